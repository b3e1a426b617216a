"""Promise: each limit holds, says which one it was, and hurts nobody who stays inside it."""

from __future__ import annotations

import asyncio

import h2.settings
import pytest

from tests.support.echo import Echo
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import H2Upstream, Script
from tests.support.processes import wait_for
from tests.support.rawh2 import Connect, H2Client, Reply, grpc_headers, grpc_message

REFUSED_STREAM = 7
RESOURCE_EXHAUSTED = "8"
MAX_CONCURRENT_STREAMS = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS


def forget_the_stream_limit(client: H2Client) -> None:
    """What the gate has announced is known here; a client that ignores it is what is tested."""
    client.h2.remote_settings[MAX_CONCURRENT_STREAMS] = 2**31 - 1
    client.h2.remote_settings.acknowledge()


class TestStreamsPerConnection:
    @pytest.fixture
    def gate(self, make_gate: GateMaker, upstream: H2Upstream) -> Gate:
        return make_gate(upstream.address, limits={"streams_per_connection": 4})

    @pytest.fixture
    def upstream(self, script: Script) -> H2Upstream:
        return script()

    def test_the_limit_is_announced(self, gate: Gate, connect: Connect) -> None:
        client = connect(gate)
        client.settle()
        assert client.h2.remote_settings.max_concurrent_streams == 4

    def test_a_stream_too_many_is_refused_alone(self, gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
        client = connect(gate)
        client.settle()
        streams = [client.request(grpc_headers("/any/Method"), grpc_message(b"%d" % n)) for n in range(4)]
        forget_the_stream_limit(client)
        too_many = client.request(grpc_headers("/any/Method", ("x-some", "header")), grpc_message(b"too many"))
        reply = client.finish(too_many)
        assert reply.reset == REFUSED_STREAM or reply.grpc_status == RESOURCE_EXHAUSTED
        for number, stream in enumerate(streams):
            call = upstream.wait_call(number)
            call.wait_ended()
            call.answer(bytes(call.body))
            assert client.finish(stream).grpc_status == "0"
        assert len(upstream.calls) == 4
        # There is room again, and both sides still agree about the compression of headers.
        upstream.on_end = lambda call: call.answer(bytes(call.body))
        again = client.request(grpc_headers("/any/Method", ("x-some", "header")), grpc_message(b"again"))
        assert bytes(client.finish(again).body) == grpc_message(b"again")

    async def test_grpcio_waits_for_its_turn(self, gate: Gate, upstream: H2Upstream) -> None:
        upstream.on_end = lambda call: call.answer(bytes(call.body))
        async with gate.aio_channel() as channel:
            method = channel.unary_unary("/any/Method")
            answers = await asyncio.gather(*(method(b"%d" % n, timeout=30) for n in range(50)))
        assert answers == [b"%d" % n for n in range(50)]


def test_connections(make_gate: GateMaker, echo: Echo, connect: Connect) -> None:
    gate = make_gate(echo.address, limits={"connections": 2})
    first, second = connect(gate), connect(gate)
    for client in (first, second):
        client.settle()
    mark = gate.process.mark()
    with pytest.raises(OSError):  # refused, reset or closed
        connect(gate).settle()
    gate.wait_log(r"limits\.connections", since=mark)
    for client in (first, second):
        reply = client.finish(client.request(grpc_headers("/test.Echo/Unary"), grpc_message(b"mine")))
        assert bytes(reply.body) == grpc_message(b"mine")
    first.close()
    wait_for(lambda: gate.metric("connections_open") < 2, "the first connection to be gone")
    third = connect(gate)
    reply = third.finish(third.request(grpc_headers("/test.Echo/Unary"), grpc_message(b"my turn")))
    assert bytes(reply.body) == grpc_message(b"my turn")


class TestHeaderList:
    @pytest.fixture
    def gate(self, make_gate: GateMaker, script: Script) -> Gate:
        upstream = script(on_end=lambda call: call.answer(call.headers.get("x-big", "").encode()))
        return make_gate(upstream.address)

    def test_headers_of_many_frames(self, gate: Gate, connect: Connect) -> None:
        client = connect(gate)
        big = "".join(chr(33 + n % 90) for n in range(50_000))
        reply = client.finish(client.request(grpc_headers("/any/Method", ("x-big", big)), grpc_message(b"")))
        assert reply.body.decode() == big

    def test_too_large(self, gate: Gate, connect: Connect) -> None:
        client = connect(gate)
        client.settle()
        headers = grpc_headers("/any/Method", *((f"x-{n}", "v" * 1000) for n in range(80)))
        reply = client.finish(client.request(headers, grpc_message(b"")))
        assert reply.grpc_status == RESOURCE_EXHAUSTED
        assert "limits.header_list_bytes" in reply.grpc_message
        assert "65536" in reply.grpc_message
        # The table of the header compression is the same on both sides afterwards.
        small = client.finish(client.request(grpc_headers("/any/Method", ("x-0", "v" * 1000)), grpc_message(b"")))
        assert small.grpc_status == "0"


def test_pending_requests(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    """Two calls run and three may wait, of which one client gets as many as it leaves to others."""
    upstream = script()
    limits = {"upstream_connections": 1, "streams_per_upstream_connection": 2, "pending_requests": 3}
    gate = make_gate(upstream.address, limits=limits, timeouts={"connect": 60})
    first, second = connect(gate), connect(gate)
    streams = [(first, first.request(grpc_headers("/any/Method"), grpc_message(b"%d" % n))) for n in range(4)]
    upstream.wait_call(1)
    too_many_of_one = first.finish(first.request(grpc_headers("/any/Method"), grpc_message(b"one more")))
    check_no_place(too_many_of_one)
    streams.append((second, second.request(grpc_headers("/any/Method"), grpc_message(b"4"))))
    too_many_of_all = second.finish(second.request(grpc_headers("/any/Method"), grpc_message(b"one more")))
    check_no_place(too_many_of_all)
    for number in range(5):
        call = upstream.wait_call(number)
        call.wait_ended()
        call.answer(bytes(call.body))
    bodies = [bytes(client.finish(stream).body) for client, stream in streams]
    assert bodies == [grpc_message(b"%d" % n) for n in range(5)]
    assert len(upstream.calls) == 5
    assert len(upstream.connections) == 1


def check_no_place(reply: Reply) -> None:
    assert reply.grpc_status == RESOURCE_EXHAUSTED
    assert "limits.pending_requests" in reply.grpc_message
    assert "3" in reply.grpc_message


def test_an_upstreams_own_limit_is_obeyed(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    upstream = script(settings={MAX_CONCURRENT_STREAMS: 3})
    gate = make_gate(upstream.address, timeouts={"connect": 60}, limits={"upstream_connections": 2})
    client = connect(gate)
    # The upstream's SETTINGS are known once a first call has been there and back.
    upstream.on_end = lambda call: call.answer()
    client.finish(client.request(grpc_headers("/any/Method"), grpc_message(b"first")))
    upstream.on_end = lambda call: call.answer(bytes(call.body))
    streams = [client.request(grpc_headers("/any/Method"), grpc_message(b"%d" % n)) for n in range(60)]
    for number, stream in enumerate(streams):
        reply = client.finish(stream)
        # h2 answers a stream too many with a connection error, which would show here.
        assert reply.grpc_status == "0", reply
        assert bytes(reply.body) == grpc_message(b"%d" % number)
    assert len(upstream.connections) <= 2
