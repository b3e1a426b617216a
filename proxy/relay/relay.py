"""What all connections of one gate share: the list of connections to flush, the clock of the current read,
the deadlines, the counters, the way to the upstream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Protocol, cast

from proxy.config.model import Limits, Timeouts
from proxy.http2 import Abuse, Buffer, Connection, ConnectionFault, Control, ErrorCode, Sender, guards
from proxy.http2.sender import OUT_FULL
from proxy.inference.status import Code
from proxy.relay.deadlines import SLOT_SECONDS, Deadlines
from proxy.relay.room import LOOK_SECONDS, Room
from proxy.telemetry.metrics import Counters
from proxy.tls.addresses import network
from proxy.upstream.fairness import Accounts, party

if TYPE_CHECKING:
    from proxy.relay.call import Call
    from proxy.relay.downstream import Downstream
    from proxy.upstream.pool import Pool

log = logging.getLogger("tensorgate")

_MISBEHAVED = 10_000
_LONELY_TURNS = 32
_TRIES = 8
_UNTIL_NEXT_TRY = 256
_UNREAD_BYTES = 4_194_304  # more than a stream or two that nobody reads from for a while
_TAKEN_PER_SECOND = 4096
_REMEMBERED_SECONDS = 10.0


def address_of(peer_name: str) -> str:
    """The address of "ADDRESS:PORT", or as much of it as tells clients apart."""
    return network(peer_name.rpartition(":")[0])


class Wire(Protocol):
    """Where a connection's output goes."""

    @property
    def untaken(self) -> int:
        """Bytes that the peer has not acknowledged yet, in our buffer and in the kernel's."""
        ...

    def write(self, out: list[Buffer], size: int) -> None: ...

    def close(self, why: str) -> None: ...

    def abort(self) -> None: ...


class Relay:
    """Shared by all connections. `now` is the monotonic time of the read, timer or event being worked on."""

    def __init__(self, counters: Counters, limits: Limits, access_log: bool, timeouts: Timeouts | None = None) -> None:
        """Of `timeouts`, handshake is what a peer, client or upstream, has for acknowledging our SETTINGS, too."""
        timeouts = timeouts or Timeouts()
        self.counters = counters
        self.limits = limits
        self.access_log = access_log
        self.wake: list[Sender] = []
        self.spenders: list[Control] = []
        self.deadlines: Deadlines[Call] = Deadlines()
        self.now = monotonic()
        self.pool: Pool
        self._late: list[Sender] = []  # upstream connections with output, see `flush_soon`
        self._turn_ends = False  # a call is under way for when the loop's turn is over
        self._reads = 0  # since there is such a call
        self._lonely_turns = 0  # of the event loop, one after another, that brought one read
        self.room_appeared = False  # upstream, while calls wait for it
        self.deferred: list[Call] = []  # calls that go upstream when the read they came with is parsed
        self._misbehaved: dict[str, float] = {}  # address -> until when its new connections have to wait
        self._unacknowledged: dict[Connection, float] = {}  # whose peer owes us a SETTINGS ACK -> since when, in order
        self._ack_timeout = timeouts.handshake
        self._unread_timeout = timeouts.unread
        self.held_bytes = 0  # of calls that wait for an upstream connection
        self.kept_bytes = 0  # of requests that could be sent again, see `kept`
        self.clients: dict[Downstream, None] = {}
        self.accounts = Accounts()
        self._reluctant: dict[Downstream, tuple[int, float]] = {}  # with much that waits -> (bytes sent, since when)
        self._trickling: dict[Downstream, tuple[object, float]] = {}  # -> (what it is at, since when)
        self._timer: asyncio.TimerHandle | None = None
        self._room: Room[Call] = Room()
        self._room_timer: asyncio.TimerHandle | None = None

    def begin(self) -> float:
        """Something happens: take its time."""
        self.now = monotonic()
        return self.now

    def flush(self) -> None:
        """Write the output of every connection that has any, once; close those that have ended."""
        if self._late:
            self._write_late()
        self.flush_read()

    def flush_read(self) -> None:
        """The same, but for what `flush_soon` lets wait: after a read from an upstream."""
        self._start_calls()
        wake = self.wake
        while wake:
            batch = wake[:]
            wake.clear()
            for conn in batch:
                self._write(conn)
            self._start_calls()

    def flush_soon(self) -> None:
        """Like `flush`, for a read that wasn't a view; what goes upstream may wait until the loop's turn is over.

        Requests of several clients that come in one turn of the event loop then leave in one write, and their answers
        come in one read. Where turns bring one read each, as with few clients, nothing waits; that is tried again from
        time to time.
        """
        if self._lonely_turns >= _LONELY_TURNS:
            self._lonely_turns += 1
            if self._lonely_turns > _LONELY_TURNS + _UNTIL_NEXT_TRY:
                self._lonely_turns = _LONELY_TURNS - _TRIES
            self.flush()
            return
        self._start_calls()
        self._reads += 1
        wake = self.wake
        while wake:
            batch = wake[:]
            wake.clear()
            for conn in batch:
                if conn.server or conn.closed:
                    self._write(conn)
                else:
                    self._late.append(conn)
            self._start_calls()
        if self._late and not self._turn_ends:
            self._turn_ends = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._turn_ends = False
        self._lonely_turns = self._lonely_turns + 1 if self._reads == 1 else 0
        self._reads = 0
        self.flush()

    def _write_late(self) -> None:
        late, self._late = self._late, []
        for conn in late:
            if conn.dirty:
                self._write(conn)

    def _write(self, conn: Sender) -> None:
        wire: Wire = conn.wire
        size = conn.out_size
        try:
            wire.write(conn.take_output(), size)
            if conn.closed:
                wire.close("a connection error")
            elif conn.blocked and not conn.paused:
                conn.resume()
            if size > OUT_FULL:
                self.room_appeared = True
        except Exception:
            # One connection's fault must not keep the output of the others back.
            log.exception("internal error while writing; the connection is closed")
            wire.abort()

    def _start_calls(self) -> None:
        """Calls that were put off, and those that wait where room has appeared. Not while a read is being parsed: who
        ends a hundred calls there, or leaves, must not have a hundred others opened upstream only to be reset."""
        if self.room_appeared:
            self.room_appeared = False
            self._guarded(self.pool.serve)
        if self.deferred:
            deferred, self.deferred = self.deferred, []
            for call in deferred:
                if not call.done and call.held is not None:
                    self._guarded(call.conn.start_deferred, call)

    def _guarded(self, what: Callable[..., None], *arguments: object) -> None:
        """One call's fault must not keep the others, or any output, back."""
        try:
            what(*arguments)
        except Exception:
            log.exception("internal error in a call")

    def refill(self) -> None:
        """A second has passed: budgets of http2.guards are full again, and some peer may have let its time pass."""
        for conn in self.spenders:
            conn.refill()
        self.spenders.clear()
        if self._unacknowledged:
            self._end_unacknowledged()
        self._end_reluctant()

    def _end_reluctant(self) -> None:
        """Give up on clients that leave much unread and take next to nothing of it."""
        self.begin()
        before, self._reluctant = self._reluctant, {}
        for client in [client for client in self.clients if client.queued > _UNREAD_BYTES]:
            sent = client.data_bytes_sent - client.wire.untaken
            mark, since = before.get(client, (sent, self.now))
            if sent - mark >= _TAKEN_PER_SECOND * self._unread_timeout:
                mark, since = sent, self.now
            if self.now - since < self._unread_timeout:
                self._reluctant[client] = mark, since
                continue
            reason = f"{client.queued} bytes of answers not read for {self._unread_timeout:g} s (timeouts.unread)"
            client.fail(Abuse(guards.UNREAD_ANSWERS, reason))
        self._end_trickling()
        self.flush()

    def _end_trickling(self) -> None:
        """Give up on clients that have begun a frame or a header block, which is kept until it is whole, and don't end
        it: slowloris."""
        before, self._trickling = self._trickling, {}
        for client in list(self.clients):
            mark = client.unfinished()
            if mark is None:
                continue
            since = self.now
            if client in before and before[client][0] == mark:
                since = before[client][1]
            if self.now - since < self._ack_timeout:
                self._trickling[client] = mark, since
                continue
            reason = f"a frame or header block isn't whole after {self._ack_timeout:g} s (timeouts.handshake)"
            client.fail(Abuse(guards.TRICKLE, reason))

    def await_settings_ack(self, conn: Connection) -> None:
        """The peer has sent its SETTINGS, so that it should have got ours."""
        self._unacknowledged.setdefault(conn, self.now)

    def settings_acked(self, conn: Connection) -> None:
        """The peer has acknowledged them, or is gone."""
        self._unacknowledged.pop(conn, None)

    def _end_unacknowledged(self) -> None:
        """SETTINGS_TIMEOUT for those that are late (RFC 9113 section 6.5.3)."""
        self.begin()
        late = [conn for conn, since in self._unacknowledged.items() if self.now - since >= self._ack_timeout]
        for conn in late:
            self.settings_acked(conn)
            reason = f"no acknowledgement of SETTINGS within {self._ack_timeout:g} s (timeouts.handshake)"
            conn.fail(ConnectionFault(ErrorCode.SETTINGS_TIMEOUT, reason))
        if late:
            self.flush()

    def remember_abuse(self, peer_name: str) -> None:
        """A client's connection was ended for abuse: the next ones from its address start slowly, see `Listener`."""
        if len(self._misbehaved) >= _MISBEHAVED:
            self._misbehaved.clear()
        self._misbehaved[address_of(peer_name)] = self.now + _REMEMBERED_SECONDS

    def has_misbehaved(self, peer_name: str) -> bool:
        """Whether a connection from this client's address was ended for abuse a short time ago."""
        if not self._misbehaved:
            return False
        address = address_of(peer_name)
        until = self._misbehaved.get(address)
        if until is None:
            return False
        if until <= monotonic():
            del self._misbehaved[address]
            return False
        return True

    def look_for_room(self) -> None:
        """A call waits: see from time to time whether that is because others hold on to what they don't use."""
        if self._room_timer is None and not self.pool.has_places():
            self._room_timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._make_room)

    def _make_room(self) -> None:
        self._room_timer = None
        pool = self.pool
        waiting = pool.waiting_parties()
        if not waiting or pool.has_places():
            self._room.rest()
            return
        self.begin()
        partners = [stream.partner for link in pool.links for stream in link.conn.streams.values()]
        held = [cast("Call", call) for call in partners if call is not None]
        for call in self._room.look(held, waiting, self.now, party):
            call.answer(
                Code.RESOURCE_EXHAUSTED,
                f"the call lay idle while others had no room on upstream {pool.address}, of which this client has most "
                "(limits.upstream_connections, limits.streams_per_upstream_connection)",
            )
        self.flush()
        self.look_for_room()

    def add_deadline(self, call: Call, seconds: float) -> None:
        self.deadlines.add(call, self.now + seconds)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SLOT_SECONDS, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.begin()
        due = self.deadlines.due(self.now)
        if self.deadlines:
            self._timer = asyncio.get_running_loop().call_later(SLOT_SECONDS, self._tick)
        for call in due:
            self._guarded(call.expire)
        self.flush()
