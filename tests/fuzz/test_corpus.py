"""Every seed and every input that ever broke an invariant, run through the fuzz targets without atheris."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import seeds
from tests.fuzz.__main__ import HERE, TARGETS
from tests.fuzz.mutation import mutation
from tests.http2.wire import no_longer_than

INPUTS = [
    pytest.param(name, path, id=f"{folder}-{name}-{path.name}")
    for folder in ("corpus", "crashes")
    for name in TARGETS
    for path in sorted((HERE / folder / name).glob("*"))
]


@pytest.fixture(autouse=True)
def _no_endless_loop() -> Iterator[None]:
    with no_longer_than(60):
        yield


@pytest.mark.parametrize(("name", "path"), INPUTS)
def test_the_invariants_hold(name: str, path: Path) -> None:
    import_module(TARGETS[name]).target(path.read_bytes())


def exchanged(data: bytes, size: int) -> bytes:
    """Two bytes exchanged: what stands for libFuzzer's own mutator here."""
    out = bytearray(data[:size])
    if out:
        random = Random(data)
        one, other = random.randrange(len(out)), random.randrange(len(out))
        out[one], out[other] = out[other], out[one]
    return bytes(out)


@pytest.mark.parametrize("name", ["server", "client"])
def test_the_invariants_hold_for_some_mutations(name: str) -> None:
    """The same few each time, made as the fuzzer makes them, so that its mutator is run where atheris is not."""
    target = import_module(TARGETS[name]).target
    texts = list((seeds.servers() if name == "server" else seeds.clients()).values())
    for seed in range(150):
        text = texts[seed % len(texts)]
        for step in range(4):
            text = mutation(text, 8192, 10 * seed + step, exchanged)
        target(text)


def test_the_corpus_is_what_the_script_makes() -> None:
    made = {"server": seeds.servers(), "client": seeds.clients(), "hpack": seeds.header_blocks()}
    for name, files in made.items():
        assert {path.name: path.read_bytes() for path in (seeds.CORPUS / name).iterdir()} == files
