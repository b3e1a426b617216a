"""Warm-up, the interleaved runs, and the figures of each run.

The peers take turns, run by run, each time in another order: what else the machine does, and how warm it is, then
falls on all of them alike. All proxies stay up from start to end; those whose turn it isn't are idle.
"""

import bisect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .load import Outcome, Shape, run_h2load
from .processes import Server, ServerError

WARM_UP_SECONDS = 0.5
# The steady part of a run: without its handshakes, and without its end, where some connections have nothing to do.
STEADY = (0.10, 0.90)
MINIMUM_SAMPLES = 5


@dataclass(frozen=True)
class Figures:
    """One run: microseconds of CPU per RPC, RPC/s, seconds of latency, share of one core, bytes."""

    cpu_us: float
    rate: float
    p50: float
    p99: float
    busy: float
    rss: int


@dataclass(frozen=True)
class Run:
    """One turn of one proxy in one shape; `figures` is None exactly if `problem` says why."""

    shape: str
    proxy: str
    repeat: int
    requests: int
    figures: Figures | None
    problem: str = ""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What to run. `requests` per run, if not None, stands instead of `seconds`."""

    shapes: list[Shape]
    repeats: int
    seconds: float
    requests: int | None


class ProxyEnded(Exception):
    """The proxy that is measured is no longer there."""


class Bench:
    """Runs a plan against proxies that are up; `say` is told what is going on.

    A proxy's faults make its rows fail. The end of the upstream raises ServerError: it would be every proxy's fault.
    """

    def __init__(
        self, plan: Plan, upstream: Server, servers: list[Server], folder: Path, say: Callable[[str], None]
    ) -> None:
        self._plan, self._upstream, self._servers = plan, upstream, servers
        self._folder, self._say = folder, say

    def runs(self) -> Iterator[Run]:
        for shape in self._plan.shapes:
            yield from self._shape(shape)

    def _shape(self, shape: Shape) -> Iterator[Run]:
        ready: list[tuple[Server, int]] = []
        for server in self._servers:
            requests, problem = self._warm_up(server, shape)
            if problem:
                yield self._report(Run(shape.name, server.name, 0, requests, None, f"in warm-up: {problem}"))
            else:
                ready.append((server, requests))
        for repeat in range(self._plan.repeats):
            turn = repeat % len(ready) if ready else 0
            for server, requests in ready[turn:] + ready[:turn]:
                yield self._report(self._measure(server, shape, repeat, requests))

    def _warm_up(self, server: Server, shape: Shape) -> tuple[int, str]:
        """The number of requests that a measured run needs, and a problem or ""."""
        requests = shape.whole(max(4 * shape.in_flight, 64))
        for seconds in (WARM_UP_SECONDS, self._plan.seconds):
            outcome = self._load(server, shape, requests, lambda: None)
            if outcome.problem:
                return requests, outcome.problem
            requests = shape.whole(requests / outcome.seconds * seconds)
        return shape.whole(self._plan.requests or requests), ""

    def _measure(self, server: Server, shape: Shape, repeat: int, requests: int) -> Run:
        server.refresh()
        samples: list[tuple[float, float]] = []
        outcome = self._load(server, shape, requests, lambda: samples.append((time.time(), server.cpu())))
        if outcome.problem:
            return Run(shape.name, server.name, repeat, requests, None, outcome.problem)
        return Run(shape.name, server.name, repeat, requests, figures(outcome, samples, server.rss()))

    def _load(self, server: Server, shape: Shape, requests: int, tick: Callable[[], None]) -> Outcome:
        def watch() -> None:
            self._check_alive(server)
            tick()

        limit = 60 + 10 * self._plan.seconds
        try:
            outcome = run_h2load(shape, server.port, requests, self._folder, limit, watch)
            self._check_alive(server)
        except ProxyEnded as ended:
            return Outcome(requests, 0.0, [], [], str(ended))
        server.trim_log()
        return outcome

    def _check_alive(self, server: Server) -> None:
        """Asked all through a run: without it, a proxy that retries its dead upstream would be waited for."""
        if (fault := self._upstream.death()) is not None:
            raise ServerError(f"while {server.name} was measured, {fault}")
        if (fault := server.death()) is not None:
            raise ProxyEnded(fault)

    def _report(self, run: Run) -> Run:
        words = f"FAILED: {run.problem}"
        if run.figures:
            words = f"{run.figures.cpu_us:.1f} us/RPC, {run.figures.rate:.0f} RPC/s"
        self._say(f"{run.shape}, repeat {run.repeat + 1}, {run.proxy}: {words}")
        return run


def figures(outcome: Outcome, samples: list[tuple[float, float]], rss: int) -> Figures:
    """The figures of the steady part of a run; `samples` are (time since the epoch, CPU seconds so far)."""
    first, last = _steady(outcome.ended, samples)
    (began, cpu_before), (ended, cpu_after) = samples[first], samples[last]
    low, high = bisect.bisect_right(outcome.ended, began), bisect.bisect_right(outcome.ended, ended)
    latency = sorted(outcome.latency[low:high])
    count, cpu, seconds = high - low, cpu_after - cpu_before, ended - began
    return Figures(
        cpu_us=cpu / count * 1e6,
        rate=count / seconds,
        p50=percentile(latency, 0.50),
        p99=percentile(latency, 0.99),
        busy=cpu / seconds,
        rss=rss,
    )


def percentile(ordered: list[float], share: float) -> float:
    """The nearest-rank percentile of values in ascending order."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _steady(ended: list[float], samples: list[tuple[float, float]]) -> tuple[int, int]:
    """Indices of the first and last sample of the steady part; of all samples where that is too short to measure."""
    times = [at for at, _ in samples]
    low, high = (ended[int(share * (len(ended) - 1))] for share in STEADY)
    first, last = bisect.bisect_left(times, low), bisect.bisect_right(times, high) - 1
    if last - first < MINIMUM_SAMPLES:
        return 0, len(samples) - 1
    return first, last
