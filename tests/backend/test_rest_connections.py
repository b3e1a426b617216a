"""Promise: a client can't keep a connection, or what is sent on it, by doing nothing; and their number is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.backend import httpconnections as connections
from proxy.backend.budget import Budget
from proxy.backend.httpconnections import Connection, Server
from proxy.backend.looplag import LoopLag
from proxy.backend.metrics import MetricsServer
from proxy.backend.repository import Repository
from proxy.config.model import Address
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, write_model
from tests.backend.test_rest import Rest, serve
from tests.backend.test_rest_malformed import talk, wait_for
from tests.support.processes import LIVENESS

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
NUMBER = json.dumps({"inputs": [{"name": "IN", "datatype": "INT32", "shape": [1], "data": [5]}]}).encode()
POST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


def server(folder: Path, patience: float) -> Iterator[Rest]:
    yield from serve(
        Repository(write_model(folder / "models", "m", NUMBER_TO_NUMBER, {"1/model.py": ECHO}).parent), patience
    )


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    """With little patience."""
    yield from server(tmp_path_factory.mktemp("hasty"), 0.3)


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Rest]:
    yield from server(tmp_path, LIVENESS)


def open_on(rest: Rest) -> list[Connection]:
    http = rest.service._http
    assert isinstance(http, Server)
    return [one for one in http.open if isinstance(one, Connection)]


def connect(rest: Rest) -> socket.socket:
    return socket.create_connection((rest.host, rest.port), LIVENESS)


# -- heads


@pytest.mark.parametrize("sent", [b"", b"G", LIVE, LIVE + b"A: b"])
def test_a_head_that_does_not_come(hasty: Rest, sent: bytes) -> None:
    assert talk(hasty, sent) == b""
    wait_for(lambda: not open_on(hasty))


@pytest.mark.parametrize("sent", [b"G", LIVE])
def test_a_second_head_that_does_not_come(hasty: Rest, sent: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(LIVE + b"\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        sock.sendall(sent)
        assert sock.recv(4096) == b""


def test_a_connection_may_idle_between_requests(patient: Rest) -> None:
    with connect(patient) as sock:
        wait_for(lambda: len(open_on(patient)) == 1)
        (one,) = open_on(patient)
        assert one._since is not None
        timer = one._timer
        for head in (LIVE + b"\r\n", LIVE + b"A: b\r\n\r\n"):
            sock.sendall(head[:30])
            wait_for(lambda: one._since is not None)
            sock.sendall(head[30:])
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert one._since is None
        assert one._timer is timer  # the one of its beginning
        patient.run(look(one))
        assert not one._force_close


async def look(one: Connection) -> None:
    one._look()


# -- answers


@pytest.mark.parametrize("path", [b"/v2", b"/nowhere"])
def test_a_client_that_takes_no_small_answers(hasty: Rest, path: bytes) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(LIVENESS)
        sock.connect((hasty.host, hasty.port))
        # Until its own requests aren't taken any more, and then until the server leaves it.
        with pytest.raises(ConnectionError):
            ask_on(sock, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: not open_on(hasty))
    assert hasty.quiet() == 0


def ask_on(sock: socket.socket, request: bytes) -> None:
    while True:
        sock.sendall(request * 100)


async def test_what_nobody_takes_does_not_outlive_its_connection_for_long() -> None:
    """aiohttp forgets a connection when it closes it; the transport waits for the client."""
    loop = asyncio.get_running_loop()
    http = Server(None)
    made: list[Connection] = []

    def connection() -> Connection:
        made.append(Connection(http, 0.05, loop=loop))
        return made[-1]

    listener = await loop.create_server(connection, "127.0.0.1", 0)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(listener.sockets[0].getsockname())
        async with asyncio.timeout(LIVENESS):
            while not made or made[0].transport is None:
                await asyncio.sleep(0.001)
            made[0].transport.write(bytes(64 * 2**20))
            made[0].force_close()
            while http.open:
                await asyncio.sleep(0.001)
    listener.close()


# -- their number


def test_one_too_many_is_closed_and_told_once(
    patient: Rest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    http = patient.service._http
    assert isinstance(http, Server)
    monkeypatch.setattr(http, "_most", 2)
    caplog.set_level(logging.WARNING, "tensorgate.backend")
    with connect(patient) as first, connect(patient):
        wait_for(lambda: len(open_on(patient)) == 2)
        for _ in range(3):
            with connect(patient) as further:
                assert further.recv(1) == b""
        first.close()
        wait_for(lambda: len(open_on(patient)) == 1)
        assert talk(patient, LIVE + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    told = [line.getMessage() for line in caplog.records if "connections" in line.getMessage()]
    assert len(told) == 1
    assert "2 HTTP connections are open, which is the limit" in told[0]


def test_half_of_the_files_are_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((256, 128), (10**6, connections.MOST_CONNECTIONS), (resource.RLIM_INFINITY, 16_384)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, files=files: (files, files))
        assert connections.most_connections() == most


async def test_silent_clients_do_not_keep_the_metrics_from_others(tmp_path: Path) -> None:
    repository = Repository(write_model(tmp_path / "models", "m", NUMBER_TO_NUMBER, {"1/model.py": ECHO}).parent)
    served = MetricsServer(repository, Budget(1), LoopLag(), patience=0.2)
    address = await served.start(Address("127.0.0.1", 0, ""))
    silent = [await asyncio.open_connection(address.host, address.port) for _ in range(64)]
    try:
        async with asyncio.timeout(LIVENESS):
            for _, writer in silent[:32]:
                writer.write(b"GET /metrics HTTP/1.1\r\n")
            for reader, _ in silent:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            silent.append((reader, writer))
    finally:
        for _, writer in silent:
            writer.close()
        await served.stop()
        repository.close(LIVENESS)


# -- what a head may say


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_no_request_behind_one_for_an_upgrade_is_left_without_an_answer(patient: Rest, protocol: bytes) -> None:
    answer = talk(patient, LIVE + b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n" + LIVE + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://x/v2/health/live", 200), (b"HTTP://x:80/v2/health/live?a=b", 200), (b"https://x/v2", 200),
        (b"http://x", 404), (b"http://x?a=/v2", 404), (b"ftp://x/v2", 404), (b"*", 404),
    ],
)  # fmt: skip
def test_a_target_may_be_a_whole_url(patient: Rest, target: bytes, status: int) -> None:
    method = b"OPTIONS" if target == b"*" else b"GET"
    answer = talk(patient, method + b" " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def test_no_transfer_coding_but_chunks(patient: Rest) -> None:
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(NUMBER), NUMBER)
    assert talk(patient, POST + b"Transfer-Encoding: chunked\r\n\r\n" + body).startswith(b"HTTP/1.1 200 ")
    assert talk(patient, POST + b"Transfer-Encoding: Chunked\r\n\r\n" + body).startswith(b"HTTP/1.1 200 ")
    answer = talk(patient, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"'gzip, chunked' is not supported" in answer
    assert patient.quiet() == 0
