"""Jobs and the threads that run them: the one place where the event loop and the models meet.

A model version has one queue and a thread for each of its instances. The loop only puts jobs in and gets results
back; it never waits for a model, and a model's thread never touches anything of the loop's but `call_soon_threadsafe`.

This is the seam for batching: whatever stands between `submit` and the threads may gather jobs, as long as each ends
exactly once and those that nobody waits for any more are left out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from proxy.backend.errors import Code, InferenceError, LoadError, description
from proxy.backend.runtimes import Instance, Runtime
from proxy.backend.spec import Device, ModelSpec
from proxy.backend.tensors import Buffer

MOST_WAITING = 8192  # requests in the queue of a model version; a model that hangs must not gather them without end

_log = logging.getLogger("tensorgate.backend")


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the answer, as it goes onto the wire."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer


class Task(Protocol):
    """A checked request."""

    def run(self, instance: Instance) -> Sequence[Output]:
        """Called in an instance's thread, once. Raises InferenceError; any other exception is the model's failure."""


class _Job:
    """A task on its way; None once nobody waits for it. Threads only read `task`, and leave `future` to the loop."""

    __slots__ = ("deadline", "future", "loop", "task")

    def __init__(self, task: Task, deadline: float | None, loop: asyncio.AbstractEventLoop) -> None:
        self.task: Task | None = task
        self.deadline = deadline
        self.loop = loop
        self.future: asyncio.Future[Sequence[Output]] = loop.create_future()

    def end(self, result: Sequence[Output] | None, error: Exception | None) -> None:
        """From a thread: hand the outcome over."""
        try:
            self.loop.call_soon_threadsafe(self._end, result, error)
        except RuntimeError:
            pass  # the loop is closed: the process ends, and nobody waits

    def _end(self, result: Sequence[Output] | None, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result or ())


class Scheduler:
    """The threads of one model version. They are started by `start` and ended by `close`."""

    def __init__(self, spec: ModelSpec, runtime: Runtime, devices: Sequence[Device]) -> None:
        self._spec = spec
        self._runtime = runtime
        self._devices = devices
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._quiet_until = 0.0
        self._unlogged = 0

    def start(self) -> None:
        """Start every instance and wait until all of them are initialized. Blocks; raises LoadError."""
        started: list[Future[None]] = []
        for index, device in enumerate(self._devices):
            ready: Future[None] = Future()
            name = f"{self._spec.name}/{self._spec.version}#{index}"
            # A daemon: a model that never returns must not keep the process from ending.
            thread = Thread(target=self._live, args=(device, ready), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
            started.append(ready)
        faults = [fault for ready in started if (fault := ready.exception()) is not None]
        if faults:
            self.close()
            raise faults[0]

    @property
    def waiting(self) -> int:
        """Jobs that no thread has taken yet."""
        return self._queue.qsize()

    async def submit(self, task: Task, deadline: float | None) -> Sequence[Output]:
        """Run a task in one of the threads; `deadline` is on the clock of time.monotonic.

        Raises InferenceError. A caller that is cancelled while its task still waits keeps it from ever running.
        """
        if self.waiting >= MOST_WAITING:
            raise InferenceError(
                Code.RESOURCE_EXHAUSTED,
                f"model '{self._spec.name}' is busy: {MOST_WAITING} requests wait for it, which is the limit; "
                "try again later",
            )
        job = _Job(task, deadline, asyncio.get_running_loop())
        self._queue.put(job)
        try:
            return await job.future
        finally:
            # Its tensors must stay neither in the queue, until a thread comes to it, nor in the cycle of a failed
            # job with the future that holds its exception, whose traceback holds this frame.
            job.task = None
            del job, task

    def close(self) -> None:
        """Ask the threads to finalize and end, after what is queued. Doesn't wait: see `join`."""
        for _ in self._threads:
            self._queue.put(None)

    def join(self, timeout: float) -> None:
        """Wait for the threads, at most so many seconds altogether."""
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                _log.warning("model %s is still running; it is cut off", thread.name)

    def _live(self, device: Device, ready: Future[None]) -> None:
        try:
            instance = self._runtime.start(self._spec, device)
        except LoadError as error:
            ready.set_exception(error)
            return
        except BaseException as error:  # noqa: BLE001  (start() would wait for ever)
            ready.set_exception(LoadError(description(error)))
            return
        ready.set_result(None)
        while (job := self._queue.get()) is not None:
            if (task := job.task) is not None:
                self._run(job, task, instance)
            del job, task  # its tensors must not stay until the next one comes
        self._protected("finalize", instance.finalize)

    def _run(self, job: _Job, task: Task, instance: Instance) -> None:
        if job.deadline is not None and time.monotonic() >= job.deadline:
            job.end(None, InferenceError(Code.DEADLINE_EXCEEDED, "deadline passed in the model's queue"))
            return
        try:
            outputs = task.run(instance)
        except InferenceError as error:
            job.end(None, error.with_traceback(None))  # the frames would hold the job in a cycle
        except BaseException as error:  # noqa: BLE001  (whatever a model raises fails its request alone)
            self._log_failure()
            job.end(None, InferenceError(Code.INTERNAL, f"model '{self._spec.name}' failed: {description(error)}"))
        else:
            job.end(outputs, None)

    def _log_failure(self) -> None:
        """With the traceback, once a second at most: clients must not fill the disk with what makes a model fail."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._unlogged += 1
            return
        missed, self._unlogged, self._quiet_until = self._unlogged, 0, now + 1
        more = f" ({missed} more failures before this one were not logged)" if missed else ""
        _log.warning("model %s version %s failed%s", self._spec.name, self._spec.version, more, exc_info=True)

    def _protected(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException:  # noqa: BLE001  (a model's last words)
            _log.warning("%s of model %s failed", what, self._spec.name, exc_info=True)
