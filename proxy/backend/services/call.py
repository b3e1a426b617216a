"""One RPC over HTTP/2: messages put together, the answer sent as windows allow, everything counted in the budget.

A call is its stream's record in the wire core. What comes is given credit at once, since the budget bounds it; behind a
message that nobody has taken yet it waits without credit. What goes is handed to the wire core in pieces of a frame, as
it can be sent, so that a large response is never copied.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proxy.backend.budget import Budget
from proxy.backend.errors import Code, InferenceError
from proxy.backend.services.compression import LARGEST_INFLATED, WINDOW_BITS, Inflater, NotCompressed, TooLong
from proxy.backend.tensors import Buffer
from proxy.http2 import ErrorCode, HeaderBlock, ResponseHead, Stream, Trailers
from proxy.inference.status import encode_message

if TYPE_CHECKING:
    from proxy.backend.services.http2 import Connection
    from proxy.backend.services.rpc import Facts

LARGEST_MESSAGE = 2**31 - 1  # bytes; protobuf's own limit
LARGEST_QUESTION = 64 * 2**10  # bytes of a request that holds no tensors: names, versions and a few parameters
ENOUGH = 256 * 1024  # bytes of output from which on it is written first

_FRAME = 16_384
_QUANTUM = 8  # frames that a call sends before others have their turn
_SMALL = 8192  # bytes; smaller pieces are sent together
_FIELDS = [
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity, gzip, deflate"),
]
_HEAD = ResponseHead(_FIELDS, checked=True)
_OK = Trailers([(b"grpc-status", b"0")], checked=True)
_DONE = ResponseHead([*_FIELDS, *_OK.fields], checked=True)


class Call(Stream):
    """`deadline` is on the clock of time.monotonic, None if the client set none; `task` serves the call."""

    __slots__ = (
        "_budget",
        "_buffer",
        "_drained",
        "_held",
        "_left",
        "_length",
        "_out",
        "_owed",
        "_sent_head",
        "_trailers",
        "_waiter",
        "_working",
        "deadline",
        "ended",
        "facts",
        "message_size",
        "most",
        "task",
        "timeout",
        "timer",
    )

    conn: Connection

    def __init__(self, conn: Connection, stream_id: int, recv_window: int, send_window: int, budget: Budget) -> None:
        super().__init__(conn, stream_id, recv_window, send_window)
        self._budget = budget
        self._held = 0
        self._buffer: bytes | bytearray = b""
        self._length = -1  # of the message that begins the buffer, -1 while its prefix isn't there
        self._owed = 0  # bytes that came and got no credit yet
        self._waiter: asyncio.Future[None] | None = None
        self._sent_head = False
        self._out: deque[Buffer] = deque()
        self._drained: asyncio.Future[None] | None = None
        self._trailers: HeaderBlock | None = None
        self._left = False  # the stream is gone
        self._working: asyncio.Task[None] | None = None  # that was told to stop
        self.timeout: float | None = None  # seconds
        self.deadline: float | None = None
        self.ended = False  # its status is on the way, nothing can be sent any more
        self.facts: Facts
        self.most = LARGEST_QUESTION  # bytes of a message
        self.message_size = 0  # bytes that are held for what `receive` returned last
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    # -- what comes

    def feed(self, chunk: Buffer | bytearray) -> None:
        """A piece of the request. Raises InferenceError for a message, or for more in all, than is taken."""
        size = len(chunk)
        self._budget.take(size)
        self._held += size
        if not self._buffer:
            self._buffer = bytes(chunk)  # a view is one of the buffer that the next read fills
        else:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            self._buffer += chunk
        if self._whole():
            self._owed += size
            if self._waiter is not None:
                self._wake()
        else:
            self.conn.credit(self, size)

    def _whole(self) -> bool:
        """Whether the buffer begins with a whole message."""
        buffer = self._buffer
        if self._length < 0:
            if len(buffer) < 5:
                return False
            self._length = int.from_bytes(buffer[1:5], "big")
            if self._length > self.most:
                raise InferenceError(
                    Code.RESOURCE_EXHAUSTED, f"message of {self._length} bytes is larger than {self.most} bytes"
                )
        return len(buffer) >= 5 + self._length

    def end_of_request(self) -> None:
        """The client will send nothing more."""
        self._wake()

    async def receive(self) -> Buffer | None:
        """The next message of the client; None after the last one. Raises InferenceError."""
        while not self._whole():
            if self.remote_closed:
                if self._buffer:
                    raise InferenceError(Code.INTERNAL, "request ended in the middle of a message")
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        compressed, payload = self._cut()
        self.message_size = 5 + len(payload)
        return await self._inflated(payload) if compressed else payload

    async def _inflated(self, payload: Buffer) -> Buffer:
        encoding, most = self.facts.encoding, min(self.most, LARGEST_INFLATED)
        if encoding == "identity":
            raise InferenceError(
                Code.INTERNAL, "message is marked as compressed, but grpc-encoding names no compression"
            )
        if encoding not in WINDOW_BITS:
            raise InferenceError(
                Code.UNIMPLEMENTED, f"grpc-encoding '{encoding:.40}' is not supported; use gzip, deflate or none"
            )
        data = bytearray()
        try:
            await Inflater(encoding).inflate(payload, data, most, self._hold_more)
        except TooLong:
            raise InferenceError(
                Code.RESOURCE_EXHAUSTED, f"compressed message is larger than {most} bytes when decompressed"
            ) from None
        except NotCompressed as fault:
            raise InferenceError(Code.INTERNAL, f"message cannot be decompressed: {fault}") from None
        return memoryview(data).toreadonly()

    def _hold_more(self, size: int) -> None:
        self.hold(size)
        self.message_size += size

    def _cut(self) -> tuple[int, Buffer]:
        """Take the message that begins the buffer -> (the flag of its prefix, its bytes)."""
        buffer, stop = self._buffer, 5 + self._length
        compressed = buffer[0]
        payload: Buffer
        if len(buffer) == stop:
            payload = memoryview(buffer).toreadonly()[5:] if isinstance(buffer, bytearray) else buffer[5:]
            self._buffer = b""
        else:
            if isinstance(buffer, bytes):
                buffer = self._buffer = bytearray(buffer)
            payload = bytes(buffer[5:stop])
            del buffer[:stop]  # which moves the start and copies nothing
        self._length = -1
        if self._owed and not self._whole():
            owed, self._owed = self._owed, 0
            self.conn.credit(self, owed)
        return compressed, payload

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- what is held

    def hold(self, size: int) -> None:
        """So many bytes more. Raises InferenceError."""
        if not self._left:  # what a task still does for a caller that has left is never given back
            self._budget.take(size)
            self._held += size

    def give(self, size: int) -> None:
        """So many bytes of its messages are gone."""
        if not self._left:
            self._budget.give(size)
            self._held -= size

    def release(self) -> None:
        """All of the call's messages are gone, or about to be."""
        self._budget.give(self._held)
        self._held = 0

    # -- what goes

    async def send(self, pieces: Sequence[Buffer]) -> None:
        """Send one message of several, given in pieces, uncompressed; returns when the wire core has all of it.

        Raises InferenceError when it would be too much.
        """
        length = _length(pieces)
        self.hold(length)
        self._write(pieces, length)
        if self._out:
            if self._drained is None or self._drained.done():
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)  # others wait for it, too
        self.give(length)

    def write(self, pieces: Sequence[Buffer]) -> None:
        """Send the only message, without waiting. What was received is taken to be gone. Raises InferenceError."""
        length = _length(pieces)
        self.release()
        self.hold(length)
        self._write(pieces, length)

    def _write(self, pieces: Sequence[Buffer], length: int) -> None:
        if self._left or self.ended:
            return
        if not self._sent_head:
            self._sent_head = True
            self.conn.send_headers(self, _HEAD)
        prefix = b"\0" + length.to_bytes(4, "big")
        if length < _SMALL and not self._out and self.backlog is None:
            self.conn.send_data(self, b"".join([prefix, *pieces]), False)
            return
        self._out.extend(gathered([prefix, *pieces]))
        self.push()

    def push(self) -> None:
        """Hand on what the wire core can send now; `conn.stalled` while there is more."""
        conn, out = self.conn, self._out
        for _ in range(_QUANTUM):
            if not out or self.backlog is not None or conn.paused or conn.out_size >= ENOUGH:
                break
            piece = out.popleft()
            if len(piece) > _FRAME:
                out.appendleft(piece[_FRAME:])
                piece = piece[:_FRAME]
            conn.send_data(self, piece, False)
        conn.stalled.pop(self, None)
        if out:
            if self.backlog is None:  # or else the connection puts it there when that is sent
                conn.stalled[self] = None  # behind the others
            return
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._trailers is not None:
            conn.send_trailers(self, self._trailers)

    def end(self, code: Code = Code.OK, message: str = "") -> None:
        """Send the status, behind what was written. Nothing can be sent after it."""
        if self.ended or self._left:
            return
        self.ended = True
        fields = _OK.fields if code is Code.OK else _status(code, message)
        if self._sent_head:
            self._trailers = _OK if code is Code.OK else Trailers(fields, checked=True)
            if not self._out:
                self.conn.send_trailers(self, self._trailers)
            return
        # RST_STREAM(NO_ERROR) goes behind it where the client still sends (RFC 9113, 8.1).
        head = _DONE if code is Code.OK else ResponseHead([*_FIELDS, *fields], checked=True)
        self.conn.send_headers(self, head, True)

    def refuse(self, head: HeaderBlock) -> None:
        """Answer what is no gRPC."""
        if not (self.ended or self._left):
            self.ended = True
            self.conn.send_headers(self, head, True)

    @property
    def has_more(self) -> bool:
        """Whether there is anything that the wire core hasn't got."""
        return bool(self._out)

    # -- its end

    def stop(self) -> None:
        """Stop working on it: nobody waits any more."""
        task, self.task = self.task, None
        if task is not None:
            self._working = task
            task.cancel()

    def expire(self) -> None:
        """The deadline has passed. The task isn't trusted to tell: one that is cancelled before its first step runs
        nothing of its own."""
        self.timer = None
        self.stop()
        if self._out or self.backlog is not None:
            # In the middle of a message no status can follow; "gRPC over HTTP/2" has CANCEL for that.
            self.conn.reset(self, ErrorCode.CANCEL)
        else:
            self.end(Code.DEADLINE_EXCEEDED, f"deadline of {self.timeout:g} s exceeded")

    def closed(self) -> None:
        """The stream has left the connection's table."""
        self._left = True
        self.conn.stalled.pop(self, None)
        self._out.clear()
        self._buffer = b""
        if self.timer is not None:
            self.timer.cancel()
        if not self.ended:
            self.stop()
        elif self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        working, self._working = self._working, None
        if working is None or working.done():
            self.release()
        else:
            # A thread may still read its messages: until that ends, they are held.
            working.add_done_callback(lambda _: self.release())


def _length(pieces: Sequence[Buffer]) -> int:
    length = sum(map(len, pieces))
    if length > LARGEST_MESSAGE:
        raise InferenceError(
            Code.RESOURCE_EXHAUSTED, f"response of {length} bytes is larger than {LARGEST_MESSAGE} bytes"
        )
    return length


def gathered(pieces: Sequence[Buffer]) -> list[Buffer]:
    """The same bytes in fewer pieces: small neighbours are joined, large ones stay as they are, as views."""
    gathered: list[Buffer] = []
    small: list[Buffer] = []
    for piece in pieces:
        if len(piece) < _SMALL:
            small.append(piece)
            continue
        gathered += [b"".join(small), memoryview(piece)] if small else [memoryview(piece)]
        small = []
    if small:
        gathered.append(b"".join(small))
    return gathered


def _status(code: Code, message: str) -> list[tuple[bytes, bytes]]:
    return [(b"grpc-status", b"%d" % code), (b"grpc-message", encode_message(message))]
