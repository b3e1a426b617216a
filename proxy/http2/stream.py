"""The record of one stream. No logic beyond its own fields, no I/O."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.http2.headers import HeaderBlock, Passing
    from proxy.http2.hpack import Field
    from proxy.http2.sender import Sender

_SMALL_BYTES = 2048
_JOINED_BYTES = 16_384


class Backlog:
    """What of a stream no window had room for: pieces of DATA in order, and what comes behind them.

    Pieces are copies: a slice of a read buffer would pin the whole of it for as long as the peer likes. Small ones are
    joined, since a peer that sends single bytes would have us keep an object for each.
    """

    __slots__ = ("chunks", "end", "passing", "size", "trailers", "waiting")

    def __init__(self) -> None:
        self.chunks: deque[bytes | bytearray] = deque()
        self.size = 0  # bytes that were ever added
        self.waiting = 0  # bytes that are in it
        self.end = False  # END_STREAM goes with the last piece
        self.trailers: HeaderBlock | None = None
        self.passing: Passing | None = None  # with the trailers

    def add(self, chunk: bytes | bytearray | memoryview, end: bool) -> None:
        """Add a piece; `end` when END_STREAM comes with it."""
        chunks = self.chunks
        if chunk or not chunks:
            self.size += len(chunk)
            self.waiting += len(chunk)
            last = chunks[-1] if chunks else None
            if isinstance(last, bytearray) and len(last) + len(chunk) <= _JOINED_BYTES:
                last += chunk
            elif len(chunk) < _SMALL_BYTES:
                chunks.append(bytearray(chunk))
            else:
                chunks.append(bytes(chunk))
        self.end = end


class Stream:
    """One stream (RFC 9113 section 5.1); it is in its connection's table from its first HEADERS until it is closed.

    `partner` is the stream of another connection whose data this one carries onward: bytes that this stream sends
    are credited there, when they are sent and not before. `remote_closed` and `local_closed` say which side has sent
    END_STREAM.
    """

    __slots__ = (
        "backlog",
        "conn",
        "expect",
        "head_seen",
        "id",
        "local_closed",
        "partner",
        "passing",
        "recv_window",
        "remote_closed",
        "send_window",
        "unacked",
        "window",
    )

    def __init__(self, conn: Sender, stream_id: int, recv_window: int, send_window: int) -> None:
        self.conn = conn
        self.id = stream_id
        self.recv_window = recv_window
        self.window = recv_window  # what recv_window is, or will be again, once all that came is forwarded
        self.send_window = send_window
        self.unacked = 0  # bytes forwarded for which no credit was returned yet
        self.expect = -1  # bytes of content-length still to come, or -1
        self.remote_closed = False
        self.local_closed = False
        self.head_seen = False  # client role: the final response head has come
        self.partner: Stream | None = None
        self.backlog: Backlog | None = None
        self.passing: Passing | None = None  # of the header section that came last

    def section(self, block: HeaderBlock) -> list[Field]:
        """All fields of the header section that came last and has this block."""
        return [*block.fields, *(self.passing.fields if self.passing is not None else ())]
