"""Makes the seed corpus, from real exchanges: `python -m tests.fuzz.seeds`.

What a server's target starts from are the bytes that an `h2` client sends to our server in whole calls, and what a
client's target starts from those that an `h2` server answers our client; the header blocks are those of both, and
some that the `hpack` package makes of the same fields in other ways. Made again, the files are the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack

from tests.fuzz.invariants import split
from tests.fuzz.roles import ACTIVE, BYTEWISE, FORWARDS, GREETED, NARROW, SMALL
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
    Client,
    Fields,
    Server,
    block,
    frame,
)

CORPUS = Path(__file__).with_name("corpus")
_CODES = h2.settings.SettingCodes
_CALL = [(b"user-agent", b"grpc-python/1.70.0"), (b"grpc-timeout", b"5S"), (b"traceparent", b"00-" + b"a" * 32)]


def _h2(client_side: bool) -> h2.connection.H2Connection:
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=client_side, header_encoding=None))
    conn.initiate_connection()
    return conn


def client_says(calls: int, body: int, pad: int | None = None, cancel: bool = False) -> bytes:
    """All that an `h2` client sends our server in so many calls, without the preface and its SETTINGS."""
    theirs, ours = _h2(True), Server()
    said = bytearray(theirs.data_to_send())
    ours.receive(bytes(said))
    for number in range(calls):
        stream = 2 * number + 1
        theirs.receive_data(b"".join(ours.take_output()))
        theirs.send_headers(stream, REQUEST + _CALL + [(b"x-call", b"%d" % number)])
        theirs.send_data(stream, bytes(body), pad_length=pad)
        if cancel:
            theirs.reset_stream(stream, 8)
        else:
            theirs.end_stream(stream)
        text = theirs.data_to_send()
        ours.receive(text)
        said += text
        if stream in ours.streams:
            ours.send_headers(ours.streams[stream], block(RESPONSE))
            ours.send_data(ours.streams[stream], b"answer", end=False)
            ours.send_trailers(ours.streams[stream], block(TRAILERS))
    theirs.receive_data(b"".join(ours.take_output()))
    theirs.ping(b"12345678")
    theirs.close_connection()
    said += theirs.data_to_send()
    assert not ours.closed
    return bytes(said)


def server_says(body: int, informational: bool = False, length: bool = False) -> bytes:
    """All that an `h2` server answers the three requests of our client."""
    theirs, ours = _h2(False), Client()
    said = bytearray(theirs.data_to_send())
    for number in range(3):
        ours.open_stream(block(REQUEST), end=number == 1)
    events = theirs.receive_data(b"".join(ours.take_output()))
    for event in events:
        if isinstance(event, h2.events.RequestReceived):
            stream = event.stream_id
            if informational:
                theirs.send_headers(stream, [(b":status", b"103")])
            extra = [(b"content-length", b"%d" % body)] if length else []
            theirs.send_headers(stream, RESPONSE + extra)
            theirs.send_data(stream, bytes(body))
            theirs.send_headers(stream, [*TRAILERS, (b"grpc-message", b"fine %d" % stream)], end_stream=True)
    theirs.close_connection()
    said += theirs.data_to_send()
    ours.receive(bytes(said))
    assert not ours.closed
    return bytes(said)


def by_hand(head: Fields) -> bytes:
    """What no library sends of itself: a header block in pieces, padding, priorities, changes of settings."""
    encoder = hpack.Encoder()
    text = encoder.encode(head)
    priority = b"\x80\0\0\0\x10"
    return b"".join(
        [
            frame(HEADERS, 0, 1, text[:5]),
            frame(CONTINUATION, 0, 1, text[5:9]),
            frame(CONTINUATION, END_HEADERS, 1, text[9:]),
            wire.settings((1, 0), (4, 10), (5, 20_000), (99, 1)),
            wire.padded_data(1, b"data", 3),
            wire.settings((1, 4096), (4, 100_000)),
            wire.window_update(0, 1000),
            wire.window_update(1, 1000),
            frame(PRIORITY, 0, 1, priority),
            frame(0x42, 0xFF, 1, b"unknown"),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, encoder.encode(TRAILERS)),
            frame(HEADERS, END_HEADERS | PADDED | PRIORITY_FLAG, 3, b"\2" + priority + encoder.encode(head) + b"\0\0"),
            wire.rst_stream(3),
            frame(HEADERS, END_HEADERS, 5, encoder.encode([*head, (b"content-length", b"4")])),
            wire.data(5, b"four", end=True),
            wire.settings() + wire.ping() + wire.ping(ack=True) + frame(wire.SETTINGS, wire.ACK),
        ]
    )


def literals(head: Fields) -> bytes:
    """Calls as gRPC clients make them: stable fields by index, behind them ids that are in no table, short messages."""
    encoder, out = hpack.Encoder(), []
    for number in range(3):
        stream, own = 2 * number + 1, b"%08d" % number
        fields = _literal(b"x-request-id", own) + _literal(b"authorization", b"Bearer " + own, never_indexed=True)
        out.append(frame(HEADERS, END_HEADERS, stream, encoder.encode(head) + fields))
        out += [wire.data(stream, bytes(size)) for size in (60, 60, 2000)]
        ends = encoder.encode(TRAILERS) + _literal(b"grpc-message", b"fine " + own)
        out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream, ends))
    return b"".join(out)


def _literal(name: bytes, value: bytes, never_indexed: bool = False) -> bytes:
    """A field of less than 128 bytes that is put into no table (RFC 7541 sections 6.2.2 and 6.2.3)."""
    return b"".join([b"\x10" if never_indexed else b"\0", bytes((len(name),)), name, bytes((len(value),)), value])


def servers() -> dict[str, bytes]:
    quiet, busy = bytes((GREETED | BYTEWISE, 1)), bytes((GREETED | ACTIVE, 2))
    small = bytes((GREETED | ACTIVE | SMALL, 3))
    raw = client_says(2, 40)
    rest = b"".join(split(raw.removeprefix(PREFACE))[1:])
    large = b"".join(split(client_says(1, 6000).removeprefix(PREFACE))[1:])
    return {
        "whole": bytes((BYTEWISE, 0)) + raw,
        "calls": busy + rest,
        "padded": quiet + b"".join(split(client_says(2, 30, pad=7).removeprefix(PREFACE))[1:]),
        "cancelled": small + b"".join(split(client_says(5, 10, cancel=True).removeprefix(PREFACE))[1:]),
        "large": busy + large,
        "by_hand": quiet + by_hand(REQUEST),
        "by_hand_small": small + by_hand(REQUEST),
        "forwarded": bytes((GREETED | FORWARDS, 6)) + rest,
        "forwarded_late": bytes((GREETED | FORWARDS, 7))
        + b"".join(split(client_says(1, 6000).removeprefix(PREFACE))[1:]),
        "narrow": bytes((GREETED | FORWARDS | NARROW | ACTIVE, 8)) + literals(REQUEST),
        "literals": bytes((GREETED | FORWARDS | BYTEWISE, 9)) + literals(REQUEST),
    }


def clients() -> dict[str, bytes]:
    whole, busy = bytes((BYTEWISE, 0)), bytes((ACTIVE, 2))
    return {
        "answers": busy + server_says(40),
        "informational": whole + server_says(10, informational=True),
        "content_length": whole + server_says(25, length=True),
        "large": busy + server_says(3000),
        "small": bytes((ACTIVE | SMALL, 4)) + server_says(20),
        "by_hand": bytes((GREETED | BYTEWISE, 1)) + by_hand(RESPONSE),
        "by_hand_busy": bytes((GREETED | ACTIVE, 5)) + by_hand(RESPONSE),
        "forwarded": bytes((FORWARDS, 6)) + server_says(3000, informational=True),
        "narrow": bytes((GREETED | FORWARDS | NARROW | ACTIVE, 7)) + literals(RESPONSE),
        "literals": bytes((GREETED | FORWARDS | BYTEWISE, 8)) + literals(RESPONSE),
    }


def header_blocks() -> dict[str, bytes]:
    def step(text: bytes) -> bytes:
        return bytes((len(text),)) + text

    out = {}
    for name, huffman in (("plain", False), ("huffman", True)):
        encoder, parts = hpack.Encoder(), [b"\3"]
        for number, fields in enumerate((REQUEST, RESPONSE, TRAILERS, REQUEST + _CALL, REQUEST)):
            parts.append(step(encoder.encode(fields, huffman=huffman)))
            parts.append(bytes((0xF0 | (3 * number + 4) & 0x0F,)))
        out[name] = b"".join(parts)
    encoder = hpack.Encoder()
    sensitive = [hpack.NeverIndexedHeaderTuple(b"authorization", b"Bearer x"), (b"x-a", b"1")]
    small = encoder.encode(sensitive)
    encoder.header_table_size = 100
    out["resized"] = b"\2" + step(small) + step(encoder.encode(REQUEST)) + b"\xf5" + step(encoder.encode(sensitive))
    out["over_the_limit"] = b"\1" + step(hpack.Encoder().encode(REQUEST)) + step(b"\xbe")
    out["empty_table"] = b"\3" + step(b"\x20\x3f\xe1\x1f\x82") + b"\xf0" + step(b"\x41\x01a") + step(b"\xbe")
    return out


def write() -> int:
    """Write all of them -> how many bytes they take."""
    size = 0
    for target, files in (("server", servers()), ("client", clients()), ("hpack", header_blocks())):
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
            size += len(data)
    return size


if __name__ == "__main__":
    print(f"{write()} bytes in {CORPUS}", file=sys.stderr)
