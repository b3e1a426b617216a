"""Promise: a message of any size passes in pieces: byte for byte, and without the gate holding it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.support.certs import Authority
from tests.support.echo import echo_stub
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import Script
from tests.support.infer import infer_input
from tests.support.rawh2 import Connect, grpc_headers, grpc_message

MIB = 2**20
SIZE = 64 * MIB
ALLOWED_GROWTH = 16 * MIB


def warm_up(gate: Gate, method: str = "/test.Echo/Unary") -> None:
    """What one small call makes the gate keep is not the large message's."""
    with gate.channel() as channel:
        channel.unary_unary(method)(bytes(100_000), timeout=30)


@pytest.mark.triton
def test_a_64_mib_tensor_there_and_back(triton_gate: Gate, authority: Authority) -> None:
    numbers = np.random.default_rng(0).random((4096, 4096), dtype=np.float32)
    assert numbers.nbytes == SIZE
    small = infer_input("NUMBERS", numbers[:8, :8].copy(), "FP32")
    with triton.InferenceServerClient(triton_gate.target, ssl=True, root_certificates=str(authority.ca_file)) as client:
        client.infer("identity", [small])
        before = triton_gate.process.forget_peak()
        result = client.infer("identity", [infer_input("NUMBERS", numbers, "FP32")], client_timeout=120)
        grown = triton_gate.process.peak_rss() - before
    assert result.as_numpy("NUMBERS_OUT").tobytes() == numbers.tobytes()
    assert grown < ALLOWED_GROWTH


def test_64_mib_there_and_back_through_grpcio(echo_gate: Gate) -> None:
    payload = np.random.default_rng(1).bytes(SIZE)
    warm_up(echo_gate)
    before = echo_gate.process.forget_peak()
    with echo_gate.channel() as channel:
        answer = echo_stub(channel).unary(payload, timeout=120)
    grown = echo_gate.process.peak_rss() - before
    assert hashlib.sha256(answer).digest() == hashlib.sha256(payload).digest()
    assert grown < ALLOWED_GROWTH


def test_a_client_that_reads_nothing_makes_the_gate_hold_nothing(echo_gate: Gate, connect: Connect) -> None:
    warm_up(echo_gate)
    # The client grants all the credit there is, so that only TCP holds the answer back.
    client = connect(echo_gate, connection_window=2**31 - 1 - 65_535)
    client.h2.update_settings({0x4: 2**31 - 1})
    client.flush()
    client.settle()
    before = echo_gate.process.forget_peak()
    sent = echo_gate.metric("downstream_sent_bytes_total")
    wanted = {"messages": 64, "bytes": MIB}
    stream = client.request(grpc_headers("/test.Echo/ServerStream"), grpc_message(json.dumps(wanted).encode()))
    # Another client's calls make sure that the gate has had its time to read from the upstream.
    with echo_gate.channel() as channel:
        for _ in range(50):
            echo_stub(channel).unary(bytes(100_000), timeout=30)
    assert echo_gate.process.peak_rss() - before < ALLOWED_GROWTH
    reply = client.finish(stream, timeout=120)
    assert len(reply.body) == 64 * (MIB + 5)
    assert reply.grpc_status == "0"
    assert echo_gate.metric("downstream_sent_bytes_total") - sent > 64 * MIB


def test_an_upstream_that_reads_nothing_makes_the_gate_hold_nothing(
    make_gate: GateMaker, script: Script, connect: Connect
) -> None:
    upstream = script()
    upstream.credit = False
    gate = make_gate(upstream.address)
    client = connect(gate)
    client.settle()
    before = gate.process.forget_peak()
    stream = client.request(grpc_headers("/any/Method"), end=False)
    sent = 0
    # All that the gate grants is sent; what it grants for one stream is bounded by `limits.stream_window_bytes`.
    while (room := client.sendable(stream)) > 0:
        client.h2.send_data(stream, bytes(room))
        client.flush()
        client.settle()
        sent += room
        assert sent <= ALLOWED_GROWTH, "the gate grants credit for what it could not pass on"
    assert gate.process.peak_rss() - before < ALLOWED_GROWTH
