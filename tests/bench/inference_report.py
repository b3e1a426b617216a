"""What the comparison of inference servers prints and writes: a table for each row, ratios and goals, JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import report
from .inference_rows import Goal, Row
from .measure import Run
from .rows import BUSY, CPU, P50, P99, RATE

BATCH = "batch"
COLUMNS: tuple[report.Column, ...] = (
    ("calls/s", RATE, 1.0, 0),
    ("CPU us/call", CPU, 1.0, 0),
    ("busy %", BUSY, 1e2, 0),
    ("p50 ms", P50, 1e3, 2),
    ("p99 ms", P99, 1e3, 2),
    ("rows/batch", BATCH, 1.0, 1),
)
FIGURES = {RATE: "calls/s", CPU: "CPU/call", P99: "p99"}

LEGEND = """\
calls/s: in a closed loop, as fast as it goes. CPU: user and system time of all the server's processes for each call.
busy: of one core. p50, p99: in that same closed loop, where those of a server that is full say how many callers wait;
"half the rate": even calls at half of the closed loop's rate. rows/batch: by the server's own statistics. Median of
the repeats (lowest-highest), each of the steady part of a run."""


class Results:
    """The runs by row and contestant, and why others didn't run: (row, contestant) -> words."""

    def __init__(self, rows: Sequence[Row], runs: Sequence[Run], absent: Mapping[tuple[str, str], str]) -> None:
        self.rows, self.runs, self.absent = rows, runs, absent
        self._runs = report.Results([], [], runs)

    @property
    def failed(self) -> bool:
        return self._runs.failed

    def values(self, row: str, name: str, metric: str) -> dict[int, float]:
        """Repeat -> value; empty if any run failed."""
        return self._runs.values(row, name, metric)

    def why_not(self, row: str, name: str) -> str:
        """Why there are no figures, or ""."""
        problem = self._runs.problem(row, name)
        return f"FAILED: {problem}" if problem else self.absent.get((row, name), "")

    def ratio(self, row: str, goal: Goal) -> report.Ratio | None:
        """None where one of the two has no figure."""
        ours, theirs = (self.values(row, name, goal.metric) for name in (goal.ours, goal.theirs))
        if not ours or not theirs:
            return None
        pairs = [ours[repeat] / theirs[repeat] for repeat in ours if repeat in theirs]
        middle = statistics.median(ours.values()) / statistics.median(theirs.values())
        return report.Ratio(middle, min(pairs, default=middle), max(pairs, default=middle))

    def as_json(self) -> dict[str, object]:
        return {
            "rows": [{"name": row.name, "title": row.title} for row in self.rows],
            "medians": {row.name: {one: self._medians(row.name, one) for one in names(row)} for row in self.rows},
            "goals": [self._goal(row.name, goal) for row in self.rows for goal in row.goals],
            "runs": [run.as_json() for run in self.runs],
        }

    def _medians(self, row: str, name: str) -> dict[str, float] | str:
        if words := self.why_not(row, name):
            return words
        found = {metric: self.values(row, name, metric) for _, metric, *_ in COLUMNS}
        return {metric: statistics.median(values.values()) for metric, values in found.items() if values}

    def _goal(self, row: str, goal: Goal) -> dict[str, object]:
        ratio = self.ratio(row, goal)
        value = ratio.value if ratio else None
        return {"row": row, **vars(goal), "value": value, "met": None if value is None else goal.met(value)}


def names(row: Row) -> list[str]:
    """What a row has figures of: its contestants, and what its goals compare them with."""
    return list(dict.fromkeys([*(one.name for one in row.contestants), *(goal.theirs for goal in row.goals)]))


def text(results: Results) -> str:
    """The tables, for people."""
    parts = [LEGEND]
    for row in results.rows:
        parts.append(f"{row.name}: {row.title}\n{report._table(_figures(results, row))}")
        parts.append(report._table(_goals(results, row)))
    return "\n\n".join(parts)


def write_json(path: Path, results: Results, machine: dict[str, str], versions: dict[str, str]) -> None:
    content = {"machine": machine, "versions": versions, **results.as_json()}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _figures(results: Results, row: Row) -> list[list[str]]:
    rows = [["", *(heading for heading, *_ in COLUMNS)]]
    for name in names(row):
        if words := results.why_not(row.name, name):
            rows.append([f"  {name}", words])
            continue
        cells = [
            report._spread(list(results.values(row.name, name, metric).values()), factor, decimals)
            for _, metric, factor, decimals in COLUMNS
        ]
        rows.append([f"  {name}", *cells])
    return rows


def _goals(results: Results, row: Row) -> list[list[str]]:
    rows = [["", "ratio", "goal", ""]]
    for goal in row.goals:
        ratio = results.ratio(row.name, goal)
        word = "?" if ratio is None else "met" if goal.met(ratio.value) else "MISSED"
        label = f"  {FIGURES[goal.metric]}: {goal.ours} / {goal.theirs}"
        rows.append([label, str(ratio) if ratio else "-", str(goal), word])
    return rows
