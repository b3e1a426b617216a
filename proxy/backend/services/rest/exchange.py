"""One HTTP request and its response: what both hold is counted, and a peer that is too slow is left.

Not aiohttp's own reading and writing of whole bodies: that counts nothing, copies, and waits for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any, TypeVar

from proxy.backend.budget import Budget
from proxy.backend.errors import InferenceError, invalid
from proxy.backend.services.rest.compression import check_encoding, inflate
from proxy.backend.services.rest.faults import HttpError, reason_of, status_of, text_of, too_large
from proxy.backend.services.rest.jsontext import dumps
from proxy.backend.tensors import Buffer
from proxy.web import HttpVersion11, web

LARGEST_BODY = 2**31 - 1  # bytes; as much as a message of gRPC
_SERVER = "tensorgate"  # aiohttp would name itself and its version
_SMALL = 64 * 2**10  # bytes; a body below is sent in one piece
_AT_ONCE = 256 * 2**10  # bytes handed to the transport in one go
_ALIGNMENT = 8  # bytes; of the largest element
_ROOM = 32 * 2**10  # bytes that a transport takes, header included, without making who writes wait
_Response = TypeVar("_Response", bound=web.StreamResponse)


class Exchange:
    """`patience`: seconds in which a client has to send, or to take, something. `closing`: the last on its connection.

    What it holds is counted in the budget, from the first byte until `release`.
    """

    __slots__ = ("_budget", "_held", "_patience", "closing", "request")

    def __init__(self, request: web.BaseRequest, budget: Budget, patience: float, closing: bool) -> None:
        self.request = request
        self.closing = closing
        self._budget = budget
        self._patience = patience
        self._held = 0

    def hold(self, size: int) -> None:
        """Raises InferenceError when it is too much."""
        self._budget.take(size)
        self._held += size

    def release(self, size: int | None = None) -> None:
        """So much is gone, or about to be; all of it by default."""
        size = self._held if size is None else size
        self._budget.give(size)
        self._held -= size

    @property
    def held(self) -> int:
        """Bytes."""
        return self._held

    def header(self, name: str) -> str:
        """A field of the request's header, "" if it is missing."""
        return self.request.headers.get(name, "")

    async def body(self, most: int = LARGEST_BODY, lead: int = 0, remedy: str = "send less at a time") -> memoryview:
        """The request's body, decompressed; what follows its first `lead` bytes is aligned. Raises InferenceError.

        remedy: for a body of more than `most` bytes as they come; what they become has limits of its own.
        """
        encoding = self.header("Content-Encoding")
        check_encoding(encoding)
        padding = -lead % _ALIGNMENT
        data = bytearray(padding)
        if encoding in ("", "identity"):
            await self._receive(most, data, remedy)
        else:
            packed = bytearray()
            await self._receive(most, packed, remedy)
            await inflate(memoryview(packed), encoding, data, self.hold)
            self.release(len(packed))
        return memoryview(data).toreadonly()[padding:]

    async def _receive(self, most: int, into: bytearray, remedy: str) -> None:
        announced = self.request.content_length or 0
        if announced > min(most, self._budget.limit):
            limit = min(most, self._budget.limit)
            raise too_large(f"request body of {announced} bytes is larger than {limit} bytes; {remedy}")
        await self._confirm()
        content = self.request.content
        got = 0
        while True:
            if content.is_eof():
                part = content.read_nowait()
            else:
                part = await self._arrived()
            got += len(part)
            if got > most:
                raise too_large(f"request body is larger than {most} bytes; {remedy}")
            self.hold(len(part))
            into += part
            if content.at_eof():
                return

    async def _confirm(self) -> None:
        """Answer `Expect: 100-continue` (RFC 9110, 10.1.1), as curl sends with a large body and then waits."""
        if self.request.headers.get("Expect", "").lower() == "100-continue" and not self.request.content.is_eof():
            await self.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.request.writer.output_size = 0  # it is not yet the response

    async def _arrived(self) -> bytes:
        try:
            async with asyncio.timeout(self._patience):
                return await self.request.content.readany()
        except TimeoutError:
            raise HttpError(
                408, f"nothing of the request body came in {self._patience:g} s, which is the limit"
            ) from None
        except web.RequestPayloadError as error:
            raise invalid(f"request body is malformed: {error!s:.200}") from None

    def json(self, value: Any, status: int = 200, fields: Mapping[str, str] | None = None) -> web.Response:
        """A response that is JSON, not sent yet."""
        headers = {"Content-Type": "application/json", "Server": _SERVER, **(fields or {})}
        return self._closed(web.Response(body=dumps(value), status=status, reason=reason_of(status), headers=headers))

    def empty(self, status: int = 200) -> web.Response:
        """A response without a body, not sent yet."""
        return self._closed(web.Response(status=status, headers={"Server": _SERVER}))

    def failure(self, error: InferenceError) -> web.Response:
        """What tells a client of an error, not sent yet."""
        fields = error.fields if isinstance(error, HttpError) else None
        return self.json({"error": text_of(error)}, status_of(error), fields)

    async def send(self, fields: Mapping[str, str], pieces: Sequence[Buffer]) -> web.StreamResponse:
        """Send a response, in pieces. What was received is taken to be gone. Raises InferenceError, ConnectionError."""
        total = sum(map(len, pieces))
        if total > LARGEST_BODY:
            raise too_large(f"response of {total} bytes is larger than {LARGEST_BODY} bytes; ask for fewer outputs")
        self.release()
        self.hold(total)
        if total < _SMALL and (whole := self._whole(fields, pieces, total)) is not None:
            return whole
        headers = {**fields, "Server": _SERVER}
        if total < _SMALL:
            return await self.finish(self._closed(web.Response(body=b"".join(pieces), headers=headers)), total)
        large = self._closed(web.StreamResponse(headers=headers))
        large.content_length = total
        await large.prepare(self.request)
        await self.write(large, *pieces)
        await large.write_eof()
        return large

    def _whole(self, fields: Mapping[str, str], pieces: Sequence[Buffer], size: int) -> web.StreamResponse | None:
        """Send a small response in one write, if the transport has room for it."""
        request, transport = self.request, self.request.transport
        if transport is None or transport.is_closing() or request.version != HttpVersion11:
            return None
        if transport.get_write_buffer_size() + size >= _ROOM:
            return None
        response = self._closed(_Whole())
        response.written_for(request)
        lines = [f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nDate: {_date()}\r\nServer: {_SERVER}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in fields.items()]
        lines.append("\r\n" if response.keep_alive else "Connection: close\r\n\r\n")
        transport.write(b"".join(["".join(lines).encode("latin-1"), *pieces]))
        return response

    async def finish(self, response: web.StreamResponse, size: int = 0) -> web.StreamResponse:
        """Send what is left of a response, about so many bytes. Raises ConnectionError."""
        transport = self.request.transport
        if transport is None or transport.get_write_buffer_size() + size < _ROOM:
            await response.prepare(self.request)
            await response.write_eof()
        else:
            async with self._taken():
                await response.prepare(self.request)
                await response.write_eof()
        return response

    @asynccontextmanager
    async def _taken(self) -> AsyncIterator[None]:
        """Raises ConnectionError when the client doesn't take it."""
        try:
            async with asyncio.timeout(self._patience):
                yield
        except TimeoutError:
            if (transport := self.request.transport) is not None:
                transport.abort()
            raise ConnectionResetError(f"client took nothing in {self._patience:g} s") from None

    async def begin(self, status: int, fields: Mapping[str, str]) -> web.StreamResponse:
        """Start a response whose length is not known. Raises ConnectionError."""
        response = self._closed(web.StreamResponse(status=status, headers={**fields, "Server": _SERVER}))
        await response.prepare(self.request)
        return response

    async def write(self, response: web.StreamResponse, *pieces: Buffer) -> None:
        """Write a part of the response; waits for the client. Raises ConnectionError, also when it takes nothing."""
        for piece in _gathered(pieces):
            view = memoryview(piece)
            for at in range(0, len(view), _AT_ONCE):
                async with self._taken():
                    await response.write(view[at : at + _AT_ONCE])

    def _closed(self, response: _Response) -> _Response:
        if self.closing:
            response.force_close()
        return response


class _Whole(web.StreamResponse):
    """A response that is written already. aiohttp's own makes a header section of objects, which takes as long as a
    small model, and hands it to the transport apart from the body."""

    def written_for(self, request: web.BaseRequest) -> None:
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        self._eof_sent = True


_second, _text = 0, ""


def _date() -> str:
    """RFC 9110, 6.6.1; made once a second."""
    global _second, _text
    if (now := int(time.time())) != _second:
        _second, _text = now, formatdate(now, usegmt=True)
    return _text


def _gathered(pieces: Sequence[Buffer]) -> Iterable[Buffer]:
    """The same bytes in fewer pieces: small neighbours are joined, large ones stay as they are."""
    small: list[Buffer] = []
    size = 0
    for piece in pieces:
        if small and (len(piece) >= _SMALL or size >= _SMALL):
            yield b"".join(small)
            small, size = [], 0
        if len(piece) < _SMALL:
            small.append(piece)
            size += len(piece)
        else:
            yield piece
    if small:
        yield b"".join(small)
