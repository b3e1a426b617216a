"""Strategies for what a peer may send: valid conversations, and everything else."""

from __future__ import annotations

from itertools import pairwise

import hpack
from hypothesis import strategies as st

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
    REQUEST,
    RESPONSE,
    TRAILERS,
    Fields,
    frame,
)

_NAMES = st.sampled_from([b"x-a", b"x-b", b"traceparent", b"grpc-timeout", b"user-agent"])
_VALUES = st.binary(max_size=20).map(lambda text: text.hex().encode()) | st.sampled_from([b"", b"1", b"grpc/1.0"])
extra_fields = st.lists(st.tuples(_NAMES, _VALUES), max_size=4)


def chunked(data: bytes, cuts: list[int]) -> list[bytes]:
    """The same bytes in pieces, cut at these places (modulo the length)."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


cuts = st.lists(st.integers(0, 2**20), max_size=40)


@st.composite
def header_frames(draw: st.DrawFn, encoder: hpack.Encoder, stream: int, fields: Fields, end: bool) -> bytes:
    """A header section in any form that is allowed: padded, with priority, in pieces."""
    block = encoder.encode(fields, huffman=draw(st.booleans()))
    split = draw(st.lists(st.integers(0, len(block)), max_size=3).map(sorted))
    edges = [0, *split, len(block)]
    parts = [block[start:stop] for start, stop in pairwise(edges)]
    flags = END_STREAM if end else 0
    first = parts[0]
    if draw(st.booleans()):
        flags |= PRIORITY_FLAG
        first = b"\x80\0\0\0\x10" + first
    if draw(st.booleans()):
        flags |= PADDED
        padding = draw(st.integers(0, 20))
        first = bytes((padding,)) + first + bytes(padding)
    out = [frame(HEADERS, flags | (END_HEADERS if len(parts) == 1 else 0), stream, first)]
    out += [frame(CONTINUATION, 0, stream, part) for part in parts[1:-1]]
    if len(parts) > 1:
        out.append(frame(CONTINUATION, END_HEADERS, stream, parts[-1]))
    return b"".join(out)


@st.composite
def data_frame(draw: st.DrawFn, stream: int, end: bool) -> bytes:
    payload = draw(st.binary(max_size=50)) * draw(st.sampled_from([1, 1, 1, 100]))
    if draw(st.booleans()):
        return wire.padded_data(stream, payload, draw(st.integers(0, 255)), end)
    return wire.data(stream, payload, end)


@st.composite
def control_frame(draw: st.DrawFn, stream: int) -> bytes:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return wire.ping(draw(st.binary(min_size=8, max_size=8)))
    if kind == 1:
        return wire.settings((draw(st.sampled_from([1, 3, 4, 6, 99])), draw(st.integers(0, 70_000))))
    if kind == 2:
        return wire.window_update(draw(st.sampled_from([0, stream])), draw(st.integers(1, 1000)))
    if kind == 3:
        return frame(PRIORITY, 0, stream, bytes(4) + b"\x10")
    if kind == 4:
        return frame(draw(st.integers(10, 255)), draw(st.integers(0, 255)), stream, draw(st.binary(max_size=30)))
    return wire.ping(ack=True)


@st.composite
def conversation(draw: st.DrawFn, from_client: bool, streams: int = 4) -> bytes:
    """Valid bytes of one side, from its preface on: messages on streams 1, 3, 5, ... interleaved in any way."""
    encoder = hpack.Encoder()
    out = [(PREFACE if from_client else b"") + wire.settings()]
    left = [2 * number + 1 for number in range(streams)]
    running: list[int] = []
    while left or running:
        if left and (not running or draw(st.booleans())):
            stream = left.pop(0)
            head = (REQUEST if from_client else RESPONSE) + draw(extra_fields)
            end = draw(st.booleans())
            out.append(draw(header_frames(encoder, stream, head, end)))
            if not end:
                running.append(stream)
            continue
        stream = draw(st.sampled_from(running))
        step = draw(st.sampled_from(["end", "data", "data", "trailers", "control", "reset"]))
        if step == "control":
            out.append(draw(control_frame(stream)))
            continue
        if step == "trailers":
            out.append(draw(header_frames(encoder, stream, TRAILERS + draw(extra_fields), True)))
        elif step == "reset":
            out.append(wire.rst_stream(stream, draw(st.integers(0, 20))))
        else:
            out.append(draw(data_frame(stream, step == "end")))
        if step != "data":
            running.remove(stream)
    return b"".join(out)


_HEADER_BLOCKS = st.sampled_from([hpack.Encoder().encode(fields) for fields in (REQUEST, RESPONSE, TRAILERS)])
_PAYLOADS = st.binary(max_size=40) | _HEADER_BLOCKS | st.integers(0, 2**32 - 1).map(lambda n: n.to_bytes(4, "big"))
any_frame = st.builds(
    frame,
    st.integers(0, 10),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D]) | st.integers(0, 255),
    st.sampled_from([0, 1, 1, 3, 5, 2, 2**31 - 1, 2**32 - 1]),
    _PAYLOADS,
)


@st.composite
def disturbed(draw: st.DrawFn, from_client: bool) -> bytes:
    """A valid conversation with bytes changed, left out or put in."""
    text = bytearray(draw(conversation(from_client, streams=2)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(24 if from_client else 0, len(text) - 1))
        what = draw(st.integers(0, 2))
        if what == 0:
            text[at] = draw(st.integers(0, 255))
        elif what == 1:
            del text[at : at + draw(st.integers(1, 12))]
        else:
            text[at:at] = draw(any_frame | st.binary(max_size=9))
        if len(text) < 25:
            break
    return bytes(text)
