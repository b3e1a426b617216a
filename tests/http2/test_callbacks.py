"""What the layer above may do from inside a callback, and what is remembered of header blocks between them."""

from __future__ import annotations

from proxy.http2 import Buffer, ConnectionFault, ErrorCode, RequestHead, Stream, Trailers
from tests.http2.wire import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    Client,
    Peer,
    Server,
    block,
    data,
    frame,
    ping,
)


def test_nothing_is_read_after_a_callback_has_ended_the_connection() -> None:
    class Strict(Server):
        def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
            super().on_request(stream, head, end)
            self.fail(ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "no requests today"))

    peer = Peer(Strict())
    sent = peer.send(peer.request(1), ping(), peer.request(3))
    assert [(item.kind, item.code) for item in sent] == [(GOAWAY, ErrorCode.ENHANCE_YOUR_CALM)]
    assert [event[0] for event in peer.events()] == ["request", "fault"]


def test_nothing_is_read_after_data_has_ended_the_connection() -> None:
    class Strict(Server):
        def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
            super().on_data(stream, chunk, end)
            self.fail(ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "no data today"))

    peer = Peer(Strict())
    peer.send(peer.request(1), data(1, b"a"), data(1, b"b"), ping())
    assert [event[0] for event in peer.events()] == ["request", "data", "fault"]


def test_a_request_can_be_answered_while_it_is_told() -> None:
    class Quick(Server):
        def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
            super().on_request(stream, head, end)
            self.send_headers(stream, block(RESPONSE), end=True)

    peer = Peer(Quick())
    sent = peer.send(peer.request(1, end=True), peer.request(3), data(3, b"abc", end=True))
    assert [(item.kind, item.stream) for item in sent] == [(HEADERS, 1), (HEADERS, 3), (RST_STREAM, 3)]
    assert [event[:2] for event in peer.events()] == [("request", 1), ("closed", 1), ("request", 3), ("closed", 3)]


def test_a_stream_can_be_reset_while_its_last_data_or_trailers_are_told() -> None:
    """It is reported closed once."""

    class Impatient(Client):
        def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
            super().on_data(stream, chunk, end)
            self.reset(stream, ErrorCode.CANCEL)

        def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
            super().on_trailers(stream, trailers)
            self.reset(stream, ErrorCode.CANCEL)

    peer = Peer(Impatient())
    for stream in (1, 3):
        peer.conn.open_stream(block(REQUEST), end=True)
        peer.send(peer.headers(stream, RESPONSE))
    peer.events()
    partial = data(1, b"abc", end=True)
    peer.conn.receive(partial[:-1])
    peer.conn.receive(partial[-1:])
    peer.send(peer.headers(3, TRAILERS, end=True))
    told = [event[:2] for event in peer.events()]
    assert told == [("data", 1), ("closed", 1), ("trailers", 3), ("closed", 3)]


def test_a_stream_can_be_ended_while_its_last_data_is_told() -> None:
    class Echo(Server):
        def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
            self.send_data(stream, chunk, end)

    peer = Peer(Echo())
    peer.send(peer.request(1))
    peer.conn.send_headers(peer.conn.streams[1], block(RESPONSE))
    sent = peer.send(data(1, b"abc"), data(1, b"def", end=True))
    assert [(item.kind, item.payload, item.ends) for item in sent if item.kind != HEADERS] == [
        (DATA, b"abc", False),
        (DATA, b"def", True),
    ]
    assert peer.conn.streams == {}


def plain(stream: int, value: bytes, end: bool = False) -> bytes:
    """HEADERS with one literal field that touches no table."""
    text = b"\x00\x01x\x7f" + bytes(((len(value) - 127) & 127 | 128, (len(value) - 127) >> 7)) + value
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, text)


def use(peer: Peer, number: int) -> Stream:
    """A further stream, on which trailers may come."""
    if not peer.conn.server:
        stream: Stream = peer.conn.open_stream(block(REQUEST), end=False)
        peer.send(peer.headers(number, RESPONSE))
        return stream
    peer.send(peer.request(number))
    opened: Stream = peer.conn.streams[number]
    return opened


def test_long_header_blocks_are_understood_again_and_again(peer: Peer) -> None:
    """They are not remembered."""
    for number in (1, 3, 5):
        use(peer, number)
        peer.send(plain(number, b"v" * 1500, end=True))
        assert peer.events("trailers") == [("trailers", number, [(b"x", b"v" * 1500)])]


def test_known_trailers_of_a_stream_that_was_reset_are_ignored(peer: Peer) -> None:
    for number in range(1, 20, 2):
        stream = use(peer, number)
        if number % 4 == 1:
            peer.conn.reset(stream, ErrorCode.CANCEL)
            peer.sent()
            peer.events()
            peer.ignored(peer.headers(number, TRAILERS, end=True))
        else:
            peer.send(peer.headers(number, TRAILERS, end=True))
            assert peer.events("trailers") == [("trailers", number, TRAILERS)]
