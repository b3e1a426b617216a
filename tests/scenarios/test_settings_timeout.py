"""Promise: a peer that leaves the gate's SETTINGS unacknowledged for longer than timeouts.handshake is not kept."""

from __future__ import annotations

import socket

import h2.settings
import pytest

from tests.support.echo import Echo
from tests.support.gate import Gate, GateMaker
from tests.support.rawh2 import Connect, grpc_headers, grpc_message, tls_context, tls_socket

GOAWAY, SETTINGS = 7, 4
SETTINGS_TIMEOUT = 4
EMPTY_SETTINGS = bytes((0, 0, 0, SETTINGS, 0, 0, 0, 0, 0))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture
def impatient_gate(make_gate: GateMaker, echo: Echo) -> Gate:
    return make_gate(echo.address, timeouts={"handshake": 1})


def goaway_code(sock: socket.socket) -> int:
    """Read to the end of the connection -> the code of the GOAWAY in it."""
    sock.settimeout(30)
    received = b""
    while chunk := sock.recv(65_536):
        received += chunk
    received = received.removeprefix(PREFACE)
    frames = {}
    while received:
        length = int.from_bytes(received[:3], "big")
        frames[received[3]] = received[9 : 9 + length]
        received = received[9 + length :]
    return int.from_bytes(frames[GOAWAY][4:8], "big")


def test_a_client(impatient_gate: Gate) -> None:
    with tls_socket(impatient_gate.port, tls_context(impatient_gate.root)) as sock:
        sock.sendall(PREFACE + EMPTY_SETTINGS)
        assert goaway_code(sock) == SETTINGS_TIMEOUT
    impatient_gate.wait_log("SETTINGS_TIMEOUT")


def test_an_upstream(make_gate: GateMaker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        gate = make_gate(f"127.0.0.1:{listener.getsockname()[1]}", timeouts={"handshake": 1})
        for _ in range(2):  # it is tried again
            with listener.accept()[0] as sock:
                sock.sendall(EMPTY_SETTINGS)
                assert goaway_code(sock) == SETTINGS_TIMEOUT
        gate.wait_log("no acknowledgement of SETTINGS within 1 s")


def test_a_client_that_acknowledges_stays(impatient_gate: Gate, connect: Connect) -> None:
    client = connect(impatient_gate)
    client.settle()
    other = connect(impatient_gate, settings={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1_000_000})
    other.settle()
    with tls_socket(impatient_gate.port, tls_context(impatient_gate.root)) as late:
        late.sendall(PREFACE + EMPTY_SETTINGS)
        assert goaway_code(late) == SETTINGS_TIMEOUT
    for one in (client, other):
        reply = one.finish(one.request(grpc_headers("/test.Echo/Unary"), grpc_message(b"hello")))
        assert bytes(reply.body) == grpc_message(b"hello")
