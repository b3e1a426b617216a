"""Promise: what runs beside the event loop is few at a time, and what it holds is held until it ends."""

from __future__ import annotations

import asyncio
import gc
import gzip
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from proxy.backend import threads
from proxy.backend.budget import Budget
from proxy.backend.cache import key_of
from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.services import compression
from proxy.backend.services.compression import Inflater, NotCompressed, deflate
from proxy.backend.services.rest import asked, jsontext
from proxy.backend.services.rest.exchange import Exchange
from proxy.backend.threads import MOST_JOBS, in_thread, turn
from tests.support.processes import LIVENESS


class Job:
    """Runs until it is told to end."""

    def __init__(self) -> None:
        self.began, self.end = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.end.wait(LIVENESS)
        return "done"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIVENESS):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_job_gives_what_it_gives_and_raises_what_it_raises() -> None:
    assert await in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)
    async with turn() as run:
        assert [await run(lambda: 1), await run(lambda: 2)] == [1, 2]


def test_every_event_loop_has_turns_of_its_own() -> None:
    async def crowd() -> int:
        return sum(await asyncio.gather(*(in_thread(lambda: 1) for _ in range(3 * MOST_JOBS))))

    assert [asyncio.run(crowd()) for _ in range(2)] == [3 * MOST_JOBS] * 2


async def test_few_run_at_a_time_and_who_leaves_before_its_turn_runs_nothing() -> None:
    jobs = [Job() for _ in range(MOST_JOBS + 2)]
    tasks = [asyncio.create_task(in_thread(job)) for job in jobs]
    await until(lambda: sum(job.began.is_set() for job in jobs) == MOST_JOBS)
    tasks[-2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[-2]
    assert not jobs[-1].began.is_set()
    for job in jobs:
        job.end.set()
    assert await asyncio.gather(*tasks[:-2], tasks[-1]) == ["done"] * (MOST_JOBS + 1)
    assert not jobs[-2].began.is_set()


async def test_who_leaves_its_job_leaves_when_that_ends() -> None:
    job = Job()
    task = asyncio.create_task(in_thread(job))
    await until(job.began.is_set)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    job.end.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nobody_asks_for_the_fault_of_a_job_that_was_left() -> None:
    job = Job()

    def fails() -> None:
        job()
        raise ValueError

    task = asyncio.create_task(in_thread(fails))
    await until(job.began.is_set)
    task.cancel()
    job.end.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leaves", [False, True])
async def test_what_a_failed_job_had_is_gone_with_its_fault(leaves: bool) -> None:
    class Document:
        pass

    job, had = Job(), []

    def fails() -> None:
        document = Document()
        had.append(weakref.ref(document))
        job()
        raise ValueError

    async def serve() -> None:
        try:
            await in_thread(fails)
        except ValueError:
            pass

    gc.disable()
    try:
        task = asyncio.create_task(serve())
        await until(job.began.is_set)
        if leaves:
            task.cancel()
            await asyncio.sleep(0)
        job.end.set()
        await asyncio.wait([task])
        del task
        await until(lambda: had[0]() is None)
    finally:
        gc.enable()


async def test_a_document_is_counted_for_as_long_as_a_thread_reads_it() -> None:
    budget, job = Budget(2**30), Job()
    exchange = Exchange(cast(Any, None), budget, LIVENESS, closing=False)
    text = memoryview(b"[" + b"1," * jsontext.LONG_TO_PARSE + b"1]")

    async def serve() -> None:
        try:
            await asked.parsed(exchange, text, text[:0], lambda document, rest: cast(Any, job()))
        finally:
            exchange.release()

    task = asyncio.create_task(serve())
    await until(job.began.is_set)
    task.cancel()
    await asyncio.sleep(0)
    assert budget.held == jsontext.weigh(text)
    job.end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert budget.held == 0


async def test_who_leaves_while_others_have_their_turn_takes_its_document_along() -> None:
    budget, jobs = Budget(2**30), [Job() for _ in range(MOST_JOBS)]
    busy = [asyncio.create_task(in_thread(job)) for job in jobs]
    await until(lambda: all(job.began.is_set() for job in jobs))
    exchange = Exchange(cast(Any, None), budget, LIVENESS, closing=False)
    text = memoryview(b"[" + b"1," * jsontext.LONG_TO_PARSE + b"1]")
    waiting = asyncio.create_task(asked.parsed(exchange, text, text[:0], lambda document, rest: cast(Any, None)))
    await asyncio.sleep(0)
    assert budget.held == 0  # besides its bytes, which are the exchange's
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for job in jobs:
        job.end.set()
    await asyncio.gather(*busy)


async def test_hashing_has_its_turn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = InputTensor("IN", "INT8", (2**20,), raw=bytes(2**20))
    with monkeypatch.context() as patched:
        patched.setattr(threads, "Thread", None)  # nothing but a thread of this module would do
        with pytest.raises(TypeError):
            await key_of(1, Request([tensor]))
    assert await key_of(1, Request([tensor])) is not None


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("size", [0, 1, 100, compression._PIECE + 1, 3 * compression._STEP + 7])
@pytest.mark.parametrize("dense", [True, False])
async def test_what_is_compressed_comes_back_step_by_step(encoding: str, size: int, dense: bool) -> None:
    data = os.urandom(size) if dense else bytes(size)
    steps: list[int] = []
    packed = b"".join(await deflate([data[:10], memoryview(data)[10:]], encoding, steps.append))
    back = bytearray()
    grown: list[int] = []
    assert await Inflater(encoding).inflate(packed + b"behind", back, size, grown.append) == 6
    assert back == data
    assert sum(grown) == size
    assert max(grown) <= compression._STEP
    assert sum(steps) <= len(packed)
    assert len(steps) >= size // compression._STEP
    if len(packed) > 20:
        with pytest.raises(NotCompressed, match="cut off"):
            await Inflater(encoding).inflate(packed[:-1], bytearray(), 2 * size, grown.append)


async def test_zlib_gets_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies what it leaves of it, so that all at once would cost quadratic time."""
    packed = gzip.compress(os.urandom(4 * 2**20), 1)
    inflater = Inflater("gzip")
    real, got = inflater._inflater, []

    class Counts:
        def decompress(self, data: bytes, most: int) -> bytes:
            got.append(len(data))
            return real.decompress(data, most)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(inflater, "_inflater", Counts())
    back = bytearray()
    assert await inflater.inflate(packed, back, 2**30, lambda size: None) == 0
    assert len(back) == 4 * 2**20
    assert max(got) <= compression._PIECE


def test_steps_are_all_of_it_and_none_is_large() -> None:
    pieces = [bytes(3), b"", bytes(3 * compression._STEP + 1), *([bytes(1000)] * 3000)]
    steps = compression._steps(pieces)
    assert b"".join(part for step in steps for part in step) == b"".join(pieces)
    assert max(sum(map(len, step)) for step in steps) <= compression._STEP
