"""Fuzzing of the wire core with atheris: `python -m tests.fuzz [--seconds 60] [--target server|client|hpack]`.

Each target runs in a process of its own, since libFuzzer ends the one that it runs in; without --target all of them at
once, and what they print is shown where something was found. An input that breaks an invariant is kept in
tests/fuzz/crashes/, where the test suite runs it from then on. Exits 1 if there is one.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGETS = {"server": "tests.fuzz.server", "client": "tests.fuzz.client", "hpack": "tests.fuzz.header_blocks"}
_SHOWN_LINES = 40
_MAX_INPUT = {"server": 8192, "client": 8192, "hpack": 1024}


def fuzz(name: str, arguments: list[str]) -> None:
    """Become libFuzzer; doesn't return."""
    from importlib import import_module

    import atheris

    with atheris.instrument_imports(include=["proxy.http2"]):
        target = import_module(TARGETS[name]).target
    if name == "hpack":
        atheris.Setup([name, *arguments], target)
    else:
        from tests.fuzz.mutation import mutation

        def mutator(data: bytes, max_size: int, seed: int) -> bytes:
            return mutation(data, max_size, seed, atheris.Mutate)

        atheris.Setup([name, *arguments], target, custom_mutator=mutator)
    atheris.Fuzz()


def command(name: str, seconds: int, corpus: Path) -> list[str]:
    """What fuzzes one target for so long."""
    found, crashes = corpus / name, HERE / "crashes" / name
    found.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={_MAX_INPUT[name]}",
        f"-artifact_prefix={crashes}/",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        str(found),
        str(HERE / "corpus" / name),
    ]
    return [sys.executable, "-m", "tests.fuzz", "--inside", name, *arguments]


def run(names: Sequence[str], seconds: int, corpus: Path) -> list[str]:
    """Fuzz these targets side by side -> those in which something was found, or that didn't run to their end."""
    logs = {name: corpus / f"{name}.log" for name in names}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in names:
            # One alone is for somebody who watches it.
            output = logs[name].open("wb") if len(names) > 1 else None
            processes[name] = subprocess.Popen(command(name, seconds, corpus), cwd=ROOT, stdout=output, stderr=output)
            if output is not None:
                output.close()
        broken = [name for name in names if processes[name].wait() != 0]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    if len(names) > 1:
        for name in names:
            text = logs[name].read_text(errors="replace")
            done = re.search(r"^Done (\d+ runs in \d+) second", text, flags=re.MULTILINE)
            shown = "\n".join(text.splitlines()[-_SHOWN_LINES:]) if name in broken else f"{done[1] if done else '?'} s"
            print(f"== {name}: {shown}", file=sys.stderr)
    return broken


def kept(names: Sequence[str]) -> set[Path]:
    """The inputs that have broken something so far. (libFuzzer keeps those that are merely slow, too.)"""
    paths = [path for name in names for path in (HERE / "crashes" / name).glob("*")]
    return {path for path in paths if not path.name.startswith("slow-unit-")}


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        fuzz(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="how long each target runs (default: 60)")
    parser.add_argument("--target", choices=list(TARGETS), help="only this one (default: all)")
    parser.add_argument("--corpus", type=Path, help="a folder for inputs that reach something new (default: none kept)")
    options = parser.parse_args()
    if find_spec("atheris") is None:
        print("fuzzing needs atheris: pip install 'tensorgate[dev]', or pip install atheris", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _end)
    names = [options.target] if options.target else list(TARGETS)
    before = kept(names)
    with tempfile.TemporaryDirectory() as scratch:
        broken = run(names, options.seconds, options.corpus.resolve() if options.corpus else Path(scratch))
    for path in sorted(kept(names) - before):
        print(f"an invariant is broken by {path.relative_to(ROOT)}", file=sys.stderr)
        print(f"  to run it again: {sys.executable} -m pytest tests/fuzz -k {path.name}", file=sys.stderr)
    if broken:
        print(f"fuzzing failed: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
