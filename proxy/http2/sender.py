"""The sending half of a connection: output, header encoding, flow control towards the peer. No I/O.

Output is gathered in `out` and fetched by `take_output`; the connection puts itself into the list `wake`, once, when
it has output, so that whoever feeds it knows whom to flush. Nothing is written while a read is being parsed.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from proxy.http2 import frames
from proxy.http2.frames import DATA, DEFAULT_MAX_FRAME, END_HEADERS, END_STREAM, FRAME_HEADER, HEADERS
from proxy.http2.headers import HeaderBlock, Passing, list_size
from proxy.http2.hpack import Encoder
from proxy.http2.settings import Settings
from proxy.http2.stream import Backlog, Stream

Buffer: TypeAlias = "bytes | bytearray | memoryview"

_pack = FRAME_HEADER.pack
# Output gathered from backlogs at once: a window that opens wide must not move all of them into one write.
_OUT_LIMIT = 524_288
# Bytes of output that wait to be written, from which on nothing is added that can wait.
OUT_FULL = 1_048_576
_ENCODED_BLOCKS = 64
_ENCODED_BYTES = 1024
_RESETS_REMEMBERED = 512
_IN_FLIGHT = 1024  # small frames of a stream that may be on their way when we end it


class Sender:
    """See the module. `paused` is set by the transport's owner while its buffer is full: DATA then waits in the
    streams' queues, which the windows that we advertise bound; control frames still go out."""

    server = False

    __slots__ = (
        "_encoded",
        "_encoded_generation",
        "_encoder",
        "blocked",
        "closed",
        "credit_received",
        "data_sent",
        "dirty",
        "full",
        "goaway_last",
        "last_local_id",
        "last_remote_id",
        "out",
        "out_size",
        "paused",
        "peer",
        "queued",
        "resets",
        "send_window",
        "stray_allowed",
        "stream_window",
        "streams",
        "stuck",
        "wake",
        "wire",
    )

    def __init__(self, wake: list[Sender], stream_window: int) -> None:
        self.wake = wake
        self.wire: Any = None  # not used here: where the owner of the transport finds it
        self.out: list[Buffer] = []
        self.out_size = 0
        self.dirty = False
        self.data_sent = 0  # DATA frames
        self.credit_received = 0  # bytes that WINDOW_UPDATE has given the connection
        self.paused = False
        self.full = False  # paused, and the transport holds much besides
        self.closed = False
        self.goaway_last = frames.MAX_STREAM_ID  # streams above it are ignored
        self.peer = Settings()
        self.send_window = frames.DEFAULT_WINDOW
        self.streams: dict[int, Stream] = {}
        self.blocked: dict[Stream, None] = {}
        self.resets: dict[int, None] = {}  # streams that we reset: frames for them may still be on their way
        self.stray_allowed = 0  # small DATA frames that may still come for streams that we have ended
        self.last_local_id = 0
        self.last_remote_id = 0
        self.stream_window = stream_window
        self.queued = 0  # bytes that wait in the backlogs of this connection's streams
        self.stuck = 0  # bytes that came here and wait in the backlogs of streams elsewhere
        self._encoder = Encoder()
        self._encoded: dict[HeaderBlock, bytes] = {}
        self._encoded_generation = 0

    # -- for subclasses above the core

    def on_stream_closed(self, stream: Stream) -> None:
        """A stream has left the table, for whatever reason."""

    def on_stuck(self, stream: Stream) -> None:
        """More of what came on this stream waits in a backlog elsewhere, see `stuck`."""

    def growth(self, stream: Stream) -> int:
        """By how many bytes the window of a stream may grow that hasn't `stream_window` yet."""
        return self.stream_window - stream.window

    @property
    def data_bytes_sent(self) -> int:
        """Bytes of messages that were ever sent; without counting them one by one."""
        return frames.DEFAULT_WINDOW + self.credit_received - self.send_window

    # -- output

    def _emit(self, data: Buffer) -> None:
        self.out.append(data)
        self.out_size += len(data)
        if not self.dirty:
            self.dirty = True
            self.wake.append(self)

    def take_output(self) -> list[Buffer]:
        """All bytes to be written, in order; the caller writes them or closes the connection."""
        out = self.out
        self.out = []
        self.out_size = 0
        self.dirty = False
        return out

    # -- headers

    def _encode(self, block: HeaderBlock) -> bytes:
        """Encode a block that isn't remembered as encoded."""
        encoder = self._encoder
        prefix = encoder.take_size_update()
        data = encoder.encode(block.fields)
        if encoder.generation != self._encoded_generation:
            # Entries moved, or this block made one: what was encoded before now means something else.
            self._encoded_generation = encoder.generation
            self._encoded.clear()
        elif len(data) <= _ENCODED_BYTES:
            if len(self._encoded) >= _ENCODED_BLOCKS:
                self._encoded.clear()
            self._encoded[block] = data
        return prefix + data

    def limit_encoder(self, table_size: int) -> None:
        self._encoder.limit_table(table_size)
        if self._encoder.generation != self._encoded_generation:
            self._encoded_generation = self._encoder.generation
            self._encoded.clear()

    def send_headers(
        self, stream: Stream, block: HeaderBlock, end: bool = False, passing: Passing | None = None
    ) -> None:
        """A header section: a request, a response, an informational response."""
        if stream.local_closed:
            return
        data = self._encoded.get(block) or self._encode(block)
        if passing is not None:
            data += passing.encoded
        length = len(data)
        if length <= DEFAULT_MAX_FRAME:
            flags = END_HEADERS | END_STREAM if end else END_HEADERS
            self.out.append(_pack(length >> 8, length & 0xFF, HEADERS, flags, stream.id) + data)
            self.out_size += length + 9
            if not self.dirty:
                self.dirty = True
                self.wake.append(self)
        else:
            self._emit(frames.header_frames(stream.id, data, end, DEFAULT_MAX_FRAME))
        if end:
            self._local_end(stream)

    def send_trailers(self, stream: Stream, block: HeaderBlock, passing: Passing | None = None) -> None:
        """The trailer section, behind all data that still waits."""
        backlog = stream.backlog
        if backlog is None:
            if stream.local_closed or not (self.paused or self.out_size > OUT_FULL):
                self.send_headers(stream, block, True, passing)
                return
            # No window holds these back, and a few bytes of a client's can make many.
            backlog = stream.backlog = Backlog()
            backlog.add(b"", False)
            self.blocked[stream] = None
        backlog.trailers = block
        backlog.passing = passing
        size = list_size(block, passing)
        backlog.waiting += size
        self._count_waiting(stream, size)
        if stream.partner is not None:
            stream.partner.conn.on_stuck(stream.partner)

    # -- data

    def send_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        """Send or queue a piece of a message. What is sent is credited to the stream's partner at once."""
        size = len(chunk)
        if (
            size > stream.send_window
            or size > self.send_window
            or size > DEFAULT_MAX_FRAME
            or stream.backlog is not None
            or self.paused
            or stream.local_closed
        ):
            self._queue(stream, chunk, end)
            return
        stream.send_window -= size
        self.send_window -= size
        out = self.out
        out.append(_pack(size >> 8, size & 0xFF, DATA, 1 if end else 0, stream.id))
        out.append(chunk)
        self.out_size += size + 9
        self.data_sent += 1
        if not self.dirty:
            self.dirty = True
            self.wake.append(self)
        partner = stream.partner
        if partner is not None and not partner.remote_closed:
            unacked = partner.unacked + size
            if unacked >= partner.window >> 1:
                partner.conn.credit(partner, size)
            else:
                partner.unacked = unacked
        if end:
            self._local_end(stream)

    def _queue(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        if stream.local_closed:
            return
        backlog = stream.backlog
        if backlog is None:
            backlog = stream.backlog = Backlog()
        backlog.add(chunk, end)
        self._count_waiting(stream, len(chunk))
        self.pump_stream(stream)
        partner = stream.partner
        if partner is not None and stream.backlog is not None:
            partner.conn.on_stuck(partner)

    def _count_waiting(self, stream: Stream, size: int) -> None:
        """So many bytes more, or less, wait in a stream's backlog."""
        self.queued += size
        if stream.partner is not None:
            stream.partner.conn.stuck += size

    def pump_stream(self, stream: Stream) -> None:
        """Send what the windows allow of one stream's backlog; `blocked` if not its own window stops it."""
        while (backlog := stream.backlog) is not None and not self.paused and self.out_size < _OUT_LIMIT:
            if not self._pump_frame(stream, backlog):
                break
        self._remember_blocked(stream)

    def _remember_blocked(self, stream: Stream) -> None:
        """Streams whose own window is shut aren't looked at again until it opens; an empty frame needs no window."""
        backlog = stream.backlog
        if backlog is not None and (stream.send_window > 0 or not backlog.chunks[0]):
            self.blocked[stream] = None

    def _pump_frame(self, stream: Stream, backlog: Backlog) -> bool:
        """One DATA frame from the backlog, or False when a window is closed."""
        chunks = backlog.chunks
        chunk = chunks[0]
        room = max(min(stream.send_window, self.send_window, self.peer.max_frame), 0)
        if room == 0 and chunk:
            return False
        if len(chunk) > room:
            chunks[0] = chunk[room:]
            chunk = chunk[:room]
        else:
            chunks.popleft()
            self.data_sent += 1  # not for a piece: windows of a byte would earn budget with each (CVE-2019-9511)
        size = len(chunk)
        stream.send_window -= size
        self.send_window -= size
        self._left_backlog(stream, backlog, size)
        end = backlog.end and not chunks
        if size or end:
            self._emit(_pack(size >> 8, size & 0xFF, DATA, END_STREAM if end else 0, stream.id) + chunk)
        partner = stream.partner
        if size and partner is not None:
            partner.conn.credit(partner, size)
        if not chunks:
            self._backlog_sent(stream, backlog)
        return True

    def _left_backlog(self, stream: Stream, backlog: Backlog, size: int) -> None:
        backlog.waiting -= size
        self._count_waiting(stream, -size)

    def _backlog_sent(self, stream: Stream, backlog: Backlog) -> None:
        stream.backlog = None
        self.blocked.pop(stream, None)
        if backlog.end:
            self._local_end(stream)
        elif backlog.trailers is not None:
            self._left_backlog(stream, backlog, backlog.waiting)
            self.send_headers(stream, backlog.trailers, True, backlog.passing)

    def drop_backlog(self, stream: Stream) -> None:
        """Throw away what waits for the peer's window: the stream goes on, or ends, without it."""
        backlog = stream.backlog
        if backlog is not None:
            self._left_backlog(stream, backlog, backlog.waiting)
            stream.backlog = None
            self.blocked.pop(stream, None)

    def pump(self) -> None:
        """Send what has become possible, one frame a stream in turn: a long backlog must not starve the others.

        Stops at `_OUT_LIMIT` bytes of output; whoever writes that calls `resume` while anything is `blocked`.
        """
        blocked = self.blocked
        while blocked and not self.paused and self.send_window > 0 and self.out_size < _OUT_LIMIT:
            stream = next(iter(blocked))
            del blocked[stream]
            backlog = stream.backlog
            if backlog is not None:
                self._pump_frame(stream, backlog)
                self._remember_blocked(stream)  # behind the others

    def resume(self) -> None:
        """The transport takes output again."""
        self.paused = self.full = False
        if self.send_window <= 0:
            for stream in list(self.blocked):
                self.pump_stream(stream)  # what ends with an empty frame needs no window
        self.pump()

    # -- credit, ends

    def credit(self, stream: Stream, size: int) -> None:
        """`size` bytes that came on this stream were forwarded: the peer may send as many more, in due course."""
        unacked = stream.unacked + size
        if unacked >= stream.window >> 1 and not stream.remote_closed:
            if stream.window < self.stream_window:
                more = self.growth(stream)
                stream.window += more
                unacked += more
            self._emit(frames.window_update(stream.id, unacked))
            stream.recv_window += unacked
            unacked = 0
        stream.unacked = unacked

    def widen(self, stream: Stream) -> None:
        """Let a stream have its whole window, as far as `growth` allows, before anything has come."""
        more = self.growth(stream)
        if more:
            stream.window += more
            stream.recv_window += more
            self._emit(frames.window_update(stream.id, more))

    def _local_end(self, stream: Stream) -> None:
        stream.local_closed = True
        if stream.remote_closed:
            self._remove(stream)
        elif self.server:
            # The response is complete before the request is (RFC 9113 section 8.1): the rest isn't needed.
            self.reset(stream, 0)

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream with RST_STREAM, unless it has ended already."""
        if self.streams.get(stream.id) is stream:
            self._emit(frames.rst_stream(stream.id, code))
            self.remember_reset(stream.id)
            self._remove(stream)

    def remember_reset(self, stream_id: int) -> None:
        self.stray_allowed = min(self.stray_allowed + _IN_FLIGHT, 64 * _IN_FLIGHT)
        resets = self.resets
        resets[stream_id] = None
        if len(resets) > _RESETS_REMEMBERED:
            del resets[next(iter(resets))]

    def _remove(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is None:
            return
        stream.local_closed = stream.remote_closed = True
        if stream.backlog is not None:
            self.drop_backlog(stream)
        self.on_stream_closed(stream)

    def send_goaway(self, code: int, debug: str = "", last_stream_id: int | None = None) -> None:
        """GOAWAY. The last stream identifier never rises from one to the next (RFC 9113 section 6.8)."""
        last = self.last_remote_id if last_stream_id is None else last_stream_id
        self.goaway_last = min(last, self.goaway_last)
        self._emit(frames.goaway(self.goaway_last, code, debug.encode()))
