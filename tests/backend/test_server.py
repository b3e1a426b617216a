"""Promise: the process listens where it is told and only for those who may, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from proxy.backend.server import Backend
from proxy.config.model import Address
from tests import peers
from tests.backend.conftest import command, start_backend
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, write_model
from tests.support.processes import LIVENESS, Process, wait_for

ENDLESS = """
import pathlib, time

class Model:
    def execute(self, batch):
        pathlib.Path(__file__).with_name("running").touch()
        time.sleep(1000)
"""
READY = "/inference.GRPCInferenceService/ServerReady"


def is_ready(target: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        return bool(channel.unary_unary(READY)(b"", timeout=LIVENESS, wait_for_ready=True) == b"\x08\x01")


@pytest.fixture
def models(folder: Path) -> Path:
    write_model(folder / "models", "m", NUMBER_TO_NUMBER, {"1/model.py": ECHO})
    return folder / "models"


def test_a_unix_socket(models: Path, folder: Path) -> None:
    path = folder / "b.sock"
    running = start_backend("unix", models, f"unix:{path}", folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert is_ready(f"unix:{path}")
    running.process.signal(signal.SIGTERM)
    assert running.process.wait() == 0
    assert not path.exists()


def test_the_socket_of_a_server_that_was_killed_is_replaced(models: Path, folder: Path) -> None:
    path = folder / "b.sock"
    start_backend("killed", models, f"unix:{path}", folder).process.kill()
    assert path.exists()
    second = start_backend("second", models, f"unix:{path}", folder)
    assert is_ready(f"unix:{path}")
    second.process.stop()


async def test_a_socket_that_is_served_is_left_alone(models: Path, folder: Path) -> None:
    path = folder / "b.sock"
    first = Backend(models)
    await first.start(Address(path=str(path)))
    with pytest.raises(OSError, match="another process listens"):
        await Backend(models).start(Address(path=str(path)))
    assert path.exists()
    # Somebody else's by the time that ours ends: it stays.
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        await first.stop(grace=0)
        assert path.exists()


async def test_a_socket_whose_server_hangs_is_left_alone(models: Path, folder: Path) -> None:
    path = folder / "b.sock"
    with contextlib.ExitStack() as stack:
        hung = stack.enter_context(socket.socket(socket.AF_UNIX))
        hung.bind(str(path))
        hung.listen(0)
        while True:  # until nobody else can even wait for it
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            if waiting.connect_ex(str(path)) != 0:
                break
        with pytest.raises(OSError, match="another process listens"):
            await Backend(models).start(Address(path=str(path)))
    assert path.exists()


async def test_a_socket_of_a_server_that_loads_is_left_alone(models: Path, folder: Path) -> None:
    address = Address(path=str(folder / "b.sock"))
    first = Backend(models)
    await first.start(address, accept=False)
    with pytest.raises(OSError, match="another process listens"):
        await Backend(models).start(address)
    await first.load()
    await first.accept()
    assert await asyncio.to_thread(is_ready, f"unix:{address.path}")
    await first.stop(grace=0)
    assert list(folder.glob("b.sock*")) == []


async def test_of_two_servers_that_load_for_one_address_one_says_so(models: Path) -> None:
    first, second = Backend(models), Backend(models)
    address = await first.start(Address("127.0.0.1", 0), accept=False)
    assert await second.start(address, accept=False) == address
    await second.load()
    await second.accept()
    await first.load()
    with pytest.raises(OSError, match="Address already in use"):
        await first.accept()
    assert await asyncio.to_thread(is_ready, str(address))
    for backend in (first, second):
        await backend.stop(grace=0)


def failing(repository: Path, listen: str, folder: Path) -> str:
    process = Process("failing", command(repository, listen), folder, cwd=peers.ROOT)
    assert process.wait() == 1
    process.kill()
    return process.log()


def test_addresses_that_cannot_be_listened_on(models: Path, folder: Path) -> None:
    file = folder / "file"
    file.touch()
    assert "is no socket; remove it" in failing(models, f"unix:{file}", folder)
    assert file.exists()
    assert "No such file or directory" in failing(models, f"unix:{folder}/none/b.sock", folder)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        log = failing(models, f"127.0.0.1:{busy.getsockname()[1]}", folder)
    assert "cannot listen on 127.0.0.1:" in log
    assert "address already in use" in log
    assert "Traceback" not in log


def test_no_repository(folder: Path) -> None:
    log = failing(folder / "none", f"unix:{folder}/b.sock", folder)
    assert f"model repository {folder}/none cannot be read: No such file or directory" in log
    assert not (folder / "b.sock").exists()


def test_no_model_keeps_the_server_from_being_ready(models: Path, folder: Path) -> None:
    """What model.py raises where, and what a directory is called, is that model's own trouble."""
    untold = "class Untold(BaseException):\n    def __str__(self): raise RuntimeError\n"
    write_model(models, "imports", NUMBER_TO_NUMBER, {"1/model.py": f"{untold}raise Untold"})
    initialize = "class Model:\n    def initialize(self, config): raise Untold\n    def execute(self, batch): ...\n"
    write_model(models, "initializes", NUMBER_TO_NUMBER, {"1/model.py": untold + initialize})
    os.mkdir(os.fsencode(models) + b"/not-\xff-utf8")
    running = start_backend("trouble", models, "127.0.0.1:0", folder)
    assert is_ready(running.target)
    log = running.process.log()
    assert "backend is ready: 1 of 4 models" in log
    assert "model imports version 1 is not ready: Untold" in log
    assert "model initializes version 1 is not ready: Untold" in log
    assert re.search(r"'not-\\+udcff-utf8': no client can ask for a model of that name", log)
    running.process.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(models: Path, folder: Path, number: signal.Signals) -> None:
    running = start_backend("signalled", models, "127.0.0.1:0", folder)
    running.process.signal(number)
    assert running.process.wait() == 0
    assert "Traceback" not in running.process.log()


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    model = write_model(folder / "models", "m", NUMBER_TO_NUMBER, {"1/model.py": ENDLESS})
    running = start_backend("twice", folder / "models", "127.0.0.1:0", folder)
    request = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"abcd"])
    request.inputs.add(name="IN", datatype="INT32", shape=[1])
    with grpc.insecure_channel(running.target) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request, timeout=LIVENESS)
        wait_for((model / "1/running").exists, "the model to run")
        running.process.signal(signal.SIGTERM)
        running.process.wait_log("backend stops")
        running.process.signal(signal.SIGTERM)
        assert running.process.wait() == 128 + signal.SIGTERM
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_a_signal_while_models_are_loaded(folder: Path) -> None:
    write_model(folder / "models", "m", NUMBER_TO_NUMBER, {"1/model.py": "import time\ntime.sleep(1000)"})
    process = Process("loading", command(folder / "models", "127.0.0.1:0"), folder, cwd=peers.ROOT)
    process.wait_log("backend loads the models")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


@pytest.mark.parametrize("stdin", ["pipe", "null", "closed"])
def test_the_end_of_standard_input(models: Path, folder: Path, stdin: str) -> None:
    argv = command(models, f"unix:{folder}/b.sock", "--eof")
    if stdin == "closed":
        argv = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *argv]
    source = subprocess.PIPE if stdin == "pipe" else subprocess.DEVNULL
    with subprocess.Popen(argv, stdin=source, stderr=subprocess.PIPE, cwd=peers.ROOT) as process:
        if process.stdin is not None:
            assert is_ready(f"unix:{folder}/b.sock")
            process.stdin.write(b"ignored")
            process.stdin.flush()
            assert process.poll() is None
            process.stdin.close()
        assert process.wait(LIVENESS) == 0
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert not os.path.exists(f"{folder}/b.sock")
