"""gRPC calls over grpclib's HTTP/2 connection: framing, status, deadline, compression, cancellation.

grpclib's own call layer (grpclib.server) is left out for what it can't do: answer compressed requests (tritonclient
offers gzip and deflate), name the method that is unknown, say INTERNAL for bytes that don't parse, send a large
response without copying it whole, end gracefully. What remains of grpclib is the HTTP/2 connection: h2, buffers with
credit on consumption, flow control.
"""

from __future__ import annotations

import asyncio
import logging
import re
import struct
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from google.protobuf.message import DecodeError
from grpclib.protocol import AbstractHandler
from grpclib.protocol import Buffer as Received
from grpclib.protocol import Stream as H2Stream
from h2.connection import H2Connection
from h2.exceptions import ProtocolError

from proxy.backend.budget import Budget
from proxy.backend.errors import Code, InferenceError
from proxy.backend.tensors import Buffer
from proxy.spawn import spawn

LARGEST_MESSAGE = 2**31 - 1  # bytes; protobuf's own limit
LARGEST_QUESTION = 4 * 2**20  # bytes of a request that holds no tensors; gRPC's own usual limit
LARGEST_INFLATED = 256 * 2**20  # bytes that a compressed message may grow to: a few MB of it could become terabytes
_LONG_TO_INFLATE = 16 * 2**10  # bytes, compressed; from here on it is not the event loop that inflates them

_log = logging.getLogger("tensorgate.backend")
_PREFIX = struct.Struct(">BI")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_HEADERS: Any = [(b":status", b"200"), (b"content-type", b"application/grpc")]
_OK: Any = [(b"grpc-status", b"0")]
_UNSUPPORTED_MEDIA: Any = [(b":status", b"415"), (b"grpc-status", b"2"), (b"grpc-message", b"not a gRPC request")]
_UNESCAPED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_LONGEST_TEXT = 1000  # characters of a status message: peers limit the size of headers, gRPC's to 8 KiB
_LONGEST_FOREIGN_TEXT = 400  # with characters that are not ASCII, which take up to 12 bytes each
_NEEDED = frozenset((b":method", b":path", b"content-type", b"grpc-encoding", b"grpc-timeout"))
_SMALL = 8192  # bytes; smaller pieces are sent together
_AT_ONCE = 128 * 1024  # bytes handed to the transport in one go


class Call:
    """One RPC. `deadline` is on the clock of time.monotonic, None if the client set none.

    The messages that it holds are counted in `budget`, from their first byte until `release`.
    """

    __slots__ = ("_budget", "_encoding", "_h2", "_held", "_started", "_stream", "_transport", "deadline")

    def __init__(
        self, stream: H2Stream, h2: H2Connection, transport: asyncio.Transport, encoding: bytes, budget: Budget
    ) -> None:
        self._stream = stream
        self._h2 = h2
        self._transport = transport
        self._encoding = encoding
        self._started = False
        self._budget = budget
        self._held = 0
        self.deadline: float | None = None
        stream.buffer = Received(self._arrived)

    def _arrived(self, size: int) -> None:
        """Called by `recv_data` for what it takes over, frame by frame: a client may announce much and send nothing."""
        stream = self._stream
        assert stream.id is not None
        stream.connection.ack(stream.id, size)  # in any case: the connection's window belongs to other calls too
        self._hold(size)

    def _hold(self, size: int) -> None:
        self._budget.take(size)
        self._held += size

    def release(self) -> None:
        """The call's messages are gone, or about to be."""
        self._budget.give(self._held)
        self._held = 0

    async def receive(self, most: int = LARGEST_QUESTION) -> bytes | None:
        """The next message of the client, at most so many bytes; None after the last one. Raises InferenceError."""
        try:
            prefix = await self._stream.recv_data(5)
            if not prefix:
                return None
            compressed, length = _PREFIX.unpack(prefix)
            if length > most:
                raise InferenceError(Code.RESOURCE_EXHAUSTED, f"message of {length} bytes is larger than {most} bytes")
            payload = await self._stream.recv_data(length)
        except AssertionError:
            # grpclib's way to say that the stream ended early
            raise InferenceError(Code.INTERNAL, "request ended in the middle of a message") from None
        if len(payload) != length:
            raise InferenceError(Code.INTERNAL, "request ended in the middle of a message")
        if not compressed:
            return payload
        if length < _LONG_TO_INFLATE:
            data = _inflate(payload, self._encoding, min(most, LARGEST_INFLATED))
        else:
            data = await asyncio.to_thread(_inflate, payload, self._encoding, min(most, LARGEST_INFLATED))
        self._hold(len(data))
        return data

    async def send(self, pieces: Sequence[Buffer]) -> None:
        """Send one message, given in pieces, uncompressed. What was received so far is taken to be gone."""
        length = sum(map(len, pieces))
        if length > LARGEST_MESSAGE:
            raise InferenceError(
                Code.RESOURCE_EXHAUSTED, f"response of {length} bytes is larger than {LARGEST_MESSAGE} bytes"
            )
        self.release()
        self._hold(length)
        if not self._started:
            self._started = True
            await self._stream.send_headers(_HEADERS)
        for piece in _gathered([_PREFIX.pack(0, length), *pieces]):
            await self._send_data(piece)

    async def end(self, code: Code = Code.OK, message: str = "") -> None:
        """Send the status. Nothing can be sent after it."""
        stream = self._stream
        trailers = _OK if code is Code.OK else _status(code, message)
        await stream.send_headers(trailers if self._started else [*_HEADERS, *trailers], end_stream=True)
        if code is not Code.OK and stream.closable:
            # The client may still be sending: RST_STREAM(NO_ERROR) tells it not to (RFC 9113, 8.1).
            stream.reset_nowait()

    async def _send_data(self, piece: Buffer) -> None:
        h2, stream, transport = self._h2, self._stream, self._transport
        assert stream.id is not None
        view = memoryview(piece)
        while view:
            await stream.connection.write_ready.wait()
            window = h2.local_flow_control_window(stream.id)
            if window <= 0:
                stream.window_updated.clear()
                await stream.window_updated.wait()
                continue
            frame, burst = h2.max_outbound_frame_size, view[: min(window, _AT_ONCE)]
            for at in range(0, len(burst), frame):
                # h2 takes any buffer; its annotation says bytes
                h2.send_data(stream.id, burst[at : at + frame])  # type: ignore[arg-type, unused-ignore]
            transport.write(h2.data_to_send())
            view = view[len(burst) :]


def _gathered(pieces: Sequence[Buffer]) -> list[Buffer]:
    """The same bytes in fewer pieces: small neighbours are joined, large ones stay as they are."""
    gathered: list[Buffer] = []
    small: list[Buffer] = []
    for piece in pieces:
        if len(piece) < _SMALL:
            small.append(piece)
            continue
        gathered += [b"".join(small), piece] if small else [piece]
        small = []
    if small:
        gathered.append(b"".join(small))
    return gathered


def _inflate(payload: bytes, encoding: bytes, most: int) -> bytes:
    if encoding == b"identity":
        raise InferenceError(Code.INTERNAL, "message is marked as compressed, but grpc-encoding names no compression")
    bits = _WINDOW_BITS.get(encoding)
    if bits is None:
        name = encoding.decode("ascii", "replace")
        raise InferenceError(Code.UNIMPLEMENTED, f"grpc-encoding '{name}' is not supported; use gzip, deflate or none")
    inflater = zlib.decompressobj(bits)
    try:
        data = inflater.decompress(payload, most)
    except zlib.error as error:
        raise InferenceError(Code.INTERNAL, f"message cannot be decompressed: {error}") from None
    if inflater.unconsumed_tail:
        raise InferenceError(
            Code.RESOURCE_EXHAUSTED, f"compressed message is larger than {most} bytes when decompressed"
        )
    if not inflater.eof:
        raise InferenceError(Code.INTERNAL, "message cannot be decompressed: it is cut off")
    return data


def _status(code: Code, message: str) -> Any:
    longest = _LONGEST_TEXT if message.isascii() else _LONGEST_FOREIGN_TEXT
    text = message if len(message) <= longest else message[: longest - 3] + "..."
    text = text.strip(" ")  # a field's value must not begin or end with a space (RFC 9113, 8.2.1)
    # A model's error may hold what UTF-8 can't say; the call must end all the same.
    quoted = quote(text, safe=_UNESCAPED, errors="replace").encode()
    return [(b"grpc-status", b"%d" % code), (b"grpc-message", quoted)]


@dataclass(frozen=True, slots=True)
class Method:
    """What serves a path. `serve` sends the messages; the status is sent after it returns or raises InferenceError."""

    serve: Callable[[Call], Awaitable[None]]


def unary(
    parse: Callable[[bytes], Any],
    answer: Callable[[Any, Call], Awaitable[Sequence[Buffer]]],
    name: str,
    most: int = LARGEST_QUESTION,
) -> Method:
    """A method with one request, at most so many bytes, and one response.

    `parse` may raise DecodeError and InferenceError; `name` is the request's type.
    """

    async def request(call: Call) -> Any:
        payload = await call.receive(most)
        if payload is None:
            raise InferenceError(Code.INTERNAL, f"request has no message; a {name} is expected")
        try:
            return parse(payload)
        except DecodeError:
            raise InferenceError(Code.INTERNAL, f"request message cannot be parsed as {name}") from None

    async def serve(call: Call) -> None:
        # No name holds the request while the response is sent, which may take long: it can be as large.
        await call.send(await answer(await request(call), call))

    return Method(serve)


def unimplemented(path: str) -> Method:
    """A method that is part of the service's definition, but not served here."""

    async def serve(call: Call) -> None:
        raise InferenceError(Code.UNIMPLEMENTED, f"{path} is not implemented by this server")

    return Method(serve)


class CallHandler(AbstractHandler):
    """The calls of one connection."""

    def __init__(
        self, methods: Mapping[bytes, Method], h2: H2Connection, transport: asyncio.Transport, budget: Budget
    ) -> None:
        self._methods = methods
        self._budget = budget
        self._h2 = h2
        self._transport = transport
        self.tasks: dict[H2Stream, asyncio.Task[None]] = {}

    def accept(self, stream: H2Stream, headers: Any, release_stream: Callable[[], None]) -> None:
        needed = _needed(headers)
        # Not in the task: the request's first frames may be handed to the stream before that runs.
        call = Call(stream, self._h2, self._transport, needed.get(b"grpc-encoding", b"identity"), self._budget)
        self.tasks[stream] = spawn(self._serve(stream, needed, call, release_stream), "call")

    def cancel(self, stream: H2Stream) -> None:
        if task := self.tasks.pop(stream, None):
            task.cancel()

    def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()

    async def _serve(
        self, stream: H2Stream, headers: Mapping[bytes, bytes], call: Call, release: Callable[[], None]
    ) -> None:
        try:
            if not _is_grpc(headers):
                await stream.send_headers(_UNSUPPORTED_MEDIA, end_stream=True)
                return
            await self._answer(call, headers)
        except ProtocolError:
            pass  # the stream was reset or the connection is gone: there is nobody to tell
        finally:
            self.tasks.pop(stream, None)
            call.release()
            release()

    async def _answer(self, call: Call, headers: Mapping[bytes, bytes]) -> None:
        try:
            await self._limited(call, headers)
        except InferenceError as error:
            await call.end(error.code, str(error))
        except ProtocolError:
            raise
        except Exception:  # noqa: BLE001  (a fault of ours fails one call, not the connection's others)
            _log.exception("%s failed", headers.get(b":path", b"").decode("ascii", "replace"))
            await call.end(Code.INTERNAL, "internal error; see the log of the server")
        else:
            await call.end()

    async def _limited(self, call: Call, headers: Mapping[bytes, bytes]) -> None:
        path = headers.get(b":path", b"")
        method = self._methods.get(path)
        if method is None:
            raise InferenceError(Code.UNIMPLEMENTED, f"unknown method {path.decode('ascii', 'replace')}")
        limit = headers.get(b"grpc-timeout")
        if limit is None:
            await method.serve(call)
            return
        seconds = _seconds(limit)
        call.deadline = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds) as timer:
                await method.serve(call)
        except TimeoutError:
            if not timer.expired():
                raise
            raise InferenceError(Code.DEADLINE_EXCEEDED, f"deadline of {seconds:g} s exceeded") from None


def _needed(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[bytes, bytes]:
    # The others may be many, and a call may last.
    return {name: value for name, value in headers if name in _NEEDED}


def _is_grpc(headers: Mapping[bytes, bytes]) -> bool:
    kind = headers.get(b"content-type", b"")
    return headers.get(b":method") == b"POST" and (
        kind == b"application/grpc" or kind.startswith((b"application/grpc+proto", b"application/grpc;"))
    )


def _seconds(text: bytes) -> float:
    found = _TIMEOUT.fullmatch(text)
    if found is None:
        shown = text.decode("ascii", "replace")
        raise InferenceError(Code.INVALID_ARGUMENT, f"grpc-timeout '{shown}' is not a number of H, M, S, m, u or n")
    return int(found[1]) * _UNITS[found[2]]
