"""Where tests meet a model that runs in their own process: models import this module like any other code does."""

from __future__ import annotations

import threading

release = threading.Event()
running = threading.Semaphore(0)
ran: list[int] = []
finalized: list[str] = []


def reset() -> None:
    """Forget what happened; models wait again."""
    release.clear()
    ran.clear()
    finalized.clear()
    while running.acquire(blocking=False):
        pass


def execute(number: int) -> None:
    """Called by the model: note the number, and wait for the test."""
    ran.append(number)
    running.release()
    assert release.wait(30), "the test never released its model"
