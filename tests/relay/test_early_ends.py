"""RFC 9113 section 8.1: a response that is complete before its request is, and what then becomes of either."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode
from tests.http2.wire import (
    GOAWAY,
    INITIAL_WINDOW_SIZE,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    data,
    rst_stream,
    window_update,
)
from tests.relay.harness import Backend, joined, settle, until

NO_ERROR = rst_stream(1, ErrorCode.NO_ERROR)


@pytest.mark.parametrize("resets", [False, True], ids=["", "and RST_STREAM"])
@pytest.mark.parametrize("trailers_only", [False, True])
async def test_8_1_the_client_gets_all_of_it_and_is_told_to_stop(resets: bool, trailers_only: bool) -> None:
    async with joined(backend := Backend()) as world:
        client = world.client()
        client.call(1, b"begun", end=False)
        conn = await backend.connection(0)
        await conn.body(1, 5)
        if trailers_only:
            conn.send(conn.headers(1, [*RESPONSE, *TRAILERS], end=True))
        else:
            conn.answer(1, b"enough")
        if resets:
            conn.send(NO_ERROR)
        reply = await client.reply(1)
        assert reply.ended
        assert (reply.status, bytes(reply.body)) == (0, b"" if trailers_only else b"enough")
        assert reply.reset == ErrorCode.NO_ERROR
        # The upstream is told that no more comes; what the client had on its way is dropped.
        await until(lambda: conn.calls[1].reset is not None, "the upstream to be told")
        client.feed(data(1, b" and on its way"), data(1, b"", end=True), window_update(1, 10))
        client.alive()
        await settle()
        assert bytes(conn.calls[1].body) == b"begun"
        assert [item.code for item in conn.inbox.of(RST_STREAM)] == [ErrorCode.CANCEL]
        assert conn.inbox.of(GOAWAY) == []


async def test_8_1_no_error_does_not_discard_what_the_client_has_not_taken_yet() -> None:
    """The response is complete and waits for the client's window: the reset is about the request."""
    async with joined(backend := Backend()) as world:
        client = world.client((INITIAL_WINDOW_SIZE, 10))
        client.call(1, b"begun", end=False)
        conn = await backend.connection(0)
        await conn.body(1, 5)
        conn.answer(1, bytes(range(100)))
        conn.send(NO_ERROR)
        await until(lambda: 1 in client.inbox.messages and len(client.inbox.messages[1].body) == 10, "the window")
        await settle()
        assert not client.inbox.messages[1].over
        client.feed(window_update(1, 1000))
        reply = await client.reply(1)
        assert (reply.status, bytes(reply.body), reply.ended) == (0, bytes(range(100)), True)
        client.alive()


async def test_8_1_a_request_that_has_ended_waits_for_its_response() -> None:
    async with joined(backend := Backend()) as world:
        client = world.client()
        client.call(1, b"whole")
        conn = await backend.connection(0)
        await conn.call(1)
        conn.send(conn.headers(1, [(b":status", b"103")]), conn.headers(1, [(b":status", b"103")]))
        await settle()
        assert not client.inbox.messages[1].over
        conn.send(conn.headers(1, RESPONSE), data(1, b"late"))
        conn.send(conn.headers(1, TRAILERS, end=True))
        reply = await client.reply(1)
        assert [dict(head)[b":status"] for head in reply.heads[:-1]] == [b"103", b"103", b"200"]
        assert (reply.status, bytes(reply.body), reply.reset) == (0, b"late", None)
        assert client.inbox.of(RST_STREAM) == conn.inbox.of(RST_STREAM) == []
