"""Answers that a client doesn't take: little of them waits in the gate, and who leaves much unread is given up."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode
from proxy.relay.call import FIRST_WINDOW
from tests.http2 import wire
from tests.http2.wire import GOAWAY, INITIAL_WINDOW_SIZE, RESPONSE, SETTINGS, WINDOW_UPDATE, window_update
from tests.relay.harness import COUNTERS, Backend, Served, World, joined, settle, until

SHUT = (INITIAL_WINDOW_SIZE, 0)
WIDE = (INITIAL_WINDOW_SIZE, 2**31 - 1)


def granted(conn: Served, stream: int) -> int:
    """The window that the gate has given for a stream's answer."""
    (first,) = [item for item in conn.inbox.of(SETTINGS) if item.payload]
    pairs = [first.payload[at : at + 6] for at in range(0, len(first.payload), 6)]
    window = {int.from_bytes(pair[:2], "big"): int.from_bytes(pair[2:], "big") for pair in pairs}
    return window[INITIAL_WINDOW_SIZE] + sum(item.number for item in conn.inbox.of(WINDOW_UPDATE, stream))


async def test_an_answer_begins_with_a_small_window() -> None:
    backend = Backend()
    async with joined(backend) as world:
        world.client(SHUT).call(1)
        conn = await backend.connection()
        await conn.call(1)
        conn.send(conn.headers(1, RESPONSE), wire.data(1, bytes(FIRST_WINDOW)))
        await settle()
        assert granted(conn, 1) == FIRST_WINDOW


async def test_it_grows_as_the_client_takes_it() -> None:
    backend = Backend()
    async with joined(backend, stream_window_bytes=262_144) as world:
        client = world.client(WIDE)
        client.feed(window_update(0, 2**30))
        client.call(1)
        conn = await backend.connection()
        await conn.call(1)
        conn.send(conn.headers(1, RESPONSE))
        sent, rounds = 0, 0
        while granted(conn, 1) - sent < 200_000:
            size = min(granted(conn, 1) - sent, 16_384)
            sent, rounds = sent + size, rounds + 1
            conn.send(wire.data(1, bytes(size)))
            await until(
                lambda want=sent: 1 in client.inbox.messages and len(client.inbox.messages[1].body) == want, "it"
            )
            await settle(3)
        assert rounds < 25
        assert client.conn.granted > 200_000
        conn.send(conn.headers(1, wire.TRAILERS, end=True))
        await client.reply(1)
        client.call(3)
        await conn.call(3)
        await until(lambda: granted(conn, 3) > 200_000, "a wide window from the start")
        conn.answer(3)
        await client.reply(3)
        assert client.conn.granted == 0


async def test_a_client_that_takes_nothing_leaves_little() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client(SHUT)
        for stream in range(1, 201, 2):
            client.call(stream)
        conn = await backend.connection()
        await conn.call(199)
        for stream in range(1, 201, 2):
            conn.send(conn.headers(stream, RESPONSE), wire.data(stream, bytes(FIRST_WINDOW)))
        await until(lambda: client.conn.queued == 100 * FIRST_WINDOW, "what may come")
        assert all(granted(conn, stream) == FIRST_WINDOW for stream in range(1, 201, 2))


def tick(world: World, seconds: int) -> None:
    """So many seconds pass, one after another."""
    for _ in range(seconds):
        world.relay.begin = lambda: None  # type: ignore[method-assign]
        world.relay.now += 1.0
        world.relay.refill()


@pytest.mark.parametrize("takes", [0, 1000, 8000])
async def test_who_leaves_much_unread_is_given_up(takes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.relay.relay._UNREAD_BYTES", 262_144)
    backend = Backend()
    before = COUNTERS.abuse["unread_answers"]
    async with joined(backend) as world:
        client = world.client(SHUT)
        client.feed(window_update(0, 2**30))
        for stream in range(1, 201, 2):
            client.call(stream)
        conn = await backend.connection()
        await conn.call(199)
        for stream in range(1, 201, 2):
            conn.send(conn.headers(stream, RESPONSE), wire.data(stream, bytes(FIRST_WINDOW)))
        await until(lambda: client.conn.queued == 100 * FIRST_WINDOW, "what may come")
        for second in range(6):
            if takes:
                client.feed(
                    *[window_update(stream, takes // 10) for stream in range(1 + 20 * second, 21 + 20 * second, 2)]
                )
            tick(world, 1)
        goaway = client.inbox.of(GOAWAY)
        if takes == 8000:
            assert goaway == []
            client.alive()
        else:
            assert goaway[-1].code == ErrorCode.ENHANCE_YOUR_CALM
            assert COUNTERS.abuse["unread_answers"] == before + 1
            assert client.conn.queued == 0


async def test_who_does_not_end_a_frame_is_given_up() -> None:
    before = COUNTERS.abuse["trickle"]
    async with joined(Backend()) as world:
        client, busy = world.client(), world.client()
        client.feed(client.head(1)[:20])
        pieces = wire.data(1, b"x") * 13
        busy.feed(busy.head(1), pieces[:5])
        for second in range(12):
            tick(world, 1)
            busy.feed(pieces[5 + 10 * second : 15 + 10 * second])
        assert busy.inbox.of(GOAWAY) == []
        assert client.inbox.of(GOAWAY)[-1].code == ErrorCode.ENHANCE_YOUR_CALM
        assert COUNTERS.abuse["trickle"] == before + 1
