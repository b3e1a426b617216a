"""What an upstream says that it takes is honoured: streams, identifiers, header lists; and what a client says, too."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode
from proxy.inference.status import Code
from tests.http2 import wire
from tests.http2.wire import (
    GOAWAY,
    MAX_CONCURRENT_STREAMS,
    MAX_HEADER_LIST_SIZE,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    Fields,
    goaway,
    settings,
)
from tests.relay.harness import CALL, Backend, Served, asked, joined, settle, until

LAST = 2**31 - 3


def size(fields: Fields) -> int:
    """As RFC 9113 section 6.5.2 counts."""
    return sum(len(name) + len(value) + 32 for name, value in fields)


# -- 5.1.2


async def test_5_1_2_no_stream_while_the_upstream_allows_none() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=2) as world:
        client = world.client()
        for stream in (1, 3, 5):
            client.call(stream)
        await until(lambda: len(backend.conns) == 2, "another connection to be tried")
        await settle()
        assert all(conn.calls == {} for conn in backend.conns)
        assert world.pool.waiting == 3
        second = backend.conns[1]
        second.send(settings((MAX_CONCURRENT_STREAMS, 1)))
        await second.call(1)
        await settle()
        assert list(second.calls) == [1]
        second.answer(1)
        await second.call(3)
        second.send(settings((MAX_CONCURRENT_STREAMS, 0)))
        second.answer(3)
        await client.reply(3)
        await settle()
        assert list(second.calls) == [1, 3]
        second.send(settings((MAX_CONCURRENT_STREAMS, 100)))
        await second.call(5)
        second.answer(5)
        assert [(await client.reply(stream)).status for stream in (1, 3, 5)] == [0, 0, 0]


async def test_5_1_2_a_limit_below_what_runs_lets_nothing_more_in_until_there_is_room() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        for stream in (1, 3, 5, 7):
            client.call(stream)
        conn = await backend.connection(0)
        await conn.call(7)
        conn.send(settings((MAX_CONCURRENT_STREAMS, 2)))
        await until(lambda: world.pool.ready[0].peer.max_streams == 2, "the limit")
        client.call(9)
        for stream in (1, 3):
            conn.answer(stream)
            await client.reply(stream)
        await settle()
        assert max(conn.calls) == 7, "two still run, as many as there may be"
        conn.answer(5)
        await conn.call(9)


async def test_5_1_2_a_call_that_waited_in_vain_is_told_why() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1, connect_timeout=0.2) as world:
        client = world.client()
        client.call(1)
        reply = await client.reply(1)
        assert reply.status == Code.UNAVAILABLE
        assert "no room on its 1 connections" in reply.words
        client.alive()


# -- 5.1.1


async def test_5_1_1_a_connection_that_has_used_up_its_identifiers_is_replaced() -> None:
    """Though only one is allowed: what runs finishes on the old one, what is new goes to another."""
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        world.pool.ready[0].last_local_id = LAST - 4
        for stream in (1, 3, 5):
            client.call(stream, b"call %d" % stream)
        old = await backend.connection(0)
        await old.call(LAST)
        assert list(old.calls) == [LAST - 2, LAST]
        new = await backend.connection(1)
        assert bytes((await new.call(1)).body) == b"call 5"
        client.call(7)
        await new.call(3)
        for conn, stream in ((old, LAST), (new, 1), (old, LAST - 2), (new, 3)):
            conn.answer(stream)
        assert [(await client.reply(stream)).status for stream in (1, 3, 5, 7)] == [0, 0, 0, 0]
        await until(lambda: old.closed, "the old connection to be closed")
        assert old.inbox.of(GOAWAY)[-1].code == ErrorCode.NO_ERROR
        assert not new.closed
        client.alive()


async def test_5_1_1_an_idle_connection_without_identifiers_is_closed() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        world.pool.ready[0].last_local_id = LAST - 2
        client.call(1)
        old = await backend.connection(0)
        await old.call(LAST)
        old.answer(LAST)
        await until(lambda: old.closed, "the connection to be closed")
        client.call(3)
        await (await backend.connection(1)).call(1)


# -- 6.5.2 and 10.5.1: SETTINGS_MAX_HEADER_LIST_SIZE


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("known", [False, True])
async def test_6_5_2_a_request_is_not_sent_to_an_upstream_that_takes_less(over: int, waits: bool, known: bool) -> None:
    """`known`: the same header section comes a third time, and is sent as it was encoded before."""
    forwarded = [*CALL, (b"x-large", b"v" * 1000)]
    limit = size(forwarded) - len("s") - over  # https becomes http
    start = [(MAX_CONCURRENT_STREAMS, 0)] if waits else []
    backend = Backend(*start)
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        conn = await backend.connection(0)
        if known:
            for stream in (1, 3):
                client.call(stream, b"", forwarded[-1])
                client.feed(wire.rst_stream(stream))
        conn.send(settings((MAX_HEADER_LIST_SIZE, limit)))
        await until(lambda: world.pool.ready[0].peer.max_header_list == limit, "the limit")
        client.call(5, b"", forwarded[-1])
        client.call(7, b"")
        if waits:
            conn.send(settings((MAX_CONCURRENT_STREAMS, 10)))
        number = max(conn.calls, default=-1) + 2
        await until(lambda: any(b"v" * 1000 not in dict(call.heads[0]).values() for call in conn.calls.values()), "7")
        if over:
            reply = await client.reply(5)
            assert reply.status == Code.RESOURCE_EXHAUSTED
            assert str(limit) in reply.words
            assert "SETTINGS_MAX_HEADER_LIST_SIZE" in reply.words
            assert str(world.pool.address) in reply.words
        else:
            assert 5 not in client.inbox.messages
            assert (await conn.call(number)).value(b"x-large") == b"v" * 1000
        client.alive()


async def test_6_5_2_request_trailers_are_counted_too() -> None:
    backend = Backend((MAX_HEADER_LIST_SIZE, 1000))
    async with joined(backend) as world:
        client = world.client()
        client.call(1, end=False)
        conn = await backend.connection(0)
        await conn.call(1, whole=False)
        trailers = b"\0\x01x\x7f" + bytes((1000 - 127 & 127 | 128, 1000 - 127 >> 7)) + b"v" * 1000
        client.feed(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, trailers))
        assert (await client.reply(1)).status == Code.RESOURCE_EXHAUSTED
        await until(lambda: conn.calls[1].reset is not None, "the request to be cancelled")
        assert len(conn.calls[1].heads) == 1
        client.alive()


async def test_6_5_2_those_of_a_call_that_waited_too() -> None:
    backend = Backend((MAX_HEADER_LIST_SIZE, 1000), (MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        client.call(1, end=False)
        trailers = b"\0\x01x\x7f" + bytes((1000 - 127 & 127 | 128, 1000 - 127 >> 7)) + b"v" * 1000
        client.feed(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, trailers))
        conn = await backend.connection(0)
        conn.send(settings((MAX_CONCURRENT_STREAMS, 1)))
        reply = await client.reply(1)
        assert reply.status == Code.RESOURCE_EXHAUSTED
        assert "MAX_HEADER_LIST_SIZE" in reply.words
        await until(lambda: conn.calls[1].reset is not None, "the request to be cancelled")
        assert len(conn.calls[1].heads) == 1


LARGE = (b"x-large", b"v" * 1000)


@pytest.mark.parametrize(
    ("head", "trailers", "code"),
    [
        ([*RESPONSE, LARGE], TRAILERS, Code.RESOURCE_EXHAUSTED),
        (RESPONSE, [*TRAILERS, LARGE], Code.RESOURCE_EXHAUSTED),
        (RESPONSE, [(b"grpc-status", b"5"), (b"grpc-message", b"m" * 1000)], Code.NOT_FOUND),
        ([*RESPONSE, (b"grpc-status", b"5"), LARGE], None, Code.NOT_FOUND),
    ],
    ids=["head", "trailers", "message", "trailers only"],
)
async def test_10_5_1_a_client_gets_no_header_section_larger_than_it_takes(
    head: Fields, trailers: Fields | None, code: Code
) -> None:
    """Some clients end their connection, and every call on it, over one."""
    async with joined(backend := Backend()) as world:
        client = world.client((MAX_HEADER_LIST_SIZE, 500))
        other = world.client()
        for caller, stream in ((client, 1), (other, 3)):
            caller.call(1)
            conn = await backend.connection(0)
            await conn.call(stream)
            conn.send(conn.headers(stream, head, trailers is None))
            if trailers is not None:
                conn.send(wire.data(stream, b"answer"), conn.headers(stream, trailers, end=True))
        reply = await client.reply(1)
        assert reply.status == code
        assert "500" in reply.words
        assert all(size(section) <= 500 for section in reply.heads)
        whole = await other.reply(1)
        assert whole.heads == [head] if trailers is None else [head, trailers]
        client.alive()


async def test_10_5_1_an_informational_response_that_is_too_large_is_left_out() -> None:
    async with joined(backend := Backend()) as world:
        client = world.client((MAX_HEADER_LIST_SIZE, 500))
        client.call(1)
        conn = await backend.connection(0)
        await conn.call()
        conn.send(conn.headers(1, [(b":status", b"103"), LARGE]), conn.headers(1, [(b":status", b"103")]))
        conn.answer(1)
        reply = await client.reply(1)
        assert [head[0][1] for head in reply.heads[:-1]] == [b"103", b"200"]
        assert reply.status == 0


# -- 6.8


async def test_6_8_a_connection_that_is_closed_gets_goaway() -> None:
    """Behind everything that was said before it."""
    backend = Backend()
    async with joined(backend) as world:
        client, conn = await asked(backend, world)
        conn.send(goaway(1), wire.ping())
        conn.answer(1)
        await until(lambda: conn.closed, "the connection to be closed")
        kinds = [item.kind for item in conn.inbox.frames]
        assert kinds[-2:] == [wire.PING, GOAWAY]
        assert (await client.reply(1)).status == 0
        assert conn.inbox.of(RST_STREAM) == []


async def test_6_8_a_goaway_with_a_higher_last_stream_ends_the_connection() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        for stream in (1, 3, 5):
            client.call(stream)
        conn = await backend.connection(0)
        await conn.call(5)
        conn.send(goaway(1))
        second: Served = await backend.connection(1)
        await second.call(3)
        conn.send(goaway(5))
        reply = await client.reply(1)
        assert reply.status == Code.UNAVAILABLE
        assert "higher last stream" in reply.words
        await until(lambda: conn.closed, "the connection to be closed")
        assert conn.inbox.of(GOAWAY)[-1].code == ErrorCode.PROTOCOL_ERROR
        # What it gave up goes on elsewhere.
        for stream in (1, 3):
            second.answer(stream)
        assert [(await client.reply(stream)).status for stream in (3, 5)] == [0, 0]
        client.alive()
