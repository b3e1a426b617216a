"""RFC 9113 sections 5.2 and 6.9: what we may send, and what waits for the peer's windows or for the transport."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode, Settings, Stream
from proxy.http2.headers import intern_trailers
from proxy.http2.sender import OUT_FULL
from tests.http2.wire import (
    DATA,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_WINDOW,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    WINDOW,
    WINDOW_UPDATE,
    Frame,
    Peer,
    block,
    client,
    data,
    open_stream,
    rst_stream,
    server,
    settings,
    window_update,
)


def sizes(frames: list[Frame], stream: int = 1) -> list[int]:
    return [len(item.payload) for item in frames if item.kind == DATA and item.stream == stream]


def body(frames: list[Frame], stream: int = 1) -> bytes:
    return b"".join(item.payload for item in frames if item.kind == DATA and item.stream == stream)


def numbered(size: int) -> bytes:
    """Bytes that tell when they are out of order."""
    return bytes(index * 7 % 251 for index in range(size))


def streams(peer: Peer, count: int) -> list[Stream]:
    """Streams 1, 3, 5, ... in use."""
    if not peer.conn.server:
        made = [peer.conn.open_stream(block(REQUEST), end=False) for _ in range(count)]
    else:
        for index in range(count):
            peer.send(peer.request(2 * index + 1, end=True))
        made = list(peer.conn.streams.values())
        for stream in made:
            peer.conn.send_headers(stream, block(RESPONSE))
    peer.sent()
    return made


# -- 6.9: WINDOW_UPDATE


def test_6_9_window_update_of_zero_on_the_connection_is_a_connection_error(peer: Peer) -> None:
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, window_update(0, 0))


def test_6_9_window_update_of_zero_on_a_stream_is_a_stream_error(peer: Peer) -> None:
    open_stream(peer)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, window_update(1, 0))


def test_6_9_window_update_of_zero_on_a_closed_stream_is_answered_once(peer: Peer) -> None:
    open_stream(peer)
    peer.send(rst_stream(1))
    sent = peer.send(window_update(1, 0), window_update(1, 0))
    assert [(item.kind, item.stream, item.code) for item in sent] == [(RST_STREAM, 1, ErrorCode.PROTOCOL_ERROR)]
    peer.alive()


def test_6_9_1_a_connection_window_beyond_the_maximum_is_a_connection_error(peer: Peer) -> None:
    assert peer.send(window_update(0, MAX_WINDOW - WINDOW)) == []
    peer.connection_error(ErrorCode.FLOW_CONTROL_ERROR, window_update(0, 1))


def test_6_9_1_a_stream_window_beyond_the_maximum_is_a_stream_error(peer: Peer) -> None:
    open_stream(peer)
    assert peer.send(window_update(1, MAX_WINDOW - WINDOW)) == []
    peer.stream_error(1, ErrorCode.FLOW_CONTROL_ERROR, window_update(1, 1))


def test_6_9_2_settings_that_push_a_stream_window_beyond_the_maximum_are_a_connection_error(peer: Peer) -> None:
    open_stream(peer)
    peer.send(window_update(1, MAX_WINDOW - WINDOW))
    peer.connection_error(ErrorCode.FLOW_CONTROL_ERROR, settings((INITIAL_WINDOW_SIZE, WINDOW + 1)))


def test_6_9_2_settings_may_push_a_stream_window_to_the_maximum(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(window_update(1, MAX_WINDOW - WINDOW - 1), settings((INITIAL_WINDOW_SIZE, WINDOW + 1)))
    assert stream.send_window == MAX_WINDOW
    peer.alive()


# -- what waits


def test_6_9_1_no_more_is_sent_than_the_stream_window(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(window_update(0, 1_000_000))
    message = numbered(100_000)
    for at in range(0, len(message), 10_000):
        peer.conn.send_data(stream, message[at : at + 10_000], end=at == 90_000)
    sent = peer.sent()
    assert body(sent) == message[:WINDOW]
    assert not any(item.ends for item in sent)
    more = peer.send(window_update(1, 10_000))
    assert body(more) == message[WINDOW : WINDOW + 10_000]
    last = peer.send(window_update(1, 100_000))
    assert body(sent + more + last) == message
    assert [item.ends for item in last if item.kind == DATA] == [False] * (len(sizes(last)) - 1) + [True]


def test_6_9_1_no_more_is_sent_than_the_connection_window(peer: Peer) -> None:
    first, second = streams(peer, 2)
    peer.conn.send_data(first, bytes(40_000), end=False)
    peer.conn.send_data(second, bytes(40_000), end=False)
    sent = peer.sent()
    assert sum(sizes(sent, 1) + sizes(sent, 3)) == WINDOW
    more = peer.send(window_update(0, 80_000))
    assert sum(sizes(sent, 1) + sizes(more, 1)) == 40_000
    assert sum(sizes(sent, 3) + sizes(more, 3)) == 40_000


@pytest.mark.parametrize(("limit", "expected"), [(16_384, [16_384, 16_384, 7232]), (30_000, [30_000, 10_000])])
def test_4_2_no_frame_is_larger_than_the_peer_allows(peer: Peer, limit: int, expected: list[int]) -> None:
    peer.send(settings((MAX_FRAME_SIZE, limit)))
    stream = open_stream(peer)
    peer.conn.send_data(stream, bytes(40_000), end=False)
    assert sizes(peer.sent()) == expected


def test_6_9_1_an_empty_frame_needs_no_window(peer: Peer) -> None:
    peer.send(settings((INITIAL_WINDOW_SIZE, 0)))
    stream = open_stream(peer)
    peer.conn.send_data(stream, b"", end=True)
    assert [(item.kind, item.flags, item.payload) for item in peer.sent()][:1] == [(DATA, END_STREAM, b"")]


def test_6_9_1_end_stream_waits_behind_data(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(settings((INITIAL_WINDOW_SIZE, 0)))
    peer.conn.send_data(stream, b"data", end=False)
    peer.conn.send_data(stream, b"", end=True)
    assert peer.sent() == []
    assert not stream.local_closed
    sent = peer.send(window_update(1, 100))
    assert [(item.payload, item.ends) for item in sent if item.kind == DATA] == [(b"data", True)]


def test_8_1_trailers_wait_behind_data(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(settings((INITIAL_WINDOW_SIZE, 3)))
    peer.conn.send_data(stream, b"abcdef", end=False)
    peer.conn.send_trailers(stream, block(TRAILERS))
    assert body(peer.sent()) == b"abc"
    assert peer.heads() == []
    sent = [item for item in peer.send(window_update(1, 3)) if item.kind in (DATA, HEADERS)]
    assert [(item.kind, item.ends) for item in sent] == [(DATA, False), (HEADERS, True)]
    assert peer.heads() == [(1, TRAILERS, True)]
    assert stream.local_closed


def test_8_1_trailers_without_data_before_them_need_no_window(peer: Peer) -> None:
    peer.send(settings((INITIAL_WINDOW_SIZE, 0)))
    stream = open_stream(peer)
    peer.conn.send_trailers(stream, block(TRAILERS))
    peer.sent()
    assert peer.heads() == [(1, TRAILERS, True)]


def test_data_that_waits_is_a_copy(peer: Peer) -> None:
    """The read buffer that it is a slice of may be used again, and must not be kept."""
    stream = open_stream(peer)
    peer.send(settings((INITIAL_WINDOW_SIZE, 0)))
    buffer = bytearray(b"payload")
    peer.conn.send_data(stream, memoryview(buffer), end=False)
    buffer[:] = b"changed"
    assert body(peer.send(window_update(1, 100))) == b"payload"


def test_what_waits_is_dropped_with_its_stream(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(settings((INITIAL_WINDOW_SIZE, 0)))
    peer.conn.send_data(stream, b"data", end=False)
    peer.conn.send_trailers(stream, block(TRAILERS))
    peer.send(rst_stream(1))
    assert peer.send(window_update(0, 100), settings((INITIAL_WINDOW_SIZE, 100)))[1:] == []
    assert peer.heads() == []


def test_what_waits_can_be_dropped_and_trailers_sent_instead(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(settings((INITIAL_WINDOW_SIZE, 0)))
    peer.conn.drop_backlog(stream)
    peer.conn.send_data(stream, b"data", end=False)
    peer.conn.drop_backlog(stream)
    peer.conn.send_trailers(stream, block(TRAILERS))
    assert body(peer.sent()) == b""
    assert peer.heads() == [(1, TRAILERS, True)]
    peer.send(window_update(0, 5))
    peer.alive()


# -- fairness


def test_a_long_queue_does_not_starve_the_others(peer: Peer) -> None:
    """One frame a stream in turn, when the connection's window opens."""
    first, second, third = streams(peer, 3)
    peer.send(settings((INITIAL_WINDOW_SIZE, 1_000_000)))
    for stream, size in ((first, 200_000), (second, 50_000), (third, 10)):
        peer.conn.send_data(stream, bytes(size), end=False)
    peer.sent()
    order = [item.stream for item in peer.send(window_update(0, 150_000)) if item.kind == DATA]
    assert set(order[:3]) == {1, 3, 5}
    assert order[3:7] == [1, 3, 1, 3]


def test_a_long_queue_does_not_starve_the_others_when_the_window_opens_little_by_little(peer: Peer) -> None:
    first, second = streams(peer, 2)
    peer.send(settings((INITIAL_WINDOW_SIZE, 10_000_000)))
    for stream in (first, second):
        peer.conn.send_data(stream, bytes(500_000), end=False)
    peer.sent()
    shares = {1: 0, 3: 0}
    for _ in range(20):
        for item in peer.send(window_update(0, 16_384)):
            shares[item.stream] += len(item.payload)
    assert min(shares.values()) > 100_000, shares


def test_a_stalled_stream_does_not_stop_its_neighbours(peer: Peer) -> None:
    peer.send(settings((INITIAL_WINDOW_SIZE, 1000)), window_update(0, 1_000_000))
    stalled, other = streams(peer, 2)
    peer.conn.send_data(stalled, bytes(5000), end=False)
    peer.conn.send_data(other, bytes(900), end=False)
    sent = peer.sent()
    assert sizes(sent, 1) == [1000]
    assert sizes(sent, 3) == [900]
    assert sizes(peer.send(window_update(3, 50)), 1) == []
    assert sizes(peer.send(window_update(1, 50)), 1) == [50]


# -- 6.9.2: the initial window changes


def test_6_9_2_a_larger_initial_window_lets_waiting_data_go(peer: Peer) -> None:
    peer.send(settings((INITIAL_WINDOW_SIZE, 10)))
    stream = open_stream(peer)
    peer.conn.send_data(stream, numbered(100), end=False)
    assert sizes(peer.sent()) == [10]
    sent = peer.send(settings((INITIAL_WINDOW_SIZE, 60)))
    assert sizes(sent) == [50]
    assert stream.send_window == 0


def test_6_9_2_a_window_may_become_negative(peer: Peer) -> None:
    peer.send(settings((INITIAL_WINDOW_SIZE, 100)))
    stream = open_stream(peer)
    message = numbered(200)
    peer.conn.send_data(stream, message[:80], end=False)
    assert sizes(peer.sent()) == [80]
    peer.send(settings((INITIAL_WINDOW_SIZE, 10)))
    assert stream.send_window == -70
    peer.conn.send_data(stream, message[80:], end=True)
    assert sizes(peer.sent()) == []
    assert sizes(peer.send(window_update(1, 70))) == []
    assert body(peer.send(window_update(1, 1))) == message[80:81]
    assert body(peer.send(settings((INITIAL_WINDOW_SIZE, 130)))) == message[81:]


def test_6_9_2_new_streams_begin_with_the_new_window(peer: Peer) -> None:
    peer.send(settings((INITIAL_WINDOW_SIZE, 5)))
    assert open_stream(peer).send_window == 5


def test_6_9_2_the_connection_window_is_not_changed_by_settings(peer: Peer) -> None:
    before = peer.conn.send_window
    peer.send(settings((INITIAL_WINDOW_SIZE, 5)))
    assert peer.conn.send_window == before


class Watched(Settings):
    """The peer's settings, which can be looked at a thousand times and no more: that is an endless loop."""

    @property
    def max_frame(self) -> int:  # type: ignore[override]
        self.left -= 1
        assert self.left, "an endless loop"
        return self._max_frame

    @max_frame.setter
    def max_frame(self, value: int) -> None:
        self._max_frame = value
        self.left = 1000


def overdrawn(peer: Peer) -> Stream:
    """Stream 1, with a window below zero: a peer may make its windows smaller while a message is on its way."""
    peer.conn.peer = Watched()
    peer.send(settings((INITIAL_WINDOW_SIZE, 100)))
    stream = open_stream(peer)
    peer.conn.send_data(stream, bytes(80), end=False)
    peer.send(settings((INITIAL_WINDOW_SIZE, 10)))
    assert stream.send_window == -70
    return stream


def test_6_9_2_a_stream_can_be_ended_while_its_window_is_negative(peer: Peer) -> None:
    stream = overdrawn(peer)
    peer.conn.send_data(stream, b"", end=True)
    assert [item.ends for item in peer.sent() if item.kind == DATA] == [True]


def test_6_9_2_an_empty_piece_may_be_sent_while_the_window_is_negative(peer: Peer) -> None:
    stream = overdrawn(peer)
    peer.conn.send_data(stream, b"", end=False)
    peer.conn.send_trailers(stream, block(TRAILERS))
    peer.sent()
    assert peer.heads() == [(1, TRAILERS, True)]


def test_6_9_2_an_end_that_waited_for_the_transport_leaves_while_the_window_is_negative(peer: Peer) -> None:
    stream = overdrawn(peer)
    peer.conn.paused = True
    peer.conn.send_data(stream, b"", end=True)
    peer.conn.resume()
    assert [item.ends for item in peer.sent() if item.kind == DATA] == [True]


# -- a transport that is full


def test_data_waits_while_the_transport_is_full(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.paused = True
    peer.conn.send_data(stream, b"abc", end=False)
    peer.conn.send_data(stream, b"def", end=False)
    assert peer.send(window_update(1, 100), window_update(0, 100)) == []
    peer.conn.resume()
    assert body(peer.sent()) == b"abcdef"


def test_control_frames_and_heads_do_not_wait_for_the_transport(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.paused = True
    peer.conn.send_headers(stream, block(RESPONSE))
    peer.sent()
    assert peer.heads() == [(1, RESPONSE, False)]
    peer.alive()


@pytest.mark.parametrize("why", ["paused", "much output"])
@pytest.mark.parametrize("window", [0, WINDOW])
def test_trailers_wait_for_the_transport(peer: Peer, why: str, window: int) -> None:
    """No window holds them back, and HPACK makes 60 KB of a few bytes."""
    stream = open_stream(peer)
    peer.conn.send_window = window
    if why == "paused":
        peer.conn.paused = True
    else:
        peer.conn._emit(bytes(OUT_FULL + 1))
    peer.conn.send_trailers(stream, intern_trailers(TRAILERS))
    assert peer.heads() == []
    assert peer.conn.queued == sum(len(name) + len(value) + 32 for name, value in TRAILERS)
    peer.conn.take_output()
    peer.conn.wake.clear()
    peer.conn.resume()
    peer.sent()
    assert peer.heads() == [(1, TRAILERS, True)]
    assert peer.conn.queued == 0
    assert stream.local_closed


def test_trailers_that_wait_are_counted_with_their_data(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.paused = True
    peer.conn.send_data(stream, b"12345", end=False)
    peer.conn.send_trailers(stream, intern_trailers(TRAILERS))
    size = sum(len(name) + len(value) + 32 for name, value in TRAILERS)
    assert peer.conn.queued == 5 + size
    peer.conn.drop_backlog(stream)
    assert peer.conn.queued == 0


def test_end_stream_waits_with_its_data_while_the_transport_is_full(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.paused = True
    peer.conn.send_data(stream, b"", end=True)
    assert peer.sent() == []
    assert not stream.local_closed
    peer.conn.resume()
    assert [item.ends for item in peer.sent() if item.kind == DATA] == [True]


def test_6_9_1_an_end_that_waited_for_the_transport_needs_no_window(peer: Peer) -> None:
    first, second = streams(peer, 2)
    peer.conn.send_data(first, bytes(WINDOW), end=False)
    peer.conn.paused = True
    peer.conn.send_data(second, b"", end=True)
    peer.sent()
    peer.conn.resume()
    assert [item.stream for item in peer.sent() if item.ends] == [3]


def test_the_transport_may_become_full_while_the_queues_are_sent() -> None:
    """What makes it full is the write that a credit causes: as here, when the first frame has left."""
    peer = client((INITIAL_WINDOW_SIZE, 0))
    other = server()
    first, second = streams(peer, 2)
    for stream, partner in zip((first, second), streams(other, 2), strict=True):
        peer.conn.send_data(stream, bytes(40_000), end=False)
        stream.partner = partner

    def credit(stream: Stream, size: int) -> None:
        peer.conn.paused = True

    other.conn.credit = credit
    assert sizes(peer.send(settings((INITIAL_WINDOW_SIZE, 100_000)))) == [16_384]
    peer.conn.paused = False
    peer.send(window_update(3, 1))
    assert peer.conn.paused


def test_what_waits_is_sent_in_portions_when_a_window_opens_wide(peer: Peer) -> None:
    """Else all that waits would lie in the transport's buffer at once; who writes it asks for more by `resume`."""
    stream = open_stream(peer)
    message = numbered(2_000_000)
    for at in range(0, len(message), 16_000):
        peer.conn.send_data(stream, message[at : at + 16_000], end=False)
    peer.conn.send_trailers(stream, block(TRAILERS))
    came = body(peer.sent())
    portions = [body(peer.send(window_update(0, 2_000_000), window_update(1, 2_000_000)))]
    while peer.conn.blocked:
        peer.conn.resume()
        portions.append(body(peer.sent()))
    assert came + b"".join(portions) == message
    assert max(map(len, portions)) < 600_000
    assert peer.heads() == [(1, TRAILERS, True)]


def test_small_pieces_that_wait_are_joined(peer: Peer) -> None:
    """A peer that sends single bytes must not make us keep an object for each."""
    stream = open_stream(peer)
    peer.send(settings((INITIAL_WINDOW_SIZE, 0)))
    message = numbered(40_000)
    for at in range(20_000):
        peer.conn.send_data(stream, message[at : at + 1], end=False)
    peer.conn.send_data(stream, message[20_000:30_000], end=False)
    for at in range(30_000, 40_000):
        peer.conn.send_data(stream, message[at : at + 1], end=at == 39_999)
    sent = peer.send(settings((INITIAL_WINDOW_SIZE, 50_000)))
    assert body(sent) == message
    assert len(sizes(sent)) < 8


def test_nothing_is_lost_when_a_resumed_transport_has_no_window(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.send_data(stream, bytes(WINDOW), end=False)
    peer.conn.paused = True
    peer.conn.send_data(stream, b"abc", end=True)
    peer.sent()
    peer.conn.resume()
    assert peer.sent() == []
    assert peer.send(window_update(0, 100)) == []
    assert body(peer.send(window_update(1, 100))) == b"abc"


# -- credit to the partner: when it is sent, not before


def linked(stream_window: int = WINDOW) -> tuple[Peer, Peer, Stream, Stream]:
    """A request's stream on a server joined to one on a client: what comes here goes out there."""
    down, up = server(stream_window=stream_window), client()
    down.send(down.request(1))
    up.conn.open_stream(block(REQUEST), end=False)
    up.sent()
    here, there = down.conn.streams[1], up.conn.streams[1]
    there.partner = here
    return down, up, here, there


def test_what_is_sent_is_credited_to_the_partner() -> None:
    down, up, _, there = linked()
    half = WINDOW // 2
    up.conn.send_data(there, bytes(16_384), end=False)
    assert down.sent() == []
    up.conn.send_data(there, bytes(half - 16_384), end=False)
    assert down.sent() == [Frame(WINDOW_UPDATE, 0, 1, half.to_bytes(4, "big"))]


def test_what_waits_is_not_credited_to_the_partner() -> None:
    down, up, here, there = linked()
    up.send(settings((INITIAL_WINDOW_SIZE, 0)))
    for _ in range(3):
        down.send(data(1, bytes(16_384)))
        up.conn.send_data(there, bytes(16_384), end=False)
    assert down.sent() == []
    assert here.recv_window == WINDOW - 3 * 16_384
    up.send(window_update(1, 20_000))
    assert down.sent() == []
    up.send(window_update(1, 20_000))
    assert [(item.kind, item.stream, item.number) for item in down.sent()] == [(WINDOW_UPDATE, 1, 2 * 16_384)]


def test_a_partner_that_has_ended_gets_no_credit() -> None:
    down, up, _, there = linked()
    down.send(data(1, bytes(16_384)), data(1, bytes(16_384)), data(1, bytes(16_384), end=True))
    up.conn.send_data(there, bytes(3 * 16_384), end=True)
    assert down.sent() == []


def test_without_a_partner_nobody_is_credited(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.send_data(stream, bytes(10), end=False)
    peer.conn.send_data(stream, bytes(30_000), end=False)
    assert sizes(peer.sent()) == [10, 16_384, 30_000 - 16_384]
