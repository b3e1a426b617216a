"""Promise: before a version is ready, every instance of it has run the samples of its model_warmup."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.backend.repository import Repository
from tests.backend.models import write_model

RECORDS = """
import pathlib, threading
import numpy as np
place = pathlib.Path(__file__).parent
class Model:
    def execute(self, batch):
        line = repr((threading.current_thread().name, {name: (a.shape, a.tolist()) for name, a in batch.items()}))
        with (place / "ran").open("a") as file:
            file.write(line + "\\n")
        return {"OUT": np.zeros((len(next(iter(batch.values()))), 1), np.int32)}
    def finalize(self):
        (place / "finalized").touch()
"""
TENSORS = """
max_batch_size: 4
input { name: "IN" data_type: TYPE_INT32 dims: -1 optional: true }
input { name: "TEXT" data_type: TYPE_STRING dims: 2 optional: true }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
"""


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Repository]:
    made = Repository(tmp_path)
    yield made
    await asyncio.to_thread(made.close, 10)


def sample(inputs: str, batch: int = 1, more: str = "") -> str:
    return f'model_warmup {{ name: "first" batch_size: {batch} {more} {inputs} }} '


def given(name: str, data_type: str, dims: str, data: str) -> str:
    return f'inputs {{ key: "{name}" value {{ data_type: {data_type} dims: {dims} {data} }} }} '


ZEROS = given("IN", "TYPE_INT32", "2", "zero_data: true")


async def ran(
    repository: Repository, text: str, files: dict[str, str | bytes] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    write_model(repository.path, "m", TENSORS + text, {"1/model.py": RECORDS, **(files or {})})
    await repository.load()
    repository.find("m", "")
    path = repository.path / "m/1/ran"
    return [eval(line) for line in path.read_text().splitlines()] if path.exists() else []


async def test_every_instance_runs_every_sample(repository: Repository) -> None:
    text = sample(ZEROS, batch=3, more="count: 2") + "instance_group { count: 2 }"
    found = await ran(repository, text)
    assert sorted(name for name, _ in found) == ["m/1#0", "m/1#0", "m/1#1", "m/1#1"]
    assert {str(batch) for _, batch in found} == {"{'IN': ((3, 2), [[0, 0], [0, 0], [0, 0]])}"}
    assert repository.find("m", "").scheduler.statistics.execution_count == 0


async def test_kinds_of_data(repository: Repository) -> None:
    text = sample(given("IN", "TYPE_INT32", "3", "random_data: true"))
    text += sample(given("IN", "TYPE_INT32", "3", 'input_data_file: "numbers"'), batch=2)
    text += sample(given("TEXT", "TYPE_STRING", "2", 'input_data_file: "words"'))
    text += sample(given("TEXT", "TYPE_STRING", "2", "random_data: true"))
    text += sample(ZEROS, batch=0)  # left out
    words = b"\1\0\0\0a\2\0\0\0bc"
    found = await ran(repository, text, {"warmup/numbers": struct.pack("<4i", 1, 2, 3, 4), "warmup/words": words})
    batches = [batch for _, batch in found]
    assert batches[0]["IN"][0] == (1, 3)
    assert len(set(batches[0]["IN"][1][0])) == 3
    assert batches[1:] == [
        {"IN": ((2, 3), [[1, 2, 3], [1, 2, 3]])},
        {"TEXT": ((1, 2), [[b"a", b"bc"]])},
        {"TEXT": ((1, 2), [[b"", b""]])},
    ]


# model_warmup, what the reason must hold
BAD: dict[str, tuple[str, list[str]]] = {
    "unknown input": (sample(given("X", "TYPE_INT32", "1", "zero_data: true")), ["'first'", "'X' is not an input"]),
    "other type": (sample(given("IN", "TYPE_FP32", "1", "zero_data: true")), ["'FP32'", "expects 'INT32'"]),
    "other shape": (sample(given("TEXT", "TYPE_STRING", "3", "zero_data: true")), ["'TEXT'", "[1, 3]", "[-1, 2]"]),
    "no type": (sample('inputs { key: "IN" value { dims: 1 zero_data: true } }'), ["'IN'", "data_type is missing"]),
    "any size": (sample(given("IN", "TYPE_INT32", "-1", "zero_data: true")), ["'IN'", "[-1]", "every size"]),
    "no data": (sample(given("IN", "TYPE_INT32", "1", "")), ["'IN'", "zero_data, random_data or input_data_file"]),
    "large": (sample(given("IN", "TYPE_INT32", "[1000000000, 1000000000]", "zero_data: true")), ["'IN'", "1073741824"]),
    "large together": (
        sample(given("IN", "TYPE_INT32", "200000000", "zero_data: true"), batch=2),
        ["'first'", "1073741824"],
    ),
    "a large batch": (sample(ZEROS, batch=5), ["batch_size is 5", "max_batch_size is 4"]),
    "a batch without end": (sample(ZEROS, batch=2**32 - 1), ["batch_size is 4294967295", "max_batch_size is 4"]),
    "no end": (sample(ZEROS, more="count: 4294967295"), ["'first'", "count is 4294967295", "at most 10000"]),
    "no file": (sample(given("IN", "TYPE_INT32", "1", 'input_data_file: "x"')), ["warmup/x", "No such file"]),
    "a short file": (
        sample(given("IN", "TYPE_INT32", "3", 'input_data_file: "short"')),
        ["warmup/short has 3 bytes", "take 12"],
    ),
    "broken text": (sample(given("TEXT", "TYPE_STRING", "2", 'input_data_file: "short"')), ["'TEXT'", "'first'"]),
    "a path": (sample(given("IN", "TYPE_INT32", "1", 'input_data_file: "../1/model.py"')), ["plain file name"]),
    "an absolute path": (sample(given("IN", "TYPE_INT32", "1", 'input_data_file: "/etc/passwd"')), ["plain file name"]),
    "no path": (sample(given("IN", "TYPE_INT32", "1", 'input_data_file: ""')), ["plain file name"]),
}


@pytest.mark.parametrize("case", BAD.values(), ids=list(BAD))
async def test_a_warm_up_that_cannot_be_done_fails_the_load(
    repository: Repository, case: tuple[str, list[str]]
) -> None:
    write_model(repository.path, "m", TENSORS + case[0], {"1/model.py": RECORDS, "warmup/short": b"abc"})
    await repository.load()
    assert not repository.is_ready("m", "")
    says = repository.models["m"].versions[1].reason
    assert [part for part in case[1] if part not in says] == [], says


async def test_a_model_that_fails_in_its_warm_up(repository: Repository) -> None:
    failing = RECORDS.replace("        return", "        raise ValueError('cold')\n        return")
    model = write_model(repository.path, "m", TENSORS + sample(ZEROS), {"1/model.py": failing})
    await repository.load()
    says = repository.models["m"].versions[1].reason
    assert says == "m/config.pbtxt: model_warmup 'first' failed: model 'm' failed: ValueError: cold"
    assert (model / "1/finalized").exists()


async def test_a_model_without_batches_gets_each_request_alone(repository: Repository) -> None:
    tensors = TENSORS.replace("max_batch_size: 4", "").replace("TYPE_INT32 dims: 1", "TYPE_INT32 dims: [-1, 1]")
    write_model(repository.path, "m", tensors + sample(ZEROS, batch=3), {"1/model.py": RECORDS})
    await repository.load()
    repository.find("m", "")
    lines = (repository.path / "m/1/ran").read_text().splitlines()
    assert [eval(line)[1] for line in lines] == [{"IN": ((2,), [0, 0])}] * 3


async def test_a_sample_has_an_end_without_batches_too(repository: Repository) -> None:
    tensors = TENSORS.replace("max_batch_size: 4", "")
    empty = sample(given("IN", "TYPE_INT32", "0", "zero_data: true"), batch=2**32 - 1)
    write_model(repository.path, "m", tensors + empty, {"1/model.py": RECORDS})
    await repository.load()
    says = repository.models["m"].versions[1].reason
    assert says == "m/config.pbtxt: model_warmup 'first': batch_size is 4294967295; at most 10000 is supported"


@pytest.mark.parametrize("kind", ["FP16", "FP32", "FP64", "BF16"])
async def test_random_numbers_are_numbers(repository: Repository, kind: str) -> None:
    tensors = TENSORS.replace('"IN" data_type: TYPE_INT32', f'"IN" data_type: TYPE_{kind}')
    text = tensors + sample(given("IN", f"TYPE_{kind}", "500", "random_data: true"))
    write_model(repository.path, "m", text, {"1/model.py": RECORDS})
    await repository.load()
    repository.find("m", "")
    ((_, batch),) = [eval(line) for line in (repository.path / "m/1/ran").read_text().splitlines()]
    numbers = np.array(batch["IN"][1][0])
    if kind == "BF16":
        numbers = (numbers.astype("u4") << 16).view("f4")
    assert numbers.shape == (500,)
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    assert len(set(numbers.tolist())) > 50


DECOUPLED = """
import numpy as np, pathlib
class Model:
    def execute(self, batch):
        for number in range(3):
            (pathlib.Path(__file__).parent / f"ran{number}").touch()
            yield {"OUT": np.array([[number]], np.int32)}
"""


async def test_a_decoupled_model(repository: Repository) -> None:
    text = TENSORS + sample(ZEROS) + "model_transaction_policy { decoupled: true }"
    model = write_model(repository.path, "m", text, {"1/model.py": DECOUPLED})
    await repository.load()
    assert repository.find("m", "").spec.decoupled
    assert sorted(path.name for path in (model / "1").glob("ran*")) == ["ran0", "ran1", "ran2"]


async def test_a_reload_whose_warm_up_fails_keeps_what_serves(repository: Repository) -> None:
    await ran(repository, sample(ZEROS))
    before = repository.find("m", "")
    (repository.path / "m/config.pbtxt").write_text(TENSORS + sample(ZEROS, batch=5))
    await repository.poll()
    assert repository.find("m", "") is before
    assert "batch_size is 5" in repository.models["m"].reason
