"""The embedded backend beside MLServer and Triton, in one run on one machine.

    python -m tests.bench.inference                             every row, every server that is installed
    python -m tests.bench.inference --quick                     one short repeat, to see that all of it works
    python -m tests.bench.inference --rows batching --json FILE some of it; keep the figures

Throughput and CPU time per inference over gRPC and REST, and what dynamic batching gains. A run in which any answer was
not right counts for nothing and makes the exit code 1; a goal that is missed doesn't. It needs `h2load` (Debian:
nghttp2-client) and takes the servers that `python -m tests.peers install` and `... install mlserver` have installed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import grpc

from . import inference_report, machine
from .inference_calls import Call, WrongAnswer, mean_batch
from .inference_load import Load
from .inference_rows import BOUND, ROWS, Contestant, Row
from .inference_servers import (
    BATCH,
    DELAY_MICROSECONDS,
    EMBEDDED,
    MLSERVER,
    TRITON,
    Site,
    batch_seconds,
    site,
    tensors,
    versions,
)
from .measure import CLOSED, Run, percentile
from .processes import ServerError
from .rows import P99, RATE

SERVERS = (EMBEDDED, MLSERVER, TRITON)
REPEATS, SECONDS = 3, 2.0
HALF = 0.5
QUICK_REPEATS, QUICK_SECONDS = 1, 0.5


class Rows:
    """Runs rows: the contestants of each take turns, each time in another order."""

    def __init__(self, there: Site, repeats: int, seconds: float, say: Callable[[str], None]) -> None:
        self._site, self._repeats, self._seconds, self._say = there, repeats, seconds, say
        self.absent: dict[tuple[str, str], str] = {}

    def runs(self, row: Row) -> Iterator[Run]:
        loads: dict[Contestant, Load] = {}
        for one in row.contestants:
            if words := self._site.why_absent(one.server, one.protocol):
                self.absent[row.name, one.name] = words
            elif problem := self._warm_up(row, one, loads):
                yield self._done(Run(row.name, one.name, 0, CLOSED, {}, problem))
        for repeat in range(self._repeats):
            rates: dict[str, float] = {}
            for one in _turn(row, repeat):
                if one not in loads or (one.paced and one.paced not in rates):
                    continue
                run = self._measure(row, one, loads[one], repeat, HALF * rates[one.paced] if one.paced else None)
                if run.problem:
                    del loads[one]
                else:
                    rates[one.name] = run.values[RATE]
                yield self._done(run)
            if any(goal.theirs == BOUND for goal in row.goals):
                yield self._done(Run(row.name, BOUND, repeat, CLOSED, {P99: _bound()}))

    def _warm_up(self, row: Row, one: Contestant, loads: dict[Contestant, Load]) -> str:
        port, server = self._site.ports[one.server, one.protocol], self._site.servers[one.server]
        load = Load(Call(one.protocol, one.model, tensors(one.model)), row.shape, server, port, self._site.folder)
        try:
            problem = load.warm_up()
        except (OSError, grpc.RpcError, WrongAnswer) as error:
            problem = str(error)
        if not problem:
            loads[one] = load
        return problem

    def _measure(self, row: Row, one: Contestant, load: Load, repeat: int, rate: float | None) -> Run:
        try:
            before = self._batches(one)[1]
            values, problem = load.measure(self._seconds, rate)
            if not problem and one.server == EMBEDDED:
                values[inference_report.BATCH] = self._batches(one, before)[0]
        except (OSError, grpc.RpcError, WrongAnswer) as error:
            values, problem = {}, str(error)
        return Run(row.name, one.name, repeat, CLOSED, values, problem)

    def _batches(self, one: Contestant, before: tuple[int, int] = (0, 0)) -> tuple[float, tuple[int, int]]:
        if one.server != EMBEDDED:
            return 0.0, before
        return mean_batch(one.model, self._site.ports[EMBEDDED, "grpc"], before)

    def _done(self, run: Run) -> Run:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in run.values.items())
        self._say(f"{run.row}, repeat {run.repeat + 1}, {run.proxy}: " + (figures or f"FAILED: {run.problem}"))
        return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every run was what it should be, whatever its figures; 1: one failed, or a server didn't start;
    2: usage."""
    options = _parser().parse_args(arguments)
    if machine.find_program("h2load") is None:
        print("not installed: h2load (apt-get install nghttp2-client)", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _end)
    try:
        return _bench(options)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _bench(options: argparse.Namespace) -> int:
    wanted = [name for name in SERVERS if any(one.server == name for row in options.rows for one in row.contestants)]
    facts, numbers = machine.facts(), versions(wanted)
    numbers["h2load"] = machine.program_version("h2load", "--version")
    for name, words in {**facts, **numbers}.items():
        print(f"{name}: {words}", flush=True)
    repeats, seconds = (QUICK_REPEATS, QUICK_SECONDS) if options.quick else (options.repeats, options.seconds)
    with tempfile.TemporaryDirectory(prefix="tensorgate-bench-") as place, site(Path(place), wanted) as there:
        neighbours = machine.Neighbours(list(there.servers.values()))
        rows = Rows(there, repeats, seconds, lambda words: print(words, file=sys.stderr, flush=True))
        runs = [run for row in options.rows for run in rows.runs(row)]
        facts["used by other processes"] = f"{neighbours.share():.1%} of the machine's CPU, on average"
    facts["plan"] = f"{repeats} {'run' if repeats == 1 else 'runs'} of {seconds:g} s"
    results = inference_report.Results(options.rows, runs, rows.absent)
    print("\n" + inference_report.text(results))
    print(f"\nused by other processes: {facts['used by other processes']}")
    if options.json:
        inference_report.write_json(options.json, results, facts, numbers)
    return 1 if results.failed else 0


def _turn(row: Row, repeat: int) -> list[Contestant]:
    """The contestants in another order each time; those whose rate is another's come last."""
    start = repeat % len(row.contestants)
    order = [*row.contestants[start:], *row.contestants[:start]]
    return sorted(order, key=lambda one: bool(one.paced))


def _bound() -> float:
    """The delay and the time of a full batch, in seconds: what a batch's last answer has to wait for at most."""
    return DELAY_MICROSECONDS / 1e6 + percentile(batch_seconds(BATCH), 0.5)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.inference", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=_rows, default=list(ROWS.values()), metavar="NAME,...",
                        help=f"of {', '.join(ROWS)} (default: all)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK_REPEATS} repeat of {QUICK_SECONDS:g} s: to see that it works")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N",
                        help=f"measured runs of each contestant (default: {REPEATS})")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S",
                        help=f"how long a measured run takes (default: {SECONDS:g})")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run, the medians and the ratios there")
    return parser


def _rows(words: str) -> list[Row]:
    found = list(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))
    if unknown := [name for name in found if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(ROWS)}")
    return [ROWS[name] for name in found]


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
