"""An upstream that breaks HTTP/2 or gRPC gives its caller a status in words, and nothing else happens to any client."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.http2 import ErrorCode
from proxy.inference.status import Code
from tests.http2 import wire
from tests.http2.wire import (
    END_HEADERS,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PUSH_PROMISE,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    data,
    frame,
    settings,
    window_update,
)
from tests.relay.harness import Backend, Served, joined, settle, until

Break = Callable[[Served, int], bytes]
OK = RESPONSE[:1]

# What it sends on one stream, with which status and words its caller gets that, and the code that it gets itself.
ONE_STREAM: dict[str, tuple[Break, Code, str, ErrorCode]] = {
    "8.1 DATA first": (lambda c, s: data(s, b"x"), Code.INTERNAL, "DATA before", ErrorCode.PROTOCOL_ERROR),
    "8.1 1xx ends the stream": (
        lambda c, s: c.headers(s, [(b":status", b"103")], True),
        Code.INTERNAL, "informational", ErrorCode.PROTOCOL_ERROR,
    ),
    "8.1 two heads": (
        lambda c, s: c.headers(s, RESPONSE) * 2, Code.INTERNAL, "second header section", ErrorCode.PROTOCOL_ERROR,
    ),
    "8.1.1 content-length without data": (
        lambda c, s: c.headers(s, [*RESPONSE, (b"content-length", b"5"), *TRAILERS], True),
        Code.INTERNAL, "content-length", ErrorCode.PROTOCOL_ERROR,
    ),
    "8.1.1 too little data": (
        lambda c, s: c.headers(s, [*RESPONSE, (b"content-length", b"5")]) + data(s, b"four")
        + c.headers(s, TRAILERS, True),
        Code.INTERNAL, "content-length", ErrorCode.PROTOCOL_ERROR,
    ),
    "8.1.1 too much data": (
        lambda c, s: c.headers(s, [*RESPONSE, (b"content-length", b"5")]) + data(s, b"sixsix"),
        Code.INTERNAL, "content-length", ErrorCode.PROTOCOL_ERROR,
    ),
    "8.2 upper case": (
        lambda c, s: c.headers(s, [*RESPONSE, (b"Upper", b"1")]), Code.INTERNAL, "lower case",
        ErrorCode.PROTOCOL_ERROR,
    ),
    "8.2.1 a line break": (
        lambda c, s: c.headers(s, [*RESPONSE, (b"x", b"a\r\nset-cookie: b")]), Code.INTERNAL, "not allowed",
        ErrorCode.PROTOCOL_ERROR,
    ),
    "8.2.2 connection": (
        lambda c, s: c.headers(s, [*RESPONSE, (b"connection", b"close")]), Code.INTERNAL, "connection-specific",
        ErrorCode.PROTOCOL_ERROR,
    ),
    "8.3.2 no :status": (lambda c, s: c.headers(s, RESPONSE[1:]), Code.INTERNAL, ":status", ErrorCode.PROTOCOL_ERROR),
    "8.3.2 :status is no number": (
        lambda c, s: c.headers(s, [(b":status", b"2OO")]), Code.INTERNAL, ":status", ErrorCode.PROTOCOL_ERROR,
    ),
    "8.3 a pseudo field in trailers": (
        lambda c, s: c.headers(s, RESPONSE) + c.headers(s, [*OK, *TRAILERS], True),
        Code.INTERNAL, "wrong place", ErrorCode.PROTOCOL_ERROR,
    ),
    "8.6 101": (lambda c, s: c.headers(s, [(b":status", b"101")]), Code.INTERNAL, "101", ErrorCode.PROTOCOL_ERROR),
    "6.9 WINDOW_UPDATE of zero": (
        lambda c, s: window_update(s, 0), Code.INTERNAL, "WINDOW_UPDATE", ErrorCode.PROTOCOL_ERROR,
    ),
    "6.9.1 a window too large": (
        lambda c, s: window_update(s, 2**31 - 1), Code.INTERNAL, "2^31-1", ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "6.9.1 more than the window": (
        lambda c, s: c.headers(s, RESPONSE) + data(s, bytes(16_384)) * 5,
        Code.INTERNAL, "more data than", ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "10.5.1 a huge head": (
        lambda c, s: huge(c, s), Code.INTERNAL, "header list", ErrorCode.PROTOCOL_ERROR,
    ),
    # gRPC: the stream is well-formed, and what is on it no answer.
    "gRPC: HTTP status 503": (
        lambda c, s: c.headers(s, [(b":status", b"503")], True), Code.UNAVAILABLE, "HTTP status 503", ErrorCode.CANCEL,
    ),
    "RFC 9110 15: HTTP status 999": (
        lambda c, s: c.headers(s, [(b":status", b"999")]), Code.UNKNOWN, "HTTP status 999", ErrorCode.CANCEL,
    ),
    "RFC 9110 15: HTTP status 099": (
        lambda c, s: c.headers(s, [(b":status", b"099")]), Code.UNKNOWN, "HTTP status 099", ErrorCode.CANCEL,
    ),
    "RFC 9110 15.3.5: HTTP status 204": (
        lambda c, s: c.headers(s, [(b":status", b"204"), (b"content-length", b"7")], True),
        Code.UNKNOWN, "HTTP status 204", ErrorCode.CANCEL,
    ),
    "gRPC: another content-type": (
        lambda c, s: c.headers(s, [*OK, (b"content-type", b"text/html")]), Code.UNKNOWN, "text/html", ErrorCode.CANCEL,
    ),
    "gRPC: no trailers": (
        lambda c, s: c.headers(s, RESPONSE) + data(s, b"x", True), Code.INTERNAL, "without grpc-status",
        ErrorCode.CANCEL,
    ),
    "gRPC: no status": (
        lambda c, s: c.headers(s, RESPONSE) + c.headers(s, [(b"x", b"y")], True),
        Code.INTERNAL, "without grpc-status", ErrorCode.CANCEL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ["short", "long", "no trailers", "cut off"])
async def test_8_1_1_an_answer_that_the_gate_ends_is_well_formed(how: str) -> None:
    """Whatever length the upstream's said that it would have: a client that counts would lose the status."""
    async with joined(backend := Backend()) as world:
        client = world.client()
        client.call(1)
        conn = await backend.connection()
        await conn.call(1)
        head = conn.headers(1, [*RESPONSE, (b"content-length", b"10")])
        rest = {
            "short": data(1, b"abc") + conn.headers(1, TRAILERS, True),
            "long": data(1, bytes(11)),
            "no trailers": data(1, bytes(10), True),
            "cut off": data(1, b"abc"),
        }[how]
        conn.send(head, rest)
        await until(lambda: 1 in client.inbox.messages, "the head")
        if how == "cut off":
            conn.abort()
        reply = await client.reply(1)
        assert reply.status in (Code.INTERNAL, Code.UNAVAILABLE)
        assert b"content-length" not in dict(reply.heads[0])


@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_10_5_frames_with_nothing_in_them_go_no_further(who: str) -> None:
    async with joined(backend := Backend()) as world:
        client = world.client()
        client.call(1, end=False)
        conn = await backend.connection()
        await conn.call(1, whole=False)
        nothing = (data(1, b"") + wire.padded_data(1, b"", 5)) * 20
        if who == "client":
            client.feed(nothing, data(1, b"end", True))
            await conn.call(1)
            assert [item.payload for item in conn.inbox.of(wire.DATA)] == [b"request", b"end"]
        else:
            conn.send(conn.headers(1, RESPONSE), nothing, data(1, b"end"), conn.headers(1, TRAILERS, True))
            await client.reply(1)
            assert [item.payload for item in client.inbox.of(wire.DATA)] == [b"end"]


def huge(conn: Served, stream: int) -> bytes:
    """A header section that a few small frames make larger than any that is taken."""
    table = conn.headers(stream, [*RESPONSE, (b"x-huge", b"v" * 3000)])
    field = conn.headers(stream, [(b"x-huge", b"v" * 3000)])[9:]
    return frame(HEADERS, END_HEADERS, stream, table[9:] + field * 400)


@pytest.mark.parametrize("name", ONE_STREAM)
async def test_one_stream_is_broken(name: str) -> None:
    make, code, words, told = ONE_STREAM[name]
    async with joined(backend := Backend()) as world:
        client, other = world.client(), world.client()
        client.call(1, end=False)
        client.call(3)
        other.call(1)
        conn = await backend.connection(0)
        await conn.call(5)
        conn.send(make(conn, 1))
        reply = await client.reply(1)
        assert reply.status == code
        assert words in reply.words
        assert str(world.pool.address) in reply.words
        await until(lambda: conn.calls[1].reset is not None, "the stream to be reset")
        assert conn.calls[1].reset == told
        # Whatever it sends on is dropped; the calls beside it, of this client and of others, don't notice.
        conn.send(data(1, b"late"), window_update(1, 5), conn.headers(1, [(b"x-late", b"1")], True))
        for caller, here, there in ((client, 3, 3), (other, 1, 5)):
            conn.answer(there)
            whole = await caller.reply(here)
            assert (whole.status, bytes(whole.body)) == (0, b"answer")
            caller.alive()
        assert len(conn.inbox.of(RST_STREAM, 1)) == 1
        assert conn.inbox.of(GOAWAY) == []
        # And the next call is a call as any other.
        client.call(5)
        await conn.call(7)
        conn.answer(7)
        assert (await client.reply(5)).status == 0


ALL_STREAMS: dict[str, tuple[Break, str, ErrorCode]] = {
    "4.2 a frame too large": (lambda c, s: data(s, bytes(16_385)), "16385", ErrorCode.FRAME_SIZE_ERROR),
    "4.3 a block that can't be decoded": (
        lambda c, s: frame(HEADERS, END_HEADERS, s, b"\xff\xff\xff\xff\xff\x0f"), "too large",
        ErrorCode.COMPRESSION_ERROR,
    ),
    "5.1 an idle stream": (lambda c, s: c.headers(99, RESPONSE), "idle", ErrorCode.PROTOCOL_ERROR),
    "5.1.1 a stream of its own": (lambda c, s: c.headers(2, RESPONSE), "idle", ErrorCode.PROTOCOL_ERROR),
    "6.1 padding": (lambda c, s: frame(0, 8, s, b"\x05abc"), "padding", ErrorCode.PROTOCOL_ERROR),
    "6.5 SETTINGS on a stream": (lambda c, s: frame(4, 0, s), "SETTINGS", ErrorCode.PROTOCOL_ERROR),
    "6.5.2 ENABLE_PUSH": (lambda c, s: settings((2, 1)), "ENABLE_PUSH", ErrorCode.PROTOCOL_ERROR),
    "6.5.2 MAX_FRAME_SIZE": (lambda c, s: settings((MAX_FRAME_SIZE, 1)), "FRAME_SIZE", ErrorCode.PROTOCOL_ERROR),
    "6.5.2 INITIAL_WINDOW_SIZE": (
        lambda c, s: settings((INITIAL_WINDOW_SIZE, 2**31)), "INITIAL_WINDOW", ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "6.6 PUSH_PROMISE": (
        lambda c, s: frame(PUSH_PROMISE, END_HEADERS, s, b"\0\0\0\2\x82"), "PUSH_PROMISE", ErrorCode.PROTOCOL_ERROR,
    ),
    "6.7 PING": (lambda c, s: frame(6, 0, 0, b"short"), "PING", ErrorCode.FRAME_SIZE_ERROR),
    "6.9 WINDOW_UPDATE of zero": (lambda c, s: window_update(0, 0), "WINDOW_UPDATE", ErrorCode.PROTOCOL_ERROR),
    "10.5 a flood of PING": (lambda c, s: wire.ping() * 5000, "too much of ping", ErrorCode.ENHANCE_YOUR_CALM),
    "6.9.1 a window too large": (
        lambda c, s: window_update(0, 2**31 - 1), "2^31-1", ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "6.10 CONTINUATION": (lambda c, s: frame(9, 4, s, b"\x88"), "CONTINUATION", ErrorCode.PROTOCOL_ERROR),
    "6.10 an interrupted block": (
        lambda c, s: frame(HEADERS, 0, s, b"\x88") + wire.ping(), "interrupted", ErrorCode.PROTOCOL_ERROR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_STREAMS)
async def test_a_connection_is_broken(name: str) -> None:
    """Its calls fail with words, none is sent again, and the next ones go to another connection."""
    make, words, told = ALL_STREAMS[name]
    async with joined(backend := Backend()) as world:
        client, other = world.client(), world.client()
        client.call(1, end=False)
        client.call(3)
        other.call(1)
        conn = await backend.connection(0)
        await conn.call(5)
        conn.send(conn.headers(3, RESPONSE), data(3, b"half"), make(conn, 1))
        for caller, stream in ((client, 1), (client, 3), (other, 1)):
            reply = await caller.reply(stream)
            assert reply.status == Code.UNAVAILABLE
            assert words in reply.words
            assert str(world.pool.address) in reply.words
            caller.alive()
        await until(lambda: conn.closed, "the connection to be closed")
        assert conn.inbox.of(GOAWAY)[-1].code == told
        fresh = await backend.connection(1)
        client.call(5)
        await fresh.call(1)
        fresh.answer(1)
        assert (await client.reply(5)).status == 0
        await settle()
        assert list(fresh.calls) == [1]
