"""Runs the steps of all TLS handshakes, one in a turn of the event loop, as `pacing` has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic, thread_time
from typing import TYPE_CHECKING

from proxy.tls.pacing import Pacer

if TYPE_CHECKING:
    from proxy.tls.shell import Shell

# Two steps with no more than this in between are taken to be of one turn of the loop: many clients' messages came at
# once. Asking the loop for its next turn each time would cost it one more round.
_TURN_SECONDS = 0.0002
_LEAST_SECONDS = 0.001  # a timer's resolution
_AROUND_SECONDS = 0.00005  # what a step costs besides: reading, waiting its turn


class Handshakes:
    """work: () -> a number that changes when connections that have been there for a while send something."""

    def __init__(self, work: Callable[[], int], give_up: Callable[[Shell], None]) -> None:
        self._work = work
        self._pacer: Pacer[Shell] = Pacer(give_up)
        self._turn: asyncio.Handle | None = None  # the loop's next turn, where somebody waits for it
        self._timer: asyncio.TimerHandle | None = None
        self._ended = 0.0

    def want(self, shell: Shell) -> None:
        """A shell has what its handshake needs to go on: its `step` is called once, now or in its turn."""
        now = monotonic()
        self._pacer.add(shell, shell.network, now)
        if self._turn is None:
            if now - self._ended > _TURN_SECONDS:
                self._run(now)
            else:
                self._turn = asyncio.get_running_loop().call_soon(self._next_turn)

    def done(self, shell: Shell) -> None:
        """A shell's handshake is over, or the shell is."""
        self._pacer.done(shell)
        if self._turn is None and self._pacer:
            self._turn = asyncio.get_running_loop().call_soon(self._next_turn)  # there may be room for another one

    def others_busy(self) -> bool:
        """Whether connections that have been there for a while have work."""
        now = monotonic()
        self._pacer.note_work(self._work(), now)
        return self._pacer.is_busy(now)

    def forget(self) -> None:
        """For a timer: see Pacer.forget."""
        self._pacer.forget(monotonic())

    def _next_turn(self) -> None:
        self._turn = None
        if self._pacer:
            self._run(monotonic())

    def _run(self, now: float) -> None:
        """One step, if one is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pacer = self._pacer
        pacer.note_work(self._work(), now)
        shell = pacer.take(now)
        if shell is None:
            if pacer:
                seconds = max(pacer.due(now) - now, _LEAST_SECONDS)
                self._timer = asyncio.get_running_loop().call_later(seconds, self._next_turn)
            return
        if pacer:
            # First, so that no error keeps the others waiting. What is readable gets its turn before the next step.
            self._turn = asyncio.get_running_loop().call_soon(self._next_turn)
        # The processor's time, not the clock's: when others keep it busy, that's not a handshake's fault.
        began = thread_time()
        shell.step()
        spent = thread_time() - began
        self._ended = monotonic()
        pacer.spent(shell.network, spent + _AROUND_SECONDS, self._ended)
