"""What every test may use: certificates, foreign servers, gates in front of them, and the logs of what failed."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.support.certs import Authority, KeyPair
from tests.support.echo import Echo, start_echo
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import H2Upstream, Script
from tests.support.nghttpd import Nghttpd, start_nghttpd
from tests.support.processes import Process
from tests.support.rawh2 import Connect, H2Client, tls_context, tls_socket
from tests.support.triton import Triton, start_triton

HUNG = 180
"""Seconds that no test takes, however slow the machine."""

SAMPLES = peers.ROOT / "proxy/backend/samples/repository"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure shows what the processes under test printed while it ran."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if call.when == "setup":
        item.stash[_MARKS] = {process.name: process.mark() for process in Process.running}
    if report.failed:
        marks = item.stash.get(_MARKS, {})
        for process in Process.running:
            text = process.log(marks.get(process.name, 0))
            report.sections.append((f"log of {process.name}", text[-6000:]))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that hangs fails; it must not hang the run."""

    def give_up(number: int, frame: object) -> None:
        pytest.fail(f"hung for {HUNG} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HUNG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_MARKS: pytest.StashKey[dict[str, int]] = pytest.StashKey()


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_tests() -> Iterator[None]:
    yield
    for process in list(Process.running):
        process.stop()


@pytest.fixture(scope="session")
def run_folder() -> Iterator[Path]:
    """A folder with a short path (unix sockets have 108 bytes for theirs)."""
    folder = Path(tempfile.mkdtemp(prefix="tensorgate-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(run_folder: Path) -> Path:
    """A folder of the test's own inside `run_folder`."""
    return Path(tempfile.mkdtemp(dir=run_folder))


@pytest.fixture(scope="session")
def authority(run_folder: Path) -> Authority:
    return Authority(run_folder, "ca")


@pytest.fixture(scope="session")
def other_authority(run_folder: Path) -> Authority:
    """A CA that nothing under test trusts."""
    return Authority(run_folder, "other-ca")


@pytest.fixture(scope="session")
def server_pair(authority: Authority) -> KeyPair:
    return authority.server()


@pytest.fixture(scope="session")
def client_pair(authority: Authority) -> KeyPair:
    return authority.client()


@pytest.fixture(scope="session")
def shared_gates(run_folder: Path, authority: Authority, server_pair: KeyPair) -> Iterator[GateMaker]:
    """Starts gates that live until the tests end."""
    gates = GateMaker(run_folder, authority.pem, server_pair)
    yield gates
    gates.stop()


@pytest.fixture
def make_gate(run_folder: Path, authority: Authority, server_pair: KeyPair) -> Iterator[GateMaker]:
    """Starts gates that live until the test ends."""
    gates = GateMaker(run_folder, authority.pem, server_pair)
    yield gates
    gates.stop()


@pytest.fixture
def script() -> Iterator[Script]:
    """`script(on_request, on_end, settings)` starts a scripted upstream that lives until the test ends."""
    started: list[H2Upstream] = []

    def start(*args: Any, **kwargs: Any) -> H2Upstream:
        started.append(H2Upstream(*args, **kwargs))
        return started[-1]

    yield start
    for upstream in started:
        upstream.stop()


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(gate, client=None, **options)` opens an HTTP/2 connection through TLS that lasts as long as the test."""
    opened: list[H2Client] = []

    def open_connection(gate: Gate, client: KeyPair | None = None, **options: Any) -> H2Client:
        context = tls_context(gate.root)
        if client is not None:
            context.load_cert_chain(client.cert_file, client.key_file)
        opened.append(H2Client(tls_socket(gate.port, context), **options))
        return opened[-1]

    yield open_connection
    for connection in opened:
        connection.close()


@pytest.fixture(scope="session")
def echo(run_folder: Path) -> Iterator[Echo]:
    server = start_echo(run_folder)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def echo_gate(echo: Echo, shared_gates: GateMaker) -> Gate:
    """A gate in front of the echo server, at default settings."""
    return shared_gates(echo.address)


@pytest.fixture(scope="session")
def triton(run_folder: Path) -> Iterator[Triton]:
    server = start_triton(peers.require_triton(), run_folder)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def triton_gate(triton: Triton, shared_gates: GateMaker) -> Gate:
    return shared_gates(triton.address)


@pytest.fixture(scope="session")
def embedded_gate(shared_gates: GateMaker) -> Gate:
    """A gate with the embedded backend and the sample model repository."""
    return shared_gates(None, model_repository_path=str(SAMPLES))


@pytest.fixture(scope="session")
def nghttpd(run_folder: Path) -> Iterator[Nghttpd]:
    server = start_nghttpd(peers.require_tool("nghttpd", "apt-get install nghttp2-server"), run_folder)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nghttpd_gate(nghttpd: Nghttpd, shared_gates: GateMaker) -> Gate:
    return shared_gates(nghttpd.address)
