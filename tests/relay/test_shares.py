"""No client keeps the others from the upstream: room is shared out, places to wait are, idle calls give way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pytest

from proxy.inference.status import Code
from proxy.relay.room import IDLE_SECONDS, Room
from tests.http2 import wire
from tests.http2.wire import MAX_CONCURRENT_STREAMS
from tests.relay.harness import Backend, Caller, joined, settle, until

# -- room, shared out as calls come


def open_calls(client: Caller, count: int, first: int = 1) -> None:
    """Calls whose requests don't end."""
    client.feed(*[client.head(stream) for stream in range(first, first + 2 * count, 2)])


async def test_one_client_alone_gets_eight_of_nine_places() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 90))
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        open_calls(client, 100)
        conn = await backend.connection()
        await until(lambda: len(conn.calls) == 80, "its share")
        await settle()
        assert len(conn.calls) == client.conn.carried == 80
        assert world.pool.waiting == 20


async def test_the_next_client_finds_room() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 90))
    async with joined(backend, upstream_connections=1) as world:
        greedy, modest = world.client(), world.client()
        open_calls(greedy, 100)
        modest.call(1)
        conn = await backend.connection()
        await conn.call(161)
        conn.answer(161)
        assert (await modest.reply(1)).status == 0


async def test_what_a_call_leaves_goes_to_those_that_wait() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 90))
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        open_calls(client, 100)
        conn = await backend.connection()
        await conn.call(159, whole=False)
        conn.answer(1)
        await conn.call(161, whole=False)
        assert client.conn.carried == 80


async def test_clients_that_wait_are_served_in_turn() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 1))
    async with joined(backend, upstream_connections=1) as world:
        holder, first, second = world.client(), world.client(), world.client()
        holder.call(1)
        conn = await backend.connection()
        await conn.call(1)
        for stream in (1, 3, 5):
            first.call(stream, b"of the first")
        second.call(1, b"of the second")
        for stream in (1, 3, 5, 7):
            await conn.call(stream)
            conn.answer(stream)
        await conn.call(9)
        conn.answer(9)
        await first.reply(5)
        bodies = [bytes(conn.calls[stream].body) for stream in (3, 5, 7, 9)]
        assert bodies == [b"of the first", b"of the second", b"of the first", b"of the first"]


async def test_places_to_wait_are_shared_too() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 1))
    async with joined(backend, upstream_connections=1, pending_requests=10) as world:
        holder, greedy, modest = world.client(), world.client(), world.client()
        holder.call(1)
        await (await backend.connection()).call(1)
        for stream in range(1, 21, 2):
            greedy.call(stream)
        assert world.pool.waiting == 5
        reply = await greedy.reply(11)
        assert reply.status == Code.RESOURCE_EXHAUSTED
        assert "limits.pending_requests" in reply.words
        modest.call(1)
        assert world.pool.waiting == 6


# -- many connections from one address


async def test_hundreds_of_connections_from_one_address_leave_room_for_another() -> None:
    """Calls whose requests have ended, which the model works on: none of them is idle."""
    backend = Backend((MAX_CONCURRENT_STREAMS, 90))
    async with joined(backend, upstream_connections=1) as world:
        modest = world.client(address="10.0.0.2")
        for _ in range(100):
            world.client(address="10.0.0.1").call(1)
        conn = await backend.connection()
        await until(lambda: len(conn.calls) == 80, "their share")
        await settle()
        modest.call(1, b"modest")
        await conn.call(161)
        conn.answer(161)
        assert (await modest.reply(1)).status == 0
        assert bytes(conn.calls[161].body) == b"modest"
        assert world.pool.waiting == 20


async def test_idle_calls_of_many_connections_give_way_to_another_address() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 8))
    async with joined(backend, upstream_connections=1) as world:
        idle = [world.client(address="10.0.0.1") for _ in range(8)]
        for client in idle:
            open_calls(client, 1)
        conn = await backend.connection()
        await conn.call(15, whole=False)
        modest = world.client(address="10.0.0.2")
        modest.call(1, b"modest")
        assert bytes((await conn.call(17)).body) == b"modest"
        ended = [client for client in idle if 1 in client.inbox.messages]
        assert [client.inbox.messages[1].status for client in ended] == [Code.RESOURCE_EXHAUSTED]


# -- idle calls give way


async def test_idle_calls_of_who_has_most_make_room() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 8))
    async with joined(backend, upstream_connections=1) as world:
        greedy, modest = world.client(), world.client()
        open_calls(greedy, 7)
        conn = await backend.connection()
        await conn.call(13, whole=False)
        third = world.client()
        third.call(1, end=False)
        await conn.call(15, whole=False)
        modest.call(1, b"modest")
        assert world.pool.waiting == 1
        await until(lambda: len(conn.calls) == 9, "room")
        assert bytes((await conn.call(17)).body) == b"modest"
        ended = [stream for stream, message in greedy.inbox.messages.items() if message.over]
        assert len(ended) == 1
        reply = greedy.inbox.messages[ended[0]]
        assert reply.status == Code.RESOURCE_EXHAUSTED
        assert "idle" in reply.words
        greedy.alive()


@dataclass(frozen=True)
class Idle:
    """A call of the pure tests: progress is what they say."""

    owner: str
    number: int
    at: object = 0

    def progress(self) -> object:
        return self.at


def look(held: Iterable[Idle], waiting: Mapping[str, int], *, idle_for: float = IDLE_SECONDS) -> list[Idle]:
    room: Room[Idle] = Room()
    held = list(held)
    assert room.look(held, waiting, 0.0, str) == []
    return room.look(held, waiting, idle_for, str)


def calls(owner: str, count: int) -> list[Idle]:
    return [Idle(owner, number) for number in range(count)]


def test_as_many_as_wait_are_ended_of_who_has_most() -> None:
    ended = look(calls("a", 20) + calls("b", 5), {"c": 2})
    assert [call.owner for call in ended] == ["a", "a"]


def test_nobody_gets_more_than_a_share_that_way() -> None:
    assert len(look(calls("a", 20) + calls("b", 1), {"b": 50})) == 9  # of 21, a share of 10
    assert look(calls("a", 10) + calls("b", 11), {"b": 50}) == []


def test_nobody_loses_what_is_within_its_share() -> None:
    ended = look(calls("a", 11) + calls("b", 9), {"c": 10, "d": 10})
    assert {owner: len([call for call in ended if call.owner == owner]) for owner in "ab"} == {"a": 6, "b": 4}


def test_a_call_is_idle_after_a_second_without_progress() -> None:
    assert look(calls("a", 5), {"b": 1}, idle_for=IDLE_SECONDS - 0.01) == []
    room: Room[Idle] = Room()

    class Moving(Idle):
        def progress(self) -> object:
            return object()

    held = [Moving("a", number) for number in range(5)]
    for now in range(5):
        assert room.look(held, {"b": 1}, float(now), str) == []


@pytest.mark.parametrize("at", [None])
def test_a_call_whose_request_has_ended_is_never_idle(at: object) -> None:
    assert look([Idle("a", number, at) for number in range(5)], {"b": 1}) == []


def test_with_more_clients_than_room_those_with_one_keep_it() -> None:
    assert look([Idle(str(number), 0) for number in range(3)], {"x": 1, "y": 1}) == []


# -- memory of requests that the upstream doesn't take


async def test_requests_that_wait_are_bounded_for_each_client() -> None:
    backend = Backend((wire.INITIAL_WINDOW_SIZE, 0))
    limit = 1_048_576
    async with joined(backend, waiting_bytes_per_connection=limit) as world:
        client = world.client()
        await until(lambda: world.pool.ready[0].peer.initial_window == 0, "the window")
        for stream in range(1, 11, 2):
            client.call(stream, bytes(250_000), end=False)
        reply = await client.reply(9)
        assert reply.status == Code.RESOURCE_EXHAUSTED
        assert "limits.waiting_bytes_per_connection" in reply.words
        assert client.conn.stuck == 4 * 250_000
        client.alive()


# -- resets


async def test_an_upstream_that_was_sent_many_resets_gets_no_more_calls() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        clients = [world.client() for _ in range(3)]
        for client in clients:
            for stream in range(1, 400, 2):
                client.feed(client.head(stream), wire.data(stream, b"x"))
                client.feed(wire.rst_stream(stream))
        await settle()
        client = world.client()
        client.call(1)
        second = await backend.connection(1)
        await second.call(1)
        second.answer(1)
        assert (await client.reply(1)).status == 0
        assert len(backend.conns[0].inbox.of(wire.RST_STREAM)) < 760
        assert len(backend.conns) == 2


async def test_calls_that_never_end_on_connections_that_are_given_up_keep_nobody_out() -> None:
    """A client has connections retired with resets that cost it nothing, and holds each of them with one call."""
    backend = Backend()
    async with joined(backend, upstream_connections=2) as world:
        greedy, good = world.client(), world.client()
        for number in range(6):
            greedy.feed(greedy.head(number * 2 + 1), wire.data(number * 2 + 1, b"x"))
            conn = await backend.connection(number)
            await conn.call(1, whole=False)
            upstream = world.pool.ready[0]
            upstream.retire()
            world.pool.going_away(upstream)
            await until(lambda want=number + 2: len(backend.conns) == want, "the next connection")  # type: ignore[misc]
            await until(lambda: bool(world.pool.ready), "it to be ready")
        assert len(world.pool.links) <= 4
        good.call(1)
        conn = await backend.connection(6)
        await conn.call(1)
        conn.answer(1)
        assert (await good.reply(1)).status == 0
        assert good.inbox.messages[1].status == 0
        ended = [message for message in greedy.inbox.messages.values() if message.over]
        assert {message.status for message in ended} == {Code.UNAVAILABLE}
        assert all("finish theirs" in message.words for message in ended)
        assert len(ended) == 3
        greedy.alive()


async def test_it_is_those_of_who_has_most_that_are_given_up() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=2) as world:
        good, greedy = world.client(), world.client()
        good.call(1, b"long", end=False)
        for number in range(6):
            greedy.feed(greedy.head(number * 2 + 1), wire.data(number * 2 + 1, b"x"))
            conn = await backend.connection(number)
            await conn.call(3 if number == 0 else 1, whole=False)
            upstream = world.pool.ready[0]
            upstream.retire()
            world.pool.going_away(upstream)
            await until(lambda want=number + 2: len(backend.conns) == want, "the next connection")  # type: ignore[misc]
            await until(lambda: bool(world.pool.ready), "it to be ready")
        assert good.inbox.messages == {}
        good.feed(wire.data(1, b"end", end=True))
        await backend.conns[0].call(1)
        backend.conns[0].answer(1)
        assert (await good.reply(1)).status == 0


# -- bytes of those that wait


async def test_who_holds_most_gives_way_when_too_much_waits() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1, pending_bytes=1_000_000) as world:
        greedy, good = world.client(), world.client()
        for stream in range(1, 9, 2):
            greedy.call(stream, bytes(240_000), end=False)
        good.call(1, bytes(60_000))
        assert good.inbox.messages == {}
        (ended,) = [message for message in greedy.inbox.messages.values() if message.over]
        assert ended.status == Code.RESOURCE_EXHAUSTED
        assert "limits.pending_bytes" in ended.words
        assert world.relay.held_bytes == 3 * 240_000 + 60_000


async def test_the_address_that_holds_most_gives_way_however_many_connections_it_has() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1, pending_bytes=1_000_000) as world:
        many = [world.client(address="10.0.0.1") for _ in range(20)]
        for client in many:
            client.call(1, bytes(49_000), end=False)
        good = world.client(address="10.0.0.2")
        good.call(1, bytes(60_000))
        assert good.inbox.messages == {}
        assert len([client for client in many if 1 in client.inbox.messages]) == 1


async def test_shares_grow_when_the_others_have_left() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 90))
    async with joined(backend, upstream_connections=1) as world:
        other = world.client(address="10.0.0.2")
        clients = [world.client(address="10.0.0.1") for _ in range(2)]
        for client in clients:
            open_calls(client, 60)
        conn = await backend.connection()
        await settle()
        before = len(conn.calls)
        assert world.pool.waiting == 120 - before
        world.relay.begin()
        other.conn.lost()
        world.relay.flush()
        await until(lambda: len(conn.calls) > before, "calls that waited")


async def test_a_client_that_holds_most_itself_is_refused() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1, pending_bytes=1_000_000) as world:
        greedy, good = world.client(), world.client()
        good.call(1, bytes(60_000))
        for stream in range(1, 11, 2):
            greedy.call(stream, bytes(240_000), end=False)
        assert good.inbox.messages == {}
        assert [stream for stream, message in greedy.inbox.messages.items() if message.over] == [7, 9]


async def test_a_full_queue_has_a_place_for_the_next_client() -> None:
    backend = Backend((MAX_CONCURRENT_STREAMS, 1))
    async with joined(backend, upstream_connections=1, pending_requests=4) as world:
        holder = world.client()
        holder.call(1)
        conn = await backend.connection()
        await conn.call(1)
        greedy = [world.client() for _ in range(3)]
        for client in greedy:
            for stream in (1, 3, 5):
                client.call(stream)
        assert world.pool.waiting == 4
        modest = world.client()
        modest.call(1)
        assert world.pool.waiting == 4
        assert modest.inbox.messages == {}
