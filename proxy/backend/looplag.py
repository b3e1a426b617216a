"""How late the event loop is: a timer that repeats, and how long after its time it runs.

What a request that comes now would wait until the loop turns to it, because of a callback that takes long, or because
a model's thread holds the interpreter. These are samples: of what blocks the loop between two ticks, only the part that
is left when the next one is due is seen. A block of 10 ms is met by one tick of 20 ms in two, as 0 to 10 ms; one that
is longer than a tick is never missed. Nothing here may cost what it measures: a tick is a few additions.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from time import monotonic_ns, process_time_ns

# Seconds. uvloop's timers count in milliseconds: below 0.001 there is nothing to tell.
BOUNDS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

_BOUNDS_NS = [round(bound * 1e9) for bound in BOUNDS]
_TICK = 20_000_000
_IDLE_TICK = 200_000_000
_IDLE_AFTER = 1_000_000_000
_IDLE_SHARE = 50  # a process that uses less than 1/50 of a processor is idle; ticks alone take up to 1/200
_MOST_MISSED = 1000
_WINDOW = 60_000_000_000


class LoopLag:
    """Measures the running loop from `start` to `stop`. For the loop's own thread. Durations are in ns.

    counts: per bucket of BOUNDS, and one more for what is above; not cumulative. total: the sum of all samples.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0
        self.tick = _TICK
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0
        self._cpu = 0
        self._busy_at = 0
        self._most = 0
        self._most_before = 0
        self._window_ends = 0

    def start(self) -> None:
        """Begin to measure the running loop."""
        now = monotonic_ns()
        self._busy_at, self._window_ends = now, now + _WINDOW
        self._cpu = process_time_ns()
        self._schedule(asyncio.get_running_loop(), now)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    @property
    def most(self) -> int:
        """The most of the last one to two minutes. Not "since it was last asked for": two who ask, a Prometheus and
        somebody with curl, would take it from each other."""
        return max(self._most, self._most_before)

    def _schedule(self, loop: asyncio.AbstractEventLoop, now: int) -> None:
        self._due = now + self.tick
        self._handle = loop.call_later(self.tick / 1e9, self._ticked, loop)

    def _ticked(self, loop: asyncio.AbstractEventLoop) -> None:
        now = monotonic_ns()
        late = max(now - self._due, 0)
        self._add(late)
        self._turn_window(now)
        self._most = max(self._most, late)
        self._adapt(now)
        self._schedule(loop, now)

    def _add(self, late: int) -> None:
        # With the ticks that didn't come meanwhile: a second in which nothing ran is no single sample among fifty good
        # ones, or the histogram would say that the loop is late once in fifty times where it is half of the time.
        for _ in range(_MOST_MISSED):
            self.counts[bisect_left(_BOUNDS_NS, late)] += 1
            self.total += late
            late -= self.tick
            if late <= 0:
                return

    def _turn_window(self, now: int) -> None:
        if now >= self._window_ends:
            self._most_before, self._most = self._most, 0
            self._window_ends = now + _WINDOW

    def _adapt(self, now: int) -> None:
        # The processor time says it all without a word from those who work: code that holds up the loop uses it.
        cpu = process_time_ns()
        elapsed = now - self._due + self.tick
        if (cpu - self._cpu) * _IDLE_SHARE >= elapsed:
            self._busy_at = now
        self._cpu = cpu
        self.tick = _IDLE_TICK if now - self._busy_at >= _IDLE_AFTER else _TICK
