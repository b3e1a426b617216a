"""HTTP/1.1 connections that can't be kept for nothing: a number of them, and a time for what a client does.

aiohttp closes those on which no request runs for long; it waits for ever for one whose answers aren't taken, and lets
a header section take as long as an idle connection may last. Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

from proxy.web import web

MOST_CONNECTIONS = 16_384
_QUIET = 60.0  # seconds without a further line in the log
_log = logging.getLogger("tensorgate.backend")


class Connection(web.RequestHandler):
    """`patience`: seconds for a header section, from the connection's or its own first byte to its last, and for the
    rest of what is sent when the connection ends."""

    __slots__ = ("_ending", "_patience", "_pending", "_since", "_timer")

    def __init__(self, server: web.Server, patience: float, **options: Any) -> None:
        super().__init__(server, access_log=None, **options)  # type: ignore[arg-type]
        self._patience = patience
        self._pending: asyncio.Transport | None = None  # until it is lost, where aiohttp forgets it when it closes it
        self._since: float | None = None  # on the loop's clock: when it began to wait for the end of a header section
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._pending = self.transport
        self._since = self._loop.time()
        self._timer = self._loop.call_later(self._patience, self._look)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._pending = None
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiter = self._waiter
        if waiter is None or waiter.done():
            if self._request_count:
                self._since = None  # a request runs, or is about to
        elif self._since is None:
            self._since = self._loop.time()

    def _look(self) -> None:
        """Every so often, one timer for all of the connection's requests."""
        if self._pending is None:
            return
        now = self._loop.time()
        due = now + self._patience
        if self._pending.is_closing():
            if self._ending:
                self._pending.abort()
                return
            self._ending = True
        elif self._since is not None and self._waiter is not None:
            if self._since + self._patience <= now:
                self.force_close()
            else:
                due = self._since + self._patience
        self._timer = self._loop.call_at(due, self._look)


class Refusal(asyncio.Protocol):
    """Of a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class Server(web.Server):
    """aiohttp's, with connections of ours, of which it counts those that are open."""

    def __init__(self, handler: Any, most: int | None = None) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.open: set[web.RequestHandler] = set()
        self._most = most_connections() if most is None else most
        self._told = 0.0

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        self.open.add(handler)
        super().connection_made(handler, transport)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.open.discard(handler)
        super().connection_lost(handler, exc)

    def refusal(self) -> Refusal | None:
        """For the next connection, if it is one too many."""
        if len(self.open) < self._most:
            return None
        now = time.monotonic()
        if not self._told or now - self._told >= _QUIET:
            self._told = now
            _log.warning(
                "%d HTTP connections are open, which is the limit (%d, or half of the files that a process may open: "
                "ulimit -n); further ones are closed",
                len(self.open),
                MOST_CONNECTIONS,
            )
        return Refusal()


def most_connections() -> int:
    """Half of the files are for others: gRPC, the models, the log."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, files // 2)
