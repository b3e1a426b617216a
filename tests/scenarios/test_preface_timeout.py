"""Promise: a client that finishes TLS and then sends no HTTP/2, or half a preface, is not kept."""

from __future__ import annotations

import pytest

from tests.support.echo import Echo
from tests.support.gate import Gate, GateMaker
from tests.support.rawh2 import tls_context, tls_socket

GOAWAY = 7
SETTINGS_TIMEOUT = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture
def impatient_gate(make_gate: GateMaker, echo: Echo) -> Gate:
    return make_gate(echo.address, timeouts={"handshake": 1})


@pytest.mark.parametrize("start", [b"", PREFACE[:8], PREFACE], ids=["nothing", "half a preface", "no SETTINGS"])
def test_the_connection_ends_with_goaway(impatient_gate: Gate, start: bytes) -> None:
    with tls_socket(impatient_gate.port, tls_context(impatient_gate.root)) as sock:
        sock.settimeout(30)
        sock.sendall(start)
        received = b""
        while chunk := sock.recv(65_536):
            received += chunk
    frames = {}
    while received:
        length = int.from_bytes(received[:3], "big")
        frames[received[3]] = received[9 : 9 + length]
        received = received[9 + length :]
    assert frames[GOAWAY][7] == SETTINGS_TIMEOUT


def test_it_is_counted(impatient_gate: Gate) -> None:
    before = impatient_gate.metric("handshakes_total", result="timeout")
    with tls_socket(impatient_gate.port, tls_context(impatient_gate.root)):
        impatient_gate.wait_metric("handshakes_total", before + 1, result="timeout")
