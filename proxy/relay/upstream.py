"""An upstream connection as the relay sees it: what comes back for each call, and what becomes of calls when it ends.

The upstream is checked as strictly as a client: whatever it breaks, its caller gets a status in words and keeps
its connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.http2 import (
    Buffer,
    ConnectionFault,
    ErrorCode,
    HeaderBlock,
    Passing,
    ResponseHead,
    Stream,
    Trailers,
    error_name,
)
from proxy.http2.headers import list_size
from proxy.inference import calls, status
from proxy.inference.status import Code
from proxy.relay.call import FIRST_WINDOW, Call
from proxy.relay.kept import ANSWERED, Held
from proxy.relay.relay import Relay
from proxy.upstream.link import UpstreamConnection

if TYPE_CHECKING:
    from proxy.upstream.pool import Pool

_HEADER_LIST = 1024 * 1024
_RESETS_AT_ONCE = 500
_RESETS_PER_SECOND = 30


class Upstream(UpstreamConnection):
    """One connection to the backend, shared by the calls of many clients."""

    __slots__ = ("_fault", "_reset_at", "_resets", "_settings_seen", "pool", "relay")

    def __init__(self, relay: Relay, pool: Pool) -> None:
        self.relay = relay
        self.pool = pool
        self._settings_seen = False
        self._fault = ""
        self._resets = 0.0  # sent lately
        self._reset_at = relay.now
        limits = relay.limits
        super().__init__(
            relay.wake,
            limits.stream_window_bytes,
            limits.streams_per_upstream_connection,
            _HEADER_LIST,
            FIRST_WINDOW,
        )
        self.spenders = relay.spenders

    def _name(self) -> str:
        return f"upstream {self.pool.address}"

    def reset(self, stream: Stream, code: int) -> None:
        """Also count: servers take many resets for an attack (CVE-2023-44487) and end the connection, with the calls of
        all. nghttp2's takes 1000 at once and 33 a second. So after many, new calls go to a new connection."""
        super().reset(stream, code)
        now = self.relay.now
        self._resets = max(self._resets - (now - self._reset_at) * _RESETS_PER_SECOND, 0.0) + 1.0
        self._reset_at = now
        if self._resets > _RESETS_AT_ONCE and not self.used_up:
            self.retire()
            self.pool.going_away(self)
            if not self.streams:
                self.link.close("it was sent many resets", orderly=True)

    def resume(self) -> None:
        """Also: there is room again, see `ClientConnection.room`."""
        super().resume()
        if self.pool.waiting:
            self.relay.room_appeared = True

    def growth(self, stream: Stream) -> int:
        """A stream begins with a small window. It grows as far as its client has shown that it takes what comes."""
        call = stream.partner
        if not isinstance(call, Call):
            return 0
        more = call.conn.answer_bytes_left(self.stream_window - stream.window)
        call.conn.granted += more
        return more

    # -- answers

    def on_response(self, stream: Stream, head: ResponseHead, end: bool) -> None:
        call: Call = stream.partner  # type: ignore[assignment]
        note: tuple[Code | None, str | None, HeaderBlock] | None = head.note
        if note is None:
            note = head.note = _judge_response(head)
        code, complaint, forward = note
        if complaint is not None:
            call.answer(code or Code.UNKNOWN, f"{self._name()}: {complaint}")
            return
        if end and code is None:
            call.answer(Code.INTERNAL, f"{self._name()} ended its response without grpc-status")
            return
        passing = stream.passing
        size = head.size if passing is None else head.size + passing.size_bound
        if size > call.conn.peer.max_header_list and self._too_large(call, code, head, passing):
            return
        call.responding = True
        if type(call.kept) is Held:
            call.forget_request(ANSWERED)
        call.kept = ANSWERED
        call.conn.send_headers(call, forward, end, passing)
        if end:
            call.finish(code or Code.OK)

    def on_informational(self, stream: Stream, head: ResponseHead) -> None:
        call: Call = stream.partner  # type: ignore[assignment]
        call.forget_request(ANSWERED)
        if list_size(head, stream.passing) <= call.conn.peer.max_header_list:
            call.conn.send_headers(call, head, False, stream.passing)

    def _too_large(self, call: Call, code: Code | None, block: HeaderBlock, passing: Passing | None) -> bool:
        """Answer a call whose response has a header section larger than its client says that it takes: some clients end
        their connection over one."""
        size, limit = list_size(block, passing), call.conn.peer.max_header_list
        if size <= limit:
            return False
        call.answer(
            code or Code.RESOURCE_EXHAUSTED,
            f"{self._name()} answered with headers of {size} bytes, the client takes {limit} "
            "(its SETTINGS_MAX_HEADER_LIST_SIZE)",
        )
        return True

    def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        call = stream.partner
        assert call is not None
        call.conn.send_data(call, chunk, False)
        if end:
            assert isinstance(call, Call)
            trailers = status.trailers(Code.INTERNAL, f"{self._name()} ended its response without grpc-status")
            call.conn.send_trailers(call, HeaderBlock(trailers, checked=True))
            call.finish(Code.INTERNAL)

    def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
        call: Call = stream.partner  # type: ignore[assignment]
        code: Code | None = trailers.note
        if code is None:
            code = trailers.note = status.read(trailers.fields)
            if code is None:
                call.answer(Code.INTERNAL, f"{self._name()} ended its response without grpc-status")
                return
        passing = stream.passing
        size = trailers.size if passing is None else trailers.size + passing.size_bound
        if size > call.conn.peer.max_header_list and self._too_large(call, code, trailers, passing):
            return
        call.conn.send_trailers(call, trailers, passing)
        call.finish(code)

    # -- endings

    def on_reset(self, stream: Stream, code: int) -> None:
        """RST_STREAM crosses the gate as it came; the client makes a status of it."""
        call: Call = stream.partner  # type: ignore[assignment]
        if call.done:
            return
        if code == ErrorCode.REFUSED_STREAM and not call.responding:
            self._unprocessed(call, f"{self._name()} refused the call: {error_name(code)}")
            return
        call.conn.reset(call, code)
        call.finish(status.from_reset(code))

    def on_stream_fault(self, stream: Stream, code: ErrorCode, reason: str) -> None:
        call: Call = stream.partner  # type: ignore[assignment]
        call.answer(Code.INTERNAL, f"{self._name()} broke HTTP/2: {reason}")

    def on_refused(self, stream: Stream, code: int, debug: bytes) -> None:
        call: Call = stream.partner  # type: ignore[assignment]
        self._unprocessed(call, f"{self._name()} went away before it took the call{_goaway_text(code, debug)}")

    def _unprocessed(self, call: Call, what: str) -> None:
        """The request was not processed, so it is safe to send it again (RFC 9113 section 8.7)."""
        why_not = call.replay(self)
        if why_not is not None:
            call.answer(Code.UNAVAILABLE, f"{what}; the request was not sent again: {why_not}")

    def on_goaway(self, last_stream_id: int, code: int, debug: bytes) -> None:
        if code:
            self._fault = f"it sent GOAWAY{_goaway_text(code, debug)}"
        self.pool.going_away(self)
        if not self.streams:
            self.link.close("it went away", orderly=True)

    def on_stream_closed(self, stream: Stream) -> None:
        if self.goaway_received or self.used_up:
            if not self.streams:
                why = "it went away" if self.goaway_received else "it takes no more calls"
                self.link.close(why, orderly=True)
        elif self.pool.waiting:
            self.relay.room_appeared = True

    def on_connection_fault(self, fault: ConnectionFault) -> None:
        self._fault = f"it broke HTTP/2: {fault.reason}"
        if not self._settings_seen:
            self._fault = f"it doesn't speak HTTP/2 without TLS (h2c): {fault.reason}"
        self.link.why = self._fault
        # Now, not when the transport has ended: that may wait for a peer that reads nothing.
        self.on_link_lost(self._fault)
        self.pool.going_away(self)

    def on_settings(self) -> None:
        if not self._settings_seen:
            self._settings_seen = True
            self.relay.await_settings_ack(self)
            if not self.link.ready.done():
                self.link.ready.set_result(None)
        elif self.pool.waiting:
            self.relay.room_appeared = True

    def on_settings_acked(self) -> None:
        self.relay.settings_acked(self)

    def on_link_lost(self, why: str) -> None:
        self.relay.settings_acked(self)
        why = self._fault or why
        for stream in list(self.streams.values()):
            call = stream.partner
            self.drop_backlog(stream)
            stream.local_closed = stream.remote_closed = True
            assert isinstance(call, Call)
            call.answer(Code.UNAVAILABLE, f"{self._name()}: {why}")
        self.streams.clear()
        self.blocked.clear()


def _judge_response(head: ResponseHead) -> tuple[Code | None, str | None, HeaderBlock]:
    """(grpc-status of a trailers-only answer or None, what is wrong with it as gRPC's or None, what goes on)."""
    code, complaint = _judge_grpc(head)
    forward: HeaderBlock = head
    if head.content_length is not None:
        # The gate may have to end the answer before it is whole, with a status that says why; it would be malformed
        # then (RFC 9113 section 8.1.1). gRPC has no use for it.
        forward = HeaderBlock([field for field in head.fields if field[0] != b"content-length"], checked=True)
        forward.size = head.size
    return code, complaint, forward


def _judge_grpc(head: ResponseHead) -> tuple[Code | None, str | None]:
    content_type = head.get(b"content-type")
    if head.status != 200:
        shown = (head.get(b":status") or b"").decode()
        return status.read(head.fields) or status.from_http(head.status), f"HTTP status {shown} instead of gRPC"
    if content_type is not None and not calls.is_grpc(content_type):
        text = content_type[:64].decode("latin-1")
        return Code.UNKNOWN, f"a response of type {text} instead of gRPC"
    return status.read(head.fields), None


def _goaway_text(code: int, debug: bytes) -> str:
    text = debug[:128].decode("utf-8", "replace")
    return f": {error_name(code)}{' ' + text if text else ''}"
