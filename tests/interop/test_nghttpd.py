"""Promise: an upstream of the nghttp2 project (content-length, at most 100 streams) works behind the gate."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests import peers
from tests.support.gate import Gate
from tests.support.processes import LIVENESS
from tests.support.rawh2 import H2Client, grpc_headers, grpc_message, tls_context, tls_socket

pytestmark = pytest.mark.nghttp2


def test_bytes_come_back_as_they_left(nghttpd_gate: Gate) -> None:
    random = np.random.default_rng(5)
    with nghttpd_gate.channel() as channel:
        echo = channel.unary_unary("/any/Method")
        for size in (0, 1, 205, 16_384, 65_535, 65_536, 1_000_000, 5_000_000):
            payload = random.bytes(size)
            assert echo(payload, timeout=30) == payload


def test_more_calls_at_once_than_an_upstream_connection_carries(nghttpd_gate: Gate) -> None:
    with nghttpd_gate.channel() as channel, ThreadPoolExecutor(4) as threads:
        calls = [channel.unary_unary("/any/Method").future(bytes([n % 256]) * 20_000, timeout=60) for n in range(400)]
        answers = list(threads.map(lambda call: call.result(), calls))
    assert answers == [bytes([n % 256]) * 20_000 for n in range(400)]


def test_the_upstreams_own_headers_and_trailers_arrive(nghttpd_gate: Gate) -> None:
    client = H2Client(tls_socket(nghttpd_gate.port, tls_context(nghttpd_gate.root)))
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b"hello"))
    reply = client.finish(stream)
    client.close()
    assert bytes(reply.body) == grpc_message(b"hello")
    assert reply.headers["nghttpd-response"] == "echo"
    assert reply.headers["trailer"] == "grpc-status"
    # The gate may have to end an answer with a status of its own, which no length could have foreseen.
    assert "content-length" not in reply.headers
    assert reply.trailers == {"grpc-status": "0"}


def test_h2load_as_a_client(nghttpd_gate: Gate, folder: Path) -> None:
    h2load = peers.require_tool("h2load", "apt-get install nghttp2-client")
    body = folder / "body"
    body.write_bytes(grpc_message(bytes(200)))
    argv = [
        h2load,
        "-n2000",
        "-c10",
        "-m20",
        "-d",
        str(body),
        "-H",
        "content-type: application/grpc",
        "-H",
        "te: trailers",
    ]
    done = subprocess.run(
        [*argv, f"https://127.0.0.1:{nghttpd_gate.port}/any/Method"], capture_output=True, text=True, timeout=LIVENESS
    )
    assert "2000 succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout, done.stdout
    assert re.search(r"status codes: 2000 2xx", done.stdout)
    assert "Application protocol: h2" in done.stdout
