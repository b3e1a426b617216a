"""The chart: CPU per call and p99 of each row, and memory, the proxies side by side, as an SVG without dependencies.

Rows differ a thousandfold, so each is drawn to its own scale: bars are relative to Envoy's (or to the first proxy's
where it has no figure), and say the absolute figure at their end. Whiskers: the lowest and highest of the repeats.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

from .peers import GATE
from .report import Results
from .rows import CPU, IDLE, MEMORY, P99, START

COLOURS = {GATE: "#0072b2", "envoy": "#e69f00", "nginx": "#4fb08c", "haproxy": "#a3a3ad"}
NAMES = {GATE: "Tensorgate", "envoy": "Envoy", "nginx": "nginx", "haproxy": "HAProxy"}
REFERENCE = "envoy"
FAILED, GREY, SHADE = "#c0392b", "#5c6370", "#f4f6f8"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Helvetica, Arial, sans-serif"

WIDTH, MARGIN = 1180, 28
PANEL_X, PANEL_WIDTH = (290, 740), 412
BAR, GAP, PADDING = 10, 2, 14
MOST = 2.0  # a bar that is longer than so many times the reference's is cut there
FIGURE_WIDTH = 70  # kept free behind the longest bar
UNIT = (PANEL_WIDTH - FIGURE_WIDTH) / MOST  # of the reference's bar


@dataclass(frozen=True)
class Bars:
    """One row of one panel: proxy -> a value for each repeat, none where it failed; and how a value is written."""

    values: dict[str, list[float]]
    words: Callable[[float], str]

    @property
    def reference(self) -> float:
        found = self.values.get(REFERENCE) or next((values for values in self.values.values() if values), [])
        return statistics.median(found) if found else 0.0


def write(path: Path, results: Results, machine: dict[str, str], versions: dict[str, str]) -> None:
    path.write_text(draw(results, machine, versions))


def draw(results: Results, machine: dict[str, str], versions: dict[str, str]) -> str:
    timed = [row for row in results.rows if row.site != "fresh"]
    height = len(results.proxies) * (BAR + GAP) - GAP + PADDING
    parts = _head(results, machine, versions)
    top = 132
    if timed:
        ends = top + 12 + height * len(timed)
        latency = "p99 latency at a fixed rate" if results.rates else ""
        parts += _headings(top, "CPU time per RPC, message or handshake", latency)
        parts += [_shade(top + 12 + number * height, height) for number in range(0, len(timed), 2)]
        if REFERENCE in results.proxies:
            parts += [_dashes(x + UNIT, top + 12, ends) for x in PANEL_X[: 2 if latency else 1]]
        for number, row in enumerate(timed):
            panels = [_bars(results, row.name, CPU, _microseconds), _bars(results, row.name, P99, _milliseconds)]
            parts += _group(top + 12 + number * height, height, (row.name, row.short), panels)
        top = ends + 34
    idle = next((row.name for row in results.rows if row.site == "fresh"), "")
    parts += _headings(top, "Memory for each idle connection" if idle else "", "Memory of a started process")
    panels = [_bars(results, idle, IDLE, _kibibytes), _bars(results, MEMORY, START, _megabytes)]
    parts += [_shade(top + 12, height), *_group(top + 12, height, ("memory", "of the proxy's processes"), panels)]
    return _svg(parts, top + height + 36)


def _bars(results: Results, row: str, metric: str, words: Callable[[float], str]) -> Bars:
    values = {name: list(results.values(row, name, metric).values()) for name in results.proxies}
    asked = any(values.values()) or metric == CPU  # a row in which no proxy has such a figure was not to have one
    return Bars(values if asked else {}, words)


def _head(results: Results, machine: dict[str, str], versions: dict[str, str]) -> list[str]:
    where = [f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores"]
    where += [machine.get("kernel", "?"), f"Python {machine.get('python', '?')}"]
    where += [f"{name} {number}" for name, number in versions.items()]
    how = f"Median of {machine.get('plan', 'the repeats')} for each proxy, all with one worker; shorter is better."
    if REFERENCE in results.proxies:
        how += f" Each row is to its own scale: the dashed line is {NAMES[REFERENCE]}."
    parts = [
        _text(MARGIN, 38, "Tensorgate beside its peers", size=20, weight=600),
        _text(MARGIN, 60, " · ".join(where), size=11, colour=GREY),
        _text(MARGIN, 77, how, size=11, colour=GREY),
    ]
    x = float(MARGIN)
    for name in results.proxies:
        parts.append(_rectangle(x, 91, 12, 12, COLOURS[name]))
        parts.append(_text(x + 17, 101, NAMES[name], size=12, weight=600 if name == GATE else 400))
        x += 40 + 7.5 * len(NAMES[name])
    return parts


def _headings(top: float, *words: str) -> list[str]:
    return [_text(x, top, heading, size=12, weight=600) for x, heading in zip(PANEL_X, words, strict=True)]


def _shade(top: float, height: float) -> str:
    return _rectangle(MARGIN - 10, top, WIDTH - 2 * MARGIN + 20, height, SHADE)


def _group(top: float, height: float, words: tuple[str, str], panels: Sequence[Bars]) -> list[str]:
    """A row: its name, and its bars in each panel."""
    parts = [
        _text(MARGIN, top + height / 2 - 2, words[0], size=13, weight=600),
        _text(MARGIN, top + height / 2 + 13, words[1], size=10.5, colour=GREY),
    ]
    for x, bars in zip(PANEL_X, panels, strict=True):
        for number, (name, values) in enumerate(bars.values.items()):
            y = top + PADDING / 2 + number * (BAR + GAP)
            if values:
                parts += _bar(x, y, name, sorted(values), bars)
            else:
                parts.append(_text(x, y + BAR - 1, f"{NAMES[name]} failed", size=10, colour=FAILED))
    return parts


def _bar(x: float, y: float, name: str, values: list[float], bars: Bars) -> list[str]:
    middle = statistics.median(values)
    low, at, high = (min(value / bars.reference, MOST) * UNIT for value in (values[0], middle, values[-1]))
    parts = [_rectangle(x, y, max(at, 1.0), BAR, COLOURS[name])]
    if middle / bars.reference > MOST:
        # Cut: a notch says that it goes on.
        steps = [(x + at - 12, y + BAR + 1), (x + at - 7, y - 1), (x + at - 3, y - 1), (x + at - 8, y + BAR + 1)]
        parts.append(f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in steps)}" fill="white"/>')
    elif high - low > 1:
        ends = [(x + low, y + 2), (x + low, y + BAR - 2), (x + low, y + BAR / 2), (x + high, y + BAR / 2)]
        ends += [(x + high, y + 2), (x + high, y + BAR - 2)]
        parts += [
            f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="#222" stroke-opacity="0.55"/>'
            for (a, b), (c, d) in pairwise(ends)
        ]
    weight = 600 if name == GATE else 400
    parts.append(_text(x + max(at, high) + 5, y + BAR - 1, bars.words(middle), size=10, weight=weight))
    return parts


def _microseconds(value: float) -> str:
    return f"{value / 1000:.2f} ms" if value >= 1000 else f"{value:.0f} µs"


def _milliseconds(value: float) -> str:
    return _microseconds(value * 1e6)


def _kibibytes(value: float) -> str:
    return f"{value:.1f} KiB"


def _megabytes(value: float) -> str:
    return f"{value:.0f} MB"


# -- SVG


def _text(x: float, y: float, words: str, size: float, weight: int = 400, colour: str = "#1f2328") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" font-weight="{weight}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}" rx="1.5"/>'


def _dashes(x: float, top: float, bottom: float) -> str:
    place = f'x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"'
    return f'<line {place} stroke="{GREY}" stroke-dasharray="3 3" stroke-opacity="0.7"/>'


def _svg(parts: Sequence[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}">'
    # A background of its own, or it can't be read where pages are dark.
    return "\n".join([head, _rectangle(0, 0, WIDTH, height, "white"), *parts, "</svg>"]) + "\n"
