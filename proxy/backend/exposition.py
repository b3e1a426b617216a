"""The backend's numbers as Prometheus text: Triton's metrics under Triton's very names, and our own.

prometheus_client's writer can't be used for them: it ends every counter's name in `_total`, which Triton's don't, and
a dashboard made for Triton would find nothing. Nothing here may hold up the event loop, however many models there are.
Labels are names of the repository and words of ours, never what a client sent.
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from time import monotonic_ns
from typing import NamedTuple

from proxy import __version__
from proxy.backend.budget import Budget
from proxy.backend.loaded import Loaded
from proxy.backend.looplag import BOUNDS, LoopLag
from proxy.backend.repository import Repository, State, Version
from proxy.backend.scheduler import Scheduler

_SLICE = 1_000_000  # ns on the event loop without a break
_PREFIX = "tensorgate_backend"


class Family(NamedTuple):
    """A metric, with all its series."""

    name: str
    kind: str
    help: str


FAILURES = Family("nv_inference_request_failure", "counter", "Number of failed inference requests, all batch sizes")
# What else a model version has, in the order of `_values`.
NUMBERS = (
    Family("nv_inference_request_success", "counter", "Number of successful inference requests, all batch sizes"),
    Family("nv_inference_count", "counter", "Number of inferences performed (does not include cached requests)"),
    Family(
        "nv_inference_exec_count", "counter", "Number of model executions performed (does not include cached requests)"
    ),
    Family(
        "nv_inference_request_duration_us",
        "counter",
        "Cumulative inference request duration in microseconds (includes cached requests)",
    ),
    Family(
        "nv_inference_queue_duration_us",
        "counter",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
    ),
    Family(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
    ),
    Family(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
    ),
    Family(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
    ),
    Family(
        "nv_inference_pending_request_count",
        "gauge",
        "Instantaneous number of pending requests awaiting execution per-model.",
    ),
    Family(f"{_PREFIX}_model_held_bytes", "gauge", "Bytes of the requests that wait or run, per model."),
)

# Of models with `response_cache`.
CACHE = (
    Family("nv_cache_num_hits_per_model", "counter", "Number of cache hits per model"),
    Family("nv_cache_num_misses_per_model", "counter", "Number of cache misses per model"),
    Family("nv_cache_hit_duration_per_model", "counter", "Total cache hit duration per model, in microseconds"),
    Family("nv_cache_miss_duration_per_model", "counter", "Total cache miss duration per model, in microseconds"),
)

UTILIZATION = Family("nv_cpu_utilization", "gauge", "CPU utilization rate [0.0 - 1.0]")
MEMORY_TOTAL = Family("nv_cpu_memory_total_bytes", "gauge", "CPU total memory (RAM), in bytes")
MEMORY_USED = Family("nv_cpu_memory_used_bytes", "gauge", "CPU used memory (RAM), in bytes")

LAG = Family(
    f"{_PREFIX}_event_loop_lag_seconds", "histogram", "How late the event loop runs what is due, by regular samples."
)
MOST_LAG = Family(
    f"{_PREFIX}_event_loop_lag_max_seconds", "gauge", "The most that it was late in the last 60 to 120 s."
)
HELD = Family(f"{_PREFIX}_held_bytes", "gauge", "Bytes of messages that are held for calls.")
LIMIT = Family(f"{_PREFIX}_held_bytes_limit", "gauge", "Bytes of messages that may be held at a time.")
MODELS = Family(f"{_PREFIX}_models", "gauge", "Model versions by state; a model that has none counts once.")
BUILD = Family(f"{_PREFIX}_build_info", "gauge", "1, with the versions of what runs.")


class Exposition:
    """The text, written anew at every `write`. For the event loop's thread."""

    def __init__(self, repository: Repository, budget: Budget, lag: LoopLag) -> None:
        self._repository = repository
        self._budget = budget
        self._lag = lag

    async def write(self) -> list[bytes]:
        """Parts of the text. Each version's numbers are of one moment; those of many are not all of the same."""
        failures = [_head(FAILURES)]
        numbers = [[_head(family)] for family in NUMBERS]
        cached: list[list[str]] = [[] for _ in CACHE]
        began = monotonic_ns()
        for loaded in _loaded(self._repository):
            _add(loaded, failures, numbers)
            if loaded.cache is not None:
                _add_cached(loaded, cached)
            if monotonic_ns() - began >= _SLICE:
                await asyncio.sleep(0)
                began = monotonic_ns()
        parts = ["".join(self._own()).encode()]
        # Triton has these only where there is a cache.
        of_caches = [[_head(family), *lines] for family, lines in zip(CACHE, cached, strict=True) if lines]
        for lines in (failures, *numbers, *of_caches):
            await asyncio.sleep(0)
            parts.append("".join(lines).encode())
        return parts

    def _own(self) -> Iterator[str]:
        yield from _histogram(LAG, self._lag)
        yield _gauge(MOST_LAG, self._lag.most / 1e9)
        yield _gauge(HELD, self._budget.held)
        yield _gauge(LIMIT, self._budget.limit)
        yield _head(MODELS)
        for state, count in _states(self._repository).items():
            yield f'{MODELS.name}{{state="{state.name.lower()}"}} {count}\n'
        yield _head(BUILD)
        yield f'{BUILD.name}{{version="{__version__}",python="{platform.python_version()}"}} 1\n'


class Machine:
    """Processors and memory of the machine, as Triton shows them: of all of it, also inside a container.

    `write` reads files; what it can't read is left out.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._ticks = self._read_ticks()
        self._utilization = 0.0

    def write(self) -> bytes:
        return "".join((*self._processors(), *self._memory())).encode()

    def _processors(self) -> Iterator[str]:
        before, self._ticks = self._ticks, self._read_ticks()
        if before is None or self._ticks is None:
            return
        busy, total = self._ticks[0] - before[0], self._ticks[1] - before[1]
        if total > 0:  # a time slice has passed
            self._utilization = min(max(busy / total, 0.0), 1.0)  # the kernel's idle time may go back a little
        yield _gauge(UTILIZATION, self._utilization)

    def _read_ticks(self) -> tuple[int, int] | None:
        """Busy, all: since the machine's start."""
        try:
            with (self._proc / "stat").open(encoding="ascii") as file:
                # user nice system idle iowait irq softirq steal; what follows is part of user
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        return (sum(ticks) - sum(ticks[3:5]), sum(ticks)) if len(ticks) >= 5 else None

    def _memory(self) -> Iterator[str]:
        try:
            lines = (self._proc / "meminfo").read_text(encoding="ascii").splitlines()
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
            total, free = sizes["MemTotal"], sizes["MemAvailable"]
        except (OSError, ValueError, KeyError, IndexError):
            return
        yield _gauge(MEMORY_TOTAL, total)
        yield _gauge(MEMORY_USED, total - free)


def escaped(value: str) -> str:
    """A label's value. A directory's name may be no UTF-8: one such must not cost everybody the page."""
    valid = value.encode("utf-8", "backslashreplace").decode()
    return valid.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _loaded(repository: Repository) -> Iterator[Loaded]:
    """Those that run now. A version that is loaded again counts from 0, as one does in a server that is restarted;
    what is unloaded is gone."""
    for version in _versions(repository):
        if version.loaded is not None:
            yield version.loaded


def _versions(repository: Repository) -> list[Version]:
    # A list: it is loaded in threads, and unloaded while `write` takes a break.
    return [version for model in list(repository.models.values()) for version in list(model.versions.values())]


def _states(repository: Repository) -> Counter[State]:
    states = Counter(dict.fromkeys(State, 0))
    for model in list(repository.models.values()):
        states.update(version.state for version in list(model.versions.values()))
        if not model.versions:
            states[State.UNAVAILABLE if model.reason else State.LOADING] += 1
    return states


def _add(loaded: Loaded, failures: list[str], numbers: Sequence[list[str]]) -> None:
    scheduler = loaded.scheduler
    model, version = f'model="{escaped(loaded.spec.name)}"', f'version="{loaded.spec.version}"'
    for reason, count in scheduler.statistics.failures.items():
        failures.append(f'{FAILURES.name}{{{model},reason="{reason}",{version}}} {count}\n')
    for family, lines, value in zip(NUMBERS, numbers, _values(scheduler), strict=True):
        lines.append(f"{family.name}{{{model},{version}}} {value}\n")


def _add_cached(loaded: Loaded, cached: list[list[str]]) -> None:
    hit, miss = loaded.scheduler.statistics.cache_hit, loaded.scheduler.statistics.cache_miss
    labels = f'model="{escaped(loaded.spec.name)}",version="{loaded.spec.version}"'
    values = (hit.count, miss.count, hit.ns // 1000, miss.ns // 1000)
    for family, lines, value in zip(CACHE, cached, values, strict=True):
        lines.append(f"{family.name}{{{labels}}} {value}\n")


def _values(scheduler: Scheduler) -> tuple[int, ...]:
    statistics = scheduler.statistics
    return (
        statistics.success.count,
        statistics.inference_count,
        statistics.execution_count,
        statistics.success.ns // 1000,
        statistics.queue.ns // 1000,
        statistics.compute_input.ns // 1000,
        statistics.compute_infer.ns // 1000,
        statistics.compute_output.ns // 1000,
        scheduler.waiting,
        scheduler.held_bytes,
    )


def _head(family: Family) -> str:
    return f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n"


def _gauge(family: Family, value: float) -> str:
    return f"{_head(family)}{family.name} {value}\n"


def _histogram(family: Family, lag: LoopLag) -> str:
    bounds = (*map(str, BOUNDS), "+Inf")
    counts = list(accumulate(lag.counts))
    buckets = [f'{family.name}_bucket{{le="{le}"}} {count}\n' for le, count in zip(bounds, counts, strict=True)]
    sums = f"{family.name}_sum {lag.total / 1e9}\n{family.name}_count {counts[-1]}\n"
    return _head(family) + "".join(buckets) + sums
