"""One run of h2load against an inference server in plaintext, and whether each of its answers was right.

h2load sees no trailers, so that it takes a gRPC error for an answer. But an answer with an error has no message: where
each answer has the same length, the bytes of all of them together say that all calls ended with grpc-status 0. For
that, a run is of a number of calls, not of a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from . import load, measure
from .inference_calls import Call
from .load import Job, Shape
from .machine import find_program
from .processes import Server
from .rows import RATE

FIRST_CALLS = 128
WARM_UP_SECONDS = 0.4
LIMIT_SECONDS = 60.0


def job(
    call: Call, shape: Shape, port: int, folder: Path, requests: int, answer_bytes: int | None,
    rate: float | None = None,
) -> Job:  # fmt: skip
    """`requests` calls, of whose answers each has `answer_bytes` (None: they differ, as numbers in JSON do).

    `rate`: evenly, so many a second; otherwise each caller makes the next call when it has its answer.
    """
    body = folder / f"{call.protocol}-{call.model}.body"
    body.write_bytes(call.body())
    command = [find_program("h2load") or "h2load", *(["--h1"] if call.protocol != "grpc" else [])]
    command += ["-n", str(requests), "-c", str(shape.connections), "-m", str(shape.streams), "-t", "1", "-d", str(body)]
    for name, value in call.headers().items():
        command += ["-H", f"{name}: {value}"]
    if rate is not None:
        command += ["--rps", f"{rate / shape.connections:.1f}"]  # of each connection
    command += ["-N", str(load.INACTIVITY_SECONDS), "--log-file", str(folder / "load.tsv")]
    command.append(f"http://127.0.0.1:{port}{call.path}")
    return Job(command, lambda report: check(report, requests, answer_bytes), folder / "load.tsv")


def check(report: str, requests: int, answer_bytes: int | None) -> str:
    """Why h2load's report isn't that of so many right answers; empty if it is."""
    found = load._summary(report)
    if isinstance(found, str):
        return found
    if found.succeeded != requests or found.codes[0] != requests:
        return f"{found.succeeded} of {requests} requests succeeded ({found.lost})"
    if answer_bytes is not None and found.data != requests * answer_bytes:
        right = requests * answer_bytes
        return f"{found.data} bytes came back, {right} are due: an answer was no tensor, but a gRPC status"
    return ""


class Load:
    """The runs of one call against one server: `warm_up` first, then `measure` as often as wanted.

    Raises what Call.make raises; a run that wasn't right is its problem, in words.
    """

    def __init__(self, call: Call, shape: Shape, server: Server, port: int, folder: Path) -> None:
        self.call, self.shape, self.server = call, shape, server
        self._port, self._folder = port, folder
        self._rate = 0.0
        self._answer_bytes: int | None = None

    def warm_up(self) -> str:
        """Make the call by itself, and then for a moment by all connections; returns the problem or ""."""
        size = self.call.make(self._port)
        self._answer_bytes = None if self.call.protocol == "json" else size
        for requests in (lambda: FIRST_CALLS, lambda: self._rate * WARM_UP_SECONDS):
            outcome = self._run(self.shape.whole(requests()), lambda: None)
            if outcome.problem:
                return f"in warm-up: {outcome.problem}"
            self._rate = len(outcome.ended) / outcome.seconds
        return ""

    def measure(self, seconds: float, rate: float | None = None) -> tuple[dict[str, float], str]:
        """The figures (see measure.figures) of a run of about so many seconds, and its problem; `rate` as in job."""
        self.server.refresh()
        samples: list[tuple[float, float]] = []
        requests = self.shape.whole((rate or self._rate) * seconds)
        outcome = self._run(requests, lambda: samples.append((time.time(), self.server.cpu())), rate)
        if outcome.problem:
            return {}, outcome.problem
        values = measure.figures(outcome, samples)
        if rate is None:
            self._rate = statistics.fmean([self._rate, values[RATE]])
        self.call.make(self._port)  # it is still the right answer
        return values, ""

    def _run(self, requests: int, tick: Callable[[], None], rate: float | None = None) -> load.Outcome:
        one = job(self.call, self.shape, self._port, self._folder, requests, self._answer_bytes, rate)
        return load.run(one, LIMIT_SECONDS, tick)
