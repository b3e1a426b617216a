"""For any frames our core and `h2` refuse the same ones, in the same way, but for what the table DISAGREEMENTS lists.

What is compared is the first refusal: at which frame, and whether it ends one stream, which one, or the connection.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import hpack
import pytest
from hypothesis import given, note
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from proxy.http2 import ErrorCode
from tests.http2 import wire
from tests.http2.wire import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    WINDOW_UPDATE,
    data,
    frame,
    rst_stream,
    settings,
    window_update,
)
from tests.properties.oracle import Case, Local, Ours, Step, Theirs, agreed, first_refusal, request
from tests.properties.quick import quick
from tests.properties.traffic import any_frame, control_frame, data_frame, header_frames


class Row(NamedTuple):
    """A disagreement: where it is decided, why ours is right, when it is this one, and steps that show it."""

    name: str
    section: str
    why: str
    applies: Callable[[Case], bool]
    is_server: bool
    steps: list[Step]
    greeting: bytes | None = None


_TOKEN = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_SECTION_FAULTS = (
    "header|Trailers must have END_STREAM|Informational response after|informational responses|RECV_INFORMATIONAL"
    "|Ordinary CONNECT|Encountered .*-only"
)


def values(case: Case, name: bytes) -> list[bytes]:
    return [value for key, value in case.fields or [] if key == name]


def refused_section(case: Case, words: str) -> bool:
    """Ours ends the stream for what is in a header section, and `h2` finds nothing in it."""
    ours = case.ours.says("stream", words) and case.ours.code == ErrorCode.PROTOCOL_ERROR
    return ours and case.fields is not None and case.theirs.kind == "fine"


def taken_section(case: Case, words: str) -> bool:
    """Ours takes a header section that `h2` finds fault with."""
    return case.ours.kind == "fine" and case.fields is not None and case.theirs.says("connection", words)


def pairs(case: Case) -> list[tuple[int, int]]:
    text = case.frame.payload if case.frame.kind == wire.SETTINGS else b""
    return [(int.from_bytes(text[at : at + 2], "big"), int.from_bytes(text[at + 2 : at + 6], "big"))
            for at in range(0, len(text), 6)]  # fmt: skip


def room(case: Case) -> int:
    """How much padding a HEADERS frame can take, its priority left out of account."""
    return len(case.frame.payload) - 1 - (5 if case.frame.flags & PRIORITY_FLAG else 0)


def padding(case: Case) -> int:
    item = case.frame
    return item.payload[0] if item.kind == HEADERS and item.flags & PADDED and item.payload else -1


def set_(name: bytes, value: bytes | None, *more: tuple[bytes, bytes | None]) -> list[Step]:
    """A request with this field in it, or without it."""
    return [request((name, value), *more)]


def answer(*changes: tuple[bytes, bytes | None], end: bool = False, base: wire.Fields = RESPONSE) -> bytes:
    return request(*changes, end=end, base=base)


def trailers(*changes: tuple[bytes, bytes | None], stream: int = 1) -> bytes:
    return request(*changes, stream=stream, base=TRAILERS)


DISAGREEMENTS = [
    # -- faults of a message: `h2` ends the connection for them
    Row("a malformed message", "9113 8.1.1", "it is a stream error: other calls on the connection go on",
        lambda c: c.fields is not None and c.ours.says("stream") and c.ours.code == ErrorCode.PROTOCOL_ERROR
        and c.theirs.says("connection", f"(?s)^ProtocolError: .*({_SECTION_FAULTS})")
        and not c.theirs.says("connection", "Error decoding"),
        True, set_(b"X-Upper", b"1")),
    Row("a body of another length", "9113 8.1.1", "it is a malformed message, so a stream error",
        lambda c: c.ours.says("stream", "as long as content-length says") and c.frame.kind == wire.DATA
        and c.theirs.says("connection", "^InvalidBodyLengthError"),
        True, [request((b"content-length", b"5"), end=False), data(1, b"four", end=True)]),
    Row("DATA before the response's head", "9113 8.1.1", "it is a malformed message, so a stream error",
        lambda c: c.ours.says("stream", "DATA before") and c.theirs.says("connection", "data before headers"),
        False, [data(1, b"x")]),
    Row("a header list over the limit", "9113 10.5.1", "the block was decoded: one request is refused (431), no more",
        lambda c: c.ours.says("stream", "too large|header list of more|trailer section of more")
        and c.theirs.says("connection", "^DenialOfServiceError"),
        True, [frame(HEADERS, 5, 1, hpack.Encoder().encode([*REQUEST, (b"x-long", b"v" * 1000)]))]),
    Row("streams over the limit", "9113 5.1.2", "a stream error, REFUSED_STREAM: the call can be made again",
        lambda c: c.ours.kind == "stream" and c.ours.code == ErrorCode.REFUSED_STREAM
        and c.theirs.says("connection", "^TooManyStreamsError"),
        True, [request(stream=stream) for stream in (1, 3, 5, 7)]),
    Row("more data than the stream's window", "9113 6.9.1", "either is allowed; the others' calls are not at fault",
        lambda c: c.ours.says("stream", "more data than the window")
        and c.theirs.says("connection", "^FlowControlError"),
        True, [request(end=False), *[data(1, bytes(16_384)) for _ in range(4)]]),
    # -- faults of a message that `h2` doesn't look for
    Row("a field name that is no token", "9110 5.1", "the next server may read it as something else",
        lambda c: refused_section(c, "^field name") and any(not _TOKEN(name) for name, _ in c.fields or []),
        True, set_(b"x(y", b"1")),
    Row("a control character in a value", "9110 5.5",
        "it is invalid; a recipient may refuse it, a log should not get it",
        lambda c: refused_section(c, "not allowed in") and any(re.search(rb"[\0-\x08\x0a-\x1f\x7f]", value)
                                                              for _, value in c.fields or []),
        True, set_(b"x-v", b"a\x01b")),
    Row("no authority in an empty field", "9110 4.2.1", "an http or https URI with an empty host is invalid",
        lambda c: refused_section(c, "^neither :authority") and not any(values(c, b":authority") + values(c, b"host")),
        True, set_(b":authority", b"")),
    Row("userinfo", "9113 8.3.1", ":authority must not include it",
        lambda c: refused_section(c, "userinfo") and b"@" in values(c, b":authority")[0],
        True, set_(b":authority", b"root@localhost")),
    Row("a :path without a slash", "9113 8.3.1", "it begins with one, but for OPTIONS *",
        lambda c: refused_section(c, "^:path") and values(c, b":path")[0][:1] != b"/",
        True, set_(b":path", b"inference")),
    Row("a :method that is no token", "9110 9.1", "nothing can be done with it, nor should it be passed on",
        lambda c: refused_section(c, "^:method")
        and not re.fullmatch(rb"[!#$%&'*+\-.^_`|~\w]+", values(c, b":method")[0]),
        True, set_(b":method", b"")),
    Row("an empty :scheme", "9113 8.3.1", "a request has a valid value for it",
        lambda c: refused_section(c, "^a request needs") and values(c, b":scheme") == [b""],
        True, set_(b":scheme", b"")),
    Row("extended CONNECT", "8441 3", ":protocol is unknown where SETTINGS_ENABLE_CONNECT_PROTOCOL was not sent",
        lambda c: refused_section(c, "^unknown pseudo") and values(c, b":protocol") != [],
        True, set_(b":protocol", b"websocket", (b":method", b"CONNECT"))),
    Row("CONNECT without :authority", "9113 8.5", ":authority holds the host and port to connect to",
        lambda c: refused_section(c, "^CONNECT") and not any(values(c, b":authority")),
        True, set_(b":method", b"CONNECT", *[(name, None) for name in (b":scheme", b":path", b":authority")],
                   (b"host", b"a"))),
    Row("a :status that is no status code", "9110 15", "it has three digits; 101 doesn't exist in HTTP/2 (9113 8.6)",
        lambda c: refused_section(c, "^:status|^101")
        and not re.fullmatch(rb"(?!101)\d\d\d", values(c, b":status")[0]),
        False, [answer((b":status", b"20"))]),
    Row("content-length in an informational response", "9110 8.6", "a server must not send it",
        lambda c: refused_section(c, "^an informational response with content-length")
        and values(c, b"content-length") != [] and values(c, b":status")[0][:1] == b"1",
        False, [answer((b":status", b"103"), (b"content-length", b"1"))]),
    Row("content-length of more than 18 digits", "9110 8.6",
        "no message is so long; an overflow further on is prevented",
        lambda c: refused_section(c, "^content-length is not") and len(max(values(c, b"content-length"), key=len)) > 18,
        True, set_(b"content-length", b"9" * 19)),
    Row("content-length and END_STREAM", "9113 8.1.1", "no data is not as long as content-length says",
        lambda c: refused_section(c, "^content-length without data") and bool(int(values(c, b"content-length")[0])),
        True, set_(b"content-length", b"5")),
    Row("content-length and trailers", "9113 8.1.1", "data that trailers follow has a length, too",
        lambda c: refused_section(c, "as long as content-length says"),
        True, [request((b"content-length", b"5"), end=False), data(1, b"four"), trailers()]),
    Row("content where there is none", "9113 8.1.1", "204 and 304 are defined to have none (9110 15.3.5, 15.4.5)",
        lambda c: not c.is_server and c.frame.kind == wire.DATA and c.theirs.kind == "fine"
        and c.ours.says("stream", "as long as content-length says"),
        False, [answer((b":status", b"204")), data(1, b"x")]),
    # -- messages that only `h2` refuses
    Row("content-length where there is no content", "9113 8.1.1",
        "a response that is defined to have no content may have one (9110 8.6)",
        lambda c: not c.is_server and c.ours.kind == "fine" and c.frame.ends
        and c.theirs.says("connection", "^InvalidBodyLengthError"),
        False, [answer((b":status", b"304"), (b"content-length", b"5")), data(1, b"", end=True)]),
    Row("host in another case", "9110 4.2.3", "hosts are compared without regard to case",
        lambda c: taken_section(c, "mismatched")
        and values(c, b"host")[0].lower() == values(c, b":authority")[0].lower(),
        True, set_(b"host", b"LOCALHOST")),
    Row("no authority where none is needed", "9113 8.3.1", "only http and https make it mandatory",
        lambda c: taken_section(c, "does not have an :authority")
        and values(c, b":scheme")[0] not in (b"http", b"https"),
        True, set_(b":scheme", b"ftp", (b":authority", None))),
    Row("white space around a response's values", "gRPC over HTTP/2",
        "gRPC servers send it in grpc-message; it is trimmed",
        lambda c: not c.is_server and taken_section(c, "surrounded by whitespace")
        and any(value != value.strip(b" \t") for _, value in c.fields or []),
        False, [answer(), trailers((b"grpc-message", b"no "))]),
    Row("content-length among trailers", "9110 6.5.1", "it frames nothing there, whatever it says",
        lambda c: taken_section(c, "content-length") and not values(c, b":method") + values(c, b":status"),
        True, [request(end=False), trailers((b"content-length", b"x"))]),
    Row("an informational response after END_STREAM", "9113 5.1", "it is HEADERS on a half-closed stream as any other",
        lambda c: c.ours.says("stream", "^HEADERS after END_STREAM") and c.ours.code == ErrorCode.STREAM_CLOSED
        and c.theirs.says("connection", "RECV_INFORMATIONAL|informational responses")
        and values(c, b":status")[0][:1] == b"1",
        True, [request(), request((b":status", b"103"), end=False)]),
    # -- frames on streams that are no more
    Row("frames on a stream that we reset", "9113 5.1", "they were on their way; RST_STREAM was said once already",
        lambda c: c.ours.kind == "fine" and c.theirs.kind == "stream" and c.frame.stream in c.reset_by_us,
        True, [request(end=False), Local("reset", 1), data(1, b"late")]),
    Row("a response's HEADERS on a closed stream", "9113 5.1",
        "5.1 allows either error; this one leaves the calls of others on the connection alone",
        lambda c: not c.is_server and c.ours.kind == "stream" and c.ours.code == ErrorCode.STREAM_CLOSED
        and c.frame.kind in (HEADERS, CONTINUATION) and c.theirs.says("connection", "^StreamClosedError"),
        False, [answer(), trailers(), Local("answer", 1), trailers()]),
    Row("a malformed message on a closed stream", "9113 5.1", "what is dropped is not looked into",
        lambda c: c.closed and c.fields is not None
        and (c.ours.kind == "fine" or (c.ours.kind == "stream" and c.ours.code == ErrorCode.STREAM_CLOSED))
        and c.theirs.says("connection", f"(?s)^ProtocolError: .*({_SECTION_FAULTS})|^DenialOfServiceError"),
        False, [rst_stream(1), answer((b":status", b"103"), end=True)]),
    Row("a request's HEADERS on a stream that it reset", "9113 5.1", "nothing permits them: a connection error",
        lambda c: c.is_server and c.ours.says("connection", "^HEADERS on closed|behind") and c.theirs.kind == "stream"
        and c.frame.stream in c.reset_by_peer,
        True, [request(end=False), rst_stream(1), trailers()]),
    Row("RST_STREAM on an idle stream", "9113 6.4", "a connection error",
        lambda c: c.frame.kind == RST_STREAM and c.ours.says("connection", "idle") and c.theirs.kind == "fine",
        True, [request(), rst_stream(3)]),
    Row("a response on an even stream", "9113 5.1.1", "we allow no pushed streams: it is idle, which takes no HEADERS",
        lambda c: not c.is_server and c.frame.stream % 2 == 0 and c.ours.says("connection", "^HEADERS on idle")
        and c.theirs.kind == "fine",
        False, [request(stream=2)]),
    # -- frames
    Row("PRIORITY of a stream on itself", "7540 5.3.1", "a stream error, and the stream is not idle",
        lambda c: c.frame.kind == PRIORITY and c.ours.kind in ("stream", "fine")
        and c.theirs.says("connection", "on itself"),
        False, [frame(PRIORITY, 0, 1, b"\0\0\0\1\x10")]),
    Row("PRIORITY of a wrong size", "9113 6.3", "a stream error, and the stream is not idle",
        lambda c: c.frame.kind == PRIORITY and len(c.frame.payload) != 5 and c.ours.kind in ("stream", "fine")
        and c.theirs.says("connection", "PRIORITY must|Invalid Priority"),
        False, [frame(PRIORITY, 0, 1, bytes(4))]),
    Row("WINDOW_UPDATE of zero on a stream", "9113 6.9", "a stream error",
        lambda c: c.frame.kind == WINDOW_UPDATE and c.frame.stream > 0 and c.frame.number & 2**31 - 1 == 0
        and c.ours.kind in ("stream", "fine") and c.theirs.says("connection", "increment"),
        False, [window_update(1, 0)]),
    Row("the reserved bit of WINDOW_UPDATE", "9113 6.9", "it is ignored",
        lambda c: c.frame.kind == WINDOW_UPDATE and c.frame.number >= 2**31 and c.frame.number > 2**31
        and c.ours.kind in ("stream", "fine") and c.theirs.says("connection", "increment"),
        False, [window_update(1, 2**31 + 5)]),
    Row("frames behind GOAWAY", "9113 6.8", "streams that it doesn't name go on to their end",
        lambda c: c.gone and c.theirs.says("connection", "in state ConnectionState.CLOSED"),
        True, [request(end=False), wire.goaway(0), data(1, b"x", end=True)]),
    Row("GOAWAY with a higher last stream", "9113 6.8",
        "it must not rise: what lies between was given up for unprocessed, and may run elsewhere by now",
        lambda c: c.frame.kind == wire.GOAWAY and c.gone and c.ours.says("connection", "higher last stream")
        and c.theirs.kind == "fine",
        False, [wire.goaway(1), wire.goaway(3)]),
    Row("a setting twice", "9113 6.5.3", "they are processed in order: an invalid one is not undone by the next",
        lambda c: len(dict(pairs(c))) < len(pairs(c)) and c.ours.says("connection", "^SETTINGS_")
        and c.theirs.kind == "fine",
        True, [settings((2, 9), (2, 0))]),
    Row("ENABLE_CONNECT_PROTOCOL", "9113 6.5.2", "an unknown setting, which is ignored whatever its value",
        lambda c: any(key == 8 and value > 1 for key, value in pairs(c)) and c.ours.kind == "fine"
        and c.theirs.kind == "connection",
        True, [settings((8, 2))]),
    Row("PUSH_PROMISE in pieces", "9113 6.6", "it is refused without waiting for the rest of its block",
        lambda c: c.frame.kind == PUSH_PROMISE and not c.frame.flags & END_HEADERS
        and c.ours.says("connection", "PUSH_PROMISE") and c.theirs.kind == "fine",
        False, [frame(PUSH_PROMISE, 0, 1, b"\0\0\0\2\x82")]),
    Row("ALTSVC", "9113 5.5", "a type that is not ours to know, which is ignored whatever is in it",
        lambda c: c.frame.kind == 10 and c.ours.kind == "fine" and c.theirs.says("connection", "ALTSVC"),
        True, [frame(10, 0, 0, b"\0\x09x")]),
    Row("what is left of a frame", "9113 4.2", "either may refuse a frame by its header, or wait for the rest of it",
        lambda c: not c.whole and "fine" in (c.ours.kind, c.theirs.kind),
        True, [frame(0x42, 0, 0, bytes(16_385))[:9]]),
    Row("padding longer than its fragment", "9113 6.2",
        "only padding that exceeds the room for the fragment is an error",
        lambda c: 0 <= padding(c) <= room(c) and c.ours.kind != "connection"
        and c.theirs.says("connection", "invalid padding"),
        False, [frame(HEADERS, END_STREAM | PADDED, 1, b"\3\0\0\0")]),
    Row("padding over the priority", "9113 6.2", "padding that exceeds the room for the fragment is an error",
        lambda c: padding(c) > room(c) and c.ours.kind == "connection" and c.theirs.kind in ("fine", "stream"),
        False, [frame(HEADERS, PADDED | PRIORITY_FLAG, 3, b"\2\0\0\0\0\x10\0")]),
    Row("a header block in too many pieces", "9113 10.5", "small frames without end are an attack (CONTINUATION flood)",
        lambda c: c.ours.kind == "connection" and c.ours.code == ErrorCode.ENHANCE_YOUR_CALM
        and sum(item.kind == CONTINUATION for item in c.seen) >= 15 and c.theirs.kind == "fine",
        True, [frame(HEADERS, 0, 1, b""), *[frame(CONTINUATION, 0, 1, b"") for _ in range(20)]]),
    Row("another first frame than SETTINGS", "9113 3.4", "the preface is a SETTINGS frame",
        lambda c: not c.seen and c.ours.says("connection", "first frame is not SETTINGS") and c.theirs.kind == "fine",
        True, [], wire.ping()),
]  # fmt: skip

_ODD_VALUES: list[tuple[bytes, list[bytes]]] = [
    (b":status", [b"200", b"103", b"204", b"304", b"999", b"1xx"]),
    (b":path", [b"x", b"", b"*"]),
    (b":protocol", [b"websocket"]),
    (b":method", [b"CONNECT", b"OPTIONS", b"", b"a b"]),
    (b":scheme", [b"ftp", b""]),
    (b":authority", [b"", b"u@localhost"]),
    (b"host", [b"localhost", b"LOCALHOST", b"other", b""]),
    (b"te", [b"Trailers", b"gzip", b"trailers, gzip"]),
    (b"connection", [b"close"]),
    (b"content-length", [b"5", b"05", b"0", b"-1", b"", b"9" * 20]),
    (b"x-v", [b"a\x01b", b"a\nb", b" a", b"a\t", b"\xff"]),
    (b"x-long", [b"v" * 900]),
    *[(name, [b"1"]) for name in (b"X-Upper", b"x(y", b"x y", b"x:y", b"")],
]
_ODD_FIELDS = st.sampled_from([(name, value) for name, values in _ODD_VALUES for value in values])


@st.composite
def sections(draw: st.DrawFn, is_server: bool) -> list[tuple[bytes, bytes]]:
    fields = list(draw(st.sampled_from([REQUEST if is_server else RESPONSE] * 4 + [TRAILERS, REQUEST, RESPONSE])))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        what = draw(st.integers(0, 3))
        if what == 0 and fields:
            del fields[draw(st.integers(0, len(fields) - 1))]
        elif what == 1:
            name, value = draw(_ODD_FIELDS)
            fields = [(name, value) if field[0] == name else field for field in fields]
            if (name, value) not in fields:
                fields.insert(0 if name[:1] == b":" else len(fields), (name, value))
        else:
            fields.insert(draw(st.integers(0, len(fields))), draw(_ODD_FIELDS))
    return fields


@st.composite
def step_lists(draw: st.DrawFn, is_server: bool) -> list[Step]:
    encoder = hpack.Encoder()
    steps: list[Step] = []
    streams = [1, 3, 5] if not is_server else [1]
    for _ in range(draw(st.integers(1, 12))):
        what = draw(st.integers(0, 11))
        stream = draw(st.sampled_from([*streams, *streams, 1, 2, 7]))
        if what <= 4:
            if is_server and what <= 2:
                stream = max(streams) + draw(st.sampled_from([0, 2, 2, 2, 4, 1]))
                streams.append(stream)
            steps.append(draw(header_frames(encoder, stream, draw(sections(is_server)), draw(st.booleans()))))
        elif what <= 6:
            steps.append(draw(data_frame(stream, draw(st.booleans()))))
        elif what == 7:
            steps.append(draw(control_frame(stream)))
        elif what == 8:
            steps.append(Local(draw(st.sampled_from(["answer", "reset"])), stream))
        elif what == 9:
            steps.append(wire.rst_stream(stream))
        elif what == 10:
            steps.append(draw(any_frame))
        else:
            steps.append(draw(any_frame | st.binary(max_size=12)))
    return steps


@settings_of(quick, max_examples=3 * quick.max_examples)
@given(st.data(), st.booleans())
def test_any_frames(data: st.DataObject, is_server: bool) -> None:
    case = first_refusal(is_server, data.draw(step_lists(is_server)))
    if case is not None and not agreed(case):
        note(str(case))
        assert [row.name for row in DISAGREEMENTS if row.applies(case)], case


@quick
@given(st.lists(any_frame | st.binary(max_size=30), max_size=6), st.booleans())
def test_any_bytes(pieces: list[bytes], is_server: bool) -> None:
    case = first_refusal(is_server, list(pieces))
    if case is not None and not agreed(case):
        note(str(case))
        assert [row.name for row in DISAGREEMENTS if row.applies(case)], case


@quick
@given(st.binary(max_size=40), st.integers(0, len(PREFACE)))
def test_any_preface(text: bytes, kept: int) -> None:
    """What doesn't begin with the preface is refused by both, as soon as it can't become one."""
    ours, theirs = Ours(True), Theirs(True, greeted=False)
    text = PREFACE[:kept] + text
    wanted = "fine" if PREFACE.startswith(text[: len(PREFACE)]) else "connection"
    assert ours.judge(text[: len(PREFACE)]).kind == theirs.judge(text[: len(PREFACE)]).kind == wanted


@pytest.mark.parametrize("row", DISAGREEMENTS, ids=[row.name for row in DISAGREEMENTS])
def test_each_disagreement_is_one(row: Row) -> None:
    """The steps show it, and no other row would have excused it."""
    case = first_refusal(row.is_server, row.steps, row.greeting)
    assert case is not None
    assert not agreed(case)
    assert [other.name for other in DISAGREEMENTS if other.applies(case)] == [row.name]
