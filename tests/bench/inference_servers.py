"""The inference servers that are compared: what each serves, how it is set, and why that is fair.

All three run networks on the CPU in one thread, with one instance of a model. MLServer is set for the highest rate that
it was seen to reach: no workers of its own (one more process for each call to pass through), no metrics, no access log,
and the parser that uvicorn takes where it is there. Its digits are served twice, with adaptive batching and without.
Triton runs a model of its Python backend, as its tests' repository has it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import onnxruntime

from proxy.backend.samples import heldout, repository_path
from tests import peers
from tests.backend import networks
from tests.support.ports import free_port
from tests.support.triton import start_triton

from .inference_calls import Call, Protocol, Tensors, WrongAnswer
from .processes import READY_SECONDS, Server, ServerError, running

EMBEDDED, MLSERVER, TRITON = "embedded", "MLServer", "Triton"
DIGITS, DIGITS_BATCHED = "digits", "digits_batched"
CONVNET, CONVNET_BATCHED = "convnet", "convnet_batched"
ADD_SUB = "simple"
BATCH = 64
DELAY_MICROSECONDS = 2000
MLSERVER_BATCH_SECONDS = 0.001
RUNTIME = Path(__file__).with_name("inference_mlserver_runtime.py")
_BATCHING = "dynamic_batching { }\n"
DIGITS_FILE = repository_path() / "digits/1/model.onnx"


@dataclass
class Site:
    """Servers that run: name -> server, (name, protocol) -> port; and why the others don't: name -> words."""

    folder: Path
    servers: dict[str, Server] = field(default_factory=dict)
    ports: dict[tuple[str, Protocol], int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def why_absent(self, server: str, protocol: Protocol) -> str:
        """"" if it is there."""
        if (server, protocol) in self.ports:
            return ""
        if server not in self.servers:
            return self.absent.get(server, "not started")
        # What a server does without is no fault of the run's: MLServer has no binary extension, and REST is optional.
        return f"not there: {server} takes no {protocol} calls"


@contextlib.contextmanager
def site(folder: Path, wanted: list[str]) -> Iterator[Site]:
    """Start those of `wanted` that are installed; they end with the context. Raises ServerError."""
    made = Site(folder)
    starters = {EMBEDDED: _start_embedded, MLSERVER: _start_mlserver, TRITON: _start_triton}
    with made.stack:
        for name in wanted:
            starters[name](made)
        yield made


def tensors(model: str) -> Tensors:
    """One row for a model, and what the network gives for it when it is run here."""
    if model == ADD_SUB:
        left, right = (np.arange(16, dtype=np.int32).reshape(1, 16) * factor for factor in (3, 2))
        return Tensors({"INPUT0": left, "INPUT1": right}, {"OUTPUT0": left + right, "OUTPUT1": left - right})
    if model.startswith(CONVNET):
        image = networks.convnet_image()
        (scores,) = _convnet().run(None, {networks.CONVNET_INPUT: image})
        return Tensors({networks.CONVNET_INPUT: image}, {networks.CONVNET_OUTPUT: scores})
    pixels = heldout()[0][:1]
    label, probabilities = session(DIGITS_FILE.read_bytes()).run(["label", "probabilities"], {"pixels": pixels})
    return Tensors({"pixels": pixels}, {"label": label.reshape(1, 1), "probabilities": probabilities})


def session(model: bytes) -> onnxruntime.InferenceSession:
    """A session with the settings that the servers' have."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def _convnet() -> onnxruntime.InferenceSession:
    return session(networks.convnet())


def batch_seconds(rows: int, repeats: int = 30) -> list[float]:
    """How long ONNX Runtime takes for so many rows of the convolutional network, in ascending order."""
    network, image = _convnet(), networks.convnet_image(rows=rows)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        network.run(None, {networks.CONVNET_INPUT: image})
        times.append(time.perf_counter() - began)
    return sorted(times[1:])


def versions(wanted: list[str]) -> dict[str, str]:
    """Of what is compared and installed."""
    known = {
        EMBEDDED: f"onnxruntime {onnxruntime.__version__}",
        MLSERVER: ", ".join(peers.MLSERVER_REQUIREMENTS),
        TRITON: f"2.51 ({peers.TRITON_REQUIREMENT})",
    }
    return {name: known[name] for name in wanted}


# -- embedded


def _start_embedded(site: Site) -> None:
    repository = write_repository(site.folder / "models")
    port = last = free_port()
    command = [sys.executable, "-m", "proxy", "backend", str(repository), "--listen", f"127.0.0.1:{port}"]
    if has_rest():
        site.ports[EMBEDDED, "json"] = site.ports[EMBEDDED, "binary"] = last = free_port()
        command += ["--http", f"127.0.0.1:{last}"]
    server = site.stack.enter_context(running(EMBEDDED, command, last, site.folder, cwd=peers.ROOT))
    site.servers[EMBEDDED], site.ports[EMBEDDED, "grpc"] = server, port
    _wait_until_right(server, Call("grpc", DIGITS, tensors(DIGITS)), port)


def has_rest() -> bool:
    """Whether this backend takes `--http`."""
    command = [sys.executable, "-m", "proxy", "backend", "--help"]
    return "--http" in subprocess.run(command, cwd=peers.ROOT, capture_output=True, text=True, check=True).stdout


def write_repository(folder: Path) -> Path:
    """The samples; digits without dynamic batching and with it; and the convolutional network likewise."""
    shutil.copytree(repository_path(), folder)
    batched = shutil.copytree(folder / DIGITS, folder / DIGITS_BATCHED)
    config = (batched / "config.pbtxt").read_text()
    assert _BATCHING in config
    (batched / "config.pbtxt").write_text(config.replace(f'name: "{DIGITS}"', f'name: "{DIGITS_BATCHED}"'))
    (folder / DIGITS / "config.pbtxt").write_text(config.replace(_BATCHING, ""))
    networks.write_convnet(folder, CONVNET, 1, "")
    networks.write_convnet(folder, CONVNET_BATCHED, BATCH, f"max_queue_delay_microseconds: {DELAY_MICROSECONDS}")
    return folder


# -- the others


def _start_mlserver(site: Site) -> None:
    program = peers.mlserver_program()
    if program is None:
        site.absent[MLSERVER] = f"not installed ({peers.INSTALL_MLSERVER})"
        return
    ports = {name: free_port() for name in ("http_port", "grpc_port", "metrics_port")}
    folder = _mlserver_folder(site.folder / "mlserver", ports)
    command, port = [str(program), "start", str(folder)], ports["grpc_port"]
    server = site.stack.enter_context(running(MLSERVER, command, port, folder))
    site.servers[MLSERVER] = server
    site.ports[MLSERVER, "grpc"], site.ports[MLSERVER, "json"] = port, ports["http_port"]
    # It listens before it has loaded its models.
    protocols: tuple[Protocol, ...] = ("grpc", "json")
    for protocol in protocols:
        for model in (DIGITS, DIGITS_BATCHED):
            _wait_until_right(server, Call(protocol, model, tensors(model)), site.ports[MLSERVER, protocol])


def _mlserver_folder(folder: Path, ports: dict[str, int]) -> Path:
    folder.mkdir()
    settings = {"host": "127.0.0.1", **ports, "debug": False, "parallel_workers": 0, "metrics_endpoint": None}
    (folder / "settings.json").write_text(json.dumps(settings))
    for name, batching in (
        (DIGITS, {}),
        (DIGITS_BATCHED, {"max_batch_size": BATCH, "max_batch_time": MLSERVER_BATCH_SECONDS}),
    ):
        model = folder / name
        model.mkdir()
        shutil.copy(DIGITS_FILE, model / "model.onnx")
        shutil.copy(RUNTIME, model / "digits_runtime.py")
        described = {"name": name, "implementation": "digits_runtime.Digits", **batching}
        described["parameters"] = {"uri": str(model / "model.onnx")}
        (model / "model-settings.json").write_text(json.dumps(described))
    return folder


def _start_triton(site: Site) -> None:
    files = peers.triton_files()
    if files is None:
        site.absent[TRITON] = f"not installed ({peers.INSTALL_TRITON})"
        return
    triton = start_triton(files, site.folder)
    site.stack.callback(triton.stop)
    port = int(triton.address.rpartition(":")[2])
    server = Server(TRITON, port, triton.process.popen, triton.process.log_file)
    server.refresh()
    site.servers[TRITON], site.ports[TRITON, "grpc"] = server, port


def _wait_until_right(server: Server, call: Call, port: int) -> None:
    """Until the call is answered as it should be. Raises ServerError when it isn't in time."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            call.make(port)
        except (OSError, grpc.RpcError, WrongAnswer) as error:
            if (death := server.death()) is not None or time.monotonic() > deadline:
                raise ServerError(death or f"{server.name} doesn't serve {call.model}: {error}") from None
            time.sleep(0.1)
        else:
            server.refresh()
            return
