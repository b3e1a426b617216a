"""One attack on one target: the good client unattacked, both at once, unattacked again, and memory all along."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import psutil

from .attack_kinds import Kind
from .machine import Neighbours
from .peers import REPOSITORY
from .processes import Server, ServerError

SAMPLE_SECONDS = 0.05
SETTLE_SECONDS = 5.0
# What the good client and the gate's memory must keep under each attack.
KEPT, P99_SECONDS, GROWTH_BYTES = 0.70, 0.025, 12e6
# From this share of the machine on that other programs take, a verdict says as much of them as of the attack.
NOISE = 0.15


@dataclass(frozen=True)
class Result:
    """One attack on one proxy: calls/s of the good client, seconds of latency, bytes; see the table's legend."""

    attack: str
    proxy: str
    unit: str
    calm_rate: float
    rate: float
    calls: int
    lost: int
    lost_why: list[str]
    calm_p99: float
    p50: float
    p99: float
    slowest: float
    rss: int
    growth_peak: int | None
    growth_after: int | None
    attack_rate: float
    connections: int
    endings: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    noise: float = 0.0

    @property
    def kept(self) -> float:
        return self.rate / self.calm_rate if self.calm_rate else 0.0

    def misses(self) -> list[str]:
        """Which of the bounds this result is outside of, in words."""
        bounds = (
            (self.lost > 0, "lost"), (self.kept < KEPT, "kept"), (self.p99 > P99_SECONDS, "p99"),
            ((self.growth_peak or 0) >= GROWTH_BYTES, "peak"),
            ((self.growth_after or 0) >= GROWTH_BYTES / 2, "not back"), (bool(self.problem), "problem"),
        )  # fmt: skip
        return [word for outside, word in bounds if outside]

    def verdict(self) -> str:
        """In a word or some, with a question mark where the machine was not the attack's alone."""
        return (", ".join(self.misses()) or "ok") + ("?" if self.noise >= NOISE else "")

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "kept": self.kept, "misses": self.misses(), "verdict": self.verdict()}


class Target(Protocol):
    """What is attacked; `rss` in bytes, of all its processes, 0 where that isn't known."""

    name: str

    @property
    def where(self) -> str: ...

    def rss(self) -> int: ...

    def neighbours(self) -> Neighbours | None: ...

    def death(self) -> str | None: ...


class Own:
    """A proxy that this script has started, and its upstream."""

    def __init__(self, server: Server, upstream: Server) -> None:
        self.name = server.name
        self.where = f"127.0.0.1:{server.port}"
        self._server = server
        self._upstream = upstream
        server.refresh()

    def rss(self) -> int:
        self._server.trim_log()
        return self._server.rss()

    def neighbours(self) -> Neighbours:
        return Neighbours([self._server, self._upstream])

    def death(self) -> str | None:
        return self._server.death()


class Listening:
    """A server that is already there; its processes are those that listen on the port, where we may see them."""

    def __init__(self, where: str, address: tuple[str, int]) -> None:
        self.name = self.where = where
        self._processes: list[psutil.Process] = []
        try:
            found = psutil.net_connections("tcp")
        except psutil.AccessDenied:
            found = []
        for pid in {conn.pid for conn in found if conn.status == "LISTEN" and conn.laddr.port == address[1]}:
            if pid is not None:
                process = psutil.Process(pid)
                self._processes += [process, *process.children(recursive=True)]

    def rss(self) -> int:
        try:
            return sum(process.memory_info().rss for process in self._processes)
        except psutil.Error:
            return 0

    def neighbours(self) -> None:
        """What belongs to it isn't known."""

    def death(self) -> str | None:
        gone = [process.pid for process in self._processes if not process.is_running()]
        return f"process {gone[0]} has ended" if gone else None


def run(kind: Kind, target: Target, seconds: float) -> Result:
    """Attack a target for `seconds`. ServerError when a client can't be started or the target isn't there."""
    calm = [_good(target, max(1.0, min(seconds, 3.0)))]
    before = _steady_rss(target)
    neighbours = target.neighbours()
    processes = [
        _start("tests.bench.attack_client", target.where, str(seconds)),
        _start("tests.bench.attack_kinds", kind.name, target.where, str(seconds)),
    ]
    try:
        for process in processes:
            _await_ready(process)
        for process in processes:
            _go(process)
        peak, problem = _watch(target, processes, seconds)
        noise = neighbours.share() if neighbours is not None else 0.0
        problem = problem or target.death() or ""
        time.sleep(SETTLE_SECONDS)
        good, attack = (_outcome(process) for process in processes)
    finally:
        for process in processes:
            _end(process)
    memory = (before, peak, target.rss())
    if not good or not attack:
        problem = problem or f"{'the good client' if not good else 'the attacker'} ended without a result"
    if not problem:
        calm.append(_good(target, max(1.0, min(seconds, 3.0))))  # a machine's speed changes from minute to minute
    return _result(kind, target, seconds, calm, good, attack, memory, problem, noise)


def _result(
    kind: Kind, target: Target, seconds: float, calm: list[dict[str, object]], good: dict[str, object],
    attack: dict[str, object], memory: tuple[int, int, int], problem: str, noise: float,
) -> Result:  # fmt: skip
    before, peak, after = memory
    number = _number
    return Result(
        attack=kind.name,
        proxy=target.name,
        unit=kind.unit,
        calm_rate=statistics.mean(number(one, "calls") / number(one, "seconds") for one in calm),
        rate=number(good, "calls") / (number(good, "seconds") or seconds),
        calls=int(number(good, "calls")),
        lost=int(number(good, "lost")),
        lost_why=[str(why) for why in good.get("why", [])],  # type: ignore[attr-defined]
        calm_p99=max(number(one, "p99") for one in calm),
        p50=number(good, "p50"),
        p99=number(good, "p99"),
        slowest=number(good, "max"),
        rss=before,
        growth_peak=peak - before if before else None,
        growth_after=after - before if before and after else None,
        attack_rate=number(attack, "sent") / seconds,
        connections=int(number(attack, "connections")),
        endings=dict(attack.get("endings", {})),  # type: ignore[call-overload]
        problem=problem,
        noise=noise,
    )


def _number(outcome: dict[str, object], key: str) -> float:
    value = outcome.get(key, 0.0)
    assert isinstance(value, (int, float))
    return float(value)


def _good(target: Target, seconds: float) -> dict[str, object]:
    """The good client alone: also what warms the target up before its memory is read."""
    process = _start("tests.bench.attack_client", target.where, str(seconds))
    try:
        _await_ready(process)
        _go(process)
        _watch(target, [process], seconds)
        outcome = _outcome(process)
    finally:
        _end(process)
    if not outcome or not outcome["calls"] or outcome["lost"]:
        raise ServerError(f"{target.name} doesn't serve the good client unattacked: {outcome or target.death()}")
    return outcome


def _steady_rss(target: Target) -> int:
    samples = []
    for _ in range(5):
        samples.append(target.rss())
        time.sleep(SAMPLE_SECONDS)
    return int(statistics.median(samples))


def _watch(target: Target, processes: Sequence["subprocess.Popen[str]"], seconds: float) -> tuple[int, str]:
    """Wait for the processes -> the target's highest memory in bytes, and what went wrong or ""."""
    peak = 0
    until = time.monotonic() + 2 * seconds + 30
    while any(process.poll() is None for process in processes):
        peak = max(peak, target.rss())
        if time.monotonic() > until:
            return peak, "a client didn't end in time"
        time.sleep(SAMPLE_SECONDS)
    return peak, ""


def _start(module: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def _await_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise ServerError(f"{process.args!r} didn't get ready")


def _go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise ServerError(f"{process.args!r} ended before its turn") from None


def _outcome(process: "subprocess.Popen[str]") -> dict[str, object]:
    """The JSON of a process that has ended; nothing where it printed none."""
    if process.poll() is None:
        return {}
    assert process.stdout is not None
    text = process.stdout.read()
    return dict(json.loads(text)) if text else {}


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
