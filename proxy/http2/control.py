"""What every frame but DATA and HEADERS does, what a peer may do in an interval, and how errors are answered. No I/O.

Rules:
- A stream error resets the stream and tells the layer above; a connection error is raised (`ConnectionFault`).
- Frames that cost the sender nothing are weighed against the budgets of `guards`.
"""

from __future__ import annotations

from proxy.http2 import frames, guards, settings
from proxy.http2.errors import Abuse, ConnectionFault, ErrorCode
from proxy.http2.frames import ACK, MAX_WINDOW
from proxy.http2.sender import Sender
from proxy.http2.stream import Stream

_MAX_QUEUED_REPLIES = 1000


class Control(Sender):
    """The middle of a connection, between `Sender` and `Connection`."""

    __slots__ = (
        "_budgets",
        "_peer_last",
        "_queued_replies",
        "_requests",
        "_spending_from",
        "_spent",
        "goaway_received",
        "resetting",
        "settings_acked",
        "spenders",
    )

    max_streams: int

    def __init__(self, wake: list[Sender], stream_window: int) -> None:
        super().__init__(wake, stream_window)
        self._budgets = guards.BUDGETS if self.server else guards.OF_SERVERS
        self.settings_acked = False  # the peer has acknowledged ours; whoever has a clock waits for it so long
        self.goaway_received = False
        self.resetting = False  # the peer has reset streams in this interval, or made us do so
        self.spenders: list[Control] = []
        self._spent: dict[str, int] = {}
        self._requests = 0  # streams that the peer has opened; identifiers may be skipped
        self._spending_from = (0, 0)  # these and DATA frames sent, when the interval's spending began
        self._queued_replies = 0
        self._peer_last = frames.MAX_STREAM_ID  # the last stream that the peer's GOAWAYs leave standing

    def resume(self) -> None:
        self._queued_replies = 0
        super().resume()

    def refill(self) -> None:
        """A new interval begins."""
        self._spent.clear()
        self.resetting = False

    def _spend(self, kind: str, cost: int = 1) -> None:
        """Take from the peer's budget, or end the connection."""
        budget = self._budgets.get(kind)
        if budget is None:
            return
        spent = self._spent
        if not spent:
            self.spenders.append(self)
            self._spending_from = (self._requests or self.last_local_id >> 1, self.data_sent)
        if kind == guards.RESET or kind == guards.PROVOKED_RESET:
            self.resetting = True
        total = spent[kind] = spent.get(kind, 0) + cost
        if total > budget:
            opened, data_sent = self._spending_from
            opened = (self._requests or self.last_local_id >> 1) - opened
            if kind == guards.RESET:
                budget = max(budget, self.max_streams) + opened // 2
            elif kind == guards.EMPTY_DATA:
                budget += opened
            elif kind == guards.PROVOKED_RESET and not self.settings_acked:
                budget *= 10  # who doesn't know our SETTINGS may open more streams than they allow
            elif kind == guards.WINDOW_UPDATE:
                budget += 2 * (self.data_sent - data_sent)
            elif kind == guards.PING:
                budget += self.data_sent - data_sent
            if total > budget:
                raise Abuse(kind, f"too much of {kind} in a short time")

    # -- for subclasses above the core

    def on_reset(self, stream: Stream, code: int) -> None:
        """The peer reset the stream, which is already gone."""

    def on_stream_fault(self, stream: Stream, code: ErrorCode, reason: str) -> None:
        """The peer broke a rule on this stream; it was reset and is already gone."""

    def on_goaway(self, last_stream_id: int, code: int, debug: bytes) -> None:
        """The peer goes away: no new streams."""

    def on_settings_acked(self) -> None:
        """The peer has taken our SETTINGS over (section 6.5.3); told once."""

    def on_connection_fault(self, fault: ConnectionFault) -> None:
        """The peer broke a rule of the connection. GOAWAY is in the output; flush and close."""

    # -- frames

    def _priority(self, stream_id: int, flags: int, payload: bytes) -> None:
        """Parsed for its errors only; RFC 9113 section 5.3.2 deprecates what it says."""
        if stream_id == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        self._spend(guards.PRIORITY)
        if len(payload) == 5 and frames.uint31(payload) != stream_id:
            return
        wrong_size = len(payload) != 5
        code = ErrorCode.FRAME_SIZE_ERROR if wrong_size else ErrorCode.PROTOCOL_ERROR
        reason = "PRIORITY is not 5 bytes long" if wrong_size else "a stream that depends on itself"
        if self._is_idle(stream_id):
            raise ConnectionFault(code, reason)  # RST_STREAM on an idle stream would be an error of ours
        self._fault_on(stream_id, code, reason)

    def _rst_stream(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes long")
        self._check_not_idle(stream_id, "RST_STREAM")
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._spend(guards.RESET)
            self._remove(stream)
            self.on_reset(stream, frames.uint32(payload))
        else:
            self._spend(guards.STRAY_FRAME)

    def _settings(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS ACK with a payload")
            self._spend(guards.STRAY_FRAME)
            if not self.settings_acked:  # one too many is harmless
                self.settings_acked = True
                self.on_settings_acked()
            return
        if len(payload) % 6:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS is not a multiple of 6 bytes long")
        self._spend(guards.SETTINGS, 1 + len(payload) // 60)
        before = largest = self.peer.initial_window
        for key, value in frames.parse_settings(payload):
            self.peer.apply(key, value, from_server=not self.server)
            if key == settings.HEADER_TABLE_SIZE:
                self.limit_encoder(value)
            elif key == settings.INITIAL_WINDOW_SIZE:
                largest = max(largest, value)
        self._reply(frames.SETTINGS_ACK)
        if largest > before:
            self._check_windows(largest - before)
        change = self.peer.initial_window - before
        if change:
            self._shift_windows(change)
        self.on_settings()

    def on_settings(self) -> None:
        """The peer's settings have changed."""

    def _check_windows(self, growth: int) -> None:
        """Values take effect in order (section 6.5.3), so that one that comes and goes within a frame counts, too."""
        for stream in self.streams.values():
            if stream.send_window + growth > MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS make a window larger than 2^31-1")

    def _shift_windows(self, change: int) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE moves the window of every open stream, below zero too (section 6.9.2)."""
        for stream in self.streams.values():
            stream.send_window += change
            if stream.backlog is not None:
                self._remember_blocked(stream)
        if change > 0:
            self.pump()

    def _push_promise(self, stream_id: int, flags: int, payload: bytes) -> None:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, which nobody asked for")

    def _ping(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING is not 8 bytes long")
        if not flags & ACK:
            self._spend(guards.PING)
            self._reply(frames.ping_ack(payload))
        else:
            self._spend(guards.STRAY_FRAME)

    def _reply(self, data: bytes) -> None:
        """Answer a frame, but don't gather answers without end for a peer that doesn't read them."""
        self._queued_replies = self._queued_replies + 1 if self.paused else 0
        if self._queued_replies > _MAX_QUEUED_REPLIES:
            raise Abuse(guards.UNREAD, "answers to PING, SETTINGS and faults are not read")
        self._emit(data)

    def _goaway(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is shorter than 8 bytes")
        self._spend(guards.STRAY_FRAME)
        self.goaway_received = True
        self.on_goaway(frames.uint31(payload), frames.uint32(payload, 4), payload[8:])

    def _window_update(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes long")
        self._spend(guards.WINDOW_UPDATE)
        increment = frames.uint31(payload)
        if stream_id == 0:
            if increment == 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of zero")
            self.send_window += increment
            self.credit_received += increment
            if self.send_window > MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window exceeds 2^31-1")
            if self.blocked:
                self.pump()
            return
        self._check_not_idle(stream_id, "WINDOW_UPDATE")
        if increment == 0:
            self._fault_on(stream_id, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of zero")
            return
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.send_window += increment
            if stream.send_window > MAX_WINDOW:
                self._stream_fault(stream, ErrorCode.FLOW_CONTROL_ERROR, "a stream's window exceeds 2^31-1")
            elif stream.backlog is not None:
                self.pump_stream(stream)

    # -- errors

    def _is_idle(self, stream_id: int) -> bool:
        theirs = stream_id & 1 == (1 if self.server else 0)
        return stream_id > (self.last_remote_id if theirs else self.last_local_id)

    def _check_not_idle(self, stream_id: int, what: str) -> None:
        """Section 5.1: an idle stream takes nothing but HEADERS and PRIORITY."""
        if stream_id > self.goaway_last and self.server and stream_id & 1:
            return  # one of those that GOAWAY said are ignored
        if stream_id == 0 or self._is_idle(stream_id):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{what} on idle stream {stream_id}")

    def _fault_on(self, stream_id: int, code: ErrorCode, reason: str) -> None:
        """A stream error on a stream that may not, or no longer, exist."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._stream_fault(stream, code, reason)
        elif stream_id not in self.resets and stream_id <= self.goaway_last:
            self._spend(guards.PROVOKED_RESET)
            self._reply(frames.rst_stream(stream_id, code))
            self.remember_reset(stream_id)

    def _stream_fault(self, stream: Stream, code: ErrorCode, reason: str) -> None:
        """A stream error (section 5.4.2): RST_STREAM, and the layer above is told."""
        self._spend(guards.PROVOKED_RESET)
        self._reply(frames.rst_stream(stream.id, code))
        self.remember_reset(stream.id)
        self._remove(stream)
        self.on_stream_fault(stream, code, reason)
