"""SETTINGS (RFC 9113 section 6.5): identifiers, defaults, validity. No I/O."""

from proxy.http2.errors import ConnectionFault, ErrorCode
from proxy.http2.frames import DEFAULT_MAX_FRAME, DEFAULT_WINDOW, MAX_WINDOW

HEADER_TABLE_SIZE = 0x1
ENABLE_PUSH = 0x2
MAX_CONCURRENT_STREAMS = 0x3
INITIAL_WINDOW_SIZE = 0x4
MAX_FRAME_SIZE = 0x5
MAX_HEADER_LIST_SIZE = 0x6


# More than there can be of anything, and little enough to be compared fast: CPython's integers of one digit.
UNLIMITED = 2**30 - 1


class Settings:
    """What one side of a connection has announced; starts at the values of RFC 9113 section 6.5.2.

    Its SETTINGS_HEADER_TABLE_SIZE is not kept: the encoder takes it over, value by value.
    """

    __slots__ = ("initial_window", "max_frame", "max_header_list", "max_streams")

    def __init__(self) -> None:
        self.max_streams = UNLIMITED
        self.initial_window = DEFAULT_WINDOW
        self.max_frame = DEFAULT_MAX_FRAME
        self.max_header_list = UNLIMITED

    def apply(self, key: int, value: int, from_server: bool) -> None:
        """Take one setting over, or raise ConnectionFault. Unknown settings are ignored (section 6.5.2)."""
        if key == ENABLE_PUSH:
            # A server may only say 0: it has nothing to enable (section 6.5.2).
            if value > 1 or (from_server and value == 1):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"SETTINGS_ENABLE_PUSH is {value}")
        elif key == MAX_CONCURRENT_STREAMS:
            self.max_streams = min(value, UNLIMITED)
        elif key == INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"SETTINGS_INITIAL_WINDOW_SIZE is {value}")
            self.initial_window = value
        elif key == MAX_FRAME_SIZE:
            if not DEFAULT_MAX_FRAME <= value <= 2**24 - 1:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"SETTINGS_MAX_FRAME_SIZE is {value}")
            self.max_frame = value
        elif key == MAX_HEADER_LIST_SIZE:
            self.max_header_list = min(value, UNLIMITED)
