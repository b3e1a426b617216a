"""Promise: a client, or one stream of it, that stops reading holds up nobody else."""

from __future__ import annotations

import json

from tests.support.echo import echo_stub
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import Call, Script
from tests.support.rawh2 import Connect, H2Client, Reply, grpc_headers, grpc_message

MESSAGES, LENGTH = 20, 500_000
FLOOD = grpc_message(json.dumps({"messages": MESSAGES, "bytes": LENGTH}).encode())


def others_are_served(gate: Gate) -> None:
    with gate.channel() as channel:
        stub = echo_stub(channel)
        for n in range(50):
            assert stub.unary(bytes([n]) * 50_000, timeout=30) == bytes([n]) * 50_000
        wanted = json.dumps({"messages": 10, "bytes": 300_000}).encode()
        assert len(list(stub.server_stream(wanted, timeout=30))) == 10


def check_flood(reply: Reply) -> None:
    assert reply.grpc_status == "0"
    assert len(reply.body) == MESSAGES * (LENGTH + 5)
    numbers = [
        int.from_bytes(reply.body[start + 5 : start + 9], "big") for start in range(0, len(reply.body), LENGTH + 5)
    ]
    assert numbers == list(range(MESSAGES))


def test_a_socket_that_nobody_reads(echo_gate: Gate, connect: Connect) -> None:
    stalled = connect(echo_gate, connection_window=2**30)
    stalled.h2.update_settings({0x4: 2**30})
    stalled.settle()
    streams = [stalled.request(grpc_headers("/test.Echo/ServerStream"), FLOOD) for _ in range(8)]
    others_are_served(echo_gate)
    for stream in streams:
        check_flood(stalled.finish(stream, timeout=60))


def test_a_connection_that_gives_no_window(echo_gate: Gate, connect: Connect) -> None:
    stalled = connect(echo_gate)
    stalled.credit = False
    streams = [stalled.request(grpc_headers("/test.Echo/ServerStream"), FLOOD) for _ in range(8)]
    others_are_served(echo_gate)
    stalled.pump(lambda: received(stalled) == 65_535, "the whole window to be used")
    others_are_served(echo_gate)
    stalled.settle()
    assert received(stalled) == 65_535
    stalled.credit = True
    for stream in streams:
        give_back(stalled, stream)
    for stream in streams:
        check_flood(stalled.finish(stream, timeout=60))


def test_a_stream_that_gives_no_window_beside_one_that_does(echo_gate: Gate, connect: Connect) -> None:
    client = connect(echo_gate, connection_window=2**30)
    client.credit = False
    stalled = client.request(grpc_headers("/test.Echo/ServerStream"), FLOOD)
    client.pump(lambda: len(client.replies[stalled].body) == 65_535, "the stalled stream's window to be used")
    client.credit = True
    for n in range(50):
        payload = grpc_message(bytes([n]) * 50_000)
        stream = client.request(grpc_headers("/test.Echo/Unary"), end=False)
        client.send_all(stream, payload)
        reply = client.finish(stream)
        assert bytes(reply.body) == payload
        assert reply.grpc_status == "0"
    beside = client.request(grpc_headers("/test.Echo/ServerStream"), FLOOD)
    check_flood(client.finish(beside, timeout=60))
    assert len(client.replies[stalled].body) == 65_535
    give_back(client, stalled)
    check_flood(client.finish(stalled, timeout=60))


def test_an_upstream_stream_that_gives_no_window(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    def answer(call: Call) -> None:
        if call.headers[":path"] == "/quick/Method":
            call.answer(bytes(call.body))

    upstream = script(on_end=answer)
    upstream.credit = False
    gate = make_gate(upstream.address, limits={"upstream_connections": 1})
    stalled, other = connect(gate), connect(gate)
    stream = stalled.request(grpc_headers("/slow/Method"), end=False)
    upstream.wait_call().connection.grant_connection(2**30)
    fill(stalled, stream)
    assert len(upstream.connections) == 1
    for _ in range(50):
        reply = other.finish(other.request(grpc_headers("/quick/Method"), grpc_message(bytes(10_000))))
        assert bytes(reply.body) == grpc_message(bytes(10_000))
    assert len(upstream.connections) == 1


def fill(client: H2Client, stream: int) -> None:
    """Send on the stream until no credit is left."""
    while (room := client.sendable(stream)) > 0:
        client.h2.send_data(stream, bytes(room))
        client.flush()
        client.settle()


def received(client: H2Client) -> int:
    return sum(len(reply.body) for reply in client.replies.values())


def give_back(client: H2Client, stream: int) -> None:
    """Acknowledge all that was read while `credit` was off."""
    client.acknowledge(stream, len(client.replies[stream].body))
