"""What of a request is kept for sending it once more, while nothing of its answer has come.

An upstream can say that it has not processed a request: by GOAWAY with a lower last stream (RFC 9113 section 6.8), by
RST_STREAM with REFUSED_STREAM (section 8.7). It is then sent again, once, on another connection if there is one. A
request that may have been processed never is.

A small request costs a reference to its one piece, and there are never more of them than streams upstream. What is
longer is copied, since a slice pins a whole read buffer, and bounded: each request, and all of them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.http2 import Backlog, Buffer, Passing, Stream

if TYPE_CHECKING:
    from proxy.relay.downstream import Downstream

KEPT_OF_CALL = 16_384
KEPT_OF_ALL = 16_777_216
SMALL = 4096
NOTHING = b""

# Why a request is not kept, in words for its client.
ANSWERED = "a part of its answer had come"
SENT_TWICE = "it was sent a second time already"
TOO_LONG = f"it is longer than {KEPT_OF_CALL} bytes"
TOO_MANY = f"the gate keeps {KEPT_OF_ALL} bytes of such requests already"
HAS_TRAILERS = "it ended with trailers"


class Held(Backlog):
    """A request that waits for an upstream connection: what has come of it, and `request`, the fields that its header
    section has besides its block. fields: bytes of the block's fields, unless many calls share it, and of trailers."""

    __slots__ = ("fields", "request")

    def __init__(self, request: Passing | None, end: bool, fields: int = 0) -> None:
        super().__init__()
        self.request = request
        self.fields = fields
        self.end = end

    @property
    def weight(self) -> int:
        """Bytes that it holds, of fields and data."""
        return self.size + self.fields + (len(self.request.encoded) if self.request is not None else 0)


class Replayable(Stream):
    """A client's stream. `kept` is what has come of its request, one small piece or all of them; or, as a text, why
    that is not known any more."""

    __slots__ = ("kept",)

    conn: Downstream
    kept: bytes | Held | str

    def keep(self, chunk: Buffer) -> None:
        """A further piece of the request, of any size."""
        kept = self.kept
        if isinstance(kept, str) or not chunk:
            return
        relay = self.conn.relay
        if isinstance(kept, bytes):
            if _message_bytes(kept or chunk) > KEPT_OF_CALL:
                self.kept = TOO_LONG  # not worth the copying
                return
            kept = self.kept = self._as_held(kept)
            relay.kept_bytes += kept.size
        if kept.size + len(chunk) > KEPT_OF_CALL:
            self.forget_request(TOO_LONG)
        elif relay.kept_bytes + len(chunk) > KEPT_OF_ALL:
            self.forget_request(TOO_MANY)
        else:
            kept.add(chunk, False)
            relay.kept_bytes += len(chunk)

    def forget_request(self, why: str) -> None:
        """It will not be sent again."""
        if isinstance(self.kept, Held):
            self.conn.relay.kept_bytes -= self.kept.size
        self.kept = why

    def take_request(self) -> Held | str:
        """The request as it waits for a connection, to be sent for the second and last time; or why it can't be."""
        kept = self.kept
        if isinstance(kept, str):
            return kept
        self.forget_request(SENT_TWICE)
        held = self._as_held(kept) if isinstance(kept, bytes) else kept
        held.end = self.remote_closed
        # What was forwarded the first time has its credit already.
        self.unacked -= held.size - self.conn.unforwarded(self)
        return held

    def _as_held(self, piece: bytes) -> Held:
        held = Held(self.passing, False)
        if piece:
            held.add(piece, False)
        return held


def _message_bytes(chunk: Buffer) -> int:
    """How long the first message of a request is, which begins with this piece: the prefix says so, if it is whole."""
    return int.from_bytes(chunk[1:5], "big") if len(chunk) >= 5 and chunk[0] <= 1 else 0
