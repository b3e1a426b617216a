"""Requests with many kilobytes of header fields: what they cost while they wait, go upstream, and last."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from proxy.http2 import Buffer
from proxy.http2.roles import OUT_FULL
from proxy.relay.call import Call
from proxy.relay.kept import SMALL
from proxy.upstream.link import Link
from tests.http2 import wire
from tests.http2.wire import CONTINUATION, END_HEADERS, END_STREAM, HEADERS, Fields
from tests.relay.harness import CALL, Backend, Caller, World, joined, settle, until

IDS: Fields = [(b"x-%d" % number, b"v" * 3000) for number in range(15)]
NAMED: Fields = [(b"user-agent", b"u" * 30_000)]  # a field that is kept for the block, not only passed on


def head(client: Caller, stream: int, extra: Fields) -> bytes:
    """HEADERS of any length."""
    block = client.head(stream, *extra)[9:]
    parts = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
    kinds = [HEADERS] + [CONTINUATION] * (len(parts) - 1)
    flags = [0] * (len(parts) - 1) + [END_HEADERS]
    return b"".join(wire.frame(kind, flag, stream, part) for kind, flag, part in zip(kinds, flags, parts, strict=True))


def held(client: Caller, stream: int) -> int:
    """Bytes of header fields that a call has hold of."""
    call = cast(Call, client.conn.streams[stream])
    assert call.facts is not None
    fields = list(call.facts.forward.fields) + list(call.passing.fields if call.passing is not None else ())
    return len(call.facts.path) + sum(len(name) + len(value) for name, value in fields)


@pytest.mark.parametrize("extra", [IDS, NAMED], ids=["passing", "kept"])
@pytest.mark.parametrize("room", [100, 0], ids=["at once", "after waiting"])
async def test_a_call_lets_go_of_them_once_they_are_upstream(extra: Fields, room: int) -> None:
    backend = Backend((wire.MAX_CONCURRENT_STREAMS, room))
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        client.feed(head(client, 1, extra), head(client, 3, extra))
        conn = await backend.connection()
        if not room:
            assert min(held(client, 1), held(client, 3)) > 30_000
            assert client.conn.held_bytes > 60_000
            conn.send(wire.settings((wire.MAX_CONCURRENT_STREAMS, 100)))
        for stream in (1, 3):
            got = await conn.call(stream, whole=False)
            assert set(extra) <= set(got.heads[0])
            assert held(client, stream) <= SMALL
            client.feed(wire.data(stream, b"request", end=True))
            await conn.call(stream)
            conn.answer(stream)
            assert (await client.reply(stream)).status == 0


async def test_such_a_call_is_not_sent_again() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=2) as world:
        client = world.client()
        client.feed(head(client, 1, NAMED), wire.data(1, b"request", end=True))
        conn = await backend.connection()
        await conn.call(1)
        conn.send(wire.rst_stream(1, 7))
        reply = await client.reply(1)
        assert reply.status == 14
        assert "not sent again" in reply.words


def remembered(client: Caller, count: int, first: int) -> bytes:
    """Requests with 45 KB of fields each, in a few bytes: references to one in the dynamic table."""
    large = b"\x40\x07x-large\x7f" + bytes((3000 - 127 & 0x7F | 0x80, 3000 - 127 >> 7)) + b"v" * 3000
    start = wire.frame(HEADERS, END_HEADERS | END_STREAM, first, b"".join([*map(literal, CALL), large]))
    block = b"".join(map(literal, CALL)) + b"\xbe" * 15
    streams = range(first + 2, first + 2 * count, 2)
    return start + b"".join(wire.frame(HEADERS, END_HEADERS | END_STREAM, stream, block) for stream in streams)


def literal(field: tuple[bytes, bytes]) -> bytes:
    name, value = field
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


async def test_little_of_what_decodes_large_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """HPACK lets a client ask for megabytes upstream with one read; others wait behind no more than OUT_FULL."""
    sizes: list[int] = []
    write = Link.write

    def counted(link: Link, out: list[Buffer], size: int) -> None:
        sizes.append(size)
        write(link, out, size)

    monkeypatch.setattr(Link, "write", counted)
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        client.feed(remembered(client, 100, 1))
        conn = await backend.connection()
        for stream in range(1, 201, 2):
            await conn.call(stream)
            conn.answer(stream)
            assert (await client.reply(stream)).status == 0
        assert len(conn.calls[199].heads[0]) == len(CALL) + 15
        assert sum(sizes) > 3 * OUT_FULL
        assert max(sizes) < OUT_FULL + 65_536


async def test_an_upstream_whose_buffer_is_full_gets_no_calls() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        link = first_link(world)
        link.pause_writing()
        client.call(1)
        await settle()
        assert world.pool.waiting == 1
        link.resume_writing()
        conn = await backend.connection()
        await conn.call(1)
        conn.answer(1)
        assert (await client.reply(1)).status == 0


async def test_the_calls_of_others_go_to_another_connection_meanwhile() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=2) as world:
        client = world.client()
        first_link(world).pause_writing()
        client.call(1)
        await until(lambda: len(backend.conns) == 2, "another connection")
        conn = await backend.connection(1)
        await conn.call(1)
        conn.answer(1)
        assert (await client.reply(1)).status == 0
        first_link(world).resume_writing()
        await asyncio.sleep(0)


def first_link(world: World) -> Link:
    return world.pool.links[0]
