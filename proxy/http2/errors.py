"""What can go wrong on an HTTP/2 connection, in the RFC's words. May not depend on anything."""

from enum import IntEnum


class ErrorCode(IntEnum):
    """RFC 9113 section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


_NAMES = {int(code): code.name for code in ErrorCode}


def error_name(code: int) -> str:
    """The name of an error code; unknown codes are legal (RFC 9113 section 7) and shown as numbers."""
    return _NAMES.get(code) or f"error code {code:#x}"


class ConnectionFault(Exception):
    """A connection error (RFC 9113 section 5.4.1): GOAWAY with `code` and `reason`, then the end."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code = code
        self.reason = reason


class Abuse(ConnectionFault):
    """A connection error for a peer that does too much of something; `kind` is one of `guards.KINDS`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(ErrorCode.ENHANCE_YOUR_CALM, reason)
        self.kind = kind


class HpackFault(Exception):
    """A header block that can't be decoded. The compression state is lost: always a connection error."""


class HeaderBomb(Exception):
    """A block that decodes to so much that it isn't decoded to its end: an attack, so a connection error."""


class HeaderListTooLarge(Exception):
    """The decoded header list is over the limit. The block was decoded to its end: the state is intact."""
