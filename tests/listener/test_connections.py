"""Promises: nobody takes more connections than are due to him, and neither a crowd nor a flood keeps others out."""

from __future__ import annotations

import selectors
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.peers import ROOT
from tests.support.certs import Authority, KeyPair
from tests.support.echo import Echo
from tests.support.gate import READY, Gate, GateMaker, gate_config
from tests.support.processes import LIVENESS, Process, wait_for
from tests.support.rawh2 import Connect, H2Client, grpc_headers, grpc_message, tls_context

HERE, ELSEWHERE = "127.0.0.1", "127.0.0.2"


class Sockets:
    """TCP connections to a gate that last as long as the test."""

    def __init__(self) -> None:
        self.opened: list[socket.socket] = []

    def plain(self, gate: Gate, source: str = HERE) -> socket.socket:
        sock = socket.create_connection((HERE, gate.port), timeout=LIVENESS, source_address=(source, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.opened.append(sock)
        return sock

    def client(self, gate: Gate, source: str = HERE) -> H2Client:
        sock = tls_context(gate.root).wrap_socket(self.plain(gate, source), server_hostname="localhost")
        self.opened.append(sock)
        return H2Client(sock)


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    for sock in sockets.opened:
        sock.close()


def call(client: H2Client, text: bytes = b"mine") -> None:
    reply = client.finish(client.request(grpc_headers("/test.Echo/Unary"), grpc_message(text)))
    assert bytes(reply.body) == grpc_message(text)


def is_closed(sock: socket.socket) -> bool:
    """Waits until the gate closes it, or says something."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


# -- how many


def test_connections_of_one_address(make_gate: GateMaker, echo: Echo, sockets: Sockets) -> None:
    gate = make_gate(echo.address, limits={"connections_per_address": 2})
    clients = [sockets.client(gate) for _ in range(2)]
    for client in clients:
        call(client)
    assert is_closed(sockets.plain(gate))
    gate.wait_log(r"refused, 2 connections are open, 2 of them from there \(limits\.connections_per_address\)")
    gate.wait_metric("connections_refused_total", 1, limit="connections_per_address")
    clients.append(sockets.client(gate, ELSEWHERE))
    for client in clients:
        call(client)
    clients[0].close()
    wait_for(lambda: gate.metric("connections_open") == 2, "the first connection to be gone")
    call(sockets.client(gate))


def test_no_limit_for_one_address(make_gate: GateMaker, echo: Echo, sockets: Sockets) -> None:
    gate = make_gate(echo.address, limits={"connections_per_address": 0, "connections": 5})
    for _ in range(5):
        sockets.plain(gate)
    assert is_closed(sockets.plain(gate))
    gate.wait_metric("connections_refused_total", 1, limit="connections")


def test_connections_that_say_nothing_count(make_gate: GateMaker, echo: Echo, sockets: Sockets) -> None:
    gate = make_gate(echo.address, limits={"connections_per_address": 3})
    silent = [sockets.plain(gate) for _ in range(3)]
    assert is_closed(sockets.plain(gate))
    silent[0].close()
    wait_for(lambda: gate.metric("connections_open") == 2, "the first connection to be gone")
    call(sockets.client(gate))


# -- files


def open_files(gate: Gate) -> int:
    return psutil.Process(gate.process.pid).num_fds()


def test_the_gate_keeps_files_for_itself(
    folder: Path, server_pair: KeyPair, authority: Authority, echo: Echo, sockets: Sockets
) -> None:
    """A gate that may open few files refuses clients before it has none left for its upstream and its metrics."""
    config = folder / "gate.yaml"
    config.write_text(yaml.safe_dump(gate_config(server_pair, echo.address)))
    few = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable, "-m", "proxy", "serve", str(config)]
    process = Process("frugal-gate", few, folder, cwd=ROOT)
    try:
        gate = Gate.__new__(Gate)  # what follows asks no more of it
        ready = process.wait_log(READY)
        gate.root, gate.port, gate.admin_port = authority.pem, int(ready["port"]), int(ready["admin"])
        client = sockets.client(gate)
        kept = [sockets.plain(gate) for _ in range(31)]
        refused = [sockets.plain(gate) for _ in range(40)]
        assert all(is_closed(sock) for sock in refused)
        call(client)
        gate.wait_metric("connections_refused_total", 40, limit="open_files")
        process.wait_log(r"refused, 32 connections are open, 32 of them from there \(ulimit -n\)")
        kept[0].close()
        wait_for(lambda: gate.metric("connections_open") == 31, "the first connection to be gone")
        call(sockets.client(gate))
    finally:
        process.stop()


def test_without_a_file_left_the_others_are_served(
    make_gate: GateMaker, echo: Echo, sockets: Sockets, connect: Connect
) -> None:
    gate = make_gate(echo.address)
    client = connect(gate)
    call(client)
    process = psutil.Process(gate.process.pid)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (open_files(gate), before[1]))
    for _ in range(30):
        sockets.plain(gate)
    for _ in range(30):
        call(client)
    process.rlimit(psutil.RLIMIT_NOFILE, before)
    call(connect(gate))
    assert gate.process.popen.poll() is None


# -- many at once


class Newcomer:
    """A client that shakes hands and makes one call, without ever waiting."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        sock.setblocking(False)
        self.sock = context.wrap_socket(sock, server_hostname="localhost", do_handshake_on_connect=False)
        self.client: H2Client | None = None
        self.stream = 0

    def go_on(self) -> bool:
        """Whether it has its answer."""
        if self.client is None:
            try:
                self.sock.do_handshake()
            except ssl.SSLWantReadError:
                return False
            self.sock.setblocking(True)
            self.client = H2Client(self.sock)
            self.stream = self.client.request(grpc_headers("/test.Echo/Unary"), grpc_message(b"new"))
            return False
        self.client._read_once(LIVENESS)
        return self.client.replies[self.stream].over


def test_a_crowd_is_served_beside_a_client_at_work(make_gate: GateMaker, echo: Echo, sockets: Sockets) -> None:
    gate = make_gate(echo.address, timeouts={"handshake": 120})
    worker = sockets.client(gate)
    for _ in range(110):
        call(worker)  # until it counts as settled
    context = tls_context(gate.root)
    selector = selectors.DefaultSelector()
    newcomers = []
    for number in range(150):
        newcomer = Newcomer(sockets.plain(gate, f"127.0.1.{number % 5}"), context)
        sockets.opened.append(newcomer.sock)
        newcomers.append(newcomer)
        newcomer.go_on()
        selector.register(newcomer.sock, selectors.EVENT_READ, newcomer)
    left = len(newcomers)
    while left:
        call(worker)
        for key, _ in selector.select(0.01):
            if key.data.go_on():
                selector.unregister(key.fileobj)
                left -= 1
    replies = [newcomer.client.replies[newcomer.stream] for newcomer in newcomers if newcomer.client is not None]
    assert [bytes(reply.body) for reply in replies] == [grpc_message(b"new")] * 150
    selector.close()
    assert gate.handshakes()["ok"] == 151


def test_handshakes_that_stall_make_room(make_gate: GateMaker, echo: Echo, sockets: Sockets) -> None:
    gate = make_gate(echo.address, timeouts={"handshake": 120})
    for _ in range(128):
        stalled = sockets.plain(gate)
        stalled.sendall(client_hello(gate))
        assert stalled.recv(1), "the server's part, which is left unanswered"
    call(sockets.client(gate, ELSEWHERE))
    gate.wait_metric("connection_abuse_total", 1, kind="stalled_handshake")
    gate.wait_metric("handshakes_total", 1, result="timeout")


def client_hello(gate: Gate) -> bytes:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        tls_context(gate.root).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def test_a_flood_of_refused_connections_beside_a_client_at_work(
    make_gate: GateMaker, echo: Echo, sockets: Sockets
) -> None:
    gate = make_gate(echo.address, limits={"connections_per_address": 1})
    worker = sockets.client(gate)
    for _ in range(110):
        call(worker)
    for _ in range(300):
        sockets.plain(gate).close()
        call(worker)
    gate.wait_metric("connections_refused_total", 300, limit="connections_per_address")
    call(sockets.client(gate, ELSEWHERE))
