"""The answers of a decoupled model to one request, on their way from the model's thread to the event loop.

Bounded: a model that is faster than its client waits. One whose client takes nothing for long is told to stop, since
the thread that waits serves others, too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from threading import Semaphore

from proxy.backend.errors import Code, InferenceError
from proxy.backend.execution import CallerLeft, Output

MOST_AHEAD = 16  # answers that the client hasn't taken
_PATIENCE = 30.0  # seconds in which it has to take one


class Answers:
    """One end is for the model's thread (`put`), the other for the event loop that it is made on (`until`)."""

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience = patience
        self._came: deque[Sequence[Output]] = deque()
        self._changed = asyncio.Event()
        self._room = Semaphore(MOST_AHEAD)
        self._left = False

    def put(self, outputs: Sequence[Output]) -> None:
        """From the thread; waits for room. Raises CallerLeft, and InferenceError when there is none for long."""
        if not self._room.acquire(timeout=self._patience):
            raise InferenceError(
                Code.RESOURCE_EXHAUSTED,
                f"the client took none of {MOST_AHEAD} answers in {self._patience:g} s, which is the limit",
            )
        if self._left:
            raise CallerLeft
        self._came.append(outputs)  # here, not on the loop: it may hear of the end before it hears of this
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:
            raise CallerLeft from None  # the loop is closed: the process ends

    async def until(self, end: asyncio.Future[Sequence[Output]]) -> AsyncIterator[Sequence[Output]]:
        """The answers up to the end, whose exception is raised behind them."""
        end.add_done_callback(lambda _: self._changed.set())
        while True:
            while self._came:
                outputs = self._came.popleft()
                self._room.release()
                yield outputs
                del outputs
            if end.done():
                end.result()
                return
            self._changed.clear()
            await self._changed.wait()

    def leave(self) -> None:
        """Nobody will take any more of them."""
        self._left = True
        self._came.clear()
        self._room.release()
