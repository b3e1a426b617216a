"""Both servers, each started once, and a client of the kind that the test names.

Triton aborts now and then (two models' answers on one stream that are written at once are enough). That is no failure
of what is tested here: a test during which it died runs once more, with another Triton. What fails while Triton lives
fails, and so does what is hit after the last crash that is forgiven.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests import peers
from tests.parity.clients import Client
from tests.parity.servers import Server, start_embedded, start_triton

FORGIVEN = 2
"""Crashes of Triton in one session."""

ENDING = 2.0
"""Seconds that Triton, which answers no more, has to be gone; it writes a trace of its stack before."""


class Crashes:
    """The Triton that runs, and what is told at the end of those that died."""

    def __init__(self) -> None:
        self.running: Server | None = None
        self.lines: dict[int, str] = {}

    def forgiven(self, where: str) -> bool:
        """Note that the Triton that ran has died, once for each; whether another may take its place."""
        assert self.running is not None
        pid = self.running.process.pid
        if pid not in self.lines:
            then = "the test was run with another one" if len(self.lines) < FORGIVEN else "once too often"
            self.lines[pid] = f"Triton died ({self.running.ending}) {where}; {then}"
        return len(self.lines) <= FORGIVEN


_CRASHES: pytest.StashKey[Crashes] = pytest.StashKey()
_AGAIN: pytest.StashKey[bool] = pytest.StashKey()


def _crashes(config: pytest.Config) -> Crashes:
    return config.stash.setdefault(_CRASHES, Crashes())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test of the triton half, and once more if Triton died in it."""
    if item.get_closest_marker("triton") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    if item.stash.get(_AGAIN, False):
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # Looked at here because Triton is stopped after the session's last test, before all of its reports are there.
    report = yield
    triton = _crashes(item.config).running
    if report.failed and call.when != "teardown" and item.get_closest_marker("triton") and triton is not None:
        item.stash[_AGAIN] = triton.has_died(ENDING) and _crashes(item.config).forgiven(f"in {item.nodeid}")
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in _crashes(config).lines.values():
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="session")
def parity_triton(run_folder: Path, pytestconfig: pytest.Config) -> Iterator[Crashes]:
    crashes = _crashes(pytestconfig)
    crashes.running = start_triton(peers.require_triton(), run_folder)
    yield crashes
    crashes.running.stop()
    crashes.running = None


@pytest.fixture(scope="session")
def parity_embedded(run_folder: Path) -> Iterator[Server]:
    server = start_embedded(run_folder)
    yield server
    server.stop()


@pytest.fixture(scope="session", params=["embedded", pytest.param("triton", marks=pytest.mark.triton)])
def server_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(request: pytest.FixtureRequest, server_name: str, run_folder: Path) -> Server:
    if server_name == "embedded":
        embedded: Server = request.getfixturevalue("parity_embedded")
        return embedded
    crashes: Crashes = request.getfixturevalue("parity_triton")
    assert crashes.running is not None
    if crashes.running.has_died() and crashes.forgiven(f"before {request.node.nodeid}"):
        crashes.running.stop()
        crashes.running = start_triton(peers.require_triton(), run_folder)
    return crashes.running


@pytest.fixture
async def client(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Client]:
    made = Client(request.param, server)
    yield made
    await made.close()
