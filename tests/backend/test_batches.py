"""Promise: requests of many clients run together where the model allows it, and each gets its own rows back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from proxy.backend import scheduler
from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import Code, InferenceError
from proxy.backend.execution import Output
from proxy.backend.repository import Loaded, Repository
from tests.backend.models import write_model

CONFIG = """
max_batch_size: 8
input { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] }
output { name: "OUT" data_type: TYPE_INT32 dims: [ -1 ] }
"""

DOUBLES = """
import threading
import numpy as np

class Model:
    def execute(self, batch):
        rows = batch["IN"]
        if rows.shape[0] == 1 and rows.size and rows[0, 0] == -1:
            go.wait(10)
        if (rows == 666).any():
            raise ValueError("no such number")
        if (rows == 667).any():
            return {"OUT": rows[:1] * 2}
        return {"OUT": rows * 2}

go = threading.Event()
"""


class Models:
    """A repository in the test's own event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = Repository(folder)

    async def load(self, name: str, batching: str) -> Loaded:
        write_model(self.folder, name, CONFIG + batching, {"1/model.py": DOUBLES})
        await self.repository.load()
        return self.repository.find(name, "")


@pytest.fixture
async def models(folder: Path) -> AsyncIterator[Models]:
    made = Models(folder / "models")
    yield made
    await asyncio.to_thread(made.repository.close, 5)


async def call(loaded: Loaded, *rows: list[int], **more: int) -> list[list[int]]:
    array = np.array(rows, np.int32)
    tensor = InputTensor("IN", "INT32", array.shape, raw=array.tobytes())
    (output,) = await loaded.infer(Request([tensor], **more))
    answer = np.frombuffer(output.data, np.int32).reshape(output.shape)
    return answer.tolist()  # type: ignore[no-any-return]


def release(loaded: Loaded) -> None:
    loaded.scheduler._runtime._model.execute.__globals__["go"].set()  # type: ignore[attr-defined]


async def hold(loaded: Loaded) -> asyncio.Task[list[list[int]]]:
    """Keep the only instance busy until `release`."""
    task = asyncio.ensure_future(call(loaded, [-1]))
    while not loaded.scheduler._given or loaded.scheduler._queue.qsize():
        await asyncio.sleep(0)
    return task


async def waiting(loaded: Loaded, count: int) -> list[asyncio.Task[list[list[int]]]]:
    """Calls of 0, 1, ..., which have come to the queue."""
    calls = [asyncio.ensure_future(call(loaded, [number])) for number in range(count)]
    await asyncio.sleep(0.01)
    return calls


async def test_requests_of_one_moment_run_together(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    answers = await asyncio.gather(*(call(loaded, [number, number + 1]) for number in range(6)))
    assert answers == [[[2 * number, 2 * number + 2]] for number in range(6)]
    stats = loaded.scheduler.statistics
    assert (stats.execution_count, stats.inference_count, stats.success.count) == (1, 6, 6)
    assert list(stats.batches) == [6]


async def test_without_dynamic_batching_each_runs_alone(models: Models) -> None:
    loaded = await models.load("m", "")
    assert await asyncio.gather(*(call(loaded, [number]) for number in range(6))) == [[[2 * n]] for n in range(6)]
    stats = loaded.scheduler.statistics
    assert (stats.execution_count, stats.inference_count) == (6, 6)
    assert list(stats.batches) == [1]


async def test_requests_of_several_rows_get_theirs_back(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    answers = await asyncio.gather(call(loaded, [1], [2]), call(loaded, [3]), call(loaded, [4], [5], [6], [7]))
    assert answers == [[[2], [4]], [[6]], [[8], [10], [12], [14]]]
    assert list(loaded.scheduler.statistics.batches) == [7]


async def test_requests_of_other_shapes_run_apart(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    answers = await asyncio.gather(call(loaded, [1]), call(loaded, [1, 2]), call(loaded, [3]), call(loaded, [3, 4]))
    assert answers == [[[2]], [[2, 4]], [[6]], [[6, 8]]]
    assert loaded.scheduler.statistics.execution_count == 2


async def test_what_waited_for_an_instance_runs_together(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    first = await hold(loaded)
    calls = await waiting(loaded, 5)
    assert loaded.scheduler.waiting == 5
    release(loaded)
    assert await first == [[-2]]
    assert await asyncio.gather(*calls) == [[[2 * number]] for number in range(5)]
    assert sorted(loaded.scheduler.statistics.batches) == [1, 5]


async def test_an_error_of_the_model_fails_those_that_ran_together(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    answers = await asyncio.gather(*(call(loaded, [number]) for number in (1, 666, 3)), return_exceptions=True)
    assert [(type(one), one.code) for one in answers if isinstance(one, InferenceError)] == [
        (InferenceError, Code.INTERNAL)
    ] * 3
    assert "no such number" in str(answers[0])
    assert await call(loaded, [5]) == [[10]]
    stats = loaded.scheduler.statistics
    assert (stats.fail.count, stats.success.count, stats.execution_count) == (3, 1, 2)


async def test_an_answer_of_too_few_rows_fails_them_too(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    answers = await asyncio.gather(call(loaded, [1]), call(loaded, [667]), return_exceptions=True)
    assert all("with shape [1, 1] for a batch of 2" in str(one) for one in answers)


async def test_a_caller_that_leaves_is_not_run(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    first = await hold(loaded)
    stays, leaves = asyncio.ensure_future(call(loaded, [1])), asyncio.ensure_future(call(loaded, [2]))
    await asyncio.sleep(0.01)
    leaves.cancel()
    await asyncio.sleep(0)
    release(loaded)
    assert await asyncio.gather(first, stays) == [[[-2]], [[2]]]
    assert loaded.scheduler.statistics.inference_count == 2


async def test_a_full_queue_refuses_at_once(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching { default_queue_policy { max_queue_size: 2 } }")
    first = await hold(loaded)
    calls = await waiting(loaded, 2)
    with pytest.raises(InferenceError, match="exceeds maximum queue size") as raised:
        await call(loaded, [9])
    assert raised.value.code == Code.UNAVAILABLE
    release(loaded)
    assert await asyncio.gather(first, *calls) == [[[-2]], [[0]], [[2]]]


async def test_time_in_the_queue_is_bounded(models: Models) -> None:
    policy = "default_timeout_microseconds: 20000 allow_timeout_override: true"
    loaded = await models.load("m", f"dynamic_batching {{ default_queue_policy {{ {policy} }} }}")
    first = await hold(loaded)
    own, default = (
        asyncio.ensure_future(call(loaded, [1], queue_timeout=5_000_000)), asyncio.ensure_future(call(loaded, [2]))
    )
    done, waits = await asyncio.wait([own, default], return_when=asyncio.FIRST_COMPLETED)
    assert (done, waits) == ({own}, {default})
    for late in (own, default):
        with pytest.raises(InferenceError, match="timeout expired") as raised:
            await late
        assert raised.value.code == Code.UNAVAILABLE
    release(loaded)
    assert await first == [[-2]]


async def test_priorities_go_first(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching { priority_levels: 2 default_priority_level: 2 }")
    first = await hold(loaded)
    ended: list[str] = []

    async def run(name: str, rows: int, priority: int) -> None:
        await call(loaded, *[[1]] * rows, priority=priority)
        ended.append(name)

    calls = [asyncio.ensure_future(run("low", 5, 2)), asyncio.ensure_future(run("high", 5, 1))]
    await asyncio.sleep(0.01)
    release(loaded)
    await asyncio.gather(first, *calls)
    assert ended == ["high", "low"]


async def test_answers_keep_their_order_where_that_is_asked_for(models: Models) -> None:
    loaded = await models.load("m", "instance_group { count: 2 } dynamic_batching { preserve_ordering: true }")
    first = await hold(loaded)
    second = asyncio.ensure_future(call(loaded, [5]))
    await asyncio.sleep(0.05)
    assert not second.done()  # it has run in the other instance
    assert loaded.scheduler.statistics.success.count == 1
    release(loaded)
    assert await asyncio.gather(first, second) == [[[-2]], [[10]]]


async def test_nobody_waits_for_one_whose_caller_has_left(models: Models) -> None:
    loaded = await models.load("m", "instance_group { count: 2 } dynamic_batching { preserve_ordering: true }")
    first = await hold(loaded)
    second = asyncio.ensure_future(call(loaded, [5]))
    await asyncio.sleep(0.05)
    assert not second.done()
    first.cancel()
    assert await asyncio.wait_for(second, 1) == [[10]]
    release(loaded)


async def test_one_instance_that_hangs_holds_up_no_other(models: Models) -> None:
    loaded = await models.load("m", "instance_group { count: 2 }")
    first = await hold(loaded)
    for number in range(5):
        assert await asyncio.wait_for(call(loaded, [number]), 1) == [[2 * number]]
    release(loaded)
    assert await first == [[-2]]


async def test_what_waits_when_the_model_goes_is_told_so(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    first = await hold(loaded)
    waits = asyncio.ensure_future(call(loaded, [1]))
    await asyncio.sleep(0.01)
    await asyncio.to_thread(loaded.scheduler.close)
    with pytest.raises(InferenceError, match="unloaded") as raised:
        await waits
    assert raised.value.code == Code.UNAVAILABLE
    with pytest.raises(InferenceError, match="unloaded"):
        await call(loaded, [2])
    release(loaded)
    assert await first == [[-2]]


async def test_a_call_leaves_nothing_for_the_cycle_collector(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching {}")
    await call(loaded, [1])
    gc.collect()
    gc.disable()
    try:
        for number in range(5):
            await call(loaded, [number])
        await asyncio.sleep(0.01)
        left = [one for one in gc.get_objects() if isinstance(one, (scheduler._Job, Output))]
    finally:
        gc.enable()
    assert left == []


async def test_a_batch_waits_for_company(models: Models) -> None:
    loaded = await models.load("m", "dynamic_batching { max_queue_delay_microseconds: 200000 }")
    early = asyncio.ensure_future(call(loaded, [1]))
    await asyncio.sleep(0.02)
    assert not early.done()
    late = [asyncio.ensure_future(call(loaded, [2])) for _ in range(7)]
    assert await asyncio.wait_for(early, 0.15) == [[2]]
    await asyncio.gather(*late)
    assert list(loaded.scheduler.statistics.batches) == [8]


@pytest.mark.parametrize(
    ("batching", "words"),
    [
        ("dynamic_batching { preferred_batch_size: [ 9 ] }", "preferred_batch_size is 9"),
        ("dynamic_batching { preferred_batch_size: [ 0 ] }", "preferred_batch_size is 0"),
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level is 0"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "default_priority_level is 3"),
        ("dynamic_batching { priority_levels: 17 default_priority_level: 1 }", "priority_levels is 17"),
        ("dynamic_batching { priority_queue_policy { key: 1 value {} } }", "level 1"),
    ],
)
async def test_a_policy_that_cannot_be_is_said(models: Models, batching: str, words: str) -> None:
    with pytest.raises(InferenceError, match=words) as raised:
        await models.load("m", batching)
    assert raised.value.code == Code.UNAVAILABLE
