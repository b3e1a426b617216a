"""What a soak has seen, its checks, and both in words."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

MINUTE = 60.0
GROWTH_BYTES = 12e6  # that the gate's memory at the end may be above what it was after the first minute
EXCUSED_SECONDS = 5.0  # behind the upstream's return: the gate tries again after a second at most
_FILES_SLACK = 2  # the metrics page's connection, and one that is just closed
_AROUND_SECONDS = 10.0  # what is called memory at a time is the median of so many seconds on either side


@dataclass(frozen=True)
class Sample:
    """The gate at a time: seconds since the beginning, bytes, counts; None where its metrics page didn't come."""

    at: float
    rss: int
    files: int
    streams: int | None
    connections: int | None
    upstream: int | None


@dataclass(frozen=True)
class Loss:
    """A call of a good client that did not end as it should."""

    kind: str
    at: float
    words: str


@dataclass(frozen=True)
class Attacked:
    """An attack, and when it was."""

    name: str
    began: float
    ended: float


@dataclass(frozen=True)
class Check:
    """A promise: in words what was found, and whether that is what it should be."""

    words: str
    holds: bool


@dataclass
class Record:
    """All of one run. `outage`: when the upstream was killed, and back; `loaded`: when the clients were told to go."""

    facts: dict[str, str]
    kinds: list[str]
    samples: list[Sample] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    attacks: list[Attacked] = field(default_factory=list)
    wrong_lines: list[str] = field(default_factory=list)
    outage: tuple[float, float] = (float("inf"), float("inf"))
    loaded: float = 0.0
    gone_after: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    last_answer: dict[str, float] = field(default_factory=dict)

    def answered(self, kind: str, at: float, count: int) -> None:
        self.calls[kind] += count
        if count:
            self.last_answer[kind] = at

    def excused(self, loss: Loss) -> bool:
        """Whether the upstream's absence is the reason."""
        killed, back = self.outage
        return killed <= loss.at <= back + EXCUSED_SECONDS

    def unexcused(self) -> list[Loss]:
        return [loss for loss in self.losses if not self.excused(loss)]

    @property
    def first_minute(self) -> float:
        """When the first minute is over, or the first third of a short run."""
        return min(MINUTE, self.loaded / 3)

    def rss_at(self, at: float) -> float:
        return statistics.median([sample.rss for sample in self.samples if abs(sample.at - at) <= _AROUND_SECONDS])

    def attack_at(self, at: float) -> str:
        names = [attack.name for attack in self.attacks if attack.began <= at < attack.ended + 1]
        return names[-1] if names else ""

    # -- checks

    def checks(self) -> list[Check]:
        first, last = self.samples[0], self.samples[-1]
        upstream = (last.upstream or 0) - (first.upstream or 0)
        most_files = first.files + max(upstream, 0) + _FILES_SLACK
        after_minute = self.rss_at(self.first_minute)
        lost = self.unexcused()
        silent = [kind for kind in self.calls if self.last_answer.get(kind, 0.0) < self.loaded - 2 * EXCUSED_SECONDS]
        grown = last.rss - after_minute
        return [
            Check(f"{last.streams} streams open at the end, 0 should be", last.streams == 0),
            Check(f"{last.connections} client connections open at the end, 0 should be", last.connections == 0),
            Check(f"{last.files} files open at the end, at most {most_files} should be", last.files <= most_files),
            Check(f"{len(lost)} calls of good clients lost but for the upstream's absence, 0 should be", not lost),
            Check(f"{', '.join(silent) or 'none'} of the good clients without answers at the end, none should be",
                  not silent),
            Check(f"memory at the end {_signed(grown)} against the first minute's, at most {_signed(GROWTH_BYTES)} "
                  "should be", grown <= GROWTH_BYTES),
            Check(f"{len(self.wrong_lines)} lines of internal errors in its log, 0 should be", not self.wrong_lines),
        ]  # fmt: skip

    def failures(self) -> list[Check]:
        return [check for check in self.checks() if not check.holds]

    def as_json(self) -> dict[str, object]:
        content = asdict(self)
        content["calls"] = dict(self.calls)
        content["losses"] = [{**asdict(loss), "excused": self.excused(loss)} for loss in self.losses]
        return content | {"checks": [asdict(check) for check in self.checks()]}


# -- words


def line(record: Record) -> str:
    """How it stands."""
    last = record.samples[-1]
    calls, lost, excused = sum(record.calls.values()), len(record.losses), len(record.losses) - len(record.unexcused())
    words = f"{clock(last.at)}  {last.rss / 1e6:.1f} MB, {last.files} files, {last.connections} connections, "
    words += f"{last.streams} streams, {last.upstream} upstream; {calls} calls, {lost} lost ({excused} excused)"
    return f"{words}  {record.attack_at(last.at)}".rstrip()


def text(record: Record) -> str:
    """The shape of each curve, the calls by kind, what the gate has counted, and the checks."""
    rows = [["", "start", f"after {clock(record.first_minute)}", "most", "at", "during", "end of load", "end"]]
    rows += [_shape(record, name, value, words) for name, value, words in _CURVES]
    kinds = [["calls", "as they should", "lost", "of these with the upstream gone"]]
    for kind in record.calls:
        lost = [loss for loss in record.losses if loss.kind == kind]
        excused = sum(record.excused(loss) for loss in lost)
        kinds.append([kind, f"{record.calls[kind]}", str(len(lost)), str(excused)])
    counted = [
        f"{int(value)} x {name.partition('/')[2]}"
        for name, value in record.metrics.items()
        if value and name.startswith(("tensorgate_connection_abuse_total/", "tensorgate_connections_refused_total/"))
    ]
    lines = [f"{name}: {words}" for name, words in record.facts.items()]
    lines += ["", *_table(rows), "", *_table(kinds), ""]
    lines += [f"{len(record.attacks)} attacks; connections ended by the gate: {', '.join(counted) or 'none'}"]
    lines += [f"all clients were gone for the gate {record.gone_after:.1f} s after their end"]
    missed = sum(sample.streams is None for sample in record.samples)
    lines += [f"{len(record.samples)} samples, {missed} of them without the gate's metrics", ""]
    lines += [
        f"lost: {clock(loss.at)} {loss.kind}, {record.attack_at(loss.at) or 'no attack'}: {loss.words}"
        for loss in record.unexcused()[:20]
    ]
    lines += [f"log: {words}" for words in record.wrong_lines[:20]]
    lines += [f"{'holds' if check.holds else 'FAILS'}: {check.words}" for check in record.checks()]
    return "\n".join(lines)


Value = Callable[[Sample], float | None]
_CURVES: tuple[tuple[str, Value, Callable[[float], str]], ...] = (
    ("memory", lambda sample: sample.rss, lambda value: f"{value / 1e6:.1f} MB"),
    ("open files", lambda sample: sample.files, lambda value: f"{value:.0f}"),
    ("client connections", lambda sample: sample.connections, lambda value: f"{value:.0f}"),
    ("streams open", lambda sample: sample.streams, lambda value: f"{value:.0f}"),
    ("upstream connections", lambda sample: sample.upstream, lambda value: f"{value:.0f}"),
)


def _shape(record: Record, name: str, value: Value, words: Callable[[float], str]) -> list[str]:
    known = [(found, sample) for sample in record.samples if (found := value(sample)) is not None]
    most, when = max(known, key=lambda pair: pair[0])
    around = [found for found, sample in known if abs(sample.at - record.first_minute) <= _AROUND_SECONDS]
    loaded = [found for found, sample in known if record.loaded - _AROUND_SECONDS <= sample.at <= record.loaded]
    middle = [words(statistics.median(found)) if found else "-" for found in (around, loaded)]
    during = record.attack_at(when.at) or "no attack"
    return [name, words(known[0][0]), middle[0], words(most), clock(when.at), during, middle[1], words(known[-1][0])]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["  ".join(row) for row in cells]


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _signed(size: float) -> str:
    return f"{size / 1e6:+.1f} MB"
