"""Repositories that change while they are served: models that answer with a number, and calls that go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.repository import IndexEntry, Repository
from tests.backend.models import NUMBER_TO_NUMBER


def answers(number: int, more: str = "") -> str:
    """A model.py whose answer is `number`."""
    return f"""
import numpy as np
{more}
class Model:
    def execute(self, batch):
        return {{"OUT": np.array([{number}], np.int32)}}
"""


BROKEN = "raise ValueError('boom')\n"


def write(directory: Path, code: str, config: str = NUMBER_TO_NUMBER, version: int = 1) -> Path:
    """Write a model, or write over one."""
    (directory / str(version)).mkdir(parents=True, exist_ok=True)
    (directory / "config.pbtxt").write_text(config)
    (directory / str(version) / "model.py").write_text(code)
    return directory


async def ask(repository: Repository, name: str, version: str = "", sent: int = 0) -> int:
    """The number that a model answers with."""
    raw = np.array([sent], np.int32).tobytes()
    (output,) = await repository.find(name, version).infer(Request([InputTensor("IN", "INT32", (1,), raw=raw)]))
    return int(np.frombuffer(output.data, np.int32)[0])


def index(repository: Repository, ready_only: bool = False) -> list[tuple[str, str, str, str]]:
    return [tuple(line) for line in map(_line, repository.index(ready_only))]


def _line(entry: IndexEntry) -> tuple[str, str, str, str]:
    return entry.name, entry.version, entry.state, entry.reason


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread is about to do."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


@asynccontextmanager
async def calls(repository: Repository, name: str, tasks: int = 8) -> AsyncIterator[list[int | Exception]]:
    """Calls that follow each other in some tasks; the list gets what comes of each."""
    came: list[int | Exception] = []
    over = False

    async def call() -> None:
        while not over:
            try:
                came.append(await ask(repository, name))
            except Exception as error:
                came.append(error)
                await asyncio.sleep(0.001)

    running = [asyncio.create_task(call()) for _ in range(tasks)]
    try:
        yield came
    finally:
        over = True
        await asyncio.gather(*running)
