"""A relay in miniature: what comes on the connection under test goes out on another one, as the gate does it.

Reads are views of a buffer that is overwritten once the output was taken. What the other connection sends is read by
hand and with `hpack`: each message has to be what was told of it, whatever windows it had to wait for. Meanwhile bytes
that came are forwarded, waiting, or credited, and none of them is two of these.
"""

from __future__ import annotations

from random import Random

import hpack

from proxy.http2 import Buffer, ConnectionFault, ErrorCode, RequestHead, ResponseHead, Stream, Trailers
from proxy.http2.headers import list_size
from tests.fuzz.roles import FuzzClient, FuzzServer
from tests.http2 import wire
from tests.http2.wire import PREFACE, REQUEST, RESPONSE, TRAILERS, Client, Fields, Server, block

_WIDE = 10_000_000
_OTHERS_STREAMS = 10_000


class _Forwarding:
    """Passes on what it is told; `partners` are the streams of `other` that carry it, by stream of ours."""

    other: Server | Client
    partners: dict[int, Stream]

    def link(self, stream: Stream, partner: Stream) -> None:
        stream.partner, partner.partner = partner, stream
        self.partners[stream.id] = partner

    def cut(self, stream: Stream) -> None:
        """The message ends here, on the other side too."""
        partner = stream.partner
        if partner is not None:
            partner.conn.reset(partner, ErrorCode.CANCEL)
            stream.partner = partner.partner = None

    def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        super().on_data(stream, chunk, end)  # type: ignore[misc]
        if stream.partner is not None:
            stream.partner.conn.send_data(stream.partner, chunk, end)

    def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
        super().on_trailers(stream, trailers)  # type: ignore[misc]
        if stream.partner is not None:
            stream.partner.conn.send_trailers(stream.partner, trailers, stream.passing)

    def on_reset(self, stream: Stream, code: int) -> None:
        super().on_reset(stream, code)  # type: ignore[misc]
        self.cut(stream)

    def on_stream_fault(self, stream: Stream, code: ErrorCode, reason: str) -> None:
        super().on_stream_fault(stream, code, reason)  # type: ignore[misc]
        self.cut(stream)

    def on_connection_fault(self, fault: ConnectionFault) -> None:
        super().on_connection_fault(fault)  # type: ignore[misc]
        for stream in self.streams.values():  # type: ignore[attr-defined]
            self.cut(stream)


class ForwardingServer(_Forwarding, FuzzServer):
    other: Client

    def __init__(self, flags: int, window: int) -> None:
        self.partners = {}
        self.other = Client(max_streams=_OTHERS_STREAMS)
        self.other.receive(wire.settings((wire.INITIAL_WINDOW_SIZE, window)))
        super().__init__(flags)

    def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
        super().on_request(stream, head, end)
        self.link(stream, self.other.open_stream(head, end, stream.passing))

    def answer(self, stream: Stream) -> None:
        self.send_headers(stream, block(RESPONSE))
        self.send_trailers(stream, block(TRAILERS))


class ForwardingClient(_Forwarding, FuzzClient):
    other: Server

    def __init__(self, flags: int, window: int) -> None:
        self.partners = {}
        self.other = Server(max_streams=_OTHERS_STREAMS)
        super().__init__(flags)
        encoder = hpack.Encoder()
        requests = [
            wire.frame(wire.HEADERS, wire.END_HEADERS | stream.local_closed, stream.id, encoder.encode(REQUEST))
            for stream in self.streams.values()
        ]
        greeting = PREFACE + wire.settings((wire.INITIAL_WINDOW_SIZE, window))
        self.other.receive(greeting + b"".join(requests))
        for stream in self.streams.values():
            self.link(stream, self.other.streams[stream.id])

    def on_response(self, stream: Stream, head: ResponseHead, end: bool) -> None:
        super().on_response(stream, head, end)
        if stream.partner is not None:
            self.other.send_headers(stream.partner, head, end, stream.passing)

    def on_informational(self, stream: Stream, head: ResponseHead) -> None:
        super().on_informational(stream, head)
        if stream.partner is not None:
            self.other.send_headers(stream.partner, head, False, stream.passing)

    def on_refused(self, stream: Stream, code: int, debug: bytes) -> None:
        super().on_refused(stream, code, debug)
        self.cut(stream)

    def answer(self, stream: Stream) -> None:
        """A client has nothing to answer."""


class _Sent:
    """What a connection has sent, by stream."""

    def __init__(self) -> None:
        self.sections: dict[int, list[Fields]] = {}
        self.bodies: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self._decoder = hpack.Decoder(max_header_list_size=2**24)
        self._block = b""

    def take(self, text: bytes) -> None:
        for item in wire.parse(text):
            if item.kind in (wire.HEADERS, wire.CONTINUATION):
                self._block += item.payload
                if item.flags & wire.END_HEADERS:
                    fields = [
                        (bytes(name), bytes(value)) for name, value in self._decoder.decode(self._block, raw=True)
                    ]
                    self.sections.setdefault(item.stream, []).append(fields)
                    self._block = b""
            elif item.kind == wire.DATA:
                self.bodies.setdefault(item.stream, bytearray()).extend(item.payload)
            elif item.kind == wire.RST_STREAM:
                self.reset.add(item.stream)
            if item.ends:
                self.ended.add(item.stream)


def check_forwarding(flags: int, pieces: list[bytes], random: Random, is_server: bool) -> None:
    window = random.choice((0, 10, 100, 65_535))
    conn: ForwardingServer | ForwardingClient
    conn = ForwardingServer(flags, window) if is_server else ForwardingClient(flags, window)
    sent, own = _Sent(), b""
    for piece in pieces:
        buffer = bytearray(piece)
        conn.receive(memoryview(buffer))
        sent.take(b"".join(conn.other.take_output()))
        own += b"".join(conn.take_output())
        buffer[:] = b"\xee" * len(buffer)
        _check_credit(conn)
        if conn.closed:
            break
        _act(conn, random)
        _check_credit(conn)
    _let_all_go(conn, sent)
    own += b"".join(conn.take_output())
    assert not conn.other.closed
    if conn.closed:
        assert wire.parse(own)[-1].kind == wire.GOAWAY, "something is said after GOAWAY"
    _compare(conn, sent)


def _act(conn: ForwardingServer | ForwardingClient, random: Random) -> None:
    """The other end takes some of it, or its socket takes nothing for a while; some calls are answered."""
    other, what = conn.other, random.randrange(8)
    if what == 0:
        other.paused = True
    elif what <= 2:
        other.resume()
    elif what <= 4 and other.streams:
        other.receive(wire.window_update(random.choice(list(other.streams)), random.choice((1, 50, 5000))))
    elif what == 5 and conn.streams:
        stream = random.choice(list(conn.streams.values()))
        if stream.remote_closed and not stream.local_closed and stream.backlog is None:
            conn.answer(stream)


def _let_all_go(conn: ForwardingServer | ForwardingClient, sent: _Sent) -> None:
    other = conn.other
    other.receive(wire.settings((wire.INITIAL_WINDOW_SIZE, _WIDE)) + wire.window_update(0, _WIDE))
    other.resume()
    sent.take(b"".join(other.take_output()))
    _check_credit(conn)
    assert other.queued == 0, "something waits that nothing stops"


def _check_credit(conn: ForwardingServer | ForwardingClient) -> None:
    """Each byte that came on a stream is credited, about to be, or waits for the other side; the sums are right."""
    other = conn.other
    backlogs = [stream.backlog for stream in other.streams.values() if stream.backlog is not None]
    for backlog in backlogs:
        trailers = 0 if backlog.trailers is None else list_size(backlog.trailers, backlog.passing)
        assert backlog.waiting == sum(map(len, backlog.chunks)) + trailers
    assert other.queued == conn.stuck == sum(backlog.waiting for backlog in backlogs), "bytes that wait are miscounted"
    for stream in conn.streams.values():
        assert stream.window <= conn.stream_window, "a window beyond what was allowed"
        partner = stream.partner
        if partner is None or stream.remote_closed or other.streams.get(partner.id) is not partner:
            continue
        queued = partner.backlog.waiting if partner.backlog is not None else 0
        under_way = conn._data_left if conn._data_stream is stream else 0
        came = stream.window - stream.recv_window - under_way
        assert came == stream.unacked + queued, "credit for what was not forwarded, or none for what was"


def _compare(conn: ForwardingServer | ForwardingClient, sent: _Sent) -> None:
    """What was told of each message against what went out for it."""
    heads: dict[int, list[Fields]] = {}
    bodies: dict[int, bytearray] = {}
    ended: set[int] = set()
    for kind, *rest in conn.events:
        if kind in ("request", "response", "informational", "trailers"):
            heads.setdefault(rest[0], []).append([(bytes(name), bytes(value)) for name, value in rest[1]])
        elif kind == "data":
            bodies.setdefault(rest[0], bytearray()).extend(rest[1])
        if kind == "trailers" or (kind in ("request", "response", "data") and rest[2]):
            ended.add(rest[0])
    for stream_id, partner in conn.partners.items():
        told, went = heads.get(stream_id, []), sent.sections.get(partner.id, [])
        body, passed = bodies.get(stream_id, b""), sent.bodies.get(partner.id, b"")
        if partner.id in sent.reset:
            assert told[: len(went)] == went, "fields were changed"
            assert body[: len(passed)] == passed, "a body was changed"
        else:
            assert told == went, "fields were changed, or are missing"
            assert body == passed, "a body was changed, or is incomplete"
            assert (stream_id in ended) == (partner.id in sent.ended), "a message ended, and its copy did not"
