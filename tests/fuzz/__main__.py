"""Fuzzing of the wire core with atheris: `python -m tests.fuzz [--seconds 60] [--target server|client|hpack]`.

Each target runs in a process of its own, since libFuzzer ends the one that it runs in. An input that breaks an
invariant is kept in tests/fuzz/crashes/, where the test suite runs it from then on. Exits 1 if there is one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = {"server": "tests.fuzz.server", "client": "tests.fuzz.client", "hpack": "tests.fuzz.header_blocks"}
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


def run(name: str, seconds: int, corpus: Path) -> bool:
    """Fuzz one target for so long -> whether nothing was found."""
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
    print(f"== {name}, {seconds} s", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "tests.fuzz", "--inside", name, *arguments]
    return subprocess.run(command, cwd=HERE.parent.parent).returncode == 0


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
    with tempfile.TemporaryDirectory() as scratch:
        corpus = options.corpus.resolve() if options.corpus else Path(scratch)
        names = [options.target] if options.target else list(TARGETS)
        broken = [name for name in names if not run(name, options.seconds, corpus)]
    for name in broken:
        print(f"{name}: an invariant is broken; the input is in tests/fuzz/crashes/{name}/", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
