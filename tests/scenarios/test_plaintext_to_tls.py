"""Promise: a client that forgets TLS is told apart from every other failure, and doesn't hang."""

from __future__ import annotations

import re
import subprocess

import grpc
import pytest

from tests import peers
from tests.support.echo import echo_stub
from tests.support.gate import Gate
from tests.support.processes import LIVENESS


def test_insecure_channel(echo_gate: Gate) -> None:
    before, mark = echo_gate.metric("handshakes_total", result="plaintext_h2c"), echo_gate.process.mark()
    channel = grpc.insecure_channel(echo_gate.target, options=echo_gate.options())
    with channel, pytest.raises(grpc.RpcError) as raised:
        echo_stub(channel).unary(b"hello", timeout=LIVENESS)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert re.search("failed to connect to all addresses", raised.value.details())
    echo_gate.wait_log(r"plaintext HTTP/2 .*on a TLS port", since=mark)
    assert echo_gate.metric("handshakes_total", result="plaintext_h2c") > before


@pytest.mark.parametrize(
    "arguments", [["http://{}/"], ["-d", "body", "http://{}/v2/models/simple/infer"]], ids=["GET", "POST"]
)
def test_http_1(echo_gate: Gate, arguments: list[str]) -> None:
    curl = peers.require_tool("curl", "apt-get install curl")
    before, mark = echo_gate.metric("handshakes_total", result="plaintext_http"), echo_gate.process.mark()
    argv = [
        curl,
        "--silent",
        "--show-error",
        "--include",
        *(argument.format(echo_gate.target) for argument in arguments),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIVENESS)
    # Either an answer that says so, or a connection that ends: never one that hangs, never a success.
    assert done.returncode != 0 or done.stdout.startswith("HTTP/1.1 400 "), done
    echo_gate.wait_log(r"plaintext HTTP on a TLS port", since=mark)
    echo_gate.wait_metric("handshakes_total", before + 1, result="plaintext_http")


def test_h2c_with_curl(echo_gate: Gate) -> None:
    curl = peers.require_tool("curl", "apt-get install curl")
    mark = echo_gate.process.mark()
    argv = [curl, "--silent", "--show-error", "--http2-prior-knowledge", f"http://{echo_gate.target}/"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIVENESS)
    assert done.returncode != 0
    echo_gate.wait_log(r"plaintext HTTP/2 .*on a TLS port", since=mark)
