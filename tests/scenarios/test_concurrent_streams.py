"""Promise: 200 calls run at the same time on one connection, each with its own answer."""

from __future__ import annotations

import asyncio

from tests.support.echo import echo_stub
from tests.support.gate import Gate
from tests.support.rawh2 import Connect, grpc_headers, grpc_message

STREAMS = 200


def test_200_open_streams_on_one_h2_connection(echo_gate: Gate, connect: Connect) -> None:
    client = connect(echo_gate)
    client.settle()
    open_before = echo_gate.metric("streams_open")
    streams = {
        client.request(grpc_headers("/test.Echo/Bidi"), grpc_message(b"first %d" % n), end=False): n
        for n in range(STREAMS)
    }
    for stream, n in streams.items():
        expected = grpc_message(b"first %d" % n)
        client.pump(lambda r=client.replies[stream], e=expected: bytes(r.body) == e, f"the echo on stream {stream}")
    # Every one has answered and none has ended: they are all open at once.
    assert echo_gate.metric("streams_open") == open_before + STREAMS
    for stream, n in reversed(streams.items()):
        client.h2.send_data(stream, grpc_message(b"last %d" % n), end_stream=True)
    client.flush()
    for stream, n in streams.items():
        reply = client.finish(stream)
        assert bytes(reply.body) == grpc_message(b"first %d" % n) + grpc_message(b"last %d" % n)
        assert reply.grpc_status == "0"
    echo_gate.wait_metric("streams_open", open_before)


async def test_200_grpcio_calls_on_one_channel(echo_gate: Gate) -> None:
    connections = echo_gate.metric("connections_total")
    async with echo_gate.aio_channel() as channel:
        stub = echo_stub(channel)
        everyone_is_in = asyncio.Barrier(STREAMS)

        async def talk(n: int) -> list[bytes]:
            call = stub.bidi()
            await call.write(b"first %d" % n)
            answers = [await call.read()]
            await everyone_is_in.wait()
            await call.write(bytes([n]) * 10_000)
            answers.append(await call.read())
            await call.done_writing()
            assert (await call.code()).name == "OK"
            return answers

        answers = await asyncio.gather(*(talk(n) for n in range(STREAMS)))
    assert answers == [[b"first %d" % n, bytes([n]) * 10_000] for n in range(STREAMS)]
    assert echo_gate.metric("connections_total") == connections + 1
