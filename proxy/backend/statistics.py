"""What a model version has done, counted as Triton counts it: ModelStatistics, and the metrics made of it.

For one thread, that of the event loop. Durations are sums in nanoseconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

# Why requests fail, as Triton calls it: its queue's rules, its caller, the model, anything else.
REJECTED, CANCELED, BACKEND, OTHER = REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


@dataclass(slots=True)
class Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass(frozen=True, slots=True)
class Times:
    """One execution. rows: of the batch. started: on the clock of time.monotonic_ns; the others are durations in ns:
    of making the inputs, of the model, of making the outputs."""

    rows: int
    started: int
    compute_input: int
    compute_infer: int
    compute_output: int


@dataclass(slots=True)
class OfBatchSize:
    """Executions of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class Statistics:
    """inference_count counts rows, execution_count batches; the durations count requests. last_inference: milliseconds
    since the epoch. success and fail: from a request's arrival to its end. cache_hit and cache_miss: of looking a
    response up. failures: reason -> count. batches: size in rows -> its executions."""

    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    batches: dict[int, OfBatchSize] = field(default_factory=dict)

    def failed(self, arrived: int, now: int, reason: str) -> None:
        """A request that came then has failed."""
        self.fail.add(now - arrived)
        self.failures[reason] += 1

    def answered_from_cache(self, took: int) -> None:
        """A request whose response was kept has been answered in so many ns."""
        self.last_inference = time.time_ns() // 1_000_000
        self.success.add(took)
        self.cache_hit.add(took)

    def executed(self, times: Times, arrived: Sequence[int], rows: int, now: int) -> None:
        """An execution of which requests that came then, with so many rows altogether, have succeeded."""
        self.execution_count += 1
        size = self.batches.get(times.rows)
        if size is None:
            size = self.batches[times.rows] = OfBatchSize()
        size.compute_input.add(times.compute_input)
        size.compute_infer.add(times.compute_infer)
        size.compute_output.add(times.compute_output)
        if not arrived:
            return
        self.last_inference = time.time_ns() // 1_000_000
        self.inference_count += rows
        count, came = len(arrived), sum(arrived)
        self.success.add(count * now - came, count)
        self.queue.add(count * times.started - came, count)
        self.compute_input.add(count * times.compute_input, count)
        self.compute_infer.add(count * times.compute_infer, count)
        self.compute_output.add(count * times.compute_output, count)
