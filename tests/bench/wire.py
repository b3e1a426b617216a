"""HTTP/2 as the benchmark's own programs speak it: frames, and header blocks encoded as real gRPC clients do it.

None of it is shared with the gate: what the gate's own code got wrong would otherwise be wrong on both sides.
"""

import random
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

METHOD = "/inference.GRPCInferenceService/ModelInfer"
STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
GRPC_PREFIX = struct.Struct(">BI")  # of a gRPC message: compressed flag, length

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM = ACK = 0x01
END_HEADERS = 0x04
PADDED = 0x08
FRAME = struct.Struct(">HBBBI")  # the length as 16 + 8 bits, type, flags, stream
FRAME_BYTES = FRAME.size
MAX_FRAME = 16_384
DEFAULT_WINDOW = 65_535
WIDE_WINDOW = 2**30 - 1  # as h2load's: no proxy ever waits for credit from a client of ours
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4

Field = tuple[bytes, bytes]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return FRAME.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", key, value) for key, value in values.items()))


def parse_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    return struct.iter_unpack(">HI", payload)


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def opening() -> bytes:
    """What a connection begins with, either way round (a server leaves the preface out): wide windows."""
    return settings({INITIAL_WINDOW_SIZE: WIDE_WINDOW}) + window_update(0, WIDE_WINDOW - DEFAULT_WINDOW)


def message(size: int) -> bytes:
    """One uncompressed gRPC message of `size` bytes in all."""
    length = size - GRPC_PREFIX.size
    return GRPC_PREFIX.pack(0, length) + (bytes(range(256)) * (size // 256 + 1))[:length]


# -- header compression (RFC 7541)


def integer(value: int, bits: int, pattern: int) -> bytes:
    """An integer with a prefix of `bits` bits, below the bits of `pattern`."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((pattern | value,))
    out = bytearray((pattern | limit,))
    value -= limit
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def plain(text: bytes) -> bytes:
    return integer(len(text), 7, 0) + text


_BITS = [f"{code:0{length}b}" for code, length in zip(REQUEST_CODES, REQUEST_CODES_LENGTH, strict=True)]


def huffman(text: bytes) -> bytes:
    """Huffman-coded where that is shorter, as most encoders do it."""
    bits = "".join([_BITS[byte] for byte in text])
    size = -(-len(bits) // 8)
    if size >= len(text):
        return plain(text)
    return integer(size, 7, 0x80) + int(bits.ljust(size * 8, "1"), 2).to_bytes(size, "big")


_STATIC_FIELDS = {(b":method", b"POST"): 3, (b":scheme", b"https"): 7}
_STATIC_NAMES = {
    b":authority": 1, b":method": 3, b":path": 4, b":scheme": 7, b"content-type": 31, b"user-agent": 58,
}  # fmt: skip
_STATIC_SIZE = 61
_TABLE_BYTES = 4096
_ENTRY_OVERHEAD = 32


class Encoder:
    """The dynamic table of one connection, of the default size, and the ways to write a field with it."""

    def __init__(self, string: Callable[[bytes], bytes], index_names: bool) -> None:
        self._string = string
        self._index_names = index_names
        self._added = 0
        self._size = 0
        self._entries: deque[Field] = deque()  # newest first
        self._fields: dict[Field, int] = {}
        self._names: dict[bytes, int] = {}

    def indexed(self, field: Field) -> bytes:
        """An index where the field is in a table; else a literal that puts it there."""
        if static := _STATIC_FIELDS.get(field):
            return integer(static, 7, 0x80)
        if number := self._alive(self._fields.get(field)):
            return integer(number, 7, 0x80)
        out = self._name(field[0], 6, 0x40) + self._string(field[1])
        self._add(field)
        return out

    def literal(self, field: Field) -> bytes:
        """A literal that leaves the table as it is."""
        return self._name(field[0], 4, 0x00) + self._string(field[1])

    def _name(self, name: bytes, bits: int, pattern: int) -> bytes:
        number = 0
        if self._index_names:
            number = _STATIC_NAMES.get(name, 0) or self._alive(self._names.get(name))
        return integer(number, bits, pattern) + (b"" if number else self._string(name))

    def _alive(self, added: int | None) -> int:
        """The present index of what was added as number `added`; 0 if it never was, or is evicted."""
        if added is None or added <= self._added - len(self._entries):
            return 0
        return _STATIC_SIZE + 1 + self._added - added

    def _add(self, field: Field) -> None:
        self._added += 1
        self._fields[field] = self._names[field[0]] = self._added
        self._entries.appendleft(field)
        self._size += _ENTRY_OVERHEAD + len(field[0]) + len(field[1])
        while self._size > _TABLE_BYTES:
            old = self._entries.pop()
            self._size -= _ENTRY_OVERHEAD + len(old[0]) + len(old[1])
            if not self._alive(self._fields[old]):
                del self._fields[old]  # or a run's unique values would all be kept


@dataclass(frozen=True)
class Style:
    """How a client encodes: the order of its fields, what it never indexes, how it writes strings.

    A value of None is another one on each call.
    """

    fields: Sequence[tuple[bytes, bytes | None]]
    literal: frozenset[bytes] = frozenset()
    string: Callable[[bytes], bytes] = huffman
    index_names: bool = True


_FIELDS: list[tuple[bytes, bytes | None]] = [
    (b":path", METHOD.encode()),
    (b":authority", b"localhost"),
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]
_METADATA: list[tuple[bytes, bytes | None]] = [(b"traceparent", None), (b"x-request-id", None)]

# What h2load is told to send, in the way it writes it.
CONSTANT = Style(_FIELDS)

# As captured from grpcio 1.85 (C-core 58): every field of its own is a literal with incremental indexing on first use
# and an index from then on, names always spelt out, nothing Huffman-coded; an application's metadata is a literal
# without indexing. A timeout is indexed too, and so each new one moves the indices of all the others, until the table
# is full and the stable fields are evicted and sent again, every 75 calls or so. (C-core rounds timeouts, so that its
# calls sometimes hit an earlier one; here each is new.) Left out: the WINDOW_UPDATE of a few bytes that C-core sends
# beside each call.
GRPCIO = Style(
    [
        *_FIELDS,
        (b"grpc-accept-encoding", b"identity, deflate, gzip"),
        (b"grpc-timeout", None),
        (b"user-agent", b"grpc-python/1.85.1 grpc-c/58.0.0 (linux; chttp2)"),
        *_METADATA,
    ],
    literal=frozenset((b"traceparent", b"x-request-id")),
    string=plain,
    index_names=False,
)

# As golang.org/x/net/http2/hpack does it for grpc-go: everything that fits is indexed, an application's metadata too,
# names are indices where they can be, strings are Huffman-coded where that is shorter. Three new entries a call push
# the stable fields out of the table every 17 calls or so.
GO = Style([*_FIELDS, (b"user-agent", b"grpc-go/1.65.0"), (b"grpc-timeout", None), *_METADATA])

STYLES = {"constant": CONSTANT, "grpcio": GRPCIO, "go": GO}


def _value(name: bytes, dice: random.Random, number: int) -> bytes:
    if name == b"grpc-timeout":
        return b"%dm" % (1_000_000 + number)  # a quarter of an hour and more: never the reason for an answer
    digits = b"%048x" % dice.getrandbits(192)
    if name == b"traceparent":
        return b"00-%s-%s-01" % (digits[:32], digits[32:])
    return b"-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32]))


def blocks(style: Style, seed: int) -> Iterator[bytes]:
    """The header blocks of the calls of one connection, in the order they must be sent; the same for the same seed.

    Connections with other seeds (below 1000) have other values.
    """
    encoder = Encoder(style.string, style.index_names)
    dice = random.Random(seed)
    number = seed
    while True:
        out = []
        for name, value in style.fields:
            field = (name, _value(name, dice, number) if value is None else value)
            out.append(encoder.literal(field) if name in style.literal else encoder.indexed(field))
        number += 1000
        yield b"".join(out)
