"""Promise: settings that change in the middle of a connection hold from then on, on both sides of the gate."""

from __future__ import annotations

import json

import h2.settings

from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import Script
from tests.support.processes import wait_for
from tests.support.rawh2 import Connect, H2Client, grpc_headers, grpc_message

INITIAL_WINDOW_SIZE = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE
HEADER_TABLE_SIZE = h2.settings.SettingCodes.HEADER_TABLE_SIZE
MAX_FRAME_SIZE = h2.settings.SettingCodes.MAX_FRAME_SIZE
MAX_CONCURRENT_STREAMS = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS
LENGTH = 1_000_000


def ask(client: H2Client, length: int = LENGTH) -> int:
    wanted = json.dumps({"messages": 1, "bytes": length}).encode()
    return client.request(grpc_headers("/test.Echo/ServerStream"), grpc_message(wanted))


def change(client: H2Client, settings: dict[h2.settings.SettingCodes, int]) -> None:
    """Send SETTINGS and wait for their acknowledgement; h2 checks all that comes by the new ones from then on."""
    acknowledged = client.settings_acknowledged
    client.h2.update_settings(dict(settings))
    client.flush()
    client.pump(lambda: client.settings_acknowledged > acknowledged, "the SETTINGS to be acknowledged")


def test_the_window_of_a_stalled_stream_grows_and_shrinks(echo_gate: Gate, connect: Connect) -> None:
    client = connect(echo_gate, connection_window=2**30)
    client.credit = False
    stream = ask(client)
    body = client.replies[stream].body
    client.pump(lambda: len(body) == 65_535, "the first window to be used")
    change(client, {INITIAL_WINDOW_SIZE: 200_000})
    client.pump(lambda: len(body) == 200_000, "the larger window to be used")
    # The window becomes 1,000 - 200,000: nothing may come until it is above zero again.
    change(client, {INITIAL_WINDOW_SIZE: 1000})
    client.h2.increment_flow_control_window(199_000, stream)
    client.settle()
    assert len(body) == 200_000
    client.h2.increment_flow_control_window(5000, stream)
    client.flush()
    client.pump(lambda: len(body) == 205_000, "what the window allows")
    client.settle()
    assert len(body) == 205_000
    client.h2.increment_flow_control_window(LENGTH, stream)
    client.flush()
    assert client.finish(stream).grpc_status == "0"
    assert len(body) == LENGTH + 5


def test_a_window_of_zero_and_back(echo_gate: Gate, connect: Connect) -> None:
    client = connect(echo_gate, connection_window=2**30, settings={INITIAL_WINDOW_SIZE: 0})
    streams = [ask(client) for _ in range(10)]
    client.pump(lambda: all(client.replies[stream].headers for stream in streams), "the heads of all answers")
    client.settle()
    assert not any(client.replies[stream].body for stream in streams)
    change(client, {INITIAL_WINDOW_SIZE: 65_535})
    for stream in streams:
        reply = client.finish(stream)
        assert len(reply.body) == LENGTH + 5
        assert reply.grpc_status == "0"


def test_larger_and_smaller_frames(echo_gate: Gate, connect: Connect) -> None:
    client = connect(echo_gate, connection_window=2**30, settings={INITIAL_WINDOW_SIZE: 2**20, MAX_FRAME_SIZE: 2**20})
    # h2 refuses a frame larger than what it has announced.
    assert len(client.finish(ask(client)).body) == LENGTH + 5
    change(client, {MAX_FRAME_SIZE: 16_384})
    assert len(client.finish(ask(client)).body) == LENGTH + 5


def test_the_header_table_shrinks_to_nothing_and_grows(echo_gate: Gate, connect: Connect) -> None:
    client = connect(echo_gate)

    def call() -> None:
        headers = grpc_headers("/test.Echo/Unary", ("my-name", "a value"), ("my-other", "another"))
        reply = client.finish(client.request(headers, grpc_message(b"hello")))
        assert bytes(reply.body) == grpc_message(b"hello")
        assert reply.headers["my-name"] == "a value"
        assert reply.trailers["t-my-other"] == "another"

    call()
    call()
    # h2's decoder insists on the announcement of the smaller table (RFC 7541 section 4.2).
    for size in (0, 4096, 100, 65_536):
        change(client, {HEADER_TABLE_SIZE: size})
        call()
        call()


def test_the_upstreams_window_grows_and_shrinks(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    upstream = script()
    upstream.credit = False
    client = connect(make_gate(upstream.address))
    stream = client.request(grpc_headers("/any/Method"), end=False)
    call = upstream.wait_call()
    call.connection.grant_connection(2**30)
    sent = 0

    def send(length: int) -> None:
        nonlocal sent
        client.h2.send_data(stream, bytes(length))
        client.flush()
        sent += length

    while sent < 100_000:
        client.pump(lambda: client.sendable(stream) > 0, "the gate to take the request")
        send(min(client.sendable(stream), 100_000 - sent))
    # h2 raises where more comes than it allows: the thread that reads would end, and nothing come any more.
    wait_for(lambda: len(call.body) == 65_535, "the first window to be used")
    call.connection.change_settings({INITIAL_WINDOW_SIZE: 90_000})
    wait_for(lambda: len(call.body) == 90_000, "the larger window to be used")
    call.connection.change_settings({INITIAL_WINDOW_SIZE: 1000})
    call.grant(89_000 + 5000)
    wait_for(lambda: len(call.body) == 95_000, "what the window allows")
    assert not call.connection.closed
    call.grant(2**20)
    wait_for(lambda: len(call.body) == sent, "the rest")


def test_the_upstream_lowers_its_number_of_streams(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    upstream = script(on_end=lambda call: call.answer(bytes(call.body)))
    gate = make_gate(upstream.address, limits={"upstream_connections": 1}, timeouts={"connect": 60})
    client = connect(gate)
    client.finish(client.request(grpc_headers("/any/Method"), grpc_message(b"first")))
    upstream.connections[0].change_settings({MAX_CONCURRENT_STREAMS: 2})
    # A call there and back: the gate has read the SETTINGS before its answer.
    client.finish(client.request(grpc_headers("/any/Method"), grpc_message(b"second")))
    streams = [client.request(grpc_headers("/any/Method"), grpc_message(b"%d" % n)) for n in range(40)]
    for number, stream in enumerate(streams):
        assert bytes(client.finish(stream).body) == grpc_message(b"%d" % number)
    assert len(upstream.connections) == 1


def test_the_upstreams_header_table_shrinks(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    upstream = script(on_end=lambda call: call.answer(call.headers["x-name"].encode()))
    client = connect(make_gate(upstream.address, limits={"upstream_connections": 1}))
    for size in (4096, 0, 64, 4096):
        if upstream.connections:
            upstream.connections[0].change_settings({HEADER_TABLE_SIZE: size})
        for n in (1, 1, 2):
            headers = grpc_headers("/any/Method", ("x-name", f"name {n}"))
            reply = client.finish(client.request(headers, grpc_message(b"")))
            assert bytes(reply.body) == b"name %d" % n
    assert len(upstream.connections) == 1
