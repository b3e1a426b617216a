"""The connections to one upstream address, and the calls that wait for one.

Rules:
- Few connections carry many calls: a further one is opened only when those there are have no room.
- While nothing is connected it is tried again, with backoff, for as long as the gate runs.
- A call waits at most `connect_timeout` seconds; how many may wait is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from proxy.config.model import Address
from proxy.spawn import spawn
from proxy.telemetry.log import throttled
from proxy.upstream.link import Link, UpstreamConnection

_log = logging.getLogger("tensorgate")

_FIRST_BACKOFF = 0.05
_LAST_BACKOFF = 1.0
_STABLE_SECONDS = 1.0


class Waiter(Protocol):
    """A call that waits for a connection; exactly one of the two is called, unless it is forgotten."""

    def connected(self, conn: UpstreamConnection) -> None: ...

    def not_connected(self, why: str) -> None: ...


class Pool:
    """Connections to `address`.

    new_link makes a connection with its transport protocol; before and after surround whatever calls waiters: they take
    the time, and flush what was produced. starting: the upstream has just been started; it needn't be there yet.
    """

    def __init__(
        self,
        address: Address,
        new_link: Callable[[Pool], Link],
        before: Callable[[], None],
        after: Callable[[], None],
        *,
        max_connections: int,
        max_waiting: int,
        connect_timeout: float,
        starting: bool = False,
    ) -> None:
        self.address = address
        self.links: list[Link] = []  # connected, oldest first; also those that go away and finish their calls
        self.ready: list[UpstreamConnection] = []  # of these, the ones that take new calls
        self.last_error = "not connected yet"
        self.starting = starting
        self.connect_timeout = connect_timeout
        self.max_waiting = max_waiting
        self._new_link = new_link
        self._before = before
        self._after = after
        self._max_connections = max_connections
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: dict[Waiter, float] = {}  # -> give up at; in order, since all wait equally long
        self._timer: asyncio.TimerHandle | None = None
        self._backoff = 0.0  # seconds before the next attempt while nothing is connected
        self._connected_at = 0.0
        self._closed = False

    @property
    def connecting(self) -> int:
        return 1 if self._connecting is not None else 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """Connect now, so that readiness is known before the first call."""
        self._ensure_connecting()

    def pick(self) -> UpstreamConnection | None:
        """A connection with room for a call; the oldest first, so that few are used."""
        for conn in self.ready:
            if conn.room() > 0:
                return conn
        return None

    def wait(self, waiter: Waiter) -> bool:
        """Queue a call until a connection has room; False when the queue is full."""
        if len(self._waiting) >= self.max_waiting:
            return False
        loop = asyncio.get_running_loop()
        self._waiting[waiter] = loop.time() + self.connect_timeout
        if self._timer is None:
            self._timer = loop.call_later(self.connect_timeout, self._expire)
        self._ensure_connecting()
        return True

    def forget(self, waiter: Waiter) -> None:
        """The call no longer waits."""
        self._waiting.pop(waiter, None)

    def serve(self) -> None:
        """Room may have appeared: let waiting calls go, first come first served."""
        while self._waiting and (conn := self.pick()) is not None:
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            waiter.connected(conn)

    def going_away(self, conn: UpstreamConnection) -> None:
        """No new calls on this connection; those on it may finish."""
        if conn in self.ready:
            self.ready.remove(conn)
        if not self.ready or self._waiting:
            self._ensure_connecting()

    def lost(self, link: Link, why: str) -> None:
        """A transport has ended."""
        if link in self.links:
            self.links.remove(link)
            self.last_error = why
            lived = asyncio.get_running_loop().time() - self._connected_at
            if lived > _STABLE_SECONDS or (link.orderly and link.conn.last_local_id):
                self._backoff = 0.0
            else:
                self._back_off()  # it accepts connections only to drop them
            if not self._closed:
                level = logging.INFO if link.orderly else logging.WARNING
                throttled(level, "upstream connections", "upstream %s: connection ended: %s", self.address, why)
        self.going_away(link.conn)

    def close(self) -> None:
        """Give up: waiting calls are answered, transports closed."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for waiter in list(self._waiting):
            waiter.not_connected("the gate is shutting down")
        self._waiting.clear()
        for link in list(self.links):
            link.close("the gate is shutting down")

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        self._before()
        for waiter, until in list(self._waiting.items()):
            if until > now:
                self._timer = loop.call_at(until, self._expire)
                break
            del self._waiting[waiter]
            waiter.not_connected(self._why_waiting())
        self._after()

    def _why_waiting(self) -> str:
        if self.ready:
            return (
                f"no room on its {len(self.ready)} connections (limits.upstream_connections is "
                f"{self._max_connections}; the last error was: {self.last_error})"
            )
        return self.last_error

    def _ensure_connecting(self) -> None:
        if self._connecting is None and not self._closed and self._may_open():
            self._connecting = spawn(self._connect(), f"connect to {self.address}")

    def _may_open(self) -> bool:
        """Connections that go away and finish their calls don't count, up to as many again."""
        return len(self.ready) < self._max_connections and len(self.links) < 2 * self._max_connections

    def _back_off(self) -> None:
        self._backoff = min(max(self._backoff * 2, _FIRST_BACKOFF), _LAST_BACKOFF)

    async def _connect(self) -> None:
        """Open connections until no call waits for one; retry while there is none at all."""
        try:
            while not self._closed and self._may_open():
                if self._backoff:
                    await asyncio.sleep(self._backoff)
                if not await self._connect_once():
                    self._back_off()
                if self.ready and not self._waiting:
                    return
        finally:
            self._connecting = None

    async def _connect_once(self) -> bool:
        link = self._new_link(self)
        try:
            async with asyncio.timeout(self.connect_timeout):
                await self._open(link)
                await link.ready
        except TimeoutError:
            self._failed(link, f"no HTTP/2 SETTINGS within {self.connect_timeout:g} s (timeouts.connect)")
            return False
        except OSError as error:
            self._failed(link, _reason(error))
            return False
        except BaseException:
            link.close("given up")
            raise
        throttled(logging.INFO, "upstream connections", "upstream %s: connected", self.address)
        self.starting = False
        self._connected_at = asyncio.get_running_loop().time()
        self.links.append(link)
        self.ready.append(link.conn)
        self._before()
        self.serve()
        self._after()
        return True

    async def _open(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        if self.address.path:
            await loop.create_unix_connection(lambda: link, self.address.path)
        else:
            await loop.create_connection(lambda: link, self.address.host, self.address.port)

    def _failed(self, link: Link, why: str) -> None:
        link.close(why)
        if why != self.last_error:
            level = logging.DEBUG if self.starting else logging.WARNING
            throttled(level, "upstream connections", "upstream %s: can't connect: %s; trying again", self.address, why)
        self.last_error = why


def _reason(error: OSError) -> str:
    """The system's own words, without the address that the caller names anyway."""
    return error.strerror or str(error)
