"""The runs: warm-up, the peers in turn, and the figures of each run.

The peers take turns, run by run, each time in another order: what else the machine does, and how warm it is, then
falls on all of them alike. All proxies of a row stay up from its start to its end; those whose turn it isn't are idle.
"""

import bisect
import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from . import load, peers
from .load import Aim, Job, Outcome, Shape
from .peers import Site
from .processes import Server, ServerError
from .rows import BUSY, CPU, END, IDLE, MEMORY, P50, P99, RATE, START, Idle, Row

# The steady part of a run: without its handshakes, and without its end, where some connections have nothing to do.
STEADY = (0.10, 0.90)
MINIMUM_SAMPLES = 5
SHARE_OF_SLOWEST = 0.5  # the fixed rate, of the slowest proxy's in a closed loop
EVEN_CALLS, MOST_LONGER = 100, 4  # a run of few calls is longer, up to so many times, for the sake of its percentiles
WARM_UP_SECONDS = 0.3
SECONDS_PER_CONNECTION = 0.008
SETTLE_SECONDS = 1.0  # before a proxy's memory is looked at
IDLE_SECONDS = 60.0  # until all idle connections must be open
CLOSED, EVEN, HELD = "closed loop", "fixed rate", "memory"


@dataclass(frozen=True)
class Run:
    """One turn of one proxy in one row; `values` is empty exactly if `problem` says why."""

    row: str
    proxy: str
    repeat: int
    phase: str
    values: dict[str, float]
    problem: str = ""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What to run, each row so often; `latency`: also at a fixed rate."""

    rows: Sequence[Row]
    proxies: Sequence[str]
    repeats: int
    seconds: float
    latency: bool = True


class ProxyEnded(Exception):
    """The proxy that is measured is no longer there."""


class Bench:
    """Runs a plan; `say` is told what is going on.

    A proxy's faults make its rows fail. The end of the upstream raises ServerError: it would be every proxy's fault.
    """

    def __init__(self, plan: Plan, site: Site, say: Callable[[str], None]) -> None:
        self._plan, self._site, self._say = plan, site, say
        self.started: list[Server] = []  # all that were, for what they used
        self._looks: Counter[tuple[str, str]] = Counter()
        self.rates: dict[str, float] = {}  # row -> calls per second of its latency

    def runs(self) -> Iterator[Run]:
        for name, upstream in (("echo", peers.upstream), ("stream", peers.stream_upstream)):
            rows = [row for row in self._plan.rows if row.site == name]
            fresh = [row for row in self._plan.rows if row.site == "fresh"] if name == "echo" else []
            if not rows and not fresh:
                continue
            with upstream(self._site.folder) as server:
                self.started.append(server)
                site = dataclasses.replace(self._site, upstream_port=server.port)
                for row in fresh:
                    yield from self._idle(row, site, server)
                if rows:
                    yield from self._together(rows, site, server, name)

    def _together(self, rows: Sequence[Row], site: Site, upstream: Server, name: str) -> Iterator[Run]:
        """Rows whose proxies are the same processes from start to end."""
        with peers.proxies(site.inside(name), list(self._plan.proxies)) as servers:
            self.started.extend(servers)
            for server in servers:
                yield self._memory(server, START, server.start_rss)
            for row in rows:
                yield from _Turns(self._plan, row, upstream, servers, site, self._say, self.rates).runs()
            if name == "echo":
                for server in servers:
                    if server.death() is None:
                        yield self._memory(server, END, server.rss())

    def _memory(self, server: Server, metric: str, size: int) -> Run:
        self._looks[server.name, metric] += 1
        return Run(MEMORY, server.name, self._looks[server.name, metric] - 1, HELD, {metric: size / 1e6})

    def _idle(self, row: Row, site: Site, upstream: Server) -> Iterator[Run]:
        for repeat in range(self._plan.repeats):
            for name in _turn(self._plan.proxies, repeat):
                with peers.proxies(site.inside(f"{row.name}-{repeat}-{name}"), [name]) as (server,):
                    yield self._memory(server, START, server.start_rss)
                    run = _idle_run(row, server, site, repeat)
                self._say(_words(run))
                if (fault := upstream.death()) is not None:
                    raise ServerError(f"while {name} was measured, {fault}")
                yield run


def _connections(row: Row) -> int:
    shape = getattr(row.kind, "shape", None)
    return shape.connections if isinstance(shape, Shape) else 0


class _Turns:
    """One row: all its runs."""

    def __init__(
        self, plan: Plan, row: Row, upstream: Server, servers: list[Server], site: Site, say: Callable[[str], None],
        rates: dict[str, float],
    ) -> None:  # fmt: skip
        self._plan, self._row, self._upstream, self._servers = plan, row, upstream, servers
        self._site, self._say, self._rates = site, say, rates
        self._failed: set[str] = set()
        self._warm_ups: dict[str, float] = {}

    def runs(self) -> Iterator[Run]:
        kind, seconds = self._row.kind, self._plan.seconds
        yield from self._warm_up()
        rates: dict[str, list[float]] = {}
        for run in self._repeats(CLOSED, lambda server, aim: kind.closed(aim, seconds, self._warm_ups[server.name])):
            rates.setdefault(run.proxy, []).append(run.values.get(RATE, 0.0))
            yield run
        slowest = [statistics.median(found) for name, found in rates.items() if name not in self._failed]
        if self._plan.latency and slowest:
            rate = round(SHARE_OF_SLOWEST * min(slowest), 1)
            longer = min(max(seconds, EVEN_CALLS / rate), MOST_LONGER * seconds)
            for run in self._repeats(EVEN, lambda _, aim: kind.even(aim, longer, rate)):
                self._rates[self._row.name] = rate
                yield run

    def _warm_up(self) -> Iterator[Run]:
        """Runs that have no figures. How long one takes is how long the connections of a measured run take to open."""
        for server in self._servers:
            self._warm_ups[server.name] = WARM_UP_SECONDS
            if job := self._row.kind.exact(self._aim(server)):
                outcome = self._load(server, job, lambda: None)
                # h2load never ends a connection that was made after its time: new ones have a share of the gate's
                # time beside those that work, some 180 a second.
                connecting = _connections(self._row) * SECONDS_PER_CONNECTION
                self._warm_ups[server.name] = max(WARM_UP_SECONDS, outcome.seconds) + connecting
                if outcome.problem:
                    problem = f"in warm-up: {outcome.problem}"
                    yield self._done(Run(self._row.name, server.name, 0, CLOSED, {}, problem))

    def _repeats(self, phase: str, jobs: Callable[[Server, Aim], Job | None]) -> Iterator[Run]:
        for repeat in range(self._plan.repeats):
            for server in _turn(self._servers, repeat):
                if server.name not in self._failed and (job := jobs(server, self._aim(server))):
                    yield self._done(self._measure(server, job, repeat, phase))

    def _measure(self, server: Server, job: Job, repeat: int, phase: str) -> Run:
        server.refresh()
        samples: list[tuple[float, float]] = []
        outcome = self._load(server, job, lambda: samples.append((time.time(), server.cpu())))
        values = {} if outcome.problem else figures(outcome, samples)
        if phase == EVEN:  # the processor time of a proxy that is half idle is another thing: kept, not compared
            values = {P50: values[P50], P99: values[P99], "even_cpu_us": values[CPU]} if values else {}
        elif values:
            values = {CPU: values[CPU], RATE: values[RATE], BUSY: values[BUSY], "rss_mb": server.rss() / 1e6}
        return Run(self._row.name, server.name, repeat, phase, values, outcome.problem)

    def _load(self, server: Server, job: Job, tick: Callable[[], None]) -> Outcome:
        def watch() -> None:
            self._check_alive(server)
            tick()

        try:
            outcome = load.run(job, 60 + 10 * self._plan.seconds, watch)
            self._check_alive(server)
        except ProxyEnded as ended:
            return Outcome(0.0, [], [], str(ended))
        server.trim_log()
        return outcome

    def _check_alive(self, server: Server) -> None:
        """Asked all through a run: without it, a proxy that retries its dead upstream would be waited for."""
        if (fault := self._upstream.death()) is not None:
            raise ServerError(f"while {server.name} was measured, {fault}")
        if (fault := server.death()) is not None:
            raise ProxyEnded(fault)

    def _aim(self, server: Server) -> Aim:
        return Aim(server.port, self._site.folder, self._site.certificate)

    def _done(self, run: Run) -> Run:
        if run.problem:
            self._failed.add(run.proxy)
        self._say(_words(run))
        return run


T = TypeVar("T")


def _turn(items: Sequence[T], repeat: int) -> Sequence[T]:
    start = repeat % len(items)
    return [*items[start:], *items[:start]]


def _idle_run(row: Row, server: Server, site: Site, repeat: int) -> Run:
    """How much a proxy's memory grows with each connection that does nothing."""
    assert isinstance(row.kind, Idle)
    job = row.kind.closed(Aim(server.port, site.folder, site.certificate), 0.0, 0.0)
    before = server.held()
    with load.held_open(job, IDLE_SECONDS) as problem:
        if not problem:
            time.sleep(SETTLE_SECONDS)
            server.refresh()
            grown = server.held() - before
            problem = server.death() or problem
    # Those that the proxy has closed meanwhile are found by the client at the end.
    problem = problem or job.check(job.report.read_text(errors="replace"))
    values = {} if problem else {IDLE: grown / 1024 / row.kind.connections}
    return Run(row.name, server.name, repeat, HELD, values, problem)


def _words(run: Run) -> str:
    figures = ", ".join(f"{name} {value * 1e3:.3f} ms" if name in (P50, P99) else f"{name} {value:.1f}"
                        for name, value in run.values.items())  # fmt: skip
    return f"{run.row}, {run.phase}, repeat {run.repeat + 1}, {run.proxy}: " + (figures or f"FAILED: {run.problem}")


def figures(outcome: Outcome, samples: list[tuple[float, float]]) -> dict[str, float]:
    """The figures of the steady part of a run; `samples` are (time since the epoch, CPU seconds so far)."""
    first, last = _steady(outcome.ended, samples)
    (began, cpu_before), (ended, cpu_after) = samples[first], samples[last]
    low, high = bisect.bisect_right(outcome.ended, began), bisect.bisect_right(outcome.ended, ended)
    latency = sorted(outcome.latency[low:high])
    count, cpu, seconds = high - low, cpu_after - cpu_before, ended - began
    return {
        CPU: cpu / count * 1e6,
        RATE: count / seconds,
        BUSY: cpu / seconds,
        P50: percentile(latency, 0.50),
        P99: percentile(latency, 0.99),
    }


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
