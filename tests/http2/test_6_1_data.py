"""RFC 9113 section 6.1: DATA, whole and in pieces, padded and not."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode
from tests.http2.wire import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PRIORITY_FLAG,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    WINDOW,
    WINDOW_UPDATE,
    Peer,
    block,
    client,
    data,
    frame,
    open_stream,
    padded_data,
    ping,
    rst_stream,
    server,
)


def body(peer: Peer) -> tuple[bytes, list[bool]]:
    """What came on stream 1, joined, and the `end` of each piece."""
    pieces = peer.events("data")
    assert all(piece[1] == 1 for piece in pieces)
    return b"".join(piece[2] for piece in pieces), [piece[3] for piece in pieces]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 16_384])
@pytest.mark.parametrize("end", [False, True])
def test_6_1_a_whole_frame_is_one_piece(peer: Peer, size: int, end: bool) -> None:
    stream = open_stream(peer)
    payload = bytes(index % 251 for index in range(size))
    assert [item for item in peer.send(data(1, payload, end)) if item.stream] == []
    # A frame with nothing in it goes no further: it would count as an attack on whoever is behind.
    assert body(peer) == (payload, [end] if size or end else [])
    assert stream.remote_closed is end


def test_6_1_a_partial_frame_is_passed_on_at_once(peer: Peer) -> None:
    stream = open_stream(peer)
    whole = data(1, b"abcdefgh", end=True)
    for start, stop, piece, end in ((0, 9, None, False), (9, 12, b"abc", False), (12, 16, b"defg", False)):
        peer.conn.receive(whole[start:stop])
        assert peer.events() == ([] if piece is None else [("data", 1, piece, end)])
        assert not stream.remote_closed
    peer.conn.receive(whole[16:])
    assert peer.events() == [("data", 1, b"h", True)]
    assert stream.remote_closed


def test_6_1_the_first_piece_may_come_with_the_header(peer: Peer) -> None:
    open_stream(peer)
    whole = data(1, bytes(10_000), end=True)
    peer.conn.receive(whole[:6000])
    peer.conn.receive(whole[6000:] + ping())
    assert [(len(event[2]), event[3]) for event in peer.events()] == [(5991, False), (4009, True)]
    assert len(peer.sent()) == 1


def test_6_1_a_partial_frame_ends_where_the_next_begins(peer: Peer) -> None:
    open_stream(peer)
    whole = data(1, b"first") + data(1, b"second", end=True)
    peer.conn.receive(whole[:11])
    peer.conn.receive(whole[11:])
    assert body(peer) == (b"firstsecond", [False, False, True])


def test_6_1_a_stream_that_is_closed_by_both_leaves_the_table_with_its_last_piece() -> None:
    peer = client()
    stream = open_stream(peer)
    peer.conn.send_data(stream, b"", end=True)
    whole = data(1, b"abc", end=True)
    peer.conn.receive(whole[:10])
    assert 1 in peer.conn.streams
    peer.conn.receive(whole[10:])
    assert peer.conn.streams == {}
    assert [event[0] for event in peer.events()] == ["data", "data", "closed"]


def test_6_1_the_rest_of_a_frame_is_dropped_when_its_stream_is_reset_meanwhile(peer: Peer) -> None:
    stream = open_stream(peer)
    whole = data(1, b"abcdef", end=True)
    peer.conn.receive(whole[:11])
    peer.conn.reset(stream, ErrorCode.CANCEL)
    peer.sent()
    peer.conn.receive(whole[11:13])
    assert peer.send(whole[13:], ping()) != []
    assert body(peer) == (b"ab", [False])


def test_6_1_the_rest_of_a_refused_frame_is_dropped(peer: Peer) -> None:
    open_stream(peer, end=True)
    late = data(1, b"x" * 100)
    resets = [item for item in peer.send(late[:20]) if item.kind == RST_STREAM]
    assert [item.code for item in resets] == [ErrorCode.STREAM_CLOSED]
    assert peer.send(late[20:]) == []
    assert peer.events("data") == []
    peer.alive()


@pytest.mark.parametrize("padding", [0, 1, 255])
@pytest.mark.parametrize("end", [False, True])
def test_6_1_padding_is_stripped(peer: Peer, padding: int, end: bool) -> None:
    stream = open_stream(peer)
    peer.send(padded_data(1, b"payload", padding, end))
    assert body(peer) == (b"payload", [end])
    assert stream.remote_closed is end


def test_6_1_a_padded_frame_may_be_nothing_but_padding(peer: Peer) -> None:
    open_stream(peer)
    peer.send(padded_data(1, b"", 10), padded_data(1, b"", 0, end=True))
    assert body(peer) == (b"", [True])


@pytest.mark.parametrize("padding", [8, 255])
@pytest.mark.parametrize("kind", [DATA, HEADERS])
def test_6_1_padding_as_long_as_the_frame_is_a_connection_error(peer: Peer, kind: int, padding: int) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, frame(kind, PADDED | END_HEADERS, 1, bytes((padding,)) + bytes(7)))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("priority", [b"", b"\x80\0\0\3\x10"])
def test_6_2_padding_and_priority_of_headers_are_stripped(peer: Peer, padding: int, priority: bytes) -> None:
    if not peer.conn.server:
        peer.conn.open_stream(block(REQUEST), end=True)
    fields = REQUEST if peer.conn.server else RESPONSE
    payload = bytes((padding,)) + priority + peer.block(fields) + bytes(padding)
    flags = PADDED | END_HEADERS | END_STREAM | (PRIORITY_FLAG if priority else 0)
    peer.send(frame(HEADERS, flags, 1, payload))
    assert peer.events("request", "response")[0][1:] == (1, fields, True)


# -- what a peer may send counts against its windows: section 6.9


def test_6_9_1_padding_counts_against_the_stream_window_and_is_credited_at_once(peer: Peer) -> None:
    stream = open_stream(peer)
    credited = 0
    for _ in range(1000):
        sent = peer.send(padded_data(1, b"", 255))
        credited += sum(item.number for item in sent if item.kind == WINDOW_UPDATE and item.stream == 1)
    assert credited + stream.unacked == 1000 * 256
    assert credited > 1000 * 256 - WINDOW
    peer.alive()


def test_6_9_1_padding_beyond_the_stream_window_is_a_stream_error(peer: Peer) -> None:
    open_stream(peer)
    full = [data(1, bytes(16_384)) for _ in range(3)] + [data(1, bytes(WINDOW - 3 * 16_384))]
    assert [item for item in peer.send(*full) if item.stream] == []
    sent = peer.stream_error(1, ErrorCode.FLOW_CONTROL_ERROR, padded_data(1, b"", 10))
    assert [item for item in sent if item.stream and item.kind == WINDOW_UPDATE] == []


def test_6_9_1_a_padded_frame_beyond_the_stream_window_is_a_stream_error_though_its_payload_is_not(peer: Peer) -> None:
    open_stream(peer)
    full = [data(1, bytes(16_384)) for _ in range(3)] + [data(1, bytes(WINDOW - 3 * 16_384 - 100))]
    peer.send(*full)
    peer.stream_error(1, ErrorCode.FLOW_CONTROL_ERROR, padded_data(1, bytes(50), 60))


def test_6_9_1_credit_for_padding_does_not_admit_the_frame_that_it_is_in(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(*[data(1, bytes(16_384)) for _ in range(3)], data(1, bytes(16_000)))
    peer.conn.credit(stream, WINDOW // 2 - 1)
    assert peer.sent() == []
    peer.stream_error(1, ErrorCode.FLOW_CONTROL_ERROR, padded_data(1, bytes(5000), 10))


def test_6_9_data_beyond_the_stream_window_is_a_stream_error(peer: Peer) -> None:
    open_stream(peer)
    full = [data(1, bytes(16_384)) for _ in range(3)] + [data(1, bytes(WINDOW - 3 * 16_384))]
    peer.send(*full)
    assert len(body(peer)[0]) == WINDOW
    peer.stream_error(1, ErrorCode.FLOW_CONTROL_ERROR, data(1, b"x"))
    assert peer.events("data") == []


def test_6_9_too_much_data_is_seen_at_the_frame_header(peer: Peer) -> None:
    open_stream(peer)
    peer.send(*[data(1, bytes(16_384)) for _ in range(3)])
    peer.events()
    late = data(1, bytes(16_384))
    sent = peer.send(late[:500])
    assert [item.code for item in sent if item.kind == RST_STREAM] == [ErrorCode.FLOW_CONTROL_ERROR]
    assert peer.send(late[500:]) == []
    assert peer.events("data") == []
    peer.alive()


def test_6_9_data_beyond_the_connection_window_is_a_connection_error() -> None:
    peer = server(max_streams=1)  # the connection's window is that of one stream; it is given back from a half on
    conn = peer.conn
    peer.send(peer.request(1))
    conn.recv_window = 10
    peer.connection_error(ErrorCode.FLOW_CONTROL_ERROR, data(1, bytes(11)))


def test_6_9_an_empty_frame_needs_no_window(peer: Peer) -> None:
    open_stream(peer)
    peer.send(*[data(1, bytes(16_384)) for _ in range(3)], data(1, bytes(WINDOW - 3 * 16_384)))
    peer.events()
    peer.send(data(1, b"", end=True))
    assert peer.events() == [("data", 1, b"", True)]


def test_6_9_the_connection_window_is_replenished_on_receipt(peer: Peer) -> None:
    """A stream that nobody reads must not stop its neighbours."""
    open_stream(peer)
    received = credited = 0
    for _ in range(3):
        sent = peer.send(data(1, bytes(16_384)))
        received += 16_384
        credited += sum(item.number for item in sent if item.kind == WINDOW_UPDATE and item.stream == 0)
    assert 100 * WINDOW - received + credited >= 50 * WINDOW
    assert [item for item in peer.sent() if item.stream == 1] == []


def test_6_9_the_connection_window_never_shuts_whatever_streams_do() -> None:
    peer = server(max_streams=2)
    window = 2 * WINDOW
    peer.send(peer.request(1))
    for number in range(1, 200, 2):
        if number > 1:
            peer.send(rst_stream(number - 2), peer.request(number))
        sent = peer.send(data(number, bytes(16_384)), padded_data(number, bytes(1000), 200))
        window += sum(item.number for item in sent if item.kind == WINDOW_UPDATE and item.stream == 0)
        window -= 16_384 + 1201
        assert WINDOW - 20_000 < window <= 2 * WINDOW
    peer.alive()


def test_6_9_1_data_that_is_dropped_still_counts_for_the_connection() -> None:
    peer = server(max_streams=1)
    peer.send(peer.request(1))
    peer.conn.reset(peer.conn.streams[1], ErrorCode.CANCEL)
    peer.sent()
    credited = 0
    for _ in range(10):
        sent = peer.send(data(1, bytes(16_384)), padded_data(1, bytes(1000), 200))
        credited += sum(item.number for item in sent if item.kind == WINDOW_UPDATE and item.stream == 0)
    assert 10 * (16_384 + 1201) - WINDOW < credited <= 10 * (16_384 + 1201)


# -- credit for the stream: on forwarding


def test_credit_is_returned_when_half_the_window_was_forwarded(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(*[data(1, bytes(16_384)) for _ in range(3)])
    half = WINDOW // 2
    peer.conn.credit(stream, half - 1)
    assert peer.sent() == []
    peer.conn.credit(stream, 1)
    assert [(item.kind, item.stream, item.number) for item in peer.sent()] == [(WINDOW_UPDATE, 1, half)]
    peer.conn.credit(stream, half)
    assert [item.number for item in peer.sent()] == [half]
    # All that was credited may be sent again, and no byte more.
    rest = WINDOW - 3 * 16_384 + 2 * half
    while rest:
        size = min(rest, 16_384)
        assert [item for item in peer.send(data(1, bytes(size))) if item.stream] == []
        rest -= size
    peer.stream_error(1, ErrorCode.FLOW_CONTROL_ERROR, data(1, b"x"))


def test_credit_is_not_returned_to_who_has_ended(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(data(1, bytes(16_384)), data(1, bytes(16_384)), data(1, bytes(16_384), end=True))
    peer.conn.credit(stream, 3 * 16_384)
    assert peer.sent() == []


# -- section 8.1.1: content-length


def with_length(peer: Peer, length: int) -> None:
    """Stream 1, whose message says that it is this long."""
    extra = (b"content-length", b"%d" % length)
    if peer.conn.server:
        peer.send(peer.request(1, extra))
    else:
        peer.conn.open_stream(block(REQUEST), end=False)
        peer.send(peer.headers(1, [*RESPONSE, extra]))
    peer.events()


@pytest.mark.parametrize("pieces", [(10,), (4, 6), (0, 10, 0), (10, 0)])
def test_8_1_1_data_of_the_announced_length(peer: Peer, pieces: tuple[int, ...]) -> None:
    with_length(peer, 10)
    last = len(pieces) - 1
    peer.send(*[data(1, bytes(size), end=index == last) for index, size in enumerate(pieces)])
    passed_on = [index == last for index, size in enumerate(pieces) if size or index == last]
    assert body(peer) == (bytes(10), passed_on)


def test_8_1_1_data_of_the_announced_length_in_padded_frames_and_partial_ones(peer: Peer) -> None:
    with_length(peer, 10)
    whole = data(1, bytes(6), end=True)
    peer.send(padded_data(1, bytes(4), 9))
    peer.send(whole[:12])
    peer.send(whole[12:])
    assert body(peer) == (bytes(10), [False, False, True])


@pytest.mark.parametrize("pieces", [(9,), (0,), (11,), (4, 5), (4, 7)])
def test_8_1_1_data_of_another_length_is_a_stream_error(peer: Peer, pieces: tuple[int, ...]) -> None:
    with_length(peer, 10)
    last = len(pieces) - 1
    frames = [data(1, bytes(size), end=index == last) for index, size in enumerate(pieces)]
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, *frames)
    assert sum(len(event[2]) for event in peer.events("data")) <= 10


def test_8_1_1_too_much_data_is_refused_before_it_ends(peer: Peer) -> None:
    with_length(peer, 10)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, data(1, bytes(11)))


def test_8_1_1_trailers_before_all_of_the_announced_length_are_a_stream_error(peer: Peer) -> None:
    with_length(peer, 10)
    peer.stream_error(
        1, ErrorCode.PROTOCOL_ERROR, data(1, bytes(9)), peer.headers(1, TRAILERS, end=True)
    )
    assert peer.events("trailers") == []


def test_8_1_1_trailers_behind_all_of_the_announced_length(peer: Peer) -> None:
    with_length(peer, 10)
    peer.send(data(1, bytes(10)), peer.headers(1, TRAILERS, end=True))
    assert [event[0] for event in peer.events()] == ["data", "trailers"]


def test_8_1_1_content_length_of_zero_may_have_an_empty_frame(peer: Peer) -> None:
    with_length(peer, 0)
    peer.send(data(1, b"", end=True))
    assert body(peer) == (b"", [True])


def test_8_1_1_content_length_of_zero_has_no_data(peer: Peer) -> None:
    with_length(peer, 0)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, data(1, b"x"))
