"""What must hold of a connection whatever bytes come, checked by means that are not the core's own.

Shared by the server's and the client's target. Needs no atheris: `tests/fuzz/test_corpus.py` runs the same functions.

An input is two bytes of choices and then the bytes that the connection receives:
    byte 0   see `roles`
    byte 1   seed for where reads are cut and for what the layer above does
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

import h2.config
import h2.connection
import h2.settings
import hpack
from hyperframe.frame import Frame as StrictFrame

from proxy.http2 import ErrorCode, Stream
from tests.fuzz.forwarding import check_forwarding
from tests.fuzz.roles import ACTIVE, BYTEWISE, FORWARDS, GREETED
from tests.http2 import wire
from tests.http2.wire import PREFACE, REQUEST, RESPONSE, TRAILERS, Client, Fields, Server, block

_ANSWER_PER_BYTE = 3  # no frame is shorter than 9 bytes, no answer longer than 13, and padded DATA may have two
_LAST_WORDS = 9 + 8 + 256  # GOAWAY with its text
_CODES = h2.settings.SettingCodes

Conn = Server | Client
Make = Callable[[int], Conn]


class Case(NamedTuple):
    """An input, taken apart."""

    flags: int
    random: Random
    text: bytes

    @classmethod
    def of(cls, data: bytes, is_server: bool) -> Case:
        flags, seed = (data[0], data[1]) if len(data) >= 2 else (0, 0)
        greeting = (PREFACE if is_server else b"") + wire.settings() if flags & GREETED else b""
        return cls(flags, Random(seed), greeting + data[2:])


def split(text: bytes) -> list[bytes]:
    """The frames of a text, by their lengths alone; the last may be incomplete."""
    frames, pos = [], 0
    while pos < len(text):
        length = int.from_bytes(text[pos : pos + 3], "big")
        frames.append(text[pos : pos + 9 + length])
        pos += 9 + length
    return frames


def cut(text: bytes, random: Random) -> list[bytes]:
    """The same bytes in reads of any size, often of one byte or at the edges of frame headers."""
    pieces, pos = [], 0
    while pos < len(text):
        size = random.choice((1, 8, 9, 10, 24, random.randint(1, 60), random.randint(1, 20_000)))
        pieces.append(text[pos : pos + size])
        pos += size
    return pieces


# -- without a layer above


def told(conn: Conn) -> list[Any]:
    """What the connection told, with the pieces of DATA joined."""
    out: list[Any] = []
    for event in conn.events:
        if event[0] == "data" and out and out[-1][:2] == event[:2] and not out[-1][3]:
            out[-1] = ("data", event[1], out[-1][2] + event[2], event[3])
        elif event[0] != "data" or event[2] or event[3]:
            out.append(event)
    return out


def read(conn: Conn, pieces: list[bytes], views: bool = False) -> tuple[list[Any], bytes, bool]:
    """views: as views of a buffer that is overwritten once the output was taken."""
    out = b"".join(conn.take_output())
    for piece in pieces:
        buffer = bytearray(piece)
        conn.receive(memoryview(buffer) if views else piece)
        out += b"".join(conn.take_output())
        buffer[:] = b"\xee" * len(buffer)
    if conn.closed:
        conn.receive(wire.ping())
        assert conn.take_output() == [], "something is said after the end"
    return told(conn), out, conn.closed


def check_reading(make: Make, case: Case, is_server: bool) -> None:
    """No exception, bounded output, GOAWAY last and once, and all of it the same however the bytes are cut."""
    fresh = make(case.flags)
    greeting = len(b"".join(fresh.take_output()))
    opened = fresh.last_local_id
    whole = make(case.flags)
    outcome = read(whole, [case.text])
    sent = outcome[1]
    assert len(sent) <= greeting + _LAST_WORDS + _ANSWER_PER_BYTE * len(case.text), "more is sent than was asked for"
    check_frames(sent)
    check_resets(sent, highest_opened(case.text) if is_server else opened)
    check_end(whole, sent)
    check_sections(case.text, whole.events, is_server)
    assert read(make(case.flags), cut(case.text, case.random), views=True) == outcome, "another cut, another result"
    if case.flags & BYTEWISE and len(case.text) <= 512:
        singly = [case.text[at : at + 1] for at in range(len(case.text))]
        assert read(make(case.flags), singly) == outcome, "byte by byte, another result"


def check_frames(sent: bytes) -> None:
    """Every frame is one that hyperframe knows and can parse, and none is cut off."""
    for text in split(sent.removeprefix(PREFACE)):
        frame, length = StrictFrame.parse_frame_header(memoryview(text[:9]), strict=True)
        assert len(text) == 9 + length, "the output ends inside a frame"
        frame.parse_body(memoryview(text[9:]))


def check_sections(text: bytes, events: list[Any], is_server: bool) -> None:
    """A header section that was told of has the fields that `hpack` finds in it, those of one name in their order."""
    came: dict[int, list[Fields]] = {}
    for stream, fields in _sections(text.removeprefix(PREFACE) if is_server else text):
        if not is_server:
            fields = [(name, value.strip(b" \t")) for name, value in fields]  # see headers.interner
        came.setdefault(stream, []).append(sorted(fields, key=lambda field: field[0]))
    for event in events:
        if event[0] in ("request", "response", "informational", "trailers"):
            told = sorted([(bytes(name), bytes(value)) for name, value in event[2]], key=lambda field: field[0])
            sections = came.get(event[1], [])
            assert told in sections, "a header section that did not come like this"
            del sections[: sections.index(told) + 1]  # what was refused before it was not told of


def _sections(text: bytes) -> Iterator[tuple[int, Fields]]:
    """Stream and fields of the header blocks in a text, as far as it makes sense."""
    decoder, block, stream = hpack.Decoder(max_header_list_size=2**24), b"", 0
    for item in split(text):
        if len(item) < 9 or len(item) != 9 + int.from_bytes(item[:3], "big"):
            return
        kind, flags, payload = item[3], item[4], item[9:]
        if kind not in (wire.HEADERS, wire.CONTINUATION):
            continue
        if kind == wire.HEADERS:
            stream, block = int.from_bytes(item[5:9], "big") & 0x7FFFFFFF, b""
            pad = payload[0] if flags & wire.PADDED and payload else 0
            start = bool(flags & wire.PADDED) + 5 * bool(flags & wire.PRIORITY_FLAG)
            payload = payload[start : len(payload) - pad]
        block += payload
        if flags & wire.END_HEADERS:
            try:
                yield stream, [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
            except hpack.HPACKError:
                return


def highest_opened(text: bytes) -> int:
    """The highest stream that a client's bytes may have opened."""
    heads = [item for item in split(text.removeprefix(PREFACE)) if item[3:4] == bytes((wire.HEADERS,))]
    ids = [int.from_bytes(item[5:9], "big") & 0x7FFFFFFF for item in heads]
    return max((number for number in ids if number % 2), default=0)


def check_resets(sent: bytes, highest: int) -> None:
    """RFC 9113 section 6.4: RST_STREAM is never sent for an idle stream."""
    for item in wire.parse(sent):
        if item.kind == wire.RST_STREAM:
            assert item.stream % 2 == 1, f"RST_STREAM for idle stream {item.stream}"
            assert item.stream <= highest, f"RST_STREAM for idle stream {item.stream}"


def check_end(conn: Conn, sent: bytes) -> None:
    """A fault is told once and ends the output with GOAWAY; the blame is never ours; a stream closes once."""
    items = wire.parse(sent)
    goaways = [item for item in items if item.kind == wire.GOAWAY]
    faults = [event[1] for event in conn.events if event[0] == "fault"]
    assert [item.code for item in goaways] == faults
    assert len(faults) == conn.closed
    assert ErrorCode.INTERNAL_ERROR not in faults
    if goaways:
        assert items[-1] is goaways[0], "something is said after GOAWAY"
    closed = [event[1] for event in conn.events if event[0] == "closed"]
    assert len(closed) == len(set(closed)), "a stream is closed twice"


# -- with a layer above


class Mirror:
    """An `h2` connection that takes what ours sends and is told which streams there are; its windows are wide open,
    since which ones the peer has opened is in bytes that it never sees."""

    def __init__(self, is_server: bool) -> None:
        config = h2.config.H2Configuration(client_side=is_server, header_encoding=None)
        self.conn = h2.connection.H2Connection(config)
        values = {_CODES.INITIAL_WINDOW_SIZE: 2**31 - 1, _CODES.MAX_FRAME_SIZE: 2**24 - 1}
        if not is_server:
            values[_CODES.MAX_CONCURRENT_STREAMS] = 2**31 - 1
        self.conn.local_settings = h2.settings.Settings(client=is_server, initial_values=values)
        self.conn.max_inbound_frame_size = 2**24 - 1
        self.conn.initiate_connection()
        self.conn.increment_flow_control_window(2**31 - 1 - 65_535)
        self.is_server = is_server
        self.greeted = False
        self.over = False
        self.highest = 0

    def take(self, sent: bytes, events: list[Any]) -> None:
        if not self.greeted:
            # The greeting without its limits: streams that the peer has ended are open here still.
            self.greeted = True
            rest = sent.removeprefix(PREFACE)
            sent = (b"" if self.is_server else PREFACE) + wire.settings() + b"".join(split(rest)[1:])
        if self.is_server:
            self._request(events, sent)
        start = len(PREFACE) if sent.startswith(PREFACE) else 0
        for text in [sent[:start], *split(sent[start:])]:
            # `h2` takes nothing behind GOAWAY, also where that is only a warning.
            if not self.over:
                self.conn.receive_data(text)
            self.over = self.over or text[3:4] == bytes((wire.GOAWAY,))
        self.conn.data_to_send()

    def _request(self, events: list[Any], sent: bytes) -> None:
        """Open what was told of, and what was reset before anything was told."""
        streams = {event[1] for event in events if event[0] in ("request", "too large")}
        streams |= {item.stream for item in wire.parse(sent) if item.kind == wire.RST_STREAM and item.stream % 2}
        for stream in sorted(streams):
            if stream > self.highest and not self.over:
                self.highest = stream
                self.conn.send_headers(stream, REQUEST)


class Layer:
    """What stands above a connection: uses it as it may be used, at random."""

    def __init__(self, conn: Conn, random: Random) -> None:
        self.conn = conn
        self.random = random
        self.answered: set[Stream] = set()

    def act(self) -> None:
        conn, random = self.conn, self.random
        what = random.randrange(12)
        if what == 0:
            conn.paused = True
        elif what <= 2:
            conn.resume()
        elif what == 3 and isinstance(conn, Client):
            if conn.room() > 0:
                conn.open_stream(block(REQUEST), end=random.random() < 0.5)
        elif what == 3 and isinstance(conn, Server) and random.random() < 0.1:
            conn.refuse_new()
        elif conn.streams:
            self.use(random.choice(list(conn.streams.values())), what)

    def use(self, stream: Stream, what: int) -> None:
        conn, random = self.conn, self.random
        if what == 4:
            conn.reset(stream, ErrorCode.CANCEL)
        elif what == 5:
            conn.credit(stream, random.randint(0, 40_000))
        elif stream.local_closed or (stream.backlog is not None and (stream.backlog.end or stream.backlog.trailers)):
            return
        elif conn.server and stream not in self.answered:
            self.answered.add(stream)
            conn.send_headers(stream, block(RESPONSE), end=random.random() < 0.2)
        elif what <= 8:
            conn.send_data(stream, bytes(random.choice((0, 1, 100, 20_000))), end=random.random() < 0.2)
        else:
            conn.send_trailers(stream, block([*TRAILERS, (b"x-n", b"%d" % random.randint(0, 9))]))


def check_acting(make: Make, case: Case, is_server: bool) -> None:
    """Whatever the peer sends and the layer above does, `h2` takes all that is sent."""
    conn = make(case.flags)
    layer, mirror = Layer(conn, case.random), Mirror(is_server)
    seen = 0
    for piece in cut(case.text, case.random):
        conn.receive(piece)
        if not conn.closed:
            layer.act()
            layer.act()
        sent = b"".join(conn.take_output())
        check_frames(sent)
        mirror.take(sent, conn.events[seen:])
        seen = len(conn.events)
        if conn.closed:
            break
    closed = [event[1] for event in conn.events if event[0] == "closed"]
    assert len(closed) == len(set(closed)), "a stream is closed twice"


def check(make: Make, data: bytes, is_server: bool) -> None:
    case = Case.of(data, is_server)
    check_reading(make, case, is_server)
    if case.flags & ACTIVE:
        check_acting(make, case, is_server)
    if case.flags & FORWARDS:
        check_forwarding(case.flags, cut(case.text, case.random), case.random, is_server)
