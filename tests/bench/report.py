"""What is printed and written: the table of each row, the gate's ratios to its peers and their targets, and JSON."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .measure import Run
from .peers import GATE
from .rows import BUSY, CPU, END, IDLE, MEMORY, MEMORY_TARGETS, P50, P99, RATE, START, Row, Target

# Heading, metric, factor to the unit that is shown, decimals.
Column = tuple[str, str, float, int]
BASE_COLUMNS: tuple[Column, ...] = (
    ("CPU us/{unit}", CPU, 1.0, 1),
    ("{unit}/s", RATE, 1.0, 0),
    ("busy %", BUSY, 1e2, 0),
)
LATENCY_COLUMNS: tuple[Column, ...] = (("p50 ms", P50, 1e3, 2), ("p99 ms", P99, 1e3, 2))
LATE_COLUMNS: tuple[Column, ...] = (("RSS MB", "rss_mb", 1.0, 1),)
IDLE_COLUMNS: tuple[Column, ...] = (("KiB/connection", IDLE, 1.0, 1),)
MEMORY_COLUMNS: tuple[Column, ...] = (("RSS MB at start", START, 1.0, 1), ("after the run", END, 1.0, 1))
RATIOS = (("CPU", CPU), ("p99", P99), ("calls/s", RATE))
FIGURES = {CPU: "CPU", P99: "p99", IDLE: "KiB per idle connection", START: "MB of memory at start"}

LEGEND = """\
CPU: user and system time of the proxy's processes for each RPC, message or handshake; and how many a second in a
closed loop, as fast as it goes. busy: of one core (well under 100 %: the client or the upstream is what limits the
rate, not the proxy). p50, p99: at an even rate of half of what the slowest proxy of the row came to in a closed loop.
Median of the repeats (lowest-highest), each of the steady part of a run, without handshakes."""


@dataclass(frozen=True)
class Ratio:
    """Gate to peer: of the medians, and the lowest and highest of a repeat."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Verdict:
    """A target and what came of it; `value` is None where the row didn't run, or failed."""

    row: str
    target: Target
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.target.limit

    def __str__(self) -> str:
        word = {None: "?", True: "met", False: "MISSED"}[self.met]
        return f"<= {self.target.limit:.2f} {word}"


class Results:
    """The runs of a benchmark, by row and proxy."""

    def __init__(
        self, rows: Sequence[Row], proxies: Sequence[str], runs: Sequence[Run], rates: dict[str, float] | None = None
    ) -> None:
        self.rows, self.proxies, self.runs, self.rates = rows, proxies, runs, rates or {}

    @property
    def failed(self) -> bool:
        return any(run.problem for run in self.runs)

    def values(self, row: str, proxy: str, metric: str) -> dict[int, float]:
        """Repeat -> value; empty if any run failed, for what is left of a failing proxy means nothing."""
        runs = [run for run in self.runs if (run.row, run.proxy) == (row, proxy)]
        if any(run.problem for run in runs):
            return {}
        return {run.repeat: run.values[metric] for run in runs if metric in run.values}

    def median(self, row: str, proxy: str, metric: str) -> float | None:
        found = self.values(row, proxy, metric)
        return statistics.median(found.values()) if found else None

    def problem(self, row: str, proxy: str) -> str:
        return next((run.problem for run in self.runs if (run.row, run.proxy) == (row, proxy) and run.problem), "")

    def ratio(self, row: str, peer: str, metric: str) -> Ratio | None:
        """Gate to peer; None if either failed, or has no such figure."""
        ours, theirs = self.values(row, GATE, metric), self.values(row, peer, metric)
        if not ours or not theirs:
            return None
        middle = statistics.median(ours.values()) / statistics.median(theirs.values())
        pairs = [ours[repeat] / theirs[repeat] for repeat in ours if repeat in theirs] or [middle]
        return Ratio(middle, min(pairs), max(pairs))

    def peers(self) -> list[str]:
        """What the gate is compared with: nothing where it doesn't run."""
        return [name for name in self.proxies if name != GATE] if GATE in self.proxies else []

    def verdicts(self) -> list[Verdict]:
        """Of the targets whose peer took part; those of latency only where it was asked for."""
        if GATE not in self.proxies:
            return []
        targets = [
            (row.name, target)
            for row in self.rows
            for target in row.targets
            if target.metric != P99 or row.name in self.rates
        ]
        targets += [(MEMORY, target) for target in MEMORY_TARGETS]
        return [self._verdict(row, target) for row, target in targets if target.peer in (None, *self.proxies)]

    def _verdict(self, row: str, target: Target) -> Verdict:
        if target.peer is None:
            return Verdict(row, target, self.median(row, GATE, target.metric))
        ratio = self.ratio(row, target.peer, target.metric)
        return Verdict(row, target, ratio.value if ratio else None)

    def as_json(self) -> dict[str, object]:
        names = [*(row.name for row in self.rows), MEMORY]
        return {
            "rows": [{"name": row.name, "title": row.title, "unit": row.unit} for row in self.rows],
            "rate_of_latency": self.rates,
            "medians": {name: {proxy: self._medians(name, proxy) for proxy in self.proxies} for name in names},
            "ratios": {name: {peer: self._ratios(name, peer) for peer in self.peers()} for name in names},
            "targets": [
                {"row": verdict.row, **vars(verdict.target), "value": verdict.value, "met": verdict.met}
                for verdict in self.verdicts()
            ],
            "runs": [run.as_json() for run in self.runs],
        }

    def _metrics(self, row: str) -> list[str]:
        found = dict.fromkeys(metric for run in self.runs if run.row == row for metric in run.values)
        return list(found)

    def _medians(self, row: str, proxy: str) -> dict[str, float] | str:
        found = {metric: self.median(row, proxy, metric) for metric in self._metrics(row)}
        problem = self.problem(row, proxy)
        return f"FAILED: {problem}" if problem else {key: value for key, value in found.items() if value is not None}

    def _ratios(self, row: str, peer: str) -> dict[str, float]:
        found = {metric: self.ratio(row, peer, metric) for metric in self._metrics(row)}
        return {metric: ratio.value for metric, ratio in found.items() if ratio}


def text(results: Results) -> str:
    """The tables, for people."""
    parts = [LEGEND, *(_row_table(results, row) for row in results.rows)]
    parts.append(_table(_memory(results)))
    if results.peers():
        parts.append(_table(_ratio_rows(results)))
    if results.verdicts():
        parts.append(_summary(results))
    return "\n\n".join(parts)


def write_json(path: Path, results: Results, machine: dict[str, str], versions: dict[str, str]) -> None:
    content = {"machine": machine, "versions": versions, **results.as_json()}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _row_table(results: Results, row: Row) -> str:
    columns = _columns(results, row)
    rows = [["", *(heading.format(unit=row.unit) for heading, *_ in columns)]]
    rows += [_cells(results, row.name, proxy, columns) for proxy in results.proxies]
    return f"{row.name}: {row.title}{_at(results, row)}\n{_table(rows)}"


def _columns(results: Results, row: Row) -> tuple[Column, ...]:
    if row.site == "fresh":
        return IDLE_COLUMNS
    latency = LATENCY_COLUMNS if row.name in results.rates else ()
    return (*BASE_COLUMNS, *latency, *LATE_COLUMNS)


def _at(results: Results, row: Row) -> str:
    rate = results.rates.get(row.name)
    return f"; p50 and p99 at {rate:.0f}/s" if rate else ""


def _cells(results: Results, row: str, proxy: str, columns: Sequence[Column]) -> list[str]:
    if problem := results.problem(row, proxy):
        return [f"  {proxy}", f"FAILED: {problem}"]
    cells = [
        _spread(list(results.values(row, proxy, metric).values()), factor, decimals)
        for _, metric, factor, decimals in columns
    ]
    return [f"  {proxy}", *cells]


def _spread(values: list[float], factor: float, decimals: int) -> str:
    if not values:
        return "-"
    middle, low, high = (factor * value for value in (statistics.median(values), min(values), max(values)))
    if len(values) == 1:
        return f"{middle:.{decimals}f}"
    return f"{middle:.{decimals}f} ({low:.{decimals}f}-{high:.{decimals}f})"


def _memory(results: Results) -> list[list[str]]:
    rows = [["memory of the processes", *(heading for heading, *_ in MEMORY_COLUMNS)]]
    return [*rows, *(_cells(results, MEMORY, proxy, MEMORY_COLUMNS) for proxy in results.proxies)]


def _ratio_rows(results: Results) -> list[list[str]]:
    """The gate to each peer in each row, with the target behind each ratio that has one."""
    verdicts = {(verdict.row, verdict.target.peer, verdict.target.metric): verdict for verdict in results.verdicts()}
    rows = [["gate / peer", "CPU", "target", "p99", "target", "calls/s"]]
    for row in results.rows:
        for peer in results.peers():
            if row.site == "fresh":
                continue
            cells = []
            for _, metric in RATIOS:
                ratio = results.ratio(row.name, peer, metric)
                cells.append(str(ratio) if ratio else "-")
                if metric in (CPU, P99):
                    verdict = verdicts.get((row.name, peer, metric))
                    cells.append(str(verdict) if verdict else "")
            rows.append([f"  {row.name} / {peer}", *cells])
    return rows


def _summary(results: Results) -> str:
    """The gate's absolute figures against their targets, and how many of all targets are met."""
    verdicts = results.verdicts()
    lines = [
        f"{verdict.row}: {FIGURES[verdict.target.metric]} {'?' if verdict.value is None else f'{verdict.value:.1f}'}, "
        f"target {verdict}"
        for verdict in verdicts
        if verdict.target.peer is None
    ]
    missed = [
        f"{verdict.row} {FIGURES[verdict.target.metric]}" + (f" / {verdict.target.peer}" if verdict.target.peer else "")
        for verdict in verdicts
        if not verdict.met
    ]
    lines.append(f"targets: {len(verdicts) - len(missed)} of {len(verdicts)} met")
    return "\n".join(lines + (textwrap.wrap(f"missed, or not known: {', '.join(missed)}", 120) if missed else []))


def _table(rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; a row of two cells among wider ones (a failure) doesn't widen the table."""
    columns = max(len(row) for row in rows)
    full = [row for row in rows if len(row) == columns]
    widths = [max(len(row[column]) for row in full) for column in range(columns)]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows))
    lines = []
    for row in rows:
        first, *others = row
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *(cells if len(row) == columns else others)]).rstrip())
    return "\n".join(lines)
