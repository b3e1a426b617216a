"""The two roles of a connection: what a server and what a client does with header sections. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from proxy.http2 import frames, guards, settings
from proxy.http2.connection import Connection
from proxy.http2.errors import ConnectionFault, ErrorCode
from proxy.http2.headers import (
    HeaderBlock,
    Passing,
    RequestHead,
    ResponseHead,
    intern_request,
    intern_response,
    intern_response_trailers,
    intern_trailers,
)
from proxy.http2.hpack import MAX_FIELDS
from proxy.http2.sender import OUT_FULL
from proxy.http2.stream import Stream

_LAST_OPENED = frames.MAX_STREAM_ID - 2


class ServerConnection(Connection):
    """The side that takes requests."""

    server = True

    __slots__ = ()

    def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
        """A request; `end` when no body follows."""

    def on_request_too_large(self, stream: Stream, limit: int) -> None:
        """A request whose header list is over the limit in bytes; answer it."""

    def new_stream(self, stream_id: int) -> Stream:
        return Stream(self, stream_id, self.stream_window, self.peer.initial_window)

    def drain(self) -> None:
        """Say that the end is near, without refusing what is on its way (section 6.8)."""
        self.send_goaway(ErrorCode.NO_ERROR, "shutting down", frames.MAX_STREAM_ID)

    def refuse_new(self) -> None:
        """Take no further streams."""
        self.send_goaway(ErrorCode.NO_ERROR, "shutting down")

    def _announced(self) -> dict[int, int]:
        return {settings.MAX_CONCURRENT_STREAMS: self.max_streams}

    def _receive_block(self, stream_id: int, end: bool, block: bytes) -> None:
        if stream_id <= self.last_remote_id:
            self._receive_late_block(stream_id, end, block)
            return
        if stream_id & 1 == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client's stream identifier is even")
        passing = None
        head = self._heads.get(block)
        if head is None:
            head, passing = self._decode(block, self._heads, intern_request)
        if stream_id > self.goaway_last:
            self._spend(guards.STRAY_FRAME)
            return  # GOAWAY said so; the client will repeat it elsewhere
        self.last_remote_id = stream_id
        self._requests += 1
        if len(self.streams) >= self.max_streams:
            self._spend(guards.PROVOKED_RESET)
            self._reply(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            self.remember_reset(stream_id)
            return
        stream = self.streams[stream_id] = self.new_stream(stream_id)
        stream.remote_closed = end
        stream.passing = passing
        if head is None:
            self.on_request_too_large(stream, self._decoder.list_limit)
            return
        assert isinstance(head, RequestHead)
        if head.error is not None:
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, head.error)
        elif head.content_length is None or self._expect(stream, head.content_length, end):
            self.on_request(stream, head, end)

    def _receive_late_block(self, stream_id: int, end: bool, block: bytes) -> None:
        """A header section on a stream that was opened before: trailers, or a mistake."""
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id & 1 == 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client's stream identifier is even")
            if stream_id not in self.resets:
                skipped = self.last_remote_id > 2 * self._requests - 1
                if skipped and stream_id < self.last_remote_id:  # as far as is known, it was never used
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} behind {self.last_remote_id}")
                raise ConnectionFault(ErrorCode.STREAM_CLOSED, f"HEADERS on closed stream {stream_id}")
            self._spend(guards.STRAY_FRAME)
            self._decode(block, self._trailers, intern_trailers)
        elif stream.remote_closed:
            self._decode(block, self._trailers, intern_trailers)
            self._stream_fault(stream, ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM")
        else:
            self._receive_trailers(stream, end, block)


class ClientConnection(Connection):
    """The side that makes requests."""

    __slots__ = ()

    intern_trailers = staticmethod(intern_response_trailers)

    def on_response(self, stream: Stream, head: ResponseHead, end: bool) -> None:
        """The final response head; `end` when neither body nor trailers follow."""

    def on_informational(self, stream: Stream, head: ResponseHead) -> None:
        """A 1xx response, before the final one."""

    def on_refused(self, stream: Stream, code: int, debug: bytes) -> None:
        """GOAWAY says that this request was not processed; the stream is already gone."""

    @property
    def used_up(self) -> bool:
        """It was retired, or no stream identifiers are left (section 5.1.1): what is new needs a new connection."""
        return self.last_local_id >= _LAST_OPENED or self.max_streams == 0

    def retire(self) -> None:
        """Open no further streams here; those that there are may finish."""
        self.max_streams = 0

    def room(self) -> int:
        """How many streams may be opened now; the peer's limit holds from its SETTINGS on.

        None while the output is full: no window holds back HEADERS, and small blocks can decode to large ones.
        """
        return 0 if self.full or self.out_size > OUT_FULL else self.places()

    def places(self) -> int:
        """The same, whatever the output."""
        if self.closed or self.goaway_received or self.last_local_id >= _LAST_OPENED:
            return 0
        limit = self.peer.max_streams
        return (limit if limit < self.max_streams else self.max_streams) - len(self.streams)

    def open_stream(self, head: HeaderBlock, end: bool, passing: Passing | None = None) -> Stream:
        """Send a request. The identifier is given here and its HEADERS leave in order; see `room` first.

        For a HEAD request set the stream's `expect` to 0: no content follows, whatever the response's content-length.
        """
        stream_id = self.last_local_id + 2 if self.last_local_id else 1
        self.last_local_id = stream_id
        stream = Stream(self, stream_id, self.first_window, self.peer.initial_window)
        self.streams[stream_id] = stream
        self.send_headers(stream, head, end, passing)
        return stream

    def _preface(self) -> bytes:
        return frames.PREFACE

    def _announced(self) -> dict[int, int]:
        return {settings.ENABLE_PUSH: 0}

    def _goaway(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) >= 8 and frames.uint31(payload) > self._peer_last:
            # What lies between was given up, and perhaps sent again elsewhere, on the word that nobody works on it.
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY with a higher last stream than before")
        super()._goaway(stream_id, flags, payload)
        self._peer_last = last = frames.uint31(payload)
        code = frames.uint32(payload, 4)
        for stream in [stream for stream in self.streams.values() if stream.id > last]:
            self._remove(stream)
            self.on_refused(stream, code, payload[8:])

    _handlers: ClassVar[tuple[Callable[..., None], ...]] = (
        *Connection._handlers[: frames.GOAWAY],
        _goaway,
        *Connection._handlers[frames.GOAWAY + 1 :],
    )

    def _receive_block(self, stream_id: int, end: bool, block: bytes) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id, "HEADERS")
            self._decode(block, self._trailers, self.intern_trailers)
            # Section 5.1 allows a connection error, but this connection carries the calls of many.
            self._fault_on(stream_id, ErrorCode.STREAM_CLOSED, "HEADERS on a closed stream")
            return
        if stream.remote_closed:
            self._decode(block, self._trailers, self.intern_trailers)
            self._stream_fault(stream, ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM")
        elif stream.head_seen:
            self._receive_trailers(stream, end, block)
        else:
            head = self._heads.get(block)
            stream.passing = None
            if head is None:
                head, stream.passing = self._decode(block, self._heads, intern_response)
            self._response(stream, end, head)

    def _response(self, stream: Stream, end: bool, head: HeaderBlock | None) -> None:
        if head is None:
            reason = f"a header list of more than {self._decoder.list_limit} bytes or {MAX_FIELDS} fields"
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, reason)
            return
        assert isinstance(head, ResponseHead)
        why = head.error
        if why is None and head.status < 200 and end:
            why = "an informational response with END_STREAM"
        if why is not None:
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, why)
            return
        if head.status < 200:
            self.on_informational(stream, head)
            return
        if head.expect >= 0 and stream.expect < 0 and not self._expect(stream, head.expect, end):
            return
        stream.head_seen = True
        stream.remote_closed = end
        self.on_response(stream, head, end)
        if end and stream.local_closed:
            self._remove(stream)
