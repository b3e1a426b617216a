"""The transport of one upstream connection: feeds what is read to the HTTP/2 core, writes what comes out.

Plaintext HTTP/2 with prior knowledge (RFC 9113 section 3.3) over TCP or a unix socket.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from proxy.http2 import Buffer, ClientConnection
from proxy.telemetry.metrics import Counters

_WRITE_BUFFER = 1024 * 1024
_JOIN_UP_TO = 65_536
_UNREAD_LIMIT = 16 * 1024 * 1024
_LINGER_SECONDS = 1.0


class UpstreamConnection(ClientConnection):
    """A client connection that has a transport; the relay adds what happens to calls."""

    __slots__ = ("link",)

    link: Link

    def on_link_lost(self, why: str) -> None:
        """The transport is gone; every stream still in the table has failed."""


class Link(asyncio.Protocol):
    """Joins a transport to an UpstreamConnection. `ready` is done at the peer's SETTINGS; on_lost called at the end."""

    def __init__(
        self,
        make_conn: Callable[[], UpstreamConnection],
        counters: Counters,
        before_read: Callable[[], None],
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
        self.why = ""
        self.orderly = False  # it ends because the peer said so, or we

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

    def data_received(self, data: bytes) -> None:
        self._counters.upstream_received += len(data)
        self._before_read()
        self.conn.receive(data)
        self._after_read()

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
        """Write what the core has gathered; small pieces are joined, since each buffer of a writev costs more."""
        transport = self.transport
        if transport is None:
            return
        self._counters.upstream_sent += size
        if self.conn.paused and transport.get_write_buffer_size() > _UNREAD_LIMIT:
            # DATA waits in the streams while the transport is full; these are heads and resets without end.
            self.why = f"it left {_UNREAD_LIMIT} bytes unread"
            transport.abort()
            return
        if len(out) == 1:
            transport.write(out[0])
        elif size <= _JOIN_UP_TO:
            transport.write(b"".join(out))
        else:
            transport.writelines(out)

    def close(self, why: str, orderly: bool = False) -> None:
        """Close once everything is written, or a second later: what is left is for a peer that doesn't read."""
        self.why = self.why or why
        self.orderly = orderly
        if self.transport is not None:
            self.transport.close()
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.abort)

    def abort(self) -> None:
        """End the connection now."""
        if self.transport is not None:
            self.transport.abort()
