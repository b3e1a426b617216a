"""The one place that starts background tasks.

A task that nothing refers to may be garbage-collected in mid-flight, and the exception of a task that nobody
awaits is lost. Tasks started here are held until they end, and an error that escapes one is logged.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

_log = logging.getLogger("tensorgate")
_running: set[asyncio.Task[Any]] = set()


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("background task %s failed: %s", task.get_name(), error, exc_info=error)


def spawn(coro: Coroutine[Any, Any, Any], name: str) -> "asyncio.Task[Any]":
    """Run a coroutine in the background of the running loop, under a name that its error is logged with."""
    task = asyncio.get_running_loop().create_task(coro, name=name)
    _running.add(task)
    task.add_done_callback(_ended)
    return task
