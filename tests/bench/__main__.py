"""`python -m tests.bench`: see the package's docstring."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from . import chart, machine, peers, report
from .measure import Bench, Plan, Run
from .processes import ServerError
from .rows import ROWS, Row

NEEDED = (("nghttpd", "nghttp2-server"), ("h2load", "nghttp2-client"))
REPEATS, SECONDS = 5, 1.6
QUICK_REPEATS, QUICK_SECONDS = 1, 0.6


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every run was what it should be, whatever its figures; 1: one failed, or a server didn't start;
    2: usage."""
    options = _parser().parse_args(arguments)
    if options.list:
        for row in ROWS.values():
            print(f"{row.name:10} {row.title}")
        return 0
    missing = [f"{program} (apt-get install {package})" for program, package in NEEDED if not _found(program)]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    machine.raise_open_files()
    try:
        return _bench(options)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _bench(options: argparse.Namespace) -> int:
    names = _proxies(options)
    facts, versions = machine.facts(), _versions(names)
    _print_facts(facts, versions)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    plan = Plan(options.rows, names, repeats, seconds, not options.no_latency)
    with tempfile.TemporaryDirectory(prefix="tensorgate-bench-") as place:
        bench = Bench(plan, peers.make_site(Path(place), 0), _say(options.quiet))
        neighbours = machine.Neighbours(bench.started)
        runs: list[Run] = list(bench.runs())
    facts["used by other processes"] = f"{neighbours.share():.1%} of the machine's CPU, on average"
    facts["plan"] = f"{repeats} {'run' if repeats == 1 else 'runs'} of {seconds:g} s"
    results = report.Results(plan.rows, names, runs, bench.rates)
    print(report.text(results))
    print(f"used by other processes: {facts['used by other processes']}")
    if options.json:
        report.write_json(options.json, results, facts, versions)
    if options.svg:
        chart.write(options.svg, results, facts, versions)
    return 1 if results.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="The gate beside its peers.")
    parser.add_argument("--rows", type=_rows, default=list(ROWS.values()), metavar="NAME,...",
                        help=f"of {', '.join(ROWS)} (default: all)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say what each row is")
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK_REPEATS} repeat of {QUICK_SECONDS:g} s: to see that it works")  # fmt: skip
    parser.add_argument("--repeats", type=_positive(int), metavar="N",
                        help=f"measured runs of each proxy in each row (default: {REPEATS})")  # fmt: skip
    parser.add_argument("--seconds", type=_positive(float), metavar="S",
                        help=f"how long a measured run takes (default: {SECONDS:g})")  # fmt: skip
    parser.add_argument("--no-latency", action="store_true", help="no runs at a fixed rate")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--peers", type=_peers, metavar="NAME,...",
                     help=f"of {', '.join(peers.PEERS)} (default: those that are installed)")  # fmt: skip
    who.add_argument("--gate-only", action="store_true", help="no peers")
    parser.add_argument("--no-gate", action="store_true", help="the peers only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run, the medians and the ratios there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw CPU per RPC and p99 there")
    parser.add_argument("--quiet", action="store_true", help="don't say each run's figures on stderr")
    return parser


def _say(quiet: bool) -> Callable[[str], None]:
    def say(words: str) -> None:
        if not quiet:
            print(words, file=sys.stderr, flush=True)

    return say


def _proxies(options: argparse.Namespace) -> list[str]:
    """The names of what runs, the gate first; peers that aren't installed are left out with a word."""
    names = [] if options.no_gate else [peers.GATE]
    if options.gate_only:
        return names
    for peer in peers.PEERS.values():
        if options.peers is not None and peer.name not in options.peers:
            continue
        if peer.path():
            names.append(peer.name)
        elif options.peers is not None:
            raise ServerError(f"{peer.name} isn't installed ({peer.install})")
        else:
            print(f"left out: {peer.name}, not installed ({peer.install})", file=sys.stderr)
    if not names:
        raise ServerError("nothing to measure: no gate, and no peer is installed")
    return names


def _versions(names: list[str]) -> dict[str, str]:
    h2load = machine.find_program("h2load") or "h2load"
    found = {name: peers.PEERS[name].version() for name in names if name in peers.PEERS}
    return {**found, "nghttpd, h2load": machine.program_version(h2load, "--version")}


def _print_facts(facts: dict[str, str], versions: dict[str, str]) -> None:
    for name, words in facts.items():
        print(f"{name}: {words}")
    print("versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    if not peers.in_memory_tmp():
        print("nghttpd's /tmp is the machine's own (no unprivileged mount namespaces): its rate may limit every row")
    for setting in machine.gate_environment():
        print(f"gate NOT at its defaults: {setting}")
    print(flush=True)


def _found(program: str) -> bool:
    return machine.find_program(program) is not None


def _names(text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return list(dict.fromkeys(names))


def _rows(text: str) -> list[Row]:
    return [ROWS[name] for name in _names(text, list(ROWS))]


def _peers(text: str) -> list[str]:
    return _names(text, list(peers.PEERS))


def _positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} isn't a positive number")
        return value

    return parse


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
