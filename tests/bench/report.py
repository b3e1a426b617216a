"""What is printed and written: the table of each shape, the gate's ratios to its peers, and JSON."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from .load import Shape
from .measure import Figures, Run
from .peers import GATE
from .processes import Server

# Heading, attribute of Figures, factor to the unit that is shown, decimals.
COLUMNS = (
    ("CPU us/RPC", "cpu_us", 1.0, 1),
    ("RPC/s", "rate", 1.0, 0),
    ("p50 ms", "p50", 1e3, 2),
    ("p99 ms", "p99", 1e3, 2),
    ("busy %", "busy", 1e2, 0),
    ("RSS MB", "rss", 1e-6, 1),
)
RATIOS = (("CPU/RPC", "cpu_us"), ("RPC/s", "rate"), ("p50", "p50"), ("p99", "p99"), ("RSS", "rss"))

LEGEND = """\
CPU us/RPC: user and system time of the proxy's processes; RPC/s, p50, p99: in a closed loop, as fast as it goes;
busy: of one core (well under 100 %: the client or the upstream is what limits RPC/s, not the proxy).
Median of the repeats (lowest-highest). Each figure is of the steady part of a run, without handshakes."""


class Results:
    """The runs of a benchmark, by shape and proxy."""

    def __init__(self, shapes: list[Shape], servers: list[Server], runs: list[Run]) -> None:
        self.shapes, self.servers, self.runs = shapes, servers, runs

    @property
    def failed(self) -> bool:
        return any(run.problem for run in self.runs)

    def figures(self, shape: str, proxy: str) -> dict[int, Figures]:
        """Repeat -> figures; empty if any run failed, for what is left of a failing server means nothing."""
        runs = [run for run in self.runs if (run.shape, run.proxy) == (shape, proxy)]
        if any(run.problem for run in runs):
            return {}
        return {run.repeat: run.figures for run in runs if run.figures}

    def problem(self, shape: str, proxy: str) -> str:
        problems = (run.problem for run in self.runs if (run.shape, run.proxy) == (shape, proxy) and run.problem)
        return next(problems, "")

    def ratio(self, shape: str, peer: str, attribute: str) -> tuple[float, float, float] | None:
        """Gate to peer: ratio of medians, lowest and highest ratio of a repeat; None if either failed."""
        ours, theirs = self.figures(shape, GATE), self.figures(shape, peer)
        if not ours or not theirs:
            return None
        pairs = [getattr(ours[repeat], attribute) / getattr(theirs[repeat], attribute) for repeat in ours]
        return median(ours, attribute) / median(theirs, attribute), min(pairs), max(pairs)

    def as_json(self) -> dict[str, object]:
        return {
            "shapes": [vars(shape) for shape in self.shapes],
            "start_rss": {server.name: server.start_rss for server in self.servers},
            "runs": [run.as_json() for run in self.runs],
            "medians": {
                shape.name: {server.name: self._medians(shape.name, server.name) for server in self.servers}
                for shape in self.shapes
            },
            "ratios": {
                shape.name: {peer: self._ratios(shape.name, peer) for peer in self.peers()} for shape in self.shapes
            },
        }

    def peers(self) -> list[str]:
        """What the gate is compared with: nothing where it doesn't run."""
        names = [server.name for server in self.servers]
        return [name for name in names if name != GATE] if GATE in names else []

    def _medians(self, shape: str, proxy: str) -> dict[str, float] | None:
        found = self.figures(shape, proxy)
        return {attribute: median(found, attribute) for _, attribute, _, _ in COLUMNS} if found else None

    def _ratios(self, shape: str, peer: str) -> dict[str, float] | None:
        found = {attribute: self.ratio(shape, peer, attribute) for _, attribute in RATIOS}
        return {attribute: ratio[0] for attribute, ratio in found.items() if ratio} or None


def median(found: dict[int, Figures], attribute: str) -> float:
    return statistics.median(getattr(figures, attribute) for figures in found.values())


def text(results: Results) -> str:
    """The tables, for people."""
    parts = [LEGEND]
    for shape in results.shapes:
        rows = [[shape.title(), *(heading for heading, *_ in COLUMNS)]]
        rows += [_row(results, shape.name, server) for server in results.servers]
        parts.append(_table(rows))
    if results.peers():
        parts.append(_ratio_table(results))
    parts.append("RSS at start, MB: " + _start_rss(results.servers))
    return "\n\n".join(parts)


def write_json(path: Path, results: Results, machine: dict[str, str], versions: dict[str, str]) -> None:
    content = {"machine": machine, "versions": versions, **results.as_json()}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _row(results: Results, shape: str, server: Server) -> list[str]:
    found = results.figures(shape, server.name)
    if not found:
        return [f"  {server.name}", f"FAILED: {results.problem(shape, server.name)}"]
    cells = [
        _spread([getattr(figures, attribute) * factor for figures in found.values()], decimals)
        for _, attribute, factor, decimals in COLUMNS
    ]
    return [f"  {server.name}", *cells]


def _spread(values: list[float], decimals: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{decimals}f} ({low:.{decimals}f}-{high:.{decimals}f})"


def _ratio_table(results: Results) -> str:
    rows = [["ratio gate / peer", *(heading for heading, _ in RATIOS)]]
    for shape in results.shapes:
        for peer in results.peers():
            ratios = [results.ratio(shape.name, peer, attribute) for _, attribute in RATIOS]
            cells = [f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})" if ratio else "-" for ratio in ratios]
            rows.append([f"  {shape.name} / {peer}", *cells])
    return _table(rows)


def _start_rss(servers: Iterable[Server]) -> str:
    return ", ".join(f"{server.name} {server.start_rss / 1e6:.1f}" for server in servers)


def _table(rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; a row of two cells (a failure) doesn't widen the table."""
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows))
    lines = []
    for row in rows:
        first, *others = row
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        line = "  ".join([first.ljust(widths[0]), *(cells if len(row) > 2 else others)])
        lines.append(line.rstrip())
    return "\n".join(lines)
