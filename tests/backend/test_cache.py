"""Promise: a response that is kept answers the same request, no other one, and none of another model or version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.backend.cache import ResponseCache, key_of
from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import InferenceError
from proxy.backend.execution import Output
from proxy.backend.loaded import Loaded
from proxy.backend.repository import Control, Repository
from tests.backend.models import write_model

CONFIG = """
max_batch_size: 8
response_cache { enable: true }
input { name: "IN" data_type: TYPE_INT32 dims: -1 }
output { name: "OUT" data_type: TYPE_INT32 dims: -1 }
output { name: "RUN" data_type: TYPE_INT32 dims: 1 }
"""
COUNTS = """
import numpy as np

class Model:
    runs = 0

    def execute(self, batch):
        if batch["IN"].max() == 13:
            raise ValueError("thirteen")
        self.runs += 1
        return {"OUT": batch["IN"] * 2, "RUN": np.full((len(batch["IN"]), 1), self.runs, np.int32)}
"""


def asking(*values: int, outputs: dict[str, int] | None = None) -> Request:
    raw = np.array([values], np.int32).tobytes()
    return Request([InputTensor("IN", "INT32", (1, len(values)), raw=raw)], outputs or {})


async def run_of(loaded: Loaded, request: Request) -> int:
    """Which of the model's runs the answer is from."""
    made = {output.name: output for output in await loaded.infer(request)}
    return int(np.frombuffer(made["RUN"].data, np.int32)[0])


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Repository]:
    write_model(tmp_path / "models", "m", CONFIG, {"1/model.py": COUNTS})
    write_model(tmp_path / "models", "other", CONFIG, {"1/model.py": COUNTS})
    write_model(tmp_path / "models", "plain", CONFIG.replace("true", "false"), {"1/model.py": COUNTS})
    made = Repository(tmp_path / "models", Control("explicit", startup=("*",)))
    await made.load()
    yield made
    made.close(timeout=10)


async def test_the_same_request_is_answered_from_the_cache(repository: Repository) -> None:
    loaded = repository.find("m", "")
    assert [await run_of(loaded, asking(1, 2)) for _ in range(3)] == [1, 1, 1]
    assert await run_of(loaded, asking(2, 1)) == 2
    made = loaded.scheduler.statistics
    assert (made.cache_hit.count, made.cache_miss.count) == (2, 2)
    assert (made.success.count, made.inference_count, made.execution_count) == (4, 2, 2)


async def test_without_response_cache_each_request_runs(repository: Repository) -> None:
    loaded = repository.find("plain", "")
    assert [await run_of(loaded, asking(1)) for _ in range(2)] == [1, 2]


async def test_models_do_not_share_responses(repository: Repository) -> None:
    one, other = repository.find("m", ""), repository.find("other", "")
    assert await run_of(one, asking(1)) == 1
    assert await run_of(one, asking(2)) == 2
    assert await run_of(other, asking(2)) == 1


async def test_other_outputs_make_another_request(repository: Repository) -> None:
    loaded = repository.find("m", "")
    both = await loaded.infer(asking(1))
    (one,) = await loaded.infer(asking(1, outputs={"OUT": 0}))
    (classes,) = await loaded.infer(asking(1, outputs={"OUT": 1}))
    assert [output.name for output in both] == ["OUT", "RUN"]
    assert (one.name, one.datatype, classes.datatype) == ("OUT", "INT32", "BYTES")


async def test_a_failure_is_not_kept(repository: Repository) -> None:
    loaded = repository.find("m", "")
    for _ in range(2):
        with pytest.raises(InferenceError, match="thirteen"):
            await loaded.infer(asking(13))
    assert loaded.scheduler.statistics.cache_hit.count == 0


async def test_a_wrong_request_is_refused_each_time(repository: Repository) -> None:
    loaded = repository.find("m", "")
    await loaded.infer(asking(1, 2))
    wrong = asking(1, 2)
    wrong.inputs = [replace(wrong.inputs[0], datatype="FP32")]
    for _ in range(2):
        with pytest.raises(InferenceError, match="FP32"):
            await loaded.infer(wrong)


async def test_a_model_that_is_loaded_anew_starts_with_none(repository: Repository) -> None:
    assert await run_of(repository.find("m", ""), asking(5)) == 1
    assert await run_of(repository.find("m", ""), asking(6)) == 2
    file = repository.path / "m/1/model.py"
    file.write_text(file.read_text() + "\n")
    await repository.load_model("m")
    assert await run_of(repository.find("m", ""), asking(6)) == 1


async def test_requests_at_the_same_time(repository: Repository) -> None:
    loaded = repository.find("m", "")
    runs = await asyncio.gather(*(run_of(loaded, asking(value % 3)) for value in range(30)))
    assert len(set(runs)) <= 30
    again = await asyncio.gather(*(run_of(loaded, asking(value)) for value in range(3)))
    assert set(again) <= set(runs)


def output(size: int) -> list[Output]:
    return [Output("OUT", "UINT8", (size,), bytes(size))]


def test_what_was_used_least_recently_goes_first() -> None:
    cache = ResponseCache(4 * 1512)
    for number in range(4):
        cache.put((1, bytes([number])), output(1000))
    assert cache.get((1, b"\0")) is not None
    cache.put((1, b"new"), output(1000))
    assert cache.get((1, b"\1")) is None
    assert [cache.get((1, key)) is not None for key in (b"\0", b"\2", b"\3", b"new")] == [True] * 4


def test_one_that_is_larger_than_all_is_not_kept() -> None:
    cache = ResponseCache(2000)
    cache.put((1, b"a"), output(100))
    cache.put((1, b"b"), output(5000))
    assert cache.get((1, b"b")) is None
    assert cache.get((1, b"a")) is not None


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=2), st.integers(0, 3000), st.booleans()), max_size=60))
def test_the_size_is_bounded_and_counted(steps: list[tuple[int, bytes, int, bool]]) -> None:
    cache = ResponseCache(8000)
    for owner, key, size, forget in steps:
        if forget:
            cache.forget(owner)
        else:
            cache.put((owner, key), output(size))
        assert 0 <= cache.size <= 8000
    for owner in range(4):
        cache.forget(owner)
    assert cache.size == 0


async def test_requests_that_differ_have_different_keys() -> None:
    tensor = InputTensor("IN", "INT32", (1, 2), raw=bytes(8))
    several = [
        Request([tensor]),
        Request([replace(tensor, raw=b"\1" + bytes(7))]),
        Request([replace(tensor, shape=(2, 1))]),
        Request([replace(tensor, name="I")]),
        Request([replace(tensor, datatype="FP32")]),
        Request([tensor, replace(tensor, name="B")]),
        Request([tensor], {"OUT": 0}),
        Request([tensor], {"OUT": 2}),
        Request([replace(tensor, raw=None, values=[0, 0])]),
        Request([replace(tensor, raw=bytes(300_000))]),
    ]
    keys = [await key_of(1, request) for request in several]
    assert len(set(keys)) == len(several)
    assert None not in keys
    assert await key_of(2, several[0]) != keys[0]
    other_order = Request([several[5].inputs[1], several[5].inputs[0]])
    assert await key_of(1, other_order) == keys[5]
    assert await key_of(1, Request([replace(tensor, raw=None, values=[0] * 70_000)])) is None
