"""`python -m tests.bench`: see the package's docstring."""

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import machine, peers, report
from .load import SHAPES, Shape
from .measure import Bench, Plan
from .processes import ServerError

NEEDED = (("nghttpd", "nghttp2-server"), ("h2load", "nghttp2-client"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every run was an echo of every request; 1: a run failed, or a server didn't start; 2: usage."""
    options = _parser().parse_args(arguments)
    missing = [f"{program} (apt-get install {package})" for program, package in NEEDED if not _found(program)]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
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
    plan = Plan(options.shapes, options.repeats, options.seconds, options.requests)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorgate-bench-")))
        echo = stack.enter_context(peers.upstream(folder))
        site = peers.make_site(folder, echo.port)
        servers = stack.enter_context(peers.proxies(site, names))
        say = (lambda words: None) if options.quiet else (lambda words: print(words, file=sys.stderr, flush=True))
        neighbours = machine.Neighbours([echo, *servers])
        results = report.Results(plan.shapes, servers, list(Bench(plan, echo, servers, folder, say).runs()))
        facts["used by other processes"] = f"{neighbours.share():.1%} of the machine's CPU, on average"
        print(report.text(results))
        print(f"used by other processes: {facts['used by other processes']}")
        if options.json:
            report.write_json(options.json, results, facts, versions)
    return 1 if results.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="The gate beside its peers.")
    parser.add_argument("--shapes", type=_shapes, default=list(SHAPES.values()), metavar="NAME,...",
                        help=f"of {', '.join(SHAPES)} (default: all)")  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=_positive(float), default=4.0, metavar="S",
                        help="how long a measured run takes, roughly (default: 4)")  # fmt: skip
    length.add_argument("--requests", type=_positive(int), metavar="N", help="requests of a run, instead of --seconds")
    parser.add_argument("--repeats", type=_positive(int), default=3, metavar="N",
                        help="measured runs of each proxy in each shape (default: 3)")  # fmt: skip
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--peers", type=_peers, metavar="NAME,...",
                     help=f"of {', '.join(peers.PEERS)} (default: those that are installed)")  # fmt: skip
    who.add_argument("--gate-only", action="store_true", help="no peers")
    parser.add_argument("--no-gate", action="store_true", help="the peers only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every run and the medians there")
    parser.add_argument("--quiet", action="store_true", help="don't say each run's figures on stderr")
    return parser


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


def _names(text: str, known: dict[str, object] | dict[str, Shape] | dict[str, peers.Peer]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def _shapes(text: str) -> list[Shape]:
    return [SHAPES[name] for name in _names(text, SHAPES)]


def _peers(text: str) -> list[str]:
    return _names(text, peers.PEERS)


def _positive(kind: type[int] | type[float]):
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
