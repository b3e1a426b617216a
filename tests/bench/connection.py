"""One HTTP/2 connection of the load generator: unary gRPC echo calls, and the check that each answer is one.

Cheap rather than general: it must take less time for a call than the proxies do. Frames of a small call are put
together before it starts, TLS runs on memory buffers so that a read takes one system call, and a header block that has
been seen is not decoded again until the dynamic table changes.
"""

import contextlib
import socket
import ssl
import struct
import time
from collections import deque

from hpack import Decoder, HPACKError

from . import wire

CIPHER = "TLS_AES_128_GCM_SHA256"  # the one cipher suite of all clients: see `load`
TIMEOUT_SECONDS = 10.0
READ_BYTES = 262_144
_PLAIN_BYTES = 16_384
_WHOLE_BYTES = wire.MAX_FRAME  # a body up to here goes out in one piece with its headers

Call = tuple[float, float]  # when it was due, and when its answer had ended; seconds since the epoch


class Problem(Exception):
    """Why a run doesn't count."""


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


class Tls:
    """A TLS connection to a port of this machine, with its handshake done."""

    def __init__(self, port: int, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost", session=session)
        self._unsent = b""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._incoming.write(self._receive())
        self.sock.sendall(self._outgoing.read())
        chosen = (self._tls.cipher() or ("none",))[0], self._tls.selected_alpn_protocol()
        if chosen != (CIPHER, "h2"):
            raise Problem(f"negotiated {' and '.join(map(str, chosen))} instead of {CIPHER} and h2")

    @property
    def session(self) -> ssl.SSLSession | None:
        """What a later connection can resume: it comes behind the handshake, with the first answer."""
        return self._tls.session

    @property
    def session_reused(self) -> bool:
        return bool(self._tls.session_reused)

    def close(self) -> None:
        """close_notify, and the end, without waiting for the proxy's."""
        with contextlib.suppress(OSError):
            try:
                self._tls.unwrap()
            except ssl.SSLError:
                pass  # the proxy's own close_notify has not come
            self.sock.sendall(self._outgoing.read())
        self.sock.close()

    def _receive(self) -> bytes:
        data = self.sock.recv(READ_BYTES)
        if not data:
            raise Problem("the proxy closed the connection")
        return data

    def read(self) -> bytes:
        """What has come; one read from the socket."""
        try:
            self._incoming.write(self._receive())
        except BlockingIOError:
            return b""
        chunks = []
        try:
            while self._incoming.pending or self._tls.pending():
                if not (data := self._tls.read(_PLAIN_BYTES)):
                    raise Problem("the proxy ended TLS")
                chunks.append(data)
        except ssl.SSLWantReadError:
            pass
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def write(self, data: bytes) -> bool:
        """Send this, and what was left; whether all of it was taken. Only after True is more to be written."""
        if data:
            self._tls.write(data)
            data = self._outgoing.read()
        data = self._unsent + data if self._unsent else data
        if not data:
            return True
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        self._unsent = data[sent:]
        return not self._unsent

    @property
    def clear(self) -> bool:
        """Whether all that was written has been taken."""
        return not self._unsent


class Connection:
    """Calls on one connection; `done` are those whose answer is right. Problem where one is not."""

    def __init__(
        self, port: int, streams: int, blocks: list[bytes], body: bytes, context: ssl.SSLContext,
        session: ssl.SSLSession | None = None,
    ) -> None:  # fmt: skip
        """Connect, and wait for the proxy's SETTINGS, as gRPC's clients do before their first call."""
        self.done: list[Call] = []
        self._streams = streams
        self._body = body
        self._calls = _calls(blocks, body)
        self._next = 0  # of the calls
        self._due: deque[float] = deque()
        self._began: dict[int, float] = {}
        self._got: dict[int, int] = {}  # stream -> bytes of its answer
        self._uploads: dict[int, list[int]] = {}  # stream -> offset in the body, window
        self._window = wire.DEFAULT_WINDOW
        self._stream_window = wire.DEFAULT_WINDOW
        self._credit = 0
        self._partial = b""
        self._control: list[bytes] = []
        self._answers = _Answers()
        self.tls = Tls(port, context, session)
        self.tls.write(wire.PREFACE + wire.opening())
        self._settled = False
        while not self._settled:
            self.receive(0.0)
        self.flush()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.tls.close()

    def call(self) -> None:
        """One call, from its beginning to its answer, on a blocking socket."""
        self.due(1, time.time())
        self.flush()
        while self.open_calls:
            self.receive(time.time())

    def fileno(self) -> int:
        return self.tls.sock.fileno()

    @property
    def open_calls(self) -> int:
        return len(self._began) + len(self._due)

    # -- sending

    def due(self, count: int, at: float) -> None:
        """`count` more calls are to be made as soon as streams and windows allow it."""
        self._due.extend([at] * count)

    def flush(self) -> bool:
        """Send what can be sent; False while the socket has not taken all of it."""
        if not self.tls.clear and not self.tls.write(b""):
            return False
        out, self._control = self._control, []
        whole = len(self._body) if len(self._body) <= _WHOLE_BYTES else 0
        while self._due and len(self._began) < self._streams and self._window >= whole:
            if self._next == len(self._calls):
                self._due.clear()  # all that was prepared is used up: the run ends early
                break
            stream = 2 * self._next + 1
            out.append(self._calls[self._next])
            self._next += 1
            self._began[stream] = self._due.popleft()
            self._window -= whole
            if not whole:
                self._uploads[stream] = [0, self._stream_window]
        taken = self.tls.write(b"".join(out))
        while taken and (part := self._upload()):
            taken = self.tls.write(part)
        return taken

    def _upload(self) -> bytes:
        """The next frame of each large body that is under way, as far as the windows allow."""
        out = []
        for stream, upload in list(self._uploads.items()):
            offset, window = upload
            size = min(wire.MAX_FRAME, self._window, window, len(self._body) - offset)
            if size <= 0:
                continue
            end = offset + size == len(self._body)
            out.append(wire.frame(wire.DATA, wire.END_STREAM * end, stream, self._body[offset : offset + size]))
            upload[0], upload[1] = offset + size, window - size
            self._window -= size
            if end:
                del self._uploads[stream]
        return b"".join(out)

    # -- receiving

    def receive(self, now: float) -> int:
        """Take what has come; how many answers ended with it."""
        data = self._partial + self.tls.read()
        unpack, overhead = wire.FRAME.unpack_from, wire.FRAME_BYTES
        before, got, body = len(self.done), self._got, self._body
        pos, end = 0, len(data)
        while end - pos >= overhead:
            high, low, kind, flags, stream = unpack(data, pos)
            start = pos + overhead
            stop = start + (high << 8 | low)
            if stop > end:
                break
            pos = stop
            if kind == wire.DATA:
                size = stop - start
                self._credit += size
                at = got.get(stream, 0)
                if flags & wire.PADDED or data[start:stop] != body[at : at + size]:
                    raise Problem("an answer isn't an echo")
                got[stream] = at + size
                if flags & wire.END_STREAM:
                    raise Problem("an answer has no trailers")
            elif kind == wire.HEADERS:
                self._headers(stream, flags, data[start:stop], now)
            elif kind != wire.SETTINGS or not flags & wire.ACK:
                self._other(kind, flags, stream, data[start:stop])
        self._partial = data[pos:]
        if self._credit > wire.WIDE_WINDOW // 2:
            self._control.append(wire.window_update(0, self._credit))
            self._credit = 0
        return len(self.done) - before

    def _headers(self, stream: int, flags: int, block: bytes, now: float) -> None:
        if not flags & wire.END_HEADERS:
            raise Problem("an answer has CONTINUATION frames")
        what = self._answers.what(block)
        if flags & wire.END_STREAM:
            size = self._got.pop(stream, 0)
            if what != "grpc-status 0" or size != len(self._body):
                raise Problem(f"an answer of {size} bytes ends with {what}")
            if self._uploads.pop(stream, None):
                raise Problem("an answer ended before its request")
            self.done.append((self._began.pop(stream), now))
        elif what != "200":
            raise Problem(f"an answer begins with {what}")

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == wire.WINDOW_UPDATE:
            (increment,) = struct.unpack(">I", payload)
            if not stream:
                self._window += increment
            elif upload := self._uploads.get(stream):
                upload[1] += increment
        elif kind == wire.SETTINGS:
            self._settings(dict(wire.parse_settings(payload)))
        elif kind == wire.PING and not flags & wire.ACK:
            self._control.append(wire.frame(wire.PING, wire.ACK, 0, payload))
        elif kind in (wire.RST_STREAM, wire.GOAWAY):
            name = "RST_STREAM" if kind == wire.RST_STREAM else "GOAWAY"
            raise Problem(f"{name} with code {int.from_bytes(payload[-4:] if stream else payload[4:8], 'big')}")

    def _settings(self, values: dict[int, int]) -> None:
        if values.get(wire.HEADER_TABLE_SIZE, 4096) < 4096:
            raise Problem("the proxy allows no dynamic table of 4096 bytes")
        if (window := values.get(wire.INITIAL_WINDOW_SIZE)) is not None:
            for upload in self._uploads.values():
                upload[1] += window - self._stream_window
            self._stream_window = window
        self._settled = True
        self._control.append(wire.frame(wire.SETTINGS, wire.ACK, 0))


def _calls(blocks: list[bytes], body: bytes) -> list[bytes]:
    """The frames of each call: headers, and the body where it is small."""
    whole = len(body) <= _WHOLE_BYTES
    calls = []
    for number, block in enumerate(blocks):
        stream = 2 * number + 1
        head = wire.frame(wire.HEADERS, wire.END_HEADERS, stream, block)
        calls.append(head + wire.frame(wire.DATA, wire.END_STREAM, stream, body) if whole else head)
    return calls


class _Answers:
    """What the header blocks of a connection's answers say, in their order."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._known: dict[bytes, str] = {}

    def what(self, block: bytes) -> str:
        """The gRPC status and message of an answer's trailers, the status of its head, or all of it if neither."""
        known = self._known.get(block)
        if known is not None:
            return known
        size, newest = self._state()
        try:
            fields = {str(name): str(value) for name, value in self._decoder.decode(block)}
        except HPACKError as error:
            raise Problem(f"an answer's header block: {error!r}") from None
        found = fields.get(":status") or repr(fields)
        if "grpc-status" in fields:
            found = f"grpc-status {fields['grpc-status']} {fields.get('grpc-message', '')}".rstrip()
        size_now, newest_now = self._state()
        if size_now == size and newest_now is newest:
            self._known[block] = found
        else:
            self._known.clear()  # the same bytes may mean something else now
        return found

    def _state(self) -> tuple[int, object]:
        table = self._decoder.header_table
        return table.maxsize, table.dynamic_entries[0] if table.dynamic_entries else None
