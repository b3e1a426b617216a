"""Whose TLS handshake goes on next, and when. No I/O; the time is an argument.

A handshake is the dearest thing that a stranger can ask for: half a millisecond of the processor and 46 KB of memory
for some hundred bytes. So it is done in steps, which the clients' messages ask for, and steps are rationed:

- While connections that have been there for a while have work, each step is paid for with a pause of several times the
  processor time that it took: all handshakes together get a half of what the pauses leave, those of one address a
  tenth. When nobody else has work, there are no pauses.
- The address whose handshakes have had the least goes first. A flood from one address doesn't keep others out, and
  hundreds of clients that come back at once are served in turn.
- A handshake that has begun holds its memory until the client answers. Only so many may be in that state; then a new
  one waits until the oldest is done, or has had its time and is given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from heapq import heappop, heappush
from typing import Generic, TypeVar

# Seconds of pause for each second of steps while others have work: 1 / share of the time.
ADDRESS_PRICE = 25.0
PRICE = 5.0
# So much of the pauses needn't be waited for, which is some handshakes one after another: timers are coarse.
SLACK = 0.02
# For so long after connections have had work, they may have it again at any moment.
BUSY_SECONDS = 0.1
# Handshakes that may be waiting for their client's answer, and how long one is waited for when all places are taken.
MIDWAY = 128
PATIENCE = 1.0

Shake = TypeVar("Shake", bound=Hashable)


class _Address(Generic[Shake]):
    """`paid`: the time until which the steps so far keep the next one off."""

    __slots__ = ("paid", "waiting")

    def __init__(self) -> None:
        self.paid = 0.0
        self.waiting: deque[Shake] = deque()


class Pacer(Generic[Shake]):
    """Handshakes by any hashable object. `give_up` is called with those whose place is needed."""

    def __init__(self, give_up: Callable[[Shake], None]) -> None:
        self._give_up = give_up
        self._addresses: dict[str, _Address[Shake]] = {}
        self._turns: list[tuple[float, int, str]] = []  # a heap: an address that has something to start, once each
        self._numbers = 0
        self._goers_on: deque[Shake] = deque()
        self._waiting: dict[Shake, str] = {}  # all that are in a queue -> their address
        self._midway: dict[Shake, float] = {}  # -> since when, in that order
        self._prefer_start = False
        self._paid = 0.0
        self._work = 0
        self._busy_until = 0.0

    def __bool__(self) -> bool:
        """Somebody waits."""
        return bool(self._waiting)

    def add(self, shake: Shake, address: str, now: float) -> None:
        """A client's message has come, the first or a further one: its handshake can take a step."""
        self._waiting[shake] = address
        if shake in self._midway:
            self._goers_on.append(shake)
            return
        state = self._addresses.get(address)
        if state is None:
            state = self._addresses[address] = _Address()
        state.waiting.append(shake)
        if len(state.waiting) == 1:
            self._queue_up(state, address, now)

    def done(self, shake: Shake) -> None:
        """It has ended, well or not, or its connection is gone."""
        self._waiting.pop(shake, None)  # the queues are rid of it when its turn comes
        self._midway.pop(shake, None)

    def note_work(self, work: int, now: float) -> None:
        """work: a number that changes whenever a connection that has been there for a while sends something."""
        if work != self._work:
            self._work = work
            self._busy_until = now + BUSY_SECONDS

    def is_busy(self, now: float) -> bool:
        return now < self._busy_until

    def take(self, now: float) -> Shake | None:
        """Who takes a step now, which `spent` must be told of; None while nobody may."""
        if now < self._busy_until and now < self._paid - SLACK:
            return None
        shake = None if self._prefer_start else self._go_on()
        if shake is None:
            shake = self._start(now)
        if shake is None:
            shake = self._go_on()
        return shake

    def due(self, now: float) -> float:
        """When `take` may have somebody if it has none now and nothing else happens."""
        when = self._paid - SLACK
        if not self._goers_on and self._turns:
            when = max(when, self._turns[0][0])
            if len(self._midway) >= MIDWAY:
                when = max(when, next(iter(self._midway.values())) + PATIENCE)
        return max(when, now)

    def spent(self, address: str, seconds: float, now: float) -> None:
        """A step of a handshake with this address has taken so much of the processor."""
        if now >= self._busy_until:
            return
        self._paid = max(self._paid, now) + seconds * PRICE
        state = self._addresses.get(address)
        if state is None:
            state = self._addresses[address] = _Address()
        state.paid = max(state.paid, now) + seconds * ADDRESS_PRICE

    def forget(self, now: float) -> None:
        """Forget addresses that nothing is known of any more; for a timer."""
        for address, state in list(self._addresses.items()):
            if not state.waiting and state.paid <= now:
                del self._addresses[address]

    def _queue_up(self, state: _Address[Shake], address: str, now: float) -> None:
        self._numbers += 1
        heappush(self._turns, (max(state.paid - SLACK, now), self._numbers, address))

    def _go_on(self) -> Shake | None:
        while self._goers_on:
            shake = self._goers_on.popleft()
            if self._waiting.pop(shake, None) is not None:
                self._prefer_start = True
                return shake
        return None

    def _start(self, now: float) -> Shake | None:
        """The next of the address that has had the least."""
        if len(self._midway) >= MIDWAY and self._overdue(now) is None:
            return None
        busy = now < self._busy_until
        turns = self._turns
        while turns and not (busy and turns[0][0] > now):
            address = heappop(turns)[2]
            state = self._addresses[address]
            waiting = state.waiting
            while waiting and waiting[0] not in self._waiting:
                waiting.popleft()  # gone while it waited
            if not waiting:
                continue
            if not (busy and state.paid - SLACK > now):
                return self._begin(state, address, now)
            self._queue_up(state, address, now)  # it has had steps since it queued up
        return None

    def _begin(self, state: _Address[Shake], address: str, now: float) -> Shake:
        if len(self._midway) >= MIDWAY and (oldest := self._overdue(now)) is not None:
            del self._midway[oldest]
            self._give_up(oldest)
        shake = state.waiting.popleft()
        if state.waiting:
            self._queue_up(state, address, now)
        del self._waiting[shake]
        self._midway[shake] = now
        self._prefer_start = False
        return shake

    def _overdue(self, now: float) -> Shake | None:
        """The oldest whose client could have answered long ago."""
        for shake, since in self._midway.items():
            if now - since < PATIENCE:
                break
            if shake not in self._waiting:
                return shake
        return None
