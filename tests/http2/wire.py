"""The other end of a connection, made of bytes: builds and reads frames itself, and has `hpack` for its headers.

Nothing here is taken from the code under test, so that both can't be wrong in the same way.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import hpack

from proxy.http2 import (
    Buffer,
    ClientConnection,
    ConnectionFault,
    ErrorCode,
    HeaderBlock,
    RequestHead,
    ResponseHead,
    ServerConnection,
    Stream,
    Trailers,
)

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FLAG = 0x20

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS = 1, 2, 3
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 4, 5, 6
MAX_WINDOW = 2**31 - 1
WINDOW = 65_535

Fields = list[tuple[bytes, bytes]]

REQUEST: Fields = [
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":path", b"/inference.GRPCInferenceService/ModelInfer"),
    (b":authority", b"localhost"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]
RESPONSE: Fields = [(b":status", b"200"), (b"content-type", b"application/grpc")]
TRAILERS: Fields = [(b"grpc-status", b"0")]


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ends(self) -> bool:
        return self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM)

    @property
    def code(self) -> int:
        """The error code of RST_STREAM or GOAWAY."""
        at = 4 if self.kind == GOAWAY else 0
        return int.from_bytes(self.payload[at : at + 4], "big")

    @property
    def number(self) -> int:
        """The first four bytes: an increment, or GOAWAY's last stream."""
        return int.from_bytes(self.payload[:4], "big")


# -- frames


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def settings(*values: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HL", *pair) for pair in values))


def data(stream: int, payload: bytes, end: bool = False) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream, payload)


def padded_data(stream: int, payload: bytes, padding: int, end: bool = False) -> bytes:
    body = bytes((padding,)) + payload + bytes(padding)
    return frame(DATA, PADDED | (END_STREAM if end else 0), stream, body)


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, increment.to_bytes(4, "big"))


def rst_stream(stream: int, code: int = 8) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last: int, code: int = 0, debug: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big") + debug)


def ping(payload: bytes = b"01234567", ack: bool = False) -> bytes:
    return frame(PING, ACK if ack else 0, 0, payload)


def parse(data: bytes) -> list[Frame]:
    """All frames of a whole output; a client's preface before them is skipped."""
    frames = []
    pos = len(PREFACE) if data.startswith(PREFACE) else 0
    while pos < len(data):
        assert len(data) - pos >= 9, "the output ends inside a frame header"
        length = int.from_bytes(data[pos : pos + 3], "big")
        kind, flags = data[pos + 3], data[pos + 4]
        stream = int.from_bytes(data[pos + 5 : pos + 9], "big")
        payload = data[pos + 9 : pos + 9 + length]
        assert len(payload) == length, "the output ends inside a frame"
        frames.append(Frame(kind, flags, stream, payload))
        pos += 9 + length
    return frames


# -- the connections under test, which write down what they are told


class _Recorder:
    events: list[Any]
    fault: ConnectionFault | None = None

    def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        self.events.append(("data", stream.id, bytes(chunk), end))

    def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
        self.events.append(("trailers", stream.id, stream.section(trailers)))

    def on_reset(self, stream: Stream, code: int) -> None:
        self.events.append(("reset", stream.id, code))

    def on_stream_fault(self, stream: Stream, code: ErrorCode, reason: str) -> None:
        self.events.append(("stream fault", stream.id, code, reason))

    def on_goaway(self, last_stream_id: int, code: int, debug: bytes) -> None:
        self.events.append(("goaway", last_stream_id, code, debug))

    def on_connection_fault(self, fault: ConnectionFault) -> None:
        self.events.append(("fault", fault.code, fault.reason))
        self.fault = fault

    def on_stream_closed(self, stream: Stream) -> None:
        self.events.append(("closed", stream.id))

    def on_settings(self) -> None:
        self.events.append(("settings",))


class Server(_Recorder, ServerConnection):
    def __init__(self, stream_window: int = WINDOW, max_streams: int = 100, header_list: int = 65_536) -> None:
        self.events = []
        super().__init__([], stream_window, max_streams, header_list)

    def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
        self.events.append(("request", stream.id, stream.section(head), end))

    def on_request_too_large(self, stream: Stream, limit: int) -> None:
        self.events.append(("too large", stream.id, limit))


class Client(_Recorder, ClientConnection):
    def __init__(self, stream_window: int = WINDOW, max_streams: int = 100, header_list: int = 65_536) -> None:
        self.events = []
        super().__init__([], stream_window, max_streams, header_list)

    def on_response(self, stream: Stream, head: ResponseHead, end: bool) -> None:
        self.events.append(("response", stream.id, stream.section(head), end))

    def on_informational(self, stream: Stream, head: ResponseHead) -> None:
        self.events.append(("informational", stream.id, stream.section(head)))

    def on_refused(self, stream: Stream, code: int, debug: bytes) -> None:
        self.events.append(("refused", stream.id, code, debug))


# -- the other end


class Peer:
    """The peer of one connection under test, whose preface has been exchanged."""

    def __init__(self, conn: Server | Client, *values: tuple[int, int]) -> None:
        self.conn: Any = conn
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder(max_header_list_size=2**24)
        self._heads: list[tuple[int, Fields, bool]] = []
        self.greeting = self.sent()
        self.send((PREFACE if conn.server else b"") + settings(*values))
        self.events()

    def send(self, *frames: bytes) -> list[Frame]:
        """Give the connection these frames, in an interval of their own -> the frames that it sends."""
        self.conn.refill()
        self.conn.receive(b"".join(frames))
        return self.sent()

    def sent(self) -> list[Frame]:
        """What the connection has sent; its header blocks are decoded in order, see `heads`."""
        size, woken = self.conn.out_size, self.conn.wake.count(self.conn)
        out = b"".join(self.conn.take_output())
        assert size == len(out), "out_size is not the size of the output"
        assert woken == (1 if out else 0), "whoever flushes is told of output once"
        self.conn.wake.clear()
        frames = parse(out)
        self._decode_heads(frames)
        return frames

    def heads(self) -> list[tuple[int, Fields, bool]]:
        """(stream, fields, END_STREAM) of the header sections that the connection has sent since the last call."""
        heads = self._heads[:]
        self._heads.clear()
        return heads

    def _decode_heads(self, frames: list[Frame]) -> None:
        first, block = Frame(0, 0, 0, b""), b""
        for item in frames:
            if item.kind not in (HEADERS, CONTINUATION):
                assert not block, "a header block is interrupted"
                continue
            first = item if item.kind == HEADERS else first
            assert item.stream == first.stream
            block += item.payload
            if item.flags & END_HEADERS:
                fields = [(bytes(name), bytes(value)) for name, value in self.decoder.decode(block, raw=True)]
                self._heads.append((first.stream, fields, first.ends))
                block = b""
        assert not block, "a header block isn't finished"

    def events(self, *kinds: str) -> list[Any]:
        """What the connection was told since the last call; only these kinds if any are named."""
        events = self.conn.events[:]
        self.conn.events.clear()
        return [event for event in events if not kinds or event[0] in kinds]

    def block(self, fields: Fields) -> bytes:
        return self.encoder.encode(fields)

    def headers(self, stream: int, fields: Fields, end: bool = False) -> bytes:
        return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, self.block(fields))

    def request(self, stream: int, *extra: tuple[bytes, bytes], end: bool = False) -> bytes:
        return self.headers(stream, REQUEST + list(extra), end)

    # -- expectations

    def connection_error(self, code: ErrorCode, *frames: bytes) -> list[Frame]:
        """These frames end the connection: GOAWAY with this code is the last thing sent, and said once."""
        sent = self.send(*frames)
        goaways = [item for item in sent if item.kind == GOAWAY]
        assert [item.code for item in goaways] == [code], sent
        assert sent[-1] is goaways[0]
        assert self.conn.closed
        assert [event[1] for event in self.events("fault")] == [code]
        assert self.send(ping()) == [], "a closed connection takes nothing more"
        return sent

    def stream_error(self, stream: int, code: ErrorCode, *frames: bytes) -> list[Frame]:
        """These frames end one stream with RST_STREAM, and the connection goes on."""
        sent = self.send(*frames)
        resets = [item for item in sent if item.kind == RST_STREAM]
        assert [(item.stream, item.code) for item in resets] == [(stream, code)], sent
        assert stream not in self.conn.streams
        self.alive()
        return sent

    def ignored(self, *frames: bytes) -> None:
        """These frames change nothing."""
        assert self.send(*frames) == []
        assert self.events() == []
        self.alive()

    def alive(self) -> None:
        assert not self.conn.closed
        assert self.send(ping(b"is-alive")) == [Frame(PING, ACK, 0, b"is-alive")]


def server(*values: tuple[int, int], **options: int) -> Peer:
    """A server under test, and the client that has announced these settings."""
    return Peer(Server(**options), *values)


def client(*values: tuple[int, int], **options: int) -> Peer:
    """A client under test, and the server that has announced these settings."""
    return Peer(Client(**options), *values)


def open_stream(peer: Peer, end: bool = False) -> Stream:
    """Stream 1, in use in both directions: the request's head has come or gone, and so has the response's.

    `end`: the peer's side of it has ended already.
    """
    conn = peer.conn
    if isinstance(conn, Server):
        peer.send(peer.request(1, end=end))
        stream = conn.streams[1]
        conn.send_headers(stream, block(RESPONSE))
    else:
        stream = conn.open_stream(block(REQUEST), end=False)
        peer.send(peer.headers(1, RESPONSE, end))
    peer.sent()
    peer.heads()
    peer.events()
    return stream


def block(fields: Fields) -> HeaderBlock:
    """Fields to be sent."""
    return HeaderBlock(fields, checked=True)


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Break out of an endless loop. Only for loops: whatever ends, ends far sooner."""

    def alarm(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s: an endless loop")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
