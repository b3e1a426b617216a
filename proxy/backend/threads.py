"""Work that takes long but not for ever, in threads beside the event loop: parsing, compressing, hashing.

Few at a time. Who waits for a turn and leaves takes what it holds along at once; who leaves while its job runs leaves
when that ends, since until then the job holds the bytes: a budget that gave them back earlier would count nothing of
what senders leave behind. What never gives the interpreter's lock back stalls the loop from any thread, so a job is
one of many short calls.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from threading import Thread
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

MOST_JOBS = 4  # at a time

T = TypeVar("T")
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


class Run(Protocol):
    """Does a job outside the event loop."""

    def __call__(self, job: Callable[[], T], /) -> Awaitable[T]: ...


async def in_thread(job: Callable[[], T]) -> T:
    """`job()`, when it has its turn. Raises what it raises."""
    async with turn() as run:
        return await run(job)


@asynccontextmanager
async def turn() -> AsyncIterator[Run]:
    """For several jobs, one after the other, and what is counted between them."""
    loop = asyncio.get_running_loop()
    turns = _turns.get(loop)
    if turns is None:
        turns = _turns[loop] = asyncio.Semaphore(MOST_JOBS)
    async with turns:
        yield _run


def start(job: Callable[[], T], name: str) -> asyncio.Future[T]:
    """`job()` in a thread of its own, at once, however long it takes -> what becomes of it.

    Not a pool's: the interpreter would wait for those at its end, and a model's code may never return.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    Thread(target=_work, args=(job, loop, done), name=name, daemon=True).start()
    return done


async def _run(job: Callable[[], T]) -> T:
    done = start(job, "job")
    del job
    left: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError as error:
            left = error
    try:
        if left is not None:
            done.exception()  # nobody will ask for it
            raise left
        return done.result()
    finally:
        # An exception holds this frame: with a way back to it, it would keep what the job had until the collector runs.
        del done, left


def _work(job: Callable[[], T], loop: asyncio.AbstractEventLoop, done: asyncio.Future[T]) -> None:
    result, fault = None, None
    try:
        result = job()
    except BaseException as error:  # noqa: BLE001  (who waits gets it)
        fault = error
    del job
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
        loop.call_soon_threadsafe(_settle, done, result, fault)
    del done, result, fault  # the same


def _settle(done: asyncio.Future[T], result: T | None, fault: BaseException | None) -> None:
    if done.done():
        return  # who waited for it has left
    if fault is not None:
        done.set_exception(fault)
    else:
        done.set_result(result)  # type: ignore[arg-type]
