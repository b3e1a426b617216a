"""The receiving half: parse loop, stream table, flow control from the peer. No I/O. The roles are in `roles`.

Rules:
- `receive` never raises for what a peer sends: a connection error becomes GOAWAY, `closed` and `on_connection_fault`.
- A header block is always decoded, also for a stream that is refused: the compression state is the connection's.
- A DATA frame need not be whole to be passed on: the piece that has come is handed over, so that none is kept.
- Windows are counted when a frame's header is seen. The connection's window is given back on receipt, so that a
  stalled stream stops its own credit and never its neighbours'; a stream's is given back by `credit`, on forwarding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from proxy.http2 import frames, guards, settings
from proxy.http2.control import Control
from proxy.http2.errors import Abuse, ConnectionFault, ErrorCode, HeaderBomb, HeaderListTooLarge, HpackFault
from proxy.http2.frames import ACK, DEFAULT_MAX_FRAME, END_HEADERS, END_STREAM, FRAME_HEADER, MAX_WINDOW, PADDED
from proxy.http2.headers import KEPT_NAMES, HeaderBlock, Passing, Trailers, check_passing, intern_trailers
from proxy.http2.hpack import Decoder, Field
from proxy.http2.sender import Buffer, Sender
from proxy.http2.stream import Stream

Block = TypeVar("Block", bound=HeaderBlock)

_HEADERS_FLAGS = END_HEADERS | PADDED | frames.PRIORITY_FLAG
_DECODED_BLOCKS = 64
_DECODED_BYTES = 1024
_DECODED_SIZE = 8192  # of its fields, as SETTINGS_MAX_HEADER_LIST_SIZE counts
_DECODED_SIZES = 65_536  # of those of all that are remembered
_SHORT = 256  # bytes of DATA
_ONCE = 64


class Connection(Control):
    """One side of an HTTP/2 connection; use ServerConnection or ClientConnection of `roles`.

    wake: the list that this connection appends itself to when it has output.
    spenders: the list that it appends itself to when it has used up some of its budgets; see `guards`.
    stream_window: the bytes of one stream that may wait here, at least 65,535.
    first_window: SETTINGS_INITIAL_WINDOW_SIZE, if that is less: a stream's window then grows to stream_window with the
    credit that it gets, as far as `growth` allows.
    max_streams: how many streams the peer may have open (server role).
    header_list: the most bytes that a header list may take, names, values and 32 a field.
    """

    __slots__ = (
        "_block",
        "_block_end",
        "_block_size",
        "_block_stream",
        "_data_end",
        "_data_left",
        "_data_stream",
        "_decoder",
        "_heads",
        "_known_size",
        "_once",
        "_partial",
        "_recv_low",
        "_recv_target",
        "_trailers",
        "first_window",
        "max_streams",
        "opened",
        "recv_window",
    )

    def __init__(
        self,
        wake: list[Sender],
        stream_window: int,
        max_streams: int,
        header_list: int,
        first_window: int | None = None,
    ) -> None:
        super().__init__(wake, stream_window)
        self.first_window = stream_window if first_window is None else first_window
        self.max_streams = max_streams
        self._recv_target = min(max(max_streams, 1) * stream_window, MAX_WINDOW)
        self._recv_low = self._recv_target // 2
        self.recv_window = self._recv_target
        self._decoder = Decoder(header_list)
        self._heads: dict[bytes, HeaderBlock] = {}
        self._trailers: dict[bytes, HeaderBlock] = {}
        self._known_size = 0  # bytes of fields of the blocks that are remembered
        self._once: set[int] = set()  # hashes of blocks that were seen and not remembered
        self._partial = b""
        self.opened = False  # the peer's preface has come
        self._block: list[bytes] | None = None  # fragments of a header block that CONTINUATION frames complete
        self._block_size = 0
        self._block_stream = 0
        self._block_end = False
        self._data_left = 0  # bytes of the current DATA frame still to come
        self._data_stream: Stream | None = None
        self._data_end = False
        self._open(header_list)

    intern_trailers = staticmethod(intern_trailers)

    def _open(self, header_list: int) -> None:
        values = self._announced()
        values[settings.INITIAL_WINDOW_SIZE] = self.first_window
        values[settings.MAX_HEADER_LIST_SIZE] = header_list
        more = self._recv_target - frames.DEFAULT_WINDOW
        self._emit(self._preface() + frames.settings(values) + (frames.window_update(0, more) if more else b""))

    def _preface(self) -> bytes:
        return b""

    def _announced(self) -> dict[int, int]:
        raise NotImplementedError

    # -- for subclasses above the core

    def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        """A piece of a message; `end` with the last one, whose chunk may be empty."""

    def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
        """The trailer section: the last that comes on this stream."""

    # -- input

    def receive(self, data: bytes | memoryview) -> None:
        """Take bytes that came from the peer, in pieces of any size.

        A view must hold until the output that comes of it was taken; what waits longer is copied.
        """
        if self.closed:
            return
        try:
            if self._partial:
                data = self._partial + data
                self._partial = b""
            if not self.opened:
                data = self._receive_preface(data)
            if data:
                self._receive_frames(data)
        except ConnectionFault as fault:
            self.fail(fault)

    def fail(self, fault: ConnectionFault) -> None:
        """End the connection with GOAWAY."""
        if not self.closed:
            self.closed = True
            self.send_goaway(fault.code, fault.reason)
            self.on_connection_fault(fault)

    def _receive_preface(self, data: bytes | memoryview) -> bytes | memoryview:
        """Check the peer's preface (section 3.4) -> the bytes behind it, or none while it isn't complete."""
        magic = frames.PREFACE if self.server else b""
        if data[: len(magic)] != magic[: len(data)]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the connection preface is not HTTP/2's")
        if len(data) < len(magic) + 9:
            self._partial = bytes(data)
            return b""
        if data[len(magic) + 3] != frames.SETTINGS or data[len(magic) + 4] & ACK:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        self.opened = True
        return data[len(magic) :]

    def _receive_frames(self, data: bytes | memoryview) -> None:
        pos, end = 0, len(data)
        is_view = type(data) is memoryview
        if self._data_left:
            pos = self._continue_data(data, end)
        unpack = FRAME_HEADER.unpack_from
        streams, on_data, server = self.streams, self.on_data, self.server
        last = end - 9
        while pos <= last:
            high, low, kind, flags, stream_id = unpack(data, pos)
            stream_id &= 0x7FFFFFFF
            length = high << 8 | low
            if length > DEFAULT_MAX_FRAME:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            start = pos + 9
            pos = start + length
            if self._block is not None and (kind != 9 or stream_id != self._block_stream):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted by another frame")
            if kind == 0 and not flags & PADDED:
                stream = streams.get(stream_id)
                if (
                    stream is not None
                    and pos <= end
                    and 4 < length <= stream.recv_window
                    and stream.expect == -1
                    and not stream.remote_closed
                    and (server or stream.head_seen)
                ):
                    # What most frames are: whole, with data, within the window, on an open stream, of no set length.
                    window = self.recv_window = self.recv_window - length
                    if window < self._recv_low:
                        self._replenish()
                    stream.recv_window -= length
                    if flags & 1:
                        stream.remote_closed = True
                        on_data(stream, data[start:pos], True)
                        if stream.local_closed:
                            self._remove(stream)
                    else:
                        on_data(stream, data[start:pos], False)
                else:
                    self._receive_data(stream_id, stream, data[start : min(pos, end)], length, flags & 1 == 1)
                if self.closed:
                    return
                continue
            if pos > end:
                pos = start - 9
                break
            payload = data[start:pos]
            if is_view:
                payload = bytes(payload)
            if kind == 1 and flags & _HEADERS_FLAGS == END_HEADERS and stream_id:
                self._receive_block(stream_id, flags & 1 == 1, payload)  # type: ignore[arg-type]
            elif kind < 10:
                self._handlers[kind](self, stream_id, flags, payload)
            else:
                self._spend(guards.UNKNOWN_FRAME)  # and ignored (section 5.5)
            if self.closed:
                return
        if pos < end:
            self._partial = bytes(data[pos:])

    def unfinished(self) -> object | None:
        """What changes with every frame, while there is one of which only a part has come and kept; else None."""
        if not self.opened or (self._block is None and not self._partial):
            return None
        return self.recv_window, self._requests, self.data_sent, self.credit_received

    # -- DATA, section 6.1

    def _receive_data(
        self, stream_id: int, stream: Stream | None, chunk: bytes | memoryview, length: int, end: bool
    ) -> None:
        """A DATA frame of `length` bytes, of which `chunk` has come."""
        self.recv_window -= length
        if self.recv_window < self._recv_low:
            self._replenish()
        left = length - len(chunk)
        if length < 5 and not end:
            # Not even gRPC's prefix of a message. Frames cost the same however short they are.
            self._spend(guards.SHORT_DATA if length else guards.EMPTY_DATA)
        if stream is None or stream.remote_closed:
            self._stray_data(stream_id, stream, length)
            stream = None
        else:
            stream.recv_window -= length
            if stream.recv_window < 0:
                self._stream_fault(stream, ErrorCode.FLOW_CONTROL_ERROR, "more data than the window allows")
                stream = None
            elif stream.expect >= 0 or not (self.server or stream.head_seen):
                stream = self._check_body(stream, length, end)
        if left:
            self._data_left = left
            self._data_stream = stream
            self._data_end = end
            end = False
            if not chunk:
                return
        # A frame without anything goes no further: peers take such for an attack, too (section 10.5), and a connection
        # upstream carries the calls of others.
        if stream is not None and (chunk or end):
            if end:
                stream.remote_closed = True
            self.on_data(stream, chunk, end)
            if end and stream.local_closed:
                self._remove(stream)

    def _continue_data(self, data: bytes | memoryview, end: int) -> int:
        """The next piece of the DATA frame under way -> the position behind it."""
        size = min(self._data_left, end)
        self._data_left -= size
        last = self._data_end and not self._data_left
        stream = self._data_stream
        # It may have been reset, here or by the peer, since the frame began.
        if stream is not None and self.streams.get(stream.id) is stream:
            if last:
                stream.remote_closed = True
            self.on_data(stream, data[:size], last)
            if last and stream.local_closed:
                self._remove(stream)
        if not self._data_left:
            self._data_stream = None
        return size

    def _replenish(self) -> None:
        """Give the connection's window back, unless the peer has sent more than it had."""
        if self.recv_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window allows")
        self._emit(frames.window_update(0, self._recv_target - self.recv_window))
        self.recv_window = self._recv_target

    def _check_body(self, stream: Stream, length: int, end: bool) -> Stream | None:
        """content-length against DATA (section 8.1.1), and DATA before the head of a response."""
        if not (self.server or stream.head_seen):
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, "DATA before the response's header section")
            return None
        stream.expect -= length
        if stream.expect < 0 or (end and stream.expect):
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, "the data is not as long as content-length says")
            return None
        return stream

    def _expect(self, stream: Stream, content_length: int, end: bool) -> bool:
        """Remember content-length; False where the message has ended already and has none of it."""
        if end and content_length:
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, "content-length without data")
            return False
        stream.expect = content_length
        return True

    def _stray_data(self, stream_id: int, stream: Stream | None, length: int) -> None:
        """DATA for a stream that takes none: refused by the rules of section 5.1; its bytes are dropped."""
        if stream is not None:  # half-closed (remote)
            self._stream_fault(stream, ErrorCode.STREAM_CLOSED, "DATA after END_STREAM")
            return
        self._check_not_idle(stream_id, "DATA")
        if length < _SHORT and self.server:
            # What was on its way when we ended the stream is lawful, and may be many small messages.
            if self.stray_allowed:
                self.stray_allowed -= 1
            else:
                self._spend(guards.STRAY_FRAME)
        if stream_id not in self.resets and stream_id <= self.goaway_last:
            self._spend(guards.PROVOKED_RESET)
            self._reply(frames.rst_stream(stream_id, ErrorCode.STREAM_CLOSED))
            self.remember_reset(stream_id)

    def _padded_data(self, stream_id: int, flags: int, payload: bytes) -> None:
        body = _strip_padding(payload)
        overhead = len(payload) - len(body)
        self.recv_window -= overhead  # checked with the rest of the frame, below
        stream = self.streams.get(stream_id)
        if stream is not None and not stream.remote_closed:
            # Padding counts against the windows (section 6.9.1) but goes no further: its credit returns at once.
            stream.recv_window -= overhead
        self._receive_data(stream_id, stream, body, len(body), flags & END_STREAM == END_STREAM)
        if stream is not None and not stream.remote_closed:
            self.credit(stream, overhead)

    # -- HEADERS and CONTINUATION, sections 6.2 and 6.10

    def _receive_headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        if flags & PADDED:
            payload = _strip_padding(payload)
        if flags & frames.PRIORITY_FLAG:
            if len(payload) < 5:
                # Section 6.2: padding that reaches into the fields is PROTOCOL_ERROR.
                code = ErrorCode.PROTOCOL_ERROR if flags & PADDED else ErrorCode.FRAME_SIZE_ERROR
                raise ConnectionFault(code, "HEADERS too short for its priority")
            if frames.uint31(payload) == stream_id:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
            payload = payload[5:]
        if flags & END_HEADERS:
            self._receive_block(stream_id, flags & END_STREAM == END_STREAM, payload)
        else:
            self._block = [payload]
            self._block_size = len(payload)
            self._block_stream = stream_id
            self._block_end = flags & END_STREAM == END_STREAM

    def _continuation(self, stream_id: int, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block.append(payload)
        self._block_size += len(payload)
        # A block is at most as long as its decoded list and some slack, in few frames: the CONTINUATION flood.
        limit = self._decoder.list_limit
        if self._block_size > limit + 16_384 or len(self._block) > 16 + limit // 8192:
            raise Abuse(guards.CONTINUATION, "a header block that is too long")
        if flags & END_HEADERS:
            block = b"".join(self._block)
            self._block = None
            self._receive_block(stream_id, self._block_end, block)

    def _receive_block(self, stream_id: int, end: bool, block: bytes) -> None:
        raise NotImplementedError

    def _decode(
        self,
        block: bytes,
        known: dict[bytes, HeaderBlock],
        intern: Callable[[Sequence[Field]], Block],
    ) -> tuple[HeaderBlock | None, Passing | None]:
        """Decode a block -> (its HeaderBlock, or None when the list is over the limit, what only passes through).

        The first time that a block is seen, what passes through is kept apart. With the second the block is taken for
        one that comes again and again: it is remembered as a whole, unless it is long.
        """
        decoder = self._decoder
        generation = decoder.generation
        result: HeaderBlock | None = None
        passing: Passing | None = None
        try:
            if len(block) <= _DECODED_BYTES and self._seen_before(block):
                result = intern(decoder.decode(block))
            else:
                fields, others = decoder.split(block, KEPT_NAMES)
                if others and check_passing(others):
                    passing = Passing(others)
                    result = intern(fields)
                else:
                    result = intern(fields + others)
        except HpackFault as fault:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, str(fault)) from None
        except HeaderBomb as bomb:
            raise Abuse(guards.LARGE_HEADERS, str(bomb)) from None
        except HeaderListTooLarge:
            self._spend(guards.LARGE_HEADERS)
        if decoder.generation != generation:
            # The block changed the table: it, and what was decoded before, would mean something else next time.
            self._forget_blocks()
        elif result is not None and passing is None and len(block) <= _DECODED_BYTES and result.size <= _DECODED_SIZE:
            self._remember(block, result, known)
            return result, None
        if result is not None:
            self._spend_fields(result, passing, len(block))
        return result, passing

    def _remember(self, block: bytes, result: HeaderBlock, known: dict[bytes, HeaderBlock]) -> None:
        self._known_size += result.size
        if len(known) >= _DECODED_BLOCKS or self._known_size > _DECODED_SIZES:
            self._forget_blocks()
            self._known_size = result.size
        known[block] = result

    def _forget_blocks(self) -> None:
        self._heads.clear()
        self._trailers.clear()
        self._known_size = 0

    def _spend_fields(self, result: HeaderBlock, passing: Passing | None, length: int) -> None:
        """Many fields that are not found again are work each time, here and where they are sent; so are long ones of
        which the block, of this length, has only a few bytes."""
        count, size = len(result.fields), result.size
        if passing is not None:
            count += len(passing.fields)
            size += passing.size_bound
        if count > guards.MANY:
            self._spend(guards.MANY_FIELDS, count - guards.MANY)
        if size > _DECODED_SIZE and size > 2 * length:
            self._spend(guards.LONG_FIELDS, (size - length) // 1024)

    def _seen_before(self, block: bytes) -> bool:
        once, mark = self._once, hash(block)
        if mark in once:
            return True
        if len(once) >= _ONCE:
            once.clear()
        once.add(mark)
        return False

    def _receive_trailers(self, stream: Stream, end: bool, block: bytes) -> None:
        passing = None
        trailers = self._trailers.get(block)
        if trailers is None:
            trailers, passing = self._decode(block, self._trailers, self.intern_trailers)
        reason = None
        if trailers is None:
            reason = f"a trailer section of more than {self._decoder.list_limit} bytes"
        elif not end:
            reason = "a second header section without END_STREAM"
        elif trailers.error is not None:
            reason = trailers.error
        elif stream.expect > 0:
            reason = "the data is not as long as content-length says"
        if reason is not None:
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, reason)
            return
        assert isinstance(trailers, Trailers)
        stream.passing = passing
        stream.remote_closed = True
        self.on_trailers(stream, trailers)
        if stream.local_closed:
            self._remove(stream)

    _handlers: ClassVar[tuple[Callable[..., None], ...]] = (
        _padded_data,
        _receive_headers,
        Control._priority,
        Control._rst_stream,
        Control._settings,
        Control._push_promise,
        Control._ping,
        Control._goaway,
        Control._window_update,
        _continuation,
    )


def _strip_padding(payload: bytes) -> bytes:
    if not payload:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without its pad length")
    pad = payload[0]
    if pad >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding that is longer than its frame")
    return payload[1 : len(payload) - pad]
