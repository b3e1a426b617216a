"""Frame types, flags, and the bytes of frames (RFC 9113 sections 4 and 6). No state, no I/O."""

from struct import Struct

DATA = 0x0
HEADERS = 0x1
PRIORITY = 0x2
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FLAG = 0x20

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW = 2**31 - 1
MAX_STREAM_ID = 2**31 - 1
DEFAULT_WINDOW = 65_535
DEFAULT_MAX_FRAME = 16_384

# length (high 16 bits, low 8 bits), type, flags, stream identifier
FRAME_HEADER = Struct(">HBBBL")
_UINT32 = Struct(">L")
_WINDOW_UPDATE = Struct(">HBBBLL")
_GOAWAY = Struct(">HBBBLLL")
_SETTING = Struct(">HL")


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """One whole frame."""
    length = len(payload)
    return FRAME_HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id) + payload


def window_update(stream_id: int, increment: int) -> bytes:
    return _WINDOW_UPDATE.pack(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


def rst_stream(stream_id: int, code: int) -> bytes:
    return _WINDOW_UPDATE.pack(0, 4, RST_STREAM, 0, stream_id, code)


def goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    """GOAWAY; `debug` is cut to 256 bytes, it is for a reader's eyes only."""
    debug = debug[:256]
    length = 8 + len(debug)
    return _GOAWAY.pack(length >> 8, length & 0xFF, GOAWAY, 0, 0, last_stream_id, code) + debug


def ping_ack(payload: bytes) -> bytes:
    return frame(PING, ACK, 0, payload)


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


SETTINGS_ACK = frame(SETTINGS, ACK, 0, b"")


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """The (identifier, value) pairs in order; the caller has checked that the length divides by six."""
    return list(_SETTING.iter_unpack(payload))


def uint31(payload: bytes, offset: int = 0) -> int:
    """A 31-bit integer behind a reserved bit."""
    value: int = _UINT32.unpack_from(payload, offset)[0]
    return value & 0x7FFFFFFF


def uint32(payload: bytes, offset: int = 0) -> int:
    value: int = _UINT32.unpack_from(payload, offset)[0]
    return value


def header_frames(stream_id: int, block: bytes, end_stream: bool, max_frame: int) -> bytes:
    """HEADERS and CONTINUATION frames, for a block that is longer than the largest frame."""
    length = len(block)
    flags = END_STREAM if end_stream else 0
    parts = [frame(HEADERS, flags, stream_id, block[:max_frame])]
    for start in range(max_frame, length, max_frame):
        last = END_HEADERS if start + max_frame >= length else 0
        parts.append(frame(CONTINUATION, last, stream_id, block[start : start + max_frame]))
    return b"".join(parts)
