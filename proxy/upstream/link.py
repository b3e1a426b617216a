"""The transport of one upstream connection: feeds what is read to the HTTP/2 core, writes what comes out.

Plaintext HTTP/2 with prior knowledge (RFC 9113 section 3.3) over TCP or a unix socket.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from proxy import transports
from proxy.http2 import Buffer, ClientConnection, ErrorCode
from proxy.telemetry.metrics import Counters

_WRITE_BUFFER = 1024 * 1024
_READ_BYTES = 131_072
_VIEW_FROM = 16_384
_FULL_READS = 4
_UNREAD_LIMIT = 16 * 1024 * 1024
_FULL = _UNREAD_LIMIT // 2  # from then on the connection takes no further calls
_LINGER_SECONDS = 1.0


# One buffer for all connections: the event loop fills it and calls buffer_updated before it asks for it again.
_read_buffer = memoryview(bytearray(_READ_BYTES))


class UpstreamConnection(ClientConnection):
    """A client connection that has a transport; the relay adds what happens to calls."""

    __slots__ = ("link",)

    link: Link

    def on_link_lost(self, why: str) -> None:
        """The transport is gone; every stream still in the table has failed."""


class Link(asyncio.BufferedProtocol):
    """Joins a transport to an UpstreamConnection. `ready` is done at the peer's SETTINGS; on_lost called at the end."""

    def __init__(
        self,
        make_conn: Callable[[], UpstreamConnection],
        counters: Counters,
        before_read: Callable[[], object],
        after_read: Callable[[], None],
        on_lost: Callable[[Link, str], None],
    ) -> None:
        self.conn: UpstreamConnection
        self._make_conn = make_conn
        self.transport: asyncio.Transport | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._counters = counters
        self._before_read = before_read
        self._after_read = after_read
        self._on_lost = on_lost
        self._full_reads = 0  # one after another
        self.why = ""
        self.orderly = False  # it ends because the peer said so, or we
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            # A backend whose host has vanished answers nothing. No TCP_USER_TIMEOUT: it also ends connections to a
            # backend that is alive but reads nothing for a while, being busy with a model.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        # Not before: a connection has output from its first moment, the preface, and anyone may flush it.
        self.conn = self._make_conn()
        self.conn.link = self.conn.wire = self
        self._after_read()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._counters.upstream_received += nbytes
        data = _read_buffer[:nbytes]
        self._before_read()
        try:
            self.conn.receive(data if nbytes >= _VIEW_FROM else bytes(data))
        finally:
            # A view holds until this flush, which must come whatever happens: output that is left would be read from
            # the buffer when that has other data.
            self._after_read()
        self._full_reads = self._full_reads + 1 if nbytes == _READ_BYTES else 0
        if self._full_reads == _FULL_READS and self.transport is not None and not self.transport.is_closing():
            self._full_reads = 0
            transports.let_others_read(self.transport)

    def eof_received(self) -> None:
        self.why = self.why or "it closed the connection"

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        why = self.why or (str(exc) if exc else "the connection was closed")
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(why))
            self.ready.exception()  # retrieved: whoever connects may have given up already
        self.conn.closed = True
        self._before_read()
        self.conn.on_link_lost(why)
        self._on_lost(self, why)
        self._after_read()

    def pause_writing(self) -> None:
        self.conn.paused = True

    def resume_writing(self) -> None:
        self._before_read()
        self.conn.resume()
        self._after_read()

    def write(self, out: list[Buffer], size: int) -> None:
        """Write what the core has gathered. Joined, which also copies views of buffers that will be used again."""
        transport = self.transport
        if transport is None or self._closing:
            return
        self._counters.upstream_sent += size
        if self.conn.paused:
            # DATA and trailers wait in the streams while the transport is full; these are heads and resets.
            waiting = transport.get_write_buffer_size()
            if waiting > _UNREAD_LIMIT:
                self.why = f"it left {_UNREAD_LIMIT} bytes unread"
                transport.abort()
                return
            self.conn.full = waiting > _FULL
        transport.write(b"".join(out))

    def close(self, why: str, orderly: bool = False) -> None:
        """Say GOAWAY (RFC 9113 section 6.8) and close once everything is written, or a second later: what is left then
        is for a peer that doesn't read."""
        self.why = self.why or why
        transport = self.transport
        if transport is None or self._closing:
            return
        self.orderly = orderly
        conn = self.conn
        if not conn.closed:
            conn.send_goaway(ErrorCode.NO_ERROR)
        size = conn.out_size
        self.write(conn.take_output(), size)
        self._closing = True
        transport.close()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.abort)

    def abort(self) -> None:
        """End the connection now."""
        if self.transport is not None:
            self.transport.abort()
