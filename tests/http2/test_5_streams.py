"""RFC 9113 section 5.1: identifiers and states of streams, concurrency, what may still arrive for closed ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.http2 import ErrorCode
from tests.http2.wire import (
    END_HEADERS,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    PRIORITY,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    Frame,
    Peer,
    Server,
    block,
    client,
    data,
    frame,
    open_stream,
    padded_data,
    rst_stream,
    server,
    settings,
    window_update,
)

Make = Callable[..., bytes]
Close = Callable[[Peer], None]

# -- 5.1.1


@pytest.mark.parametrize("stream", [2, 4, 1000])
def test_5_1_1_even_stream_identifier_of_a_client_is_a_connection_error(stream: int) -> None:
    peer = server()
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, peer.request(stream))


def test_5_1_1_even_stream_identifier_below_the_last_one_is_a_connection_error() -> None:
    peer = server()
    peer.send(peer.request(5))
    peer.events()
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, peer.request(2))


@pytest.mark.parametrize("skipped", [1, 3])
def test_5_1_1_a_lower_stream_identifier_is_a_connection_error(skipped: int) -> None:
    peer = server()
    peer.send(peer.request(5))
    peer.events()
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, peer.request(skipped))


@pytest.mark.parametrize("again", [1, 3])
def test_5_1_1_a_stream_identifier_cant_be_used_again(again: int) -> None:
    """As each lower one was used, it is surely a closed stream that it names: STREAM_CLOSED (section 5.1)."""
    peer = server()
    for stream in (1, 3, 5):
        peer.send(peer.request(stream, end=True))
        peer.conn.send_headers(peer.conn.streams[stream], block(RESPONSE), end=True)
    peer.sent()
    peer.events()
    peer.connection_error(ErrorCode.STREAM_CLOSED, peer.request(again))


def test_5_1_1_a_refused_stream_counts_as_used() -> None:
    peer = server(max_streams=1)
    peer.send(peer.request(1, end=True), peer.request(3), peer.request(5))
    peer.conn.send_headers(peer.conn.streams[1], block(RESPONSE), end=True)
    peer.sent()
    peer.events()
    peer.connection_error(ErrorCode.STREAM_CLOSED, peer.request(1))


def test_5_1_1_a_client_that_has_used_up_its_identifiers_has_to_reconnect() -> None:
    """What it has begun goes on; whatever it opens next has a lower number."""
    peer = server()
    last = 2**31 - 1
    peer.send(peer.request(last, end=True))
    peer.conn.send_headers(peer.conn.streams[last], block(RESPONSE), end=True)
    assert peer.sent()[0].ends
    peer.events()
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, peer.request(1))


def test_5_1_1_streams_may_be_skipped() -> None:
    peer = server()
    peer.send(peer.request(1), peer.request(7), peer.request(2**31 - 1))
    assert [event[1] for event in peer.events("request")] == [1, 7, 2**31 - 1]


def test_5_1_1_a_client_numbers_its_streams_in_order() -> None:
    peer = client()
    for _ in range(3):
        peer.conn.open_stream(block(REQUEST), end=True)
    assert [item.stream for item in peer.sent()] == [1, 3, 5]


def test_5_1_1_a_client_stops_before_identifiers_run_out() -> None:
    peer = client()
    peer.conn.last_local_id = 2**31 - 5
    assert peer.conn.room() > 0
    assert not peer.conn.used_up
    stream = peer.conn.open_stream(block(REQUEST), end=True)
    assert peer.conn.room() == 0
    assert peer.conn.used_up
    # What runs goes on to its end.
    peer.sent()
    peer.send(peer.headers(stream.id, [*RESPONSE, *TRAILERS], end=True))
    assert peer.events("response")[0][1] == stream.id
    assert peer.conn.streams == {}


# -- 5.1: idle


@pytest.mark.parametrize("stream", [1, 3, 2])
@pytest.mark.parametrize(
    "make", [lambda s: data(s, b"x"), lambda s: padded_data(s, b"x", 1), rst_stream, lambda s: window_update(s, 1)]
)
def test_5_1_idle_a_stream_takes_nothing_but_headers_and_priority(peer: Peer, stream: int, make: Make) -> None:
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, make(stream))


def test_5_1_idle_priority_is_allowed(peer: Peer) -> None:
    peer.ignored(frame(PRIORITY, 0, 9, b"\0\0\0\3\x10"))


@pytest.mark.parametrize(
    ("payload", "code"), [(bytes(4), ErrorCode.FRAME_SIZE_ERROR), (b"\0\0\0\x09\x10", ErrorCode.PROTOCOL_ERROR)]
)
def test_6_4_wrong_priority_on_an_idle_stream_ends_the_connection(peer: Peer, payload: bytes, code: ErrorCode) -> None:
    """RST_STREAM must not be sent for an idle stream."""
    sent = peer.connection_error(code, frame(PRIORITY, 0, 9, payload))
    assert [item for item in sent if item.kind == RST_STREAM] == []


@pytest.mark.parametrize("stream", [1, 2])
def test_5_1_idle_a_server_may_not_open_streams(stream: int) -> None:
    peer = client()
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, peer.headers(stream, RESPONSE))


# -- 5.1: half-closed (remote)


def test_5_1_half_closed_data_after_end_stream_is_a_stream_error(peer: Peer) -> None:
    open_stream(peer, end=True)
    peer.stream_error(1, ErrorCode.STREAM_CLOSED, data(1, b"more"))
    assert peer.events("data") == []


def test_5_1_half_closed_data_after_trailers_is_a_stream_error(peer: Peer) -> None:
    open_stream(peer)
    peer.send(peer.headers(1, TRAILERS, end=True))
    peer.stream_error(1, ErrorCode.STREAM_CLOSED, padded_data(1, b"more", 2))


def test_5_1_half_closed_headers_after_end_stream_are_a_stream_error(peer: Peer) -> None:
    """The block is decoded all the same: the next one refers to what it put into the table."""
    stream = open_stream(peer, end=True)
    late = peer.headers(1, [(b"x-new", b"value")], end=True)
    peer.stream_error(1, ErrorCode.STREAM_CLOSED, late)
    assert stream.remote_closed
    peer.events()
    again = [(b"x-new", b"value")]
    if isinstance(peer.conn, Server):
        peer.send(peer.request(3, *again))
        assert peer.events("request")[0][2] == REQUEST + again
    else:
        peer.conn.open_stream(block(REQUEST), end=True)
        peer.send(peer.headers(3, RESPONSE + again))
        assert peer.events("response")[0][2] == RESPONSE + again


@pytest.mark.parametrize("make", [lambda: window_update(1, 5), lambda: frame(PRIORITY, 0, 1, bytes(5))])
def test_5_1_half_closed_window_updates_and_priority_are_allowed(peer: Peer, make: Make) -> None:
    stream = open_stream(peer, end=True)
    peer.ignored(make())
    assert stream.id in peer.conn.streams


def test_5_1_half_closed_a_reset_is_allowed(peer: Peer) -> None:
    open_stream(peer, end=True)
    assert peer.send(rst_stream(1, 8)) == []
    assert peer.events() == [("closed", 1), ("reset", 1, 8)]


# -- 5.1: closed


def closed_by_both(peer: Peer) -> None:
    stream = open_stream(peer, end=True)
    peer.conn.send_data(stream, b"", end=True)
    assert peer.sent()[-1].ends
    assert peer.events() == [("closed", 1)]


def closed_by_peer(peer: Peer) -> None:
    open_stream(peer)
    peer.send(rst_stream(1))
    peer.events()


def closed_by_us(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.reset(stream, ErrorCode.CANCEL)
    assert [(item.kind, item.code) for item in peer.sent()] == [(RST_STREAM, ErrorCode.CANCEL)]
    assert peer.events() == [("closed", 1)]


@pytest.mark.parametrize("close", [closed_by_both, closed_by_peer, closed_by_us])
@pytest.mark.parametrize(
    "make", [lambda: window_update(1, 5), lambda: rst_stream(1), lambda: frame(PRIORITY, 0, 1, bytes(5))]
)
def test_5_1_closed_late_control_frames_are_ignored(peer: Peer, close: Close, make: Make) -> None:
    close(peer)
    peer.ignored(make())


@pytest.mark.parametrize("close", [closed_by_both, closed_by_peer])
def test_5_1_closed_data_is_answered_with_one_reset(peer: Peer, close: Close) -> None:
    close(peer)
    reset = Frame(RST_STREAM, 0, 1, ErrorCode.STREAM_CLOSED.to_bytes(4, "big"))
    assert peer.send(data(1, b"late"), data(1, b"later"), padded_data(1, b"last", 3, end=True)) == [reset]
    assert peer.events() == []
    peer.alive()


def test_5_1_closed_by_us_data_on_its_way_is_ignored(peer: Peer) -> None:
    closed_by_us(peer)
    peer.ignored(data(1, b"late"), padded_data(1, b"late", 3, end=True))


@pytest.mark.parametrize("close", [closed_by_both, closed_by_peer])
def test_5_1_closed_headers_of_a_client_are_a_connection_error(close: Close) -> None:
    peer = server()
    close(peer)
    peer.connection_error(ErrorCode.STREAM_CLOSED, peer.headers(1, TRAILERS, end=True))


def test_5_1_closed_by_us_headers_on_their_way_are_decoded_and_ignored(peer: Peer) -> None:
    closed_by_us(peer)
    peer.ignored(peer.headers(1, [(b"x-new", b"value")], end=True))
    if peer.conn.server:
        peer.send(peer.request(3, (b"x-new", b"value")))
        assert peer.events("request")[0][2][-1] == (b"x-new", b"value")


@pytest.mark.parametrize("close", [closed_by_both, closed_by_peer])
def test_5_1_closed_headers_of_a_server_are_answered_with_one_reset(close: Close) -> None:
    """Not with GOAWAY, as a client's: the calls of many are on this connection."""
    peer = client()
    close(peer)
    reset = Frame(RST_STREAM, 0, 1, ErrorCode.STREAM_CLOSED.to_bytes(4, "big"))
    assert peer.send(*[peer.headers(1, [(b"x-new", b"value")], end=True) for _ in range(3)]) == [reset]
    assert peer.events() == []
    peer.alive()


def test_5_1_closed_a_reset_remembered_too_long_ago_is_forgotten() -> None:
    """The memory of resets is bounded; data for a forgotten one is answered as for any closed stream."""
    peer = server()
    for number in range(600):
        peer.send(peer.request(2 * number + 1))
        peer.conn.reset(peer.conn.streams[2 * number + 1], ErrorCode.CANCEL)
    peer.sent()
    peer.events()
    peer.ignored(data(1199, b"late"), data(201, b"late"))
    assert [(item.stream, item.code) for item in peer.send(data(1, b"late"))] == [(1, ErrorCode.STREAM_CLOSED)]


def test_5_1_closed_reset_twice_is_sent_once(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.reset(stream, ErrorCode.CANCEL)
    peer.conn.reset(stream, ErrorCode.INTERNAL_ERROR)
    assert len(peer.sent()) == 1


def test_5_1_closed_nothing_is_sent_on_a_stream_that_is_gone(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(rst_stream(1))
    peer.conn.send_headers(stream, block(TRAILERS))
    peer.conn.send_data(stream, b"data", end=False)
    peer.conn.send_data(stream, b"", end=True)
    peer.conn.send_trailers(stream, block(TRAILERS))
    peer.conn.credit(stream, 100_000)
    assert peer.sent() == []


def test_5_4_2_what_is_on_its_way_to_a_stream_that_broke_a_rule_is_ignored(peer: Peer) -> None:
    open_stream(peer)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, window_update(1, 0))
    peer.events()
    peer.ignored(data(1, b"more"), window_update(1, 0), peer.headers(1, TRAILERS, end=True), rst_stream(1))


def test_5_4_2_what_is_on_its_way_to_a_malformed_request_is_ignored() -> None:
    peer = server()
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.request(1, (b"connection", b"close")))
    peer.events()
    peer.ignored(data(1, b"more"), peer.headers(1, TRAILERS, end=True))


# -- 5.1.2


def test_5_1_2_requests_over_the_limit_are_refused_and_can_be_repeated() -> None:
    peer = server(max_streams=2)
    sent = peer.send(peer.request(1, end=True), peer.request(3), peer.request(5, (b"x-new", b"v"), end=True))
    assert sent == [Frame(RST_STREAM, 0, 5, ErrorCode.REFUSED_STREAM.to_bytes(4, "big"))]
    assert [event[1] for event in peer.events("request")] == [1, 3]
    peer.ignored(data(5, b"on its way"), rst_stream(5))
    peer.conn.send_headers(peer.conn.streams[1], block(RESPONSE), end=True)
    peer.send(peer.request(7, (b"x-new", b"v"), end=True))
    assert peer.events("request")[0][1:3] == (7, [*REQUEST, (b"x-new", b"v")])


def test_5_1_2_a_client_knows_how_many_streams_there_is_room_for() -> None:
    peer = client((MAX_CONCURRENT_STREAMS, 3), max_streams=10)
    room = peer.conn.room
    assert room() == 3
    stream = peer.conn.open_stream(block(REQUEST), end=True)
    assert room() == 2
    peer.send(settings((MAX_CONCURRENT_STREAMS, 100)))
    assert room() == 9
    peer.conn.reset(stream, ErrorCode.CANCEL)
    assert room() == 10
    peer.send(settings((MAX_CONCURRENT_STREAMS, 0)))
    assert room() == 0


def test_5_1_2_a_limit_that_is_lowered_below_whats_open_leaves_no_room() -> None:
    peer = client()
    for _ in range(3):
        peer.conn.open_stream(block(REQUEST), end=True)
    peer.send(settings((MAX_CONCURRENT_STREAMS, 1)))
    assert peer.conn.room() <= 0
    assert len(peer.conn.streams) == 3


# -- 5.3


def test_5_3_1_a_stream_that_depends_on_itself(peer: Peer) -> None:
    open_stream(peer)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, frame(PRIORITY, 0, 1, b"\x80\0\0\1\x10"))


def test_5_3_1_headers_that_depend_on_their_own_stream(peer: Peer) -> None:
    open_stream(peer)
    payload = b"\0\0\0\1\x10" + peer.block(TRAILERS)
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, frame(HEADERS, END_HEADERS | 0x20, 1, payload))


def test_5_3_priority_on_a_closed_stream_that_is_wrong_is_answered_once(peer: Peer) -> None:
    closed_by_both(peer)
    wrong = frame(PRIORITY, 0, 1, b"\0\0\0\1\x10")
    assert [(item.kind, item.stream) for item in peer.send(wrong, wrong)] == [(RST_STREAM, 1)]
    peer.alive()
