"""The gate under attack, beside its peers: what a good client keeps, what memory it costs, how attackers end.

    python -m tests.bench.attacks                                     every attack on the gate
    python -m tests.bench.attacks --attacks rapid-reset,ping --peers envoy,nginx,haproxy
    python -m tests.bench.attacks --target 127.0.0.1:8001             whatever listens there, before an echo upstream
    python -m tests.bench.attacks --list

One attacking process, one good client on a connection of its own that makes 205-byte unary echo calls one after
another, and the proxy, each started anew for each attack, in front of nghttpd. Loopback only. Nothing here tells more
than how this machine's cores were shared out: compare proxies within one run.

    attack_wire.py     connections and bytes of the attacking process
    attack_kinds.py    the attacks, and the attacking process
    attack_costly.py   those whose frames are lawful, and dear to work on
    attack_slow.py     those that hold something on a connection: streams, answers
    attack_shake.py    those on the way to a connection
    attack_client.py   the good client
    attack_run.py      one attack on one proxy, and its bounds
"""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from . import attack_run, machine, peers
from .attack_kinds import ATTACKS, Kind
from .attack_run import Listening, Own, Result, Target
from .attack_wire import loopback
from .processes import ServerError

HEADINGS = (
    "", "calls/s calm", "attacked", "kept", "lost", "p99 ms", "max ms", "peak MB", "after MB", "attack rate",
    "verdict", "the attacker's connections",
)  # fmt: skip
_BOUNDS = (
    f"no call lost, {attack_run.KEPT:.0%} kept, a p99 of {attack_run.P99_SECONDS * 1000:.0f} ms, a peak below "
    f"{attack_run.GROWTH_BYTES / 1e6:.0f} MB and at most half of that left afterwards"
)
LEGEND = f"""\
calls/s, lost, p99, max: of the good client; kept: of its unattacked rate, before and afterwards; peak, after: growth
of the proxy's resident memory during the attack and {attack_run.SETTLE_SECONDS:.0f} s behind it; verdict: which bounds
are not met, with a question mark where other programs took {attack_run.NOISE:.0%} of the machine or more; the bounds:
{_BOUNDS}."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all ran, whatever the figures; 1: something didn't start or serve; 2: usage."""
    options = _parser().parse_args(arguments)
    if options.list:
        for kind in ATTACKS.values():
            print(f"{kind.name:20} {kind.what} ({kind.reference})")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        return _run(options)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    facts = machine.facts()
    for name, words in facts.items():
        print(f"{name}: {words}")
    for setting in machine.gate_environment():
        print(f"gate NOT at its defaults: {setting}")
    print(f"{options.seconds:g} s an attack\n", flush=True)
    results: list[Result] = []
    failed = False
    for kind in options.attacks:
        for name in _names(options):
            try:
                with _target(name, options) as target:
                    result = attack_run.run(kind, target, options.seconds)
            except ServerError as error:
                print(f"{kind.name}, {name}: FAILED: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            results.append(result)
            print("  ".join(_row(result)), file=sys.stderr, flush=True)
            for why in result.lost_why:
                print(f"    lost: {why}", file=sys.stderr, flush=True)
        if options.json:
            _write_json(options.json, facts, options.seconds, results)
    print(text(results))
    if options.peers:
        print(f"\n{side_by_side(results)}")
    return 1 if failed else 0


def _names(options: argparse.Namespace) -> list[str]:
    if options.target:
        return [options.target]
    names = [] if options.no_gate else [peers.GATE]
    for name in options.peers:
        if peers.PEERS[name].path() is None:
            raise ServerError(f"{name} isn't installed ({peers.PEERS[name].install})")
    return [*names, *options.peers]


@contextlib.contextmanager
def _target(name: str, options: argparse.Namespace) -> Iterator[Target]:
    """A proxy in front of its own upstream, both fresh: no attack inherits what another has left behind."""
    if options.target:
        yield Listening(options.target, loopback(options.target))
        return
    with tempfile.TemporaryDirectory(prefix="tensorgate-attacks-") as place:
        folder = Path(place)
        with peers.upstream(folder) as echo:
            site = peers.make_site(folder, echo.port)
            with peers.proxies(site, [name]) as servers:
                yield Own(servers[0], echo)
                if (fault := echo.death()) is not None:
                    print(f"under the attack on {name}, {fault}", file=sys.stderr, flush=True)


def text(results: Sequence[Result]) -> str:
    """The table, a line for each attack and proxy."""
    return "\n".join([_table([list(HEADINGS), *(_row(result) for result in results)], left=2), "", LEGEND])


def side_by_side(results: Sequence[Result]) -> str:
    """A line for each attack: what the good client kept, its p99, the growth of memory and the verdict, by proxy."""
    proxies = list(dict.fromkeys(result.proxy for result in results))
    found = {(result.attack, result.proxy): result for result in results}
    rows = [["kept / p99 ms / MB", *(word for proxy in proxies for word in (proxy, ""))]]
    for attack in dict.fromkeys(result.attack for result in results):
        row = [attack]
        for proxy in proxies:
            row += _cell(found.get((attack, proxy)))
        rows.append(row)
    return _table(rows, left=0)


def _cell(result: Result | None) -> list[str]:
    if result is None:
        return ["-", "failed"]
    return [f"{result.kept:.0%} / {result.p99 * 1e3:.1f} / {_megabytes(result.growth_peak)}", result.verdict()]


def _table(rows: Sequence[Sequence[str]], left: int) -> str:
    """`left`: how many columns at the end begin at their left edge, as the first does."""
    last = len(rows[0]) - 1
    widths = [max(len(row[column]) for row in rows) for column in range(last + 1)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(widths[at]) if at == 0 or at > last - left else cell.rjust(widths[at])
            for at, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(result: Result) -> list[str]:
    endings = sorted(result.endings.items(), key=lambda item: -item[1])
    return [
        f"{result.attack} / {result.proxy}",
        f"{result.calm_rate:.0f}",
        f"{result.rate:.0f}",
        f"{result.kept:.0%}",
        str(result.lost),
        f"{result.p99 * 1e3:.1f}",
        f"{result.slowest * 1e3:.0f}",
        _megabytes(result.growth_peak),
        _megabytes(result.growth_after),
        f"{result.attack_rate:,.0f} {result.unit}/s",
        result.verdict(),
        result.problem or "; ".join(f"{count} x {how}" for how, count in endings[:3]) or "none",
    ]


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def _write_json(path: Path, facts: dict[str, str], seconds: float, results: Sequence[Result]) -> None:
    content = {"machine": facts, "seconds": seconds, "results": [result.as_json() for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attacks", description="The gate under attack.")
    parser.add_argument("--attacks", type=_attacks, default=list(ATTACKS.values()), metavar="NAME,...",
                        help="which (default: all; see --list)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say what each attack does")
    parser.add_argument("--seconds", type=_seconds, default=10.0, metavar="S", help="of each attack (default: 10)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--peers", type=_peers, default=[], metavar="NAME,...",
                       help=f"attack these too, of {', '.join(peers.PEERS)}")  # fmt: skip
    where.add_argument("--target", type=_loopback, metavar="HOST:PORT",
                       help="attack what listens there instead: TLS with h2, loopback, before an echo upstream; its "
                       "memory is measured where its process can be seen")  # fmt: skip
    parser.add_argument("--no-gate", action="store_true", help="the peers only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there")
    return parser


def _attacks(words: str) -> list[Kind]:
    return [ATTACKS[name] for name in _known(words, list(ATTACKS))]


def _peers(words: str) -> list[str]:
    return _known(words, list(peers.PEERS))


def _known(words: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in words.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def _loopback(words: str) -> str:
    try:
        loopback(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return words


def _seconds(words: str) -> float:
    try:
        value = float(words)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{words!r} isn't a number of seconds up to 600")
    return value


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
