"""The backend under test: as a process of its own, and inside the test's event loop."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from proxy.backend.server import Backend
from proxy.config.model import Address
from tests import peers
from tests.backend import rendezvous
from tests.backend.models import NUMBER_TO_NUMBER, WAITS, write_model, write_repository
from tests.support.processes import Process

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SERVE = """
import sys
from pathlib import Path
from proxy.backend.server import Options, run
from proxy.config.model import Address
eof = sys.argv[3:] == ["--eof"]
sys.exit(run(Options(Path(sys.argv[1]), Address.parse(sys.argv[2]), exit_on_stdin_eof=eof)))
"""


def command(repository: Path, listen: str, *flags: str) -> list[str]:
    """The argument vector of a backend; `-W error` as in the tests themselves."""
    return [sys.executable, "-W", "error", "-c", SERVE, str(repository), listen, *flags]


@dataclass
class Running:
    """A backend's process and where it listens."""

    process: Process
    target: str


def start_backend(name: str, repository: Path, listen: str, folder: Path) -> Running:
    """Start a backend and wait until its models are loaded."""
    process = Process(name, command(repository, listen), folder, cwd=peers.ROOT)
    target = process.wait_log(r"backend listens: grpc on (\S+)")[1]
    process.wait_log("backend is ready")
    return Running(process, target)


@pytest.fixture(scope="session")
def repository(run_folder: Path) -> Path:
    return write_repository(run_folder / "models")


@pytest.fixture(scope="session")
def backend(repository: Path, run_folder: Path) -> Iterator[Running]:
    running = start_backend("backend", repository, "127.0.0.1:0", run_folder)
    yield running
    running.process.stop()


@pytest.fixture(scope="session")
def channel(backend: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(backend.target, options=UNLIMITED) as channel:
        yield channel


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    """Triton's own stub and messages, on our server."""
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


@dataclass
class Local:
    """A backend in the test's own event loop, with the model `waits`."""

    backend: Backend
    target: str

    @property
    def waiting(self) -> int:
        """Requests in the queue of `waits` that no thread has taken."""
        return self.backend.repository.find("waits", "").scheduler.waiting


@pytest.fixture
async def local(folder: Path) -> AsyncIterator[Local]:
    rendezvous.reset()
    write_model(folder / "models", "waits", NUMBER_TO_NUMBER, {"1/model.py": WAITS})
    backend = Backend(folder / "models")
    address = await backend.start(Address("127.0.0.1", 0, ""))
    await backend.load()
    yield Local(backend, str(address))
    rendezvous.release.set()
    await backend.stop(grace=5)
