"""Two judges of one peer: our core and `h2` are given the same frames, and do the same in between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import h2.config
import h2.connection
import h2.errors
import h2.exceptions
import h2.settings
import hpack

from proxy.http2 import ErrorCode
from tests.http2 import wire
from tests.http2.wire import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PREFACE,
    PRIORITY_FLAG,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    Client,
    Fields,
    Frame,
    Server,
    block,
)

STREAMS, HEADER_LIST = 3, 1000  # both judges' limits
_CODES = h2.settings.SettingCodes


class Verdict(NamedTuple):
    """What a judge makes of a frame: "fine", "stream" (RST_STREAM was sent), "connection" (GOAWAY), "raised"."""

    kind: str
    stream: int = 0
    code: int = 0
    words: str = ""

    def says(self, kind: str, pattern: str = "") -> bool:
        return self.kind == kind and re.search(pattern, self.words) is not None


class Local(NamedTuple):
    """What the layer above does: "answer" with head and END_STREAM, or "reset"."""

    what: str
    stream: int


Step = bytes | Local
FINE = Verdict("fine")


def _reset(sent: bytes) -> Verdict:
    for item in wire.parse(sent):
        if item.kind == RST_STREAM:
            return Verdict("stream", item.stream, item.code)
    return FINE


class Ours:
    def __init__(self, is_server: bool) -> None:
        make = Server if is_server else Client
        self.conn: Server | Client = make(max_streams=STREAMS, header_list=HEADER_LIST)
        if isinstance(self.conn, Client):
            for end in (False, True, False):
                self.conn.open_stream(block(REQUEST), end)
        self.conn.take_output()

    def judge(self, text: bytes) -> Verdict:
        del self.conn.events[:]
        self.conn.receive(text)
        verdict = _reset(b"".join(self.conn.take_output()))
        for event in self.conn.events:
            if event[0] == "fault":
                return Verdict("connection", 0, event[1], event[2])
            if event[0] == "too large":
                return Verdict("stream", event[1], 0, "too large")
            if event[0] == "stream fault":
                verdict = verdict._replace(words=event[3])
        return verdict

    def act(self, local: Local) -> bool:
        """False where there is nothing to be done, so that the other judge does nothing either."""
        stream = self.conn.streams.get(local.stream)
        if stream is None or stream.local_closed:
            return False
        if local.what == "reset":
            self.conn.reset(stream, ErrorCode.CANCEL)
        elif self.conn.server:
            self.conn.send_headers(stream, block(RESPONSE), end=True)
        else:
            self.conn.send_data(stream, b"", end=True)
        self.sent = wire.parse(b"".join(self.conn.take_output()))
        return True


class Theirs:
    def __init__(self, is_server: bool, greeted: bool = True) -> None:
        config = h2.config.H2Configuration(client_side=not is_server, header_encoding=None)
        self.conn = h2.connection.H2Connection(config)
        values = {_CODES.ENABLE_PUSH: 0, _CODES.MAX_CONCURRENT_STREAMS: STREAMS}
        self.conn.local_settings = h2.settings.Settings(client=not is_server, initial_values=values)
        self.conn.decoder.max_header_list_size = HEADER_LIST
        self.conn.initiate_connection()
        self.conn.increment_flow_control_window(STREAMS * wire.WINDOW - wire.WINDOW)
        if is_server:
            if greeted:
                self.conn.receive_data(PREFACE)
        else:
            for stream, end in ((1, False), (3, True), (5, False)):
                self.conn.send_headers(stream, REQUEST, end_stream=end)
        self.conn.data_to_send()

    def judge(self, text: bytes) -> Verdict:
        try:
            self.conn.receive_data(text)
        except h2.exceptions.ProtocolError as error:
            cause = error.__cause__
            words = f"{error} ({cause})" if cause else str(error)
            return Verdict("connection", 0, int(error.error_code), f"{type(error).__name__}: {words}")
        except Exception as error:  # a judge may have faults of its own
            return Verdict("raised", 0, 0, f"{type(error).__name__}: {error}")
        return _reset(self.conn.data_to_send())

    def closed(self, number: int) -> bool:
        """Whether this stream was open and is no more."""
        stream = self.conn.streams.get(number)
        mine = number % 2 == self.conn.config.client_side
        last = self.conn.highest_outbound_stream_id if mine else self.conn.highest_inbound_stream_id
        return stream.closed if stream else number <= last

    def act(self, local: Local, sent: list[Frame]) -> None:
        """The same frames as ours has sent."""
        if self.conn.state_machine.state is h2.connection.ConnectionState.CLOSED:
            return  # `h2` sends nothing behind a GOAWAY
        for item in sent:
            if item.kind == HEADERS:
                self.conn.send_headers(item.stream, RESPONSE, end_stream=True)
            elif item.kind == RST_STREAM:
                self.conn.reset_stream(item.stream, item.code)
            elif item.kind == DATA:
                self.conn.end_stream(item.stream)
        self.conn.data_to_send()


class Case(NamedTuple):
    """The first frame that a judge refused, and what led to it."""

    is_server: bool
    frame: Frame
    whole: bool  # false for what is left of a frame at the end
    fields: Fields | None  # of the header section that the frame completes, if it can be decoded
    reset_by_us: frozenset[int]
    reset_by_peer: frozenset[int]
    closed: bool  # the frame's stream was no longer open for `h2`
    seen: tuple[Frame, ...]  # the frames before it
    ours: Verdict
    theirs: Verdict

    @property
    def gone(self) -> bool:
        """A GOAWAY came before."""
        return any(item.kind == GOAWAY for item in self.seen)


class History:
    """What an onlooker sees of the peer's frames."""

    def __init__(self) -> None:
        self.decoder = hpack.Decoder(max_header_list_size=2**24)
        self.block = b""
        self.seen: list[Frame] = []
        self.reset_by_us: set[int] = set()
        self.reset_by_peer: set[int] = set()

    def fields(self, item: Frame) -> Fields | None:
        """The header section that is complete with this frame."""
        if item.kind not in (HEADERS, CONTINUATION):
            return None
        fragment = item.payload
        if item.kind == HEADERS:
            self.block = b""
            fragment = unpadded(item)
        self.block += fragment
        if not item.flags & END_HEADERS:
            return None
        try:
            return [(bytes(name), bytes(value)) for name, value in self.decoder.decode(self.block, raw=True)]
        except hpack.HPACKError:
            return None

    def note(self, item: Frame) -> None:
        self.seen.append(item)
        if item.kind == RST_STREAM:
            self.reset_by_peer.add(item.stream)


def unpadded(item: Frame) -> bytes:
    fragment = item.payload
    if item.flags & PADDED:
        fragment = fragment[1 : len(fragment) - fragment[0]] if fragment else b""
    return fragment[5:] if item.flags & PRIORITY_FLAG else fragment


def framed(steps: list[Step]) -> Iterator[Step]:
    """The same bytes, one frame at a time, and what is left at the end."""
    rest = b""
    for step in steps:
        if isinstance(step, Local):
            yield step
            continue
        rest += step
        while len(rest) >= 9 and len(rest) >= (size := 9 + int.from_bytes(rest[:3], "big")):
            yield rest[:size]
            rest = rest[size:]
    if rest:
        yield rest


def taken_apart(text: bytes) -> tuple[Frame, bool]:
    if len(text) < 9:
        return Frame(-1, 0, 0, text), False
    item = Frame(text[3], text[4], int.from_bytes(text[5:9], "big") & 0x7FFFFFFF, text[9:])
    return item, len(item.payload) == int.from_bytes(text[:3], "big")


def first_refusal(is_server: bool, steps: list[Step], greeting: bytes | None = None) -> Case | None:
    """Give both judges these steps, up to the first frame that one of them refuses; None when there is none."""
    ours, theirs, history = Ours(is_server), Theirs(is_server), History()
    if is_server:
        ours.conn.receive(PREFACE)
    for step in framed([wire.settings() if greeting is None else greeting, *steps]):
        if isinstance(step, Local):
            if ours.act(step):
                theirs.act(step, ours.sent)
                history.reset_by_us |= {item.stream for item in ours.sent if item.kind == RST_STREAM}
            continue
        item, whole = taken_apart(step)
        closed = theirs.closed(item.stream)
        verdicts = ours.judge(step), theirs.judge(step)
        if verdicts[0].kind != "fine" or verdicts[1].kind != "fine":
            fields = history.fields(item) if whole else None
            resets = frozenset(history.reset_by_us), frozenset(history.reset_by_peer)
            return Case(is_server, item, whole, fields, *resets, closed, tuple(history.seen), *verdicts)
        history.fields(item)
        history.note(item)
    return None


def agreed(case: Case) -> bool:
    """Both refuse, and with it the same: one stream, or the connection."""
    return case.ours[:2] == case.theirs[:2]


def request(*changes: tuple[bytes, bytes | None], end: bool = True, stream: int = 1, base: Fields = REQUEST) -> bytes:
    """A header section with these fields set, added or (None) left out, as literals without a table."""
    fields = [field for field in base if field[0] not in [name for name, _ in changes]]
    added = [(name, value) for name, value in changes if value is not None]
    pseudo = [field for field in added if field[0][:1] == b":"]
    fields = pseudo + fields + [field for field in added if field not in pseudo]
    text = b"".join(b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)
    return wire.frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, text)
