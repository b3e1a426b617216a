"""The soak's chart: memory, connections and streams over time, the attacks below, as an SVG without dependencies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .chart import COLOURS, FAILED, FONT, GREY, SHADE
from .peers import GATE
from .soak_record import Record, Sample, clock

WIDTH, LEFT, RIGHT, TOP = 1180, 78, 24, 84
GAP, NAMES_HEIGHT = 40, 132
TICKS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)  # seconds between those of the time axis


@dataclass(frozen=True)
class Panel:
    """One curve: its title, its height, its values, and how a value on its scale is written."""

    title: str
    height: float
    value: Callable[[Sample], float | None]
    words: Callable[[float], str]
    logarithmic: bool = False


PANELS = (
    Panel("memory of the gate, resident", 250, lambda sample: sample.rss / 1e6, lambda value: f"{value:g} MB"),
    Panel("client connections", 90, lambda sample: sample.connections, lambda value: f"{value:g}", True),
    Panel("streams open", 90, lambda sample: sample.streams, lambda value: f"{value:g}", True),
)


def draw(record: Record) -> str:
    seconds = max(record.samples[-1].at, 1.0)
    height = TOP + sum(panel.height + GAP for panel in PANELS) + NAMES_HEIGHT
    parts = [
        _rectangle(0, 0, WIDTH, height, "white"),
        _text(LEFT - 50, 34, "Tensorgate under mixed load", size=20, weight=600),
        _text(LEFT - 50, 54, _subtitle(record), size=11, colour=GREY),
    ]
    bottom = TOP + sum(panel.height + GAP for panel in PANELS) - GAP
    parts += [_shaded(attack.began, min(attack.ended, record.loaded), seconds, bottom) for attack in record.attacks]
    top = float(TOP)
    for panel in PANELS:
        parts += _panel(panel, record, seconds, top)
        top += panel.height + GAP
    parts += _times(seconds, bottom)
    parts += _events(record, seconds, bottom)
    for attack in record.attacks:
        x, y = _x(attack.began + 1, seconds) + 4, bottom + 28
        parts.append(
            f'<text transform="translate({x:.1f},{y}) rotate(-90)" text-anchor="end" font-size="8.5" fill="{GREY}">'
            f"{escape(attack.name)}</text>"
        )
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _subtitle(record: Record) -> str:
    words = f"{sum(record.calls.values()):,} calls of good clients, {len(record.unexcused())} lost while the upstream "
    words += f"was there; {len(record.attacks)} attacks (shaded, named below); no client at all at the end · "
    return words + " · ".join([record.facts.get("cpu", "?"), f"Python {record.facts.get('python', '?')}"])


def _x(at: float, seconds: float) -> float:
    return LEFT + at / seconds * (WIDTH - LEFT - RIGHT)


def _panel(panel: Panel, record: Record, seconds: float, top: float) -> list[str]:
    points = [(sample.at, value) for sample in record.samples if (value := panel.value(sample)) is not None]
    marks, scale = _scale(max(value for _, value in points), panel.logarithmic)
    parts = [_text(LEFT, top - 8, panel.title, size=12, weight=600)]
    for mark in marks:
        y = top + panel.height * (1 - scale(mark))
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, GREY, 0.25))
        width = 6.2 * len(panel.words(mark))
        parts.append(_text(LEFT - 8 - width, y + 4, panel.words(mark), size=10.5, colour=GREY))
    curve = " ".join(f"{_x(at, seconds):.1f},{top + panel.height * (1 - scale(value)):.1f}" for at, value in points)
    return [*parts, f'<polyline points="{curve}" fill="none" stroke="{COLOURS[GATE]}" stroke-width="1.6"/>']


def _scale(most: float, logarithmic: bool) -> tuple[Sequence[float], Callable[[float], float]]:
    """Round marks from 0 on, and value -> 0.0 at the bottom to 1.0 at the top."""
    if logarithmic:
        top = max(math.log10(most + 1), 1.0)
        marks = [0.0, *(10.0**power for power in range(int(top) + 1) if 10**power <= most * 1.3)]
        return marks, lambda value: math.log10(value + 1) / top
    step = next(size for size in (5, 10, 20, 25, 50, 100, 200, 500, 1000, 10_000) if most / size <= 6)
    marks = [float(step * number) for number in range(math.ceil(most / step) + 1)]
    return marks, lambda value: value / marks[-1]


def _times(seconds: float, bottom: float) -> list[str]:
    step = next((size for size in TICKS if seconds / size <= 12), TICKS[-1])
    parts = []
    for at in range(0, int(seconds) + 1, step):
        parts.append(_line(_x(at, seconds), bottom, _x(at, seconds), bottom + 5, GREY, 1.0))
        parts.append(_text(_x(at, seconds) - 11, bottom + 18, clock(at), size=10.5, colour=GREY))
    return parts


def _events(record: Record, seconds: float, bottom: float) -> list[str]:
    parts = []
    for at, words in ((record.outage[0], "upstream killed"), (record.loaded, "clients gone")):
        if at <= seconds:
            x = _x(at, seconds)
            parts.append(_line(x, TOP - 6, x, bottom, FAILED, 0.8))
            # To the left of its line: to the right there may be no room.
            parts.append(_text(x - 5.6 * len(words) - 4, TOP - 8, words, size=10.5, colour=FAILED))
    return parts


def _shaded(began: float, ended: float, seconds: float, bottom: float) -> str:
    x = _x(began, seconds)
    return _rectangle(x, TOP, max(_x(ended, seconds) - x, 1.0), bottom - TOP, SHADE)


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, opacity: float) -> str:
    place = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-opacity="{opacity:g}"/>'


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, words: str, size: float, weight: int = 400, colour: str = "#1f2328") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" font-weight="{weight}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"
