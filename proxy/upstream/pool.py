"""The connections to one upstream address, and the calls that wait for one.

Rules:
- Few connections carry many calls: a further one is opened only when those there are have no room.
- While nothing is connected it is tried again, with backoff, for as long as the gate runs.
- A call waits at most `connect_timeout` seconds; how many may wait is bounded.
- No client can take all room, or all places to wait, from the others: see `fairness`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from proxy.config.model import Address
from proxy.spawn import spawn
from proxy.telemetry.log import throttled
from proxy.upstream import fairness
from proxy.upstream.fairness import SHARE, Line, Owner, may_have, party
from proxy.upstream.link import Link, UpstreamConnection

_log = logging.getLogger("tensorgate")

_FIRST_BACKOFF = 0.05
_LAST_BACKOFF = 1.0
_STABLE_SECONDS = 1.0
_CERTAIN = SHARE - 1


class Waiter(fairness.Waiter, Protocol):
    """A call that waits for a connection; exactly one of the three is called, unless it is forgotten."""

    def connected(self, conn: UpstreamConnection) -> None: ...

    def not_connected(self, why: str) -> None: ...

    def crowded_out(self) -> None:
        """Its place is needed for others; it is forgotten already."""
        ...


class Pool:
    """Connections to `address`.

    new_link makes a connection with its transport protocol; before and after surround whatever calls waiters: they take
    the time, and flush what was produced. starting: the upstream has just been started; it needn't be there yet.
    """

    def __init__(
        self,
        address: Address,
        new_link: Callable[[Pool], Link],
        before: Callable[[], object],
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
        self._refused: dict[Waiter, tuple[float, UpstreamConnection]] = {}  # the same, and who has refused them
        self._line: Line[Waiter] = Line()  # those of _waiting
        self._timer: asyncio.TimerHandle | None = None
        self._backoff = 0.0  # seconds before the next attempt while nothing is connected
        self._connected_at = 0.0
        self._closed = False

    @property
    def connecting(self) -> int:
        return 1 if self._connecting is not None else 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._refused)

    def start(self) -> None:
        """Connect now, so that readiness is known before the first call."""
        self._ensure_connecting()

    def pick(self, owner: Owner) -> UpstreamConnection | None:
        """A connection with room for a call of this owner; the oldest first, so that few are used."""
        for conn in self.ready:
            room = conn.room()
            if room > 0:
                # The first is what is usual, and implies the others.
                if owner.account.carried < room * _CERTAIN or may_have(owner, room) or may_have(owner, self._room()):
                    return conn
                return None
        return None

    def _room(self) -> int:
        """For so many more calls, with the connections that may be opened."""
        room = sum([max(conn.room(), 0) for conn in self.ready])
        unopened = self._max_connections - len(self.ready)
        newest = self.ready[-1]
        return room + max(unopened, 0) * min(newest.peer.max_streams, newest.max_streams)

    def waiting_parties(self) -> dict[Any, int]:
        """Whose calls wait, and how many."""
        return self._line.parties()

    def has_places(self) -> bool:
        """Whether any connection can carry a further call, be it not now and not from everyone."""
        return any(conn.places() > 0 for conn in self.ready)

    def _first_with_room(self) -> UpstreamConnection | None:
        return next((conn for conn in self.ready if conn.room() > 0), None)

    def pick_other(self, refused_by: UpstreamConnection, no_more: bool = False) -> UpstreamConnection | None:
        """A connection for a call that this one has refused: another, or the same where there can be no other.

        no_more: that is so although the limits allow another one.
        """
        for conn in self.ready:
            if conn is not refused_by and conn.room() > 0:
                return conn
        if refused_by in self.ready and refused_by.room() > 0 and (no_more or not self._may_open()):
            return refused_by
        return None

    def wait(self, waiter: Waiter, refused_by: UpstreamConnection | None = None) -> bool:
        """Queue a call until a connection has room, another than `refused_by`; False when the queue is full."""
        # Who has no place left gets one of who has most.
        if not self._line.has_place(waiter.owner, self.max_waiting - self.waiting) and not self._make_place(waiter):
            return False
        # Those that have no stream identifiers left finish their calls; they must not keep others from being opened.
        self.ready = [conn for conn in self.ready if not conn.used_up]
        loop = asyncio.get_running_loop()
        until = loop.time() + self.connect_timeout
        if refused_by is None:
            self._waiting[waiter] = until
            self._line.add(waiter)
        else:
            self._refused[waiter] = (until, refused_by)
        if self._timer is None:
            self._timer = loop.call_later(self.connect_timeout, self._expire)
        self._ensure_connecting()
        return True

    def _make_place(self, newcomer: Waiter) -> bool:
        """Send a waiting call away for this one, if there is who has more."""
        waiter = self._line.who_makes_place(newcomer.owner)
        if waiter is None:
            return False
        self.forget(waiter)
        waiter.crowded_out()
        return True

    def forget(self, waiter: Waiter) -> None:
        """The call no longer waits."""
        self._refused.pop(waiter, None)
        if self._waiting.pop(waiter, None) is not None:
            self._line.remove(waiter)

    def serve(self, no_more: bool = False) -> None:
        """Room may have appeared: let waiting calls go. no_more: see `pick_other`."""
        for waiter, (_, refused_by) in list(self._refused.items()):
            other = self.pick_other(refused_by, no_more)
            if other is not None:
                del self._refused[waiter]
                waiter.connected(other)
        while self._line and (conn := self._first_with_room()) is not None:
            turn = self._line.next(partial(may_have, room=self._room()))
            if turn is None:
                return
            self.forget(turn)
            turn.connected(conn)

    def going_away(self, conn: UpstreamConnection) -> None:
        """No new calls on this connection; those on it may finish."""
        if conn in self.ready:
            self.ready.remove(conn)
        if not self.ready or self.waiting:
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
        waiting = [*self._refused, *self._waiting]
        self._refused.clear()
        self._waiting.clear()
        self._line.clear()
        for waiter in waiting:
            waiter.not_connected("the gate is shutting down")
        for link in list(self.links):
            link.close("the gate is shutting down")

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        self._before()
        refused = {waiter: until for waiter, (until, _) in self._refused.items()}
        for queue in (refused, self._waiting):
            for waiter, until in list(queue.items()):
                if until > now:
                    break
                self.forget(waiter)
                waiter.not_connected(self._why_waiting())
        left = [*[until for until, _ in self._refused.values()][:1], *list(self._waiting.values())[:1]]
        if left:
            self._timer = loop.call_at(min(left), self._expire)
        self._after()

    def _why_waiting(self) -> str:
        if self.ready:
            return (
                f"no room on its {len(self.ready)} connections (limits.upstream_connections is "
                f"{self._max_connections}; the last error was: {self.last_error})"
            )
        return self.last_error

    def _ensure_connecting(self) -> None:
        if not self.ready and not self._may_open():
            self._make_way()
        if self._connecting is None and not self._closed and self._may_open():
            self._connecting = spawn(self._connect(), f"connect to {self.address}")

    def _may_open(self) -> bool:
        """Connections that go away and finish their calls don't count, up to as many again."""
        return len(self.ready) < self._max_connections and len(self.links) < 2 * self._max_connections

    def _make_way(self) -> None:
        """No connection takes calls, and those that finish theirs leave no room for a new one: give up one of them.
        Else calls that never end, one on each, would keep all others out. The one with the fewest calls of others than
        who has calls on most of them."""
        parties = {link: _parties(link) for link in self.links}
        links_of = Counter(one for found in parties.values() for one in set(found))
        most = max(links_of, key=links_of.__getitem__, default=None)
        link = min(self.links, key=lambda link: len([one for one in parties[link] if one is not most]))
        self.links.remove(link)
        why = f"given up with its last calls: {len(self.links)} more connections finish theirs, and none takes new ones"
        link.conn.on_link_lost(why)
        link.close(why, orderly=True)

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
                    self._serve_all(no_more=True)  # a call that was refused waits beside a connection that has room
                if self.ready and not self.waiting:
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
        self._serve_all()
        return True

    def _serve_all(self, no_more: bool = False) -> None:
        self._before()
        self.serve(no_more)
        self._after()

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


def _parties(link: Link) -> list[Any]:
    """Whose the calls on a connection are, one for each call."""
    calls = [cast(Any, stream.partner) for stream in link.conn.streams.values()]
    return [party(call.owner) for call in calls if call is not None]


def _reason(error: OSError) -> str:
    """The system's own words, without the address that the caller names anyway."""
    return error.strerror or str(error)
