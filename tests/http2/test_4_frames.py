"""RFC 9113 sections 4 and 5.5: frame sizes, the reserved bit, frames of unknown types, header blocks in pieces."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode
from tests.http2.wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    SETTINGS,
    WINDOW,
    WINDOW_UPDATE,
    Frame,
    Peer,
    block,
    client,
    data,
    frame,
    open_stream,
    ping,
    server,
    window_update,
)

# -- 4.1


def test_4_1_the_reserved_bit_is_ignored(peer: Peer) -> None:
    open_stream(peer)
    peer.send(frame(DATA, 0, 1 | 1 << 31, b"abc"))
    assert peer.events() == [("data", 1, b"abc", False)]
    assert peer.send(frame(PING, 0, 1 << 31, bytes(8))) == [Frame(PING, ACK, 0, bytes(8))]


def test_4_1_the_reserved_bit_of_a_window_update_is_ignored(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.send(window_update(1, 5 | 1 << 31))
    assert stream.send_window == WINDOW + 5


def test_4_1_unknown_flags_are_ignored(peer: Peer) -> None:
    open_stream(peer)
    peer.send(frame(DATA, 0xF6, 1, b"abc"))
    assert peer.events() == [("data", 1, b"abc", False)]


# -- 4.2


@pytest.mark.parametrize("kind", [*range(10), 0x42])
def test_4_2_a_frame_that_is_too_large_is_a_connection_error(peer: Peer, kind: int) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.FRAME_SIZE_ERROR, frame(kind, 0, 1, bytes(16_385)))


def test_4_2_too_large_is_seen_at_the_frame_header(peer: Peer) -> None:
    peer.connection_error(ErrorCode.FRAME_SIZE_ERROR, frame(0x42, 0, 0, bytes(16_385))[:9])


def test_4_2_a_frame_may_be_as_large_as_we_allow(peer: Peer) -> None:
    open_stream(peer)
    peer.send(data(1, bytes(16_384)))
    assert peer.events() == [("data", 1, bytes(16_384), False)]
    peer.ignored(frame(0x42, 0, 1, bytes(16_384)))


@pytest.mark.parametrize(
    ("kind", "stream", "length"),
    [
        (RST_STREAM, 1, 3),
        (RST_STREAM, 1, 5),
        (SETTINGS, 0, 5),
        (SETTINGS, 0, 7),
        (PING, 0, 7),
        (PING, 0, 9),
        (GOAWAY, 0, 7),
        (WINDOW_UPDATE, 0, 3),
        (WINDOW_UPDATE, 1, 5),
    ],
)
def test_4_2_a_frame_of_a_wrong_size_is_a_connection_error(peer: Peer, kind: int, stream: int, length: int) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.FRAME_SIZE_ERROR, frame(kind, 0, stream, bytes(length)))


@pytest.mark.parametrize("length", [4, 6])
def test_6_3_priority_of_a_wrong_size_is_a_stream_error(peer: Peer, length: int) -> None:
    open_stream(peer)
    peer.stream_error(1, ErrorCode.FRAME_SIZE_ERROR, frame(PRIORITY, 0, 1, bytes(length)))
    assert peer.events("stream fault")[0][:3] == ("stream fault", 1, ErrorCode.FRAME_SIZE_ERROR)


@pytest.mark.parametrize("flags", [PADDED, PADDED | PRIORITY_FLAG])
@pytest.mark.parametrize("kind", [DATA, HEADERS])
def test_4_2_a_padded_frame_without_its_pad_length_is_a_connection_error(peer: Peer, kind: int, flags: int) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.FRAME_SIZE_ERROR, frame(kind, flags | END_HEADERS, 1, b""))


def test_6_2_headers_too_short_for_their_priority_are_a_connection_error(peer: Peer) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.FRAME_SIZE_ERROR, frame(HEADERS, END_HEADERS | PRIORITY_FLAG, 1, bytes(4)))


# -- 5.5


@pytest.mark.parametrize("kind", [0xA, 0x10, 0xFF])
@pytest.mark.parametrize("stream", [0, 1, 2, 77])
def test_5_5_frames_of_unknown_types_are_ignored(peer: Peer, kind: int, stream: int) -> None:
    open_stream(peer)
    peer.ignored(frame(kind, 0xFF, stream, b"whatever"))


# -- which stream a frame may name


@pytest.mark.parametrize(
    "wrong",
    [
        frame(DATA, 0, 0, b"x"),
        frame(DATA, PADDED, 0, b"\0x"),
        frame(HEADERS, END_HEADERS, 0, b"\x82"),
        frame(PRIORITY, 0, 0, bytes(5)),
        frame(RST_STREAM, 0, 0, bytes(4)),
        frame(CONTINUATION, END_HEADERS, 0, b"\x82"),
        frame(SETTINGS, 0, 1),
        frame(SETTINGS, ACK, 1),
        frame(PING, 0, 1, bytes(8)),
        frame(GOAWAY, 0, 1, bytes(8)),
    ],
    ids=["6.1", "6.1 padded", "6.2", "6.3", "6.4", "6.10", "6.5", "6.5 ACK", "6.7", "6.8"],
)
def test_6_a_frame_for_the_connection_on_a_stream_or_the_reverse_is_a_connection_error(
    peer: Peer, wrong: bytes
) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, wrong)


def test_6_6_push_promise_is_a_connection_error(peer: Peer) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2\x82"))


# -- 4.3, 6.2 and 6.10: header blocks in pieces


def head_of(peer: Peer) -> bytes:
    return peer.block(REQUEST if peer.conn.server else RESPONSE)


def idle(peer: Peer) -> int:
    """A stream whose header section the peer may send now."""
    if not peer.conn.server:
        peer.conn.open_stream(block(REQUEST), end=True)
        peer.sent()
    return 1


@pytest.mark.parametrize("sizes", [(1, 1), (5, 0, 5), (0, 20), (3, 3, 3, 3)])
def test_6_10_a_header_block_may_come_in_pieces(peer: Peer, sizes: tuple[int, ...]) -> None:
    stream = idle(peer)
    text = head_of(peer)
    pieces, pos = [], 0
    for size in sizes:
        pieces.append(text[pos : pos + size])
        pos += size
    out = [frame(HEADERS, END_STREAM, stream, pieces[0])]
    out += [frame(CONTINUATION, 0, stream, piece) for piece in pieces[1:]]
    assert peer.send(*out) == []
    assert peer.events() == []
    peer.send(frame(CONTINUATION, END_HEADERS, stream, text[pos:]))
    head = peer.events("request", "response")[0]
    assert head[1:] == (stream, REQUEST if peer.conn.server else RESPONSE, True)
    peer.alive()


@pytest.mark.parametrize(
    "between",
    [
        ping(),
        frame(DATA, 0, 1, b"x"),
        frame(CONTINUATION, END_HEADERS, 3, b""),
        frame(HEADERS, END_HEADERS, 1, b"\x88"),
        frame(0x42),
        window_update(0, 1),
    ],
    ids=["PING", "DATA", "CONTINUATION elsewhere", "HEADERS", "unknown", "WINDOW_UPDATE"],
)
def test_6_10_a_header_block_must_not_be_interrupted(peer: Peer, between: bytes) -> None:
    stream = idle(peer)
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, frame(HEADERS, 0, stream, head_of(peer)), between)


@pytest.mark.parametrize("finished", [False, True])
def test_6_10_continuation_without_headers_is_a_connection_error(peer: Peer, finished: bool) -> None:
    stream = idle(peer)
    before = frame(HEADERS, END_HEADERS, stream, head_of(peer)) if finished else b""
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, before, frame(CONTINUATION, END_HEADERS, stream, b"\x82"))


def test_6_10_end_stream_is_that_of_the_headers_frame() -> None:
    peer = server()
    text = peer.block(REQUEST)
    peer.send(frame(HEADERS, 0, 1, text[:4]), frame(CONTINUATION, END_HEADERS | END_STREAM, 1, text[4:]))
    assert peer.events("request")[0][3] is False


def test_10_5_a_flood_of_continuations_ends_the_connection(peer: Peer) -> None:
    """Without END_HEADERS nothing would ever be decoded, and each frame kept."""
    stream = idle(peer)
    peer.conn.receive(frame(HEADERS, 0, stream, b""))
    for _ in range(1000):
        peer.conn.receive(frame(CONTINUATION, 0, stream, b""))
    assert peer.events("fault")[0][1] == ErrorCode.ENHANCE_YOUR_CALM


def test_10_5_1_a_header_block_may_come_in_many_pieces() -> None:
    """As many as a sender makes whose frames are half as long as they may be, and some more."""
    peer = server(header_list=262_144)
    text = peer.encoder.encode([*REQUEST, (b"x-long", b"v" * 250_000)], huffman=False)
    pieces = [text[at : at + 8192] for at in range(0, len(text), 8192)]
    peer.conn.receive(frame(HEADERS, 0, 1, b"") + b"".join(frame(CONTINUATION, 0, 1, piece) for piece in pieces))
    peer.send(frame(CONTINUATION, END_HEADERS, 1))
    assert [event[0] for event in peer.events()] == ["request"]


def test_10_5_1_a_header_block_far_over_the_limit_ends_the_connection() -> None:
    peer = server(header_list=20_000)
    out = [frame(CONTINUATION, 0, 1, bytes(16_000)) for _ in range(2)]
    peer.connection_error(ErrorCode.ENHANCE_YOUR_CALM, frame(HEADERS, 0, 1, bytes(16_000)), *out)


def test_10_5_1_a_header_block_of_the_limit_is_taken_in_pieces() -> None:
    peer = server(header_list=65_536)
    text = peer.encoder.encode([*REQUEST, (b"x-long", b"v" * 60_000)], huffman=False)
    assert len(text) > 60_000
    out = [frame(HEADERS, 0, 1, text[:16_384])]
    out += [frame(CONTINUATION, 0, 1, text[at : at + 16_384]) for at in range(16_384, len(text), 16_384)]
    peer.send(*out, frame(CONTINUATION, END_HEADERS, 1, b""))
    assert [event[0] for event in peer.events()] == ["request"]


def test_4_3_a_block_that_cant_be_decoded_ends_the_connection(peer: Peer) -> None:
    stream = idle(peer)
    peer.connection_error(ErrorCode.COMPRESSION_ERROR, frame(HEADERS, END_HEADERS, stream, b"\x80"))


def test_4_3_a_block_that_cant_be_decoded_ends_the_connection_also_as_trailers(peer: Peer) -> None:
    open_stream(peer)
    peer.connection_error(ErrorCode.COMPRESSION_ERROR, frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xff\xff"))


def test_6_10_a_long_header_section_is_sent_in_pieces(peer: Peer) -> None:
    """As large as the default allows: a larger SETTINGS_MAX_FRAME_SIZE obliges nobody."""
    fields = [(b"x-long", b"v" * 40_000)]
    stream = open_stream(peer)
    peer.conn.send_headers(stream, block(fields), end=True)
    sent = [item for item in peer.sent() if item.kind in (HEADERS, CONTINUATION)]
    assert [item.kind for item in sent] == [HEADERS, CONTINUATION, CONTINUATION]
    assert [item.flags for item in sent] == [END_STREAM, 0, END_HEADERS]
    assert max(len(item.payload) for item in sent) == 16_384
    assert peer.heads() == [(1, fields, True)]


def test_4_2_a_header_block_of_exactly_one_frame_is_not_split() -> None:
    stream_peer = client((MAX_FRAME_SIZE, 16_384))
    # 1 byte of pattern, 1 + 6 of name, 3 + length of value
    fields = [(b"x-long", b"v" * (16_384 - 11))]
    stream_peer.conn.open_stream(block(fields), end=False)
    sent = stream_peer.sent()
    assert [(item.kind, item.flags, len(item.payload)) for item in sent] == [(HEADERS, END_HEADERS, 16_384)]
