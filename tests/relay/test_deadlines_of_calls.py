"""Deadlines of calls whose header fields come apart: one call never keeps another's deadline from passing."""

from __future__ import annotations

import pytest

from proxy.inference.status import Code
from tests.http2 import wire
from tests.relay.harness import Backend, Caller, Served, World, joined


@pytest.mark.parametrize("trailers", [[(b"x-trailer", b"1")], [(b"grpc-timeout", b"X")]])
async def test_trailers_of_a_request_do_not_touch_its_deadline(trailers: wire.Fields) -> None:
    backend = Backend()
    async with joined(backend) as world:
        odd, good = world.client(), world.client()
        odd.call(1, b"request", (b"grpc-timeout", b"300m"), end=False)
        odd.feed(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, odd._encoder.encode(trailers)))
        good.call(1, b"request", (b"grpc-timeout", b"301m"))
        for client in (odd, good):
            reply = await client.reply(1)
            assert reply.status == Code.DEADLINE_EXCEEDED
            assert "deadline of 0.3" in reply.words


async def many_calls(backend: Backend, world: World) -> tuple[Caller, Served]:
    """A client with a hundred calls, of which the backend takes eight."""
    client = world.client()
    for stream in range(1, 201, 2):
        client.call(stream)
    conn = await backend.connection()
    await conn.call(15)
    return client, conn


async def test_a_client_that_leaves_has_none_of_its_waiting_calls_opened() -> None:
    backend = Backend((wire.MAX_CONCURRENT_STREAMS, 8))
    async with joined(backend, upstream_connections=1) as world:
        client, conn = await many_calls(backend, world)
        before = len(conn.calls)
        world.relay.begin()
        client.conn.lost()
        world.relay.flush()
        good = world.client()
        good.call(1, b"good")
        await conn.call(2 * before + 1)
        assert len(conn.calls) == before + 1


async def test_so_has_one_that_resets_them_all_at_once() -> None:
    backend = Backend((wire.MAX_CONCURRENT_STREAMS, 8))
    async with joined(backend, upstream_connections=1) as world:
        client, conn = await many_calls(backend, world)
        before = len(conn.calls)
        client.feed(*[wire.rst_stream(stream) for stream in range(1, 201, 2)])
        good = world.client()
        good.call(1, b"good")
        await conn.call(2 * before + 1)
        assert len(conn.calls) == before + 1
