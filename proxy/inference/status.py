"""gRPC status codes and messages, as "gRPC over HTTP/2" writes them into trailers. No I/O."""

from collections.abc import Iterable
from enum import IntEnum

Field = tuple[bytes, bytes]


class Code(IntEnum):
    """grpc/doc/statuscodes.md"""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


NAMES = tuple(code.name for code in Code)
_MAX_MESSAGE = 1024

# grpc/doc/http-grpc-status-mapping.md: what a client makes of an HTTP status without grpc-status.
_FROM_HTTP = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}

# "gRPC over HTTP/2", section Errors: what a client makes of RST_STREAM, by HTTP/2 error code.
_FROM_RESET = {
    0x7: Code.UNAVAILABLE,
    0x8: Code.CANCELLED,
    0xB: Code.RESOURCE_EXHAUSTED,
    0xC: Code.PERMISSION_DENIED,
}


def from_http(status: int) -> Code:
    return _FROM_HTTP.get(status, Code.UNKNOWN)


def from_reset(error_code: int) -> Code:
    return _FROM_RESET.get(error_code, Code.INTERNAL)


def read(fields: Iterable[Field]) -> Code | None:
    """The grpc-status of a trailer section; None where there is none, UNKNOWN where it is no code."""
    for name, value in fields:
        if name == b"grpc-status":
            if value.isdigit() and len(value) <= 2 and int(value) < len(NAMES):
                return Code(int(value))
            return Code.UNKNOWN
    return None


def encode_message(text: str) -> bytes:
    """grpc-message: percent-encoded UTF-8, printable ASCII but % as it is; cut to about 1 KiB."""
    raw = text.encode("utf-8", "replace")
    if len(raw) > _MAX_MESSAGE:
        raw = raw[: _MAX_MESSAGE - 3].decode("utf-8", "ignore").encode() + b"..."  # not in the middle of a character
    raw = raw.strip(b" ")  # a field's value must neither begin nor end with one (RFC 9113, 8.2.1)
    return b"".join([bytes((byte,)) if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte for byte in raw])


def trailers(code: Code, message: str) -> list[Field]:
    return [(b"grpc-status", b"%d" % code), (b"grpc-message", encode_message(message))]


def trailers_only(code: Code, message: str) -> list[Field]:
    """The whole answer in one header section ("Trailers-Only")."""
    return [(b":status", b"200"), (b"content-type", b"application/grpc"), *trailers(code, message)]
