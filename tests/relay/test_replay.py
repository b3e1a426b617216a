"""RFC 9113 sections 6.8 and 8.7: a request that the upstream has not processed is sent again, once."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode
from proxy.inference.status import Code
from proxy.relay import kept
from tests.http2 import wire
from tests.http2.wire import DATA, INITIAL_WINDOW_SIZE, REQUEST, RESPONSE, RST_STREAM, goaway, rst_stream
from tests.relay.harness import Backend, Served, asked, counted, joined, leave_without_room, message, settle, until

UNPROCESSED = ["GOAWAY", "REFUSED_STREAM"]


def refuse(conn: Served, how: str, stream: int = 1) -> None:
    if how == "GOAWAY":
        conn.send(goaway(stream - 1))
    else:
        conn.send(rst_stream(stream, ErrorCode.REFUSED_STREAM))


@pytest.mark.parametrize("how", UNPROCESSED)
@pytest.mark.parametrize("size", [0, 12, 5000, kept.KEPT_OF_CALL])
async def test_8_7_it_is_sent_again_on_another_connection(how: str, size: int) -> None:
    backend = Backend((INITIAL_WINDOW_SIZE, 100_000))
    body = message(size)
    counts = counted()
    counts[Code.OK] += 1
    async with joined(backend) as world:
        client = world.client()
        client.call(1, body, (b"x-id", b"1234"), (b"x-id", b"5678"))
        first = await backend.connection(0)
        before = await first.call()
        refuse(first, how)
        second = await backend.connection(1)
        again = await second.call()
        assert bytes(again.body) == bytes(before.body) == body
        assert again.heads == before.heads
        assert again.heads[0][:3] == [*REQUEST[:1], (b":scheme", b"http"), REQUEST[2]]
        assert [value for name, value in again.heads[0] if name == b"x-id"] == [b"1234", b"5678"]
        second.answer(1, b"the answer")
        reply = await client.reply(1)
        assert (reply.status, bytes(reply.body)) == (0, b"the answer")
        client.alive()
        assert counted() == counts


@pytest.mark.parametrize("how", UNPROCESSED)
async def test_8_7_it_is_sent_again_once(how: str) -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        client.call(1)
        for number in range(2):
            conn = await backend.connection(number)
            await conn.call()
            refuse(conn, how)
        reply = await client.reply(1)
        assert reply.status == Code.UNAVAILABLE
        assert "a second time" in reply.words
        assert str(world.pool.address) in reply.words
        client.alive()


@pytest.mark.parametrize("how", UNPROCESSED)
@pytest.mark.parametrize("size", [kept.KEPT_OF_CALL + 1, 200_000])
async def test_8_7_what_is_too_long_to_be_kept_is_not_sent_again(how: str, size: int) -> None:
    backend = Backend((INITIAL_WINDOW_SIZE, 300_000))
    async with joined(backend) as world:
        client = world.client()
        client.call(1, message(size))
        conn = await backend.connection(0)
        await conn.body(1, size)
        refuse(conn, how)
        reply = await client.reply(1)
        assert reply.status == Code.UNAVAILABLE
        assert f"longer than {kept.KEPT_OF_CALL} bytes" in reply.words
        client.alive()


async def test_8_7_a_message_that_says_it_is_too_long_is_not_even_kept_in_part() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        client.call(1, b"\0" + (1_000_000).to_bytes(4, "big") + bytes(20_000), end=False)
        conn = await backend.connection(0)
        await conn.call(whole=False)
        assert world.relay.kept_bytes == 0
        refuse(conn, "REFUSED_STREAM")
        assert "longer than" in (await client.reply(1)).words


async def test_8_7_all_that_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_OF_ALL", 30_000)
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        for stream in (1, 3, 5):
            client.call(stream, message(12_000))
        assert world.relay.kept_bytes == 24_000
        conn = await backend.connection(0)
        await conn.call(3)
        conn.send(goaway(0))
        reply = await client.reply(5)
        assert reply.status == Code.UNAVAILABLE
        assert "such requests" in reply.words
        second = await backend.connection(1)
        for stream in (1, 3):
            assert len((await second.call(stream)).body) == 12_000
            second.answer(stream)
            assert (await client.reply(stream)).status == 0
        assert world.relay.kept_bytes == 0


async def test_8_7_the_rest_of_a_request_follows_on_the_new_stream() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        client.call(1, b"first ", end=False)
        client.feed(wire.data(1, b"second "))
        first = await backend.connection(0)
        await first.body(1, len(b"first second "))
        first.send(goaway(0))
        client.feed(wire.data(1, b"third "))  # now, or while it waits for a connection
        second = await backend.connection(1)
        await second.call(whole=False)
        client.feed(wire.data(1, b"fourth"), wire.data(1, b"", end=True))
        assert bytes((await second.call()).body) == b"first second third fourth"
        second.answer(1)
        assert (await client.reply(1)).status == 0


@pytest.mark.parametrize("window", [0, 1000, 40_000])
@pytest.mark.parametrize("first_piece", [10, 15_000])
async def test_8_7_credit_is_given_once_for_what_is_sent_twice(window: int, first_piece: int) -> None:
    """A client's window never grows beyond what was announced, nor does it shrink for good."""
    backend = Backend((INITIAL_WINDOW_SIZE, window))
    async with joined(backend, stream_window_bytes=65_536) as world:
        client = world.client()
        body = message(15_500) + message(200_000)
        sent = first_piece
        client.call(1, body[:sent], end=False)
        first = await backend.connection(0)
        await first.body(1, min(window, sent))
        backend.settings = [(INITIAL_WINDOW_SIZE, 1_000_000)]
        first.send(goaway(0))
        second = await backend.connection(1)
        await second.call(whole=False)
        while sent < len(body):
            size = min(client.window(1, sent), 10_000, len(body) - sent)
            if size == 0:
                await settle(1)
                continue
            client.feed(wire.data(1, body[sent : sent + size], sent + size == len(body)))
            sent += size
            await second.body(1, sent)
            assert client.window(1, sent) <= 65_536
        assert bytes(second.calls[1].body) == body
        assert client.window(1, sent) >= 65_536 // 2
        second.answer(1)
        assert (await client.reply(1)).status == 0


async def test_8_7_a_frame_under_way_is_credited_once() -> None:
    """Its bytes count against the window when its header is seen, and are forwarded as they come."""
    backend = Backend()
    async with joined(backend, stream_window_bytes=65_536) as world:
        client = world.client()
        whole = wire.data(1, bytes(16_000))
        client.feed(client.head(1), whole[:6009])
        first = await backend.connection(0)
        await first.body(1, 6000)
        first.send(goaway(0))
        second = await backend.connection(1)
        await second.body(1, 6000)
        client.feed(whole[6009:])
        call = client.conn.streams[1]
        assert (call.unacked, call.recv_window) == (16_000, 65_536 - 16_000)


async def test_8_7_several_calls_are_sent_again_in_order() -> None:
    backend = Backend()
    async with joined(backend) as world:
        clients = [world.client() for _ in range(3)]
        for number, client in enumerate(clients):
            client.call(1, b"call %d" % number)
        first = await backend.connection(0)
        await first.call(5)
        first.send(goaway(1))
        second = await backend.connection(1)
        for number, stream in ((1, 1), (2, 3)):
            assert bytes((await second.call(stream)).body) == b"call %d" % number
            second.answer(stream)
            assert (await clients[number].reply(1)).status == 0
        # What it has processed goes on where it is.
        first.answer(1)
        assert (await clients[0].reply(1)).status == 0
        await until(lambda: first.closed, "the old connection to be closed")


# -- what may have been processed, or was answered in part, is never sent again


async def test_8_7_a_connection_that_dies_may_have_processed_it() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client, conn = await asked(backend, world)
        conn.abort()
        assert (await client.reply(1)).status == Code.UNAVAILABLE
        second = await backend.connection(1)
        await settle()
        assert second.calls == {}
        client.alive()


async def test_6_8_a_connection_that_dies_behind_a_goaway_may_have_processed_what_that_covers() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        for stream in (1, 3):
            client.call(stream, b"call %d" % stream)
        conn = await backend.connection(0)
        await conn.call(3)
        conn.send(goaway(1))
        second = await backend.connection(1)
        assert bytes((await second.call(1)).body) == b"call 3"
        conn.abort()
        assert (await client.reply(1)).status == Code.UNAVAILABLE
        second.answer(1)
        assert (await client.reply(3)).status == 0
        assert list(second.calls) == [1]


@pytest.mark.parametrize("code", [code for code in ErrorCode if code != ErrorCode.REFUSED_STREAM])
async def test_8_7_no_other_reset_says_that_it_was_not_processed(code: ErrorCode) -> None:
    backend = Backend()
    async with joined(backend) as world:
        client, conn = await asked(backend, world)
        conn.send(rst_stream(1, code))
        assert (await client.reply(1)).reset == code
        await settle()
        assert len(backend.conns) == 1
        assert list(conn.calls) == [1]
        client.alive()


@pytest.mark.parametrize("how", UNPROCESSED)
async def test_8_7_an_informational_response_is_a_part_of_the_answer(how: str) -> None:
    backend = Backend()
    async with joined(backend) as world:
        client, conn = await asked(backend, world)
        conn.send(conn.headers(1, [(b":status", b"103"), (b"link", b"</a>")]))
        refuse(conn, how)
        reply = await client.reply(1)
        assert [dict(head)[b":status"] for head in reply.heads] == [b"103", b"200"]
        assert reply.status == Code.UNAVAILABLE
        assert "a part of its answer" in reply.words


@pytest.mark.parametrize("how", UNPROCESSED)
async def test_8_7_an_answer_that_has_begun_ends_as_it_is(how: str) -> None:
    backend = Backend()
    async with joined(backend) as world:
        client, conn = await asked(backend, world)
        conn.send(conn.headers(1, RESPONSE), wire.data(1, b"half"))
        await until(lambda: 1 in client.inbox.messages and len(client.inbox.messages[1].body) == 4, "the half")
        assert world.relay.kept_bytes == 0
        refuse(conn, how)
        reply = await client.reply(1)
        if how == "GOAWAY":
            assert reply.status == Code.UNAVAILABLE
        else:  # as it came
            assert (reply.status, reply.reset) == (None, ErrorCode.REFUSED_STREAM)
        await settle()
        assert all(len(other.calls) == (other is conn) for other in backend.conns)
        client.alive()


async def test_8_7_a_request_with_trailers_is_not_kept() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        client.call(1, end=False)
        client.feed(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, b"\0\x05x-sum\x011"))
        conn = await backend.connection(0)
        assert (await conn.call()).heads[1] == [(b"x-sum", b"1")]
        refuse(conn, "REFUSED_STREAM")
        reply = await client.reply(1)
        assert (reply.status, "trailers" in reply.words) == (Code.UNAVAILABLE, True)


# -- while it waits


async def test_8_7_the_deadline_goes_on() -> None:
    backend = Backend()
    async with joined(backend) as world:
        client = world.client()
        client.call(1, b"request", (b"grpc-timeout", b"200m"))
        conn = await backend.connection(0)
        await conn.call()
        backend.settings = [(wire.MAX_CONCURRENT_STREAMS, 0)]
        conn.send(goaway(0))
        reply = await client.reply(1)
        assert reply.status == Code.DEADLINE_EXCEEDED
        assert "a connection to the upstream" in reply.words


async def test_8_7_it_waits_as_long_as_any_other() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1, connect_timeout=0.2) as world:
        client, conn = await asked(backend, world)
        await leave_without_room(backend, world, conn)
        client.call(3)
        for stream in (1, 3):
            reply = await client.reply(stream)
            assert (reply.status, "timeouts.connect" in reply.words) == (Code.UNAVAILABLE, True)
        assert (world.pool.waiting, world.relay.held_bytes) == (0, 0)
        client.alive()


async def test_8_7_a_call_that_waits_at_the_end_of_the_gate_is_told_so() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client, conn = await asked(backend, world)
        await leave_without_room(backend, world, conn)
        world.relay.begin()
        world.pool.close()
        world.relay.flush()
        reply = await client.reply(1)
        assert (reply.status, "shutting down" in reply.words) == (Code.UNAVAILABLE, True)


async def test_8_7_a_call_that_is_cancelled_is_not_sent_again() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client, conn = await asked(backend, world)
        await leave_without_room(backend, world, conn)
        assert world.relay.held_bytes == len(b"request")
        client.feed(rst_stream(1))
        assert (world.pool.waiting, world.relay.held_bytes) == (0, 0)
        second = await backend.connection(1)
        second.send(wire.settings((wire.MAX_CONCURRENT_STREAMS, 10)))
        await settle()
        assert second.calls == {}


async def test_8_7_a_call_that_has_waited_once_is_sent_again() -> None:
    """Also what came while there was no connection is kept."""
    backend = Backend((wire.MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        client.call(1, b"waited", (b"x-id", b"1"))
        assert world.pool.waiting == 1
        first = await backend.connection(0)
        first.send(wire.settings((wire.MAX_CONCURRENT_STREAMS, 1)))
        before = await first.call()
        backend.settings = []
        first.send(goaway(0))
        again = await (await backend.connection(1)).call()
        assert (again.heads, bytes(again.body)) == (before.heads, b"waited")


async def test_8_1_the_sections_of_a_call_that_waits_are_kept_apart() -> None:
    """The fields of its trailers don't go out with its head."""
    backend = Backend((wire.MAX_CONCURRENT_STREAMS, 0))
    async with joined(backend, upstream_connections=1) as world:
        client = world.client()
        client.call(1, b"waited", (b"x-id", b"head"), end=False)
        client.feed(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, b"\0\x04x-id\x08trailers"))
        conn = await backend.connection(0)
        conn.send(wire.settings((wire.MAX_CONCURRENT_STREAMS, 1)))
        call = await conn.call()
        assert [dict(section)[b"x-id"] for section in call.heads] == [b"head", b"trailers"]


async def test_8_7_the_only_connection_gets_it_again() -> None:
    backend = Backend()
    async with joined(backend, upstream_connections=1) as world:
        client, conn = await asked(backend, world)
        refuse(conn, "REFUSED_STREAM")
        assert bytes((await conn.call(3)).body) == b"request"
        conn.answer(3)
        assert (await client.reply(1)).status == 0
        assert len(backend.conns) == 1


async def test_8_7_a_second_connection_that_cant_be_had_is_not_waited_for() -> None:
    backend = Backend()
    async with joined(backend, connect_timeout=0.2) as world:
        client, conn = await asked(backend, world)
        backend.stop_listening()
        refuse(conn, "REFUSED_STREAM")
        await conn.call(3)
        conn.answer(3)
        assert (await client.reply(1)).status == 0


async def test_8_7_a_full_queue_is_said() -> None:
    backend = Backend()
    async with joined(backend, pending_requests=0) as world:
        client, conn = await asked(backend, world)
        conn.send(goaway(0))
        reply = await client.reply(1)
        assert (reply.status, "pending_requests" in reply.words) == (Code.RESOURCE_EXHAUSTED, True)


async def test_6_8_what_waits_for_the_upstreams_window_is_sent_again_too() -> None:
    backend = Backend((INITIAL_WINDOW_SIZE, 100))
    async with joined(backend) as world:
        client = world.client()
        body = message(250)
        client.call(1, body)
        first = await backend.connection(0)
        await first.body(1, 100)
        backend.settings = []
        first.send(goaway(0))
        assert bytes((await (await backend.connection(1)).call()).body) == body
        assert [len(item.payload) for item in first.inbox.of(DATA)] == [100]
        assert first.inbox.of(RST_STREAM) == []
