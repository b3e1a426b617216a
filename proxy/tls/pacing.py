"""Whose TLS handshake goes on next, and when. No I/O; the time is an argument.

A handshake is the dearest thing that a stranger can ask for: half a millisecond of the processor and 46 KB of memory
for some hundred bytes. So it is done in steps, which the client's messages ask for, and steps are rationed:

- While connections that have been there for a while have work, each step is paid for with a pause of a multiple of the
  processor time that it took, so that all handshakes together get at most a tenth of the time, those of one
  address a sixteenth. When nobody else has work there are no pauses.
- The address whose handshakes have had the least goes first. A flood from one address doesn't keep others out, and
  hundreds of clients that come back at once are served in turn.
- A handshake that has begun holds its memory until the client answers. Only so many may be in that state; then a new
  one waits until the oldest is done, or has had its time and is given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable
from heapq import heappop, heappush
from typing import Generic, TypeVar

# Seconds that each second of steps is paid for with while others have work: 1 / share of the time.
PRICE = 10.0
ADDRESS_PRICE = 16.0
# So much of it needn't be waited for, which is a few handshakes one after another: timers are coarse.
SLACK = 0.02
# For so long after connections have had work, they may have it again at any moment.
BUSY_SECONDS = 0.1
# Handshakes that may be waiting for their client's answer, and how long one is waited for when all places are taken.
MIDWAY = 128
PATIENCE = 1.0

Shake = TypeVar("Shake", bound=Hashable)


class _Line(Generic[Shake]):
    """Those who wait for the same thing, by address.

    paid: address -> the time until which its steps so far keep the next one off. waiting: who waits, anywhere.
    """

    def __init__(self, paid: dict[str, float], waiting: Container[Shake]) -> None:
        self._paid, self._waiting = paid, waiting
        self._queues: dict[str, deque[Shake]] = {}
        self._turns: list[tuple[float, int, str]] = []  # a heap: when an address may go, the order of coming, who
        self._numbers = 0

    def add(self, shake: Shake, address: str, now: float) -> None:
        queue = self._queues.get(address)
        if queue is None:
            queue = self._queues[address] = deque()
            self._queue_up(address, now)
        queue.append(shake)

    def take(self, now: float, busy: bool) -> Shake | None:
        """The next of the address that has had the least; of those that may go now, if others are busy."""
        turns = self._turns
        while turns and not (busy and turns[0][0] > now):
            address = heappop(turns)[2]
            queue = self._queues[address]
            while queue and queue[0] not in self._waiting:
                queue.popleft()  # gone while it waited
            if busy and queue and self._paid.get(address, 0.0) - SLACK > now:
                self._queue_up(address, now)  # it has had steps since it queued up
                continue
            shake = queue.popleft() if queue else None
            if queue:
                self._queue_up(address, now)
            else:
                del self._queues[address]
            if shake is not None:
                return shake
        return None

    def due(self) -> float:
        """When the next may go; never, where there is none."""
        return self._turns[0][0] if self._turns else float("inf")

    def _queue_up(self, address: str, now: float) -> None:
        self._numbers += 1
        heappush(self._turns, (max(self._paid.get(address, 0.0) - SLACK, now), self._numbers, address))


class Pacer(Generic[Shake]):
    """Handshakes by any hashable object. `give_up` is called with those whose place is needed."""

    def __init__(self, give_up: Callable[[Shake], None]) -> None:
        self._give_up = give_up
        self._waiting: set[Shake] = set()
        self._midway: dict[Shake, float] = {}  # begun -> since when, in that order
        self._paid_by: dict[str, float] = {}
        self._starting: _Line[Shake] = _Line(self._paid_by, self._waiting)
        self._going_on: _Line[Shake] = _Line(self._paid_by, self._waiting)
        self._start_next = False
        self._paid = 0.0
        self._work = 0
        self._busy_until = 0.0

    def __bool__(self) -> bool:
        """Somebody waits."""
        return bool(self._waiting)

    def add(self, shake: Shake, address: str, now: float) -> None:
        """A client's message has come, the first or a further one: its handshake can take a step."""
        self._waiting.add(shake)
        line = self._going_on if shake in self._midway else self._starting
        line.add(shake, address, now)

    def done(self, shake: Shake) -> None:
        """It has ended, well or not, or its connection is gone."""
        self._waiting.discard(shake)  # its line is rid of it when its turn comes
        self._midway.pop(shake, None)

    def note_work(self, work: int, now: float) -> None:
        """work: a number that changes whenever a connection that has been there for a while sends something."""
        if work != self._work:
            self._work = work
            self._busy_until = now + BUSY_SECONDS

    def is_busy(self, now: float) -> bool:
        """Whether such connections have work."""
        return now < self._busy_until

    def take(self, now: float) -> Shake | None:
        """Who takes a step now, which `spent` must be told of; None while nobody may."""
        busy = self.is_busy(now)
        if busy and now < self._paid - SLACK:
            return None
        shake = None if self._start_next else self._going_on.take(now, busy)
        if shake is not None:
            self._start_next = True
        elif (shake := self._start(now, busy)) is not None:
            self._start_next = False
        else:
            shake = self._going_on.take(now, busy)
        if shake is not None:
            self._waiting.discard(shake)
        return shake

    def due(self, now: float) -> float:
        """When `take` may have somebody if it has none now and nothing else happens."""
        start = self._starting.due()
        if len(self._midway) >= MIDWAY:
            start = max(start, next(iter(self._midway.values())) + PATIENCE)
        return max(min(start, self._going_on.due()), self._paid - SLACK, now)

    def spent(self, address: str, seconds: float, now: float) -> None:
        """A step of a handshake with this address has taken so much of the processor."""
        if self.is_busy(now):
            self._paid = max(self._paid, now) + seconds * PRICE
            self._paid_by[address] = max(self._paid_by.get(address, 0.0), now) + seconds * ADDRESS_PRICE

    def forget(self, now: float) -> None:
        """Forget what was paid for by now; for a timer."""
        for address in [address for address, paid in self._paid_by.items() if paid <= now]:
            del self._paid_by[address]

    def _start(self, now: float, busy: bool) -> Shake | None:
        oldest = None
        if len(self._midway) >= MIDWAY and (oldest := self._overdue(now)) is None:
            return None
        shake = self._starting.take(now, busy)
        if shake is not None:
            if oldest is not None:
                del self._midway[oldest]
                self._give_up(oldest)
            self._midway[shake] = now
        return shake

    def _overdue(self, now: float) -> Shake | None:
        """The oldest whose client could have answered long ago."""
        for shake, since in self._midway.items():
            if now - since < PATIENCE:
                break
            if shake not in self._waiting:
                return shake
        return None
