"""Requests with many kilobytes of header fields: what they cost while they wait, go upstream, and last."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from proxy.http2 import Buffer
from proxy.http2.sender import OUT_FULL
from proxy.relay import room
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


@pytest.mark.parametrize("size", [4093, 4094, 4096, 4097])
async def test_what_one_call_lets_go_of_others_still_have(size: int) -> None:
    """A block that is remembered, and whose scheme grows to `http`, of a call that waited until its read was parsed."""
    head = [(name, b"a" if name == b":scheme" else value) for name, value in CALL]
    taken = sum(len(name) + len(value) + 32 for name, value in head)
    head.append((b"x-pad", b"p" * (size - taken - 32 - 5)))
    async with joined(backend := Backend()) as world:
        client = world.client()
        conn = await backend.connection()
        for stream in (1, 3, 5, 7):
            block = client._encoder.encode(head)
            client.feed(
                wire.frame(HEADERS, END_HEADERS, stream + 100 * stream, block),
                wire.rst_stream(stream + 100 * stream),
                wire.frame(HEADERS, END_HEADERS | END_STREAM, stream + 100 * stream + 2, block),
            )
        await until(lambda: len(conn.calls) == 5, "the calls, and the first of those that are cancelled")
        assert {len(call.heads[0]) for call in conn.calls.values()} == {len(head)}
        for stream in list(conn.calls):
            conn.answer(stream)


async def test_trailers_wait_while_the_upstream_takes_nothing() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        client.call(1, end=False)
        conn = await backend.connection()
        await conn.call(1, whole=False)
        link = first_link(world)
        link.pause_writing()
        fields = b"".join(map(literal, IDS[:4]))
        client.feed(wire.frame(HEADERS, END_HEADERS | END_STREAM, 1, fields))
        await settle()
        assert len(conn.calls[1].heads) == 1
        assert client.conn.stuck > 12_000
        link.resume_writing()
        await conn.call(1)
        assert conn.calls[1].heads[1] == IDS[:4]
        assert client.conn.stuck == 0


async def test_trailers_of_calls_that_wait_are_counted() -> None:
    backend = Backend((wire.MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        client.call(1, end=False)
        before = world.relay.held_bytes
        client.feed(wire.frame(HEADERS, END_HEADERS | END_STREAM, 1, b"".join(map(literal, IDS[:4]))))
        assert world.relay.held_bytes > before + 12_000


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
    more = len(value) - 127
    length = bytes((len(value),)) if more < 0 else b"\x7f" + bytes((more & 127 | 128, more >> 7))
    return b"\x00" + bytes((len(name),)) + name + length + value


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


async def test_an_upstream_that_reads_nothing_for_a_while_still_gets_small_calls() -> None:
    """Others have filled its buffer to the mark from which on data waits; heads may still go into it."""
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        first_link(world).pause_writing()
        client.feed(client.head(1))
        conn = await backend.connection()
        await conn.call(1, whole=False)
        assert world.pool.waiting == 0
        first_link(world).resume_writing()


async def test_an_upstream_whose_buffer_is_full_gets_no_calls() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        link = first_link(world)
        link.pause_writing()
        link.conn.full = True
        client.call(1)
        await settle()
        assert world.pool.waiting == 1
        link.resume_writing()
        conn = await backend.connection()
        await conn.call(1)
        conn.answer(1)
        assert (await client.reply(1)).status == 0


async def test_nobody_loses_an_idle_call_to_a_buffer_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no lack of places, and ending calls would make none."""
    monkeypatch.setattr(room, "IDLE_SECONDS", 0.0)
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        idle, other = world.client(), world.client()
        idle.feed(*[idle.head(stream) for stream in range(1, 9, 2)])
        first_link(world).pause_writing()
        first_link(world).conn.full = True
        other.call(1)
        await asyncio.sleep(3 * room.LOOK_SECONDS)
        assert idle.inbox.messages == {}
        first_link(world).resume_writing()
        conn = await backend.connection()
        await conn.call(9)
        conn.answer(9)
        assert (await other.reply(1)).status == 0


async def test_the_calls_of_others_go_to_another_connection_meanwhile() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=2) as world:
        client = world.client()
        first_link(world).pause_writing()
        first_link(world).conn.full = True
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
