"""The two servers that are compared, started alike: the models of `models.LOADED`, the others loaded on demand."""

from __future__ import annotations

import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired

from tests import peers
from tests.parity.models import LOADED, write_repository
from tests.support.ports import free_port
from tests.support.processes import Process, port_answers, wait_for
from tests.support.triton import Regions, libraries

_ENDPOINTS = ("grpc", "http", "metrics")


@dataclass(frozen=True)
class Server:
    """A running server; the addresses are HOST:PORT."""

    name: str  # "embedded" or "triton"
    process: Process
    grpc: str
    http: str
    metrics: str
    regions: Regions | None = None

    @property
    def is_triton(self) -> bool:
        return self.name == "triton"

    def has_died(self, within: float = 0) -> bool:
        """Whether it isn't there any more; what ends within so many seconds counts as well."""
        try:
            self.process.popen.wait(within)
        except TimeoutExpired:
            return False
        return True

    @property
    def ending(self) -> str:
        """How it ended, if it did: the name of a signal, or its exit status."""
        code = self.process.popen.returncode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"

    def stop(self) -> None:
        self.process.stop()
        if self.regions is not None:
            self.regions.remove()


def start_embedded(folder: Path) -> Server:
    repository = write_repository(folder / "parity-embedded", "embedded")
    argv = [sys.executable, "-W", "error", "-m", "proxy", "backend", str(repository)]
    for flag in ("--listen", "--http", "--metrics"):
        argv += [flag, "127.0.0.1:0"]
    argv += ["--model-control-mode", "explicit"]
    for name in LOADED:
        argv += ["--load-model", name]
    process = Process("parity-embedded", argv, folder, cwd=peers.ROOT)
    process.wait_log("backend is ready")
    addresses = {name: process.wait_log(rf"backend listens: {name} on (\S+)")[1] for name in _ENDPOINTS}
    return Server("embedded", process, **addresses)


def start_triton(files: peers.TritonFiles, folder: Path) -> Server:
    # A folder of its own, for the one that follows a crash starts with an empty log.
    folder = Path(tempfile.mkdtemp(dir=folder))
    repository = write_repository(folder / "parity-triton", "triton")
    regions = Regions.new()
    argv = [str(files.server), f"--model-repository={repository}", f"--backend-directory={files.backends}"]
    ports = {name: free_port() for name in _ENDPOINTS}
    for name, port in ports.items():
        argv += [f"--{name}-port={port}", f"--{name}-address=127.0.0.1"]
    argv += ["--exit-timeout-secs=1", "--model-control-mode=explicit", f"--backend-config={regions.option}"]
    argv += [f"--load-model={name}" for name in LOADED]
    # A __pycache__ in a model's folder is a change to it, for which Triton loads the model again.
    env = {"LD_LIBRARY_PATH": libraries(files), "PYTHONDONTWRITEBYTECODE": "1"}
    process = Process("parity-triton", argv, folder, env=env)
    process.wait_log("Started Metrics Service", timeout=60)
    for name, port in ports.items():
        wait_for(lambda port=port: port_answers(port), f"Triton's {name} port")
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    return Server("triton", process, **addresses, regions=regions)
