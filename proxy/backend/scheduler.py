"""Requests of one model version, from the event loop to the threads that run the model, and back.

On the event loop a Batcher says what runs together, and an instance that is idle gets it. The loop never waits for a
model, and an instance's thread touches nothing of the loop's but `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from itertools import count, islice
from queue import SimpleQueue
from threading import Thread
from time import monotonic_ns

from proxy.backend.answers import Answers
from proxy.backend.batching import MOST_SHAPES, Batcher, Entry, InOrder, Policy, QueueFull, TooManyShapes
from proxy.backend.errors import Code, InferenceError, LoadError, description
from proxy.backend.execution import Outcome, Output, Task, run_decoupled, run_together
from proxy.backend.runtimes import Instance, Runtime
from proxy.backend.spec import Device, ModelSpec
from proxy.backend.statistics import BACKEND, CANCELED, OTHER, REJECTED, Statistics, Times

MOST_WAITING = 8192  # requests in the queue of a model version; a model that hangs must not gather them without end

_AHEAD = 32  # requests for each thread; those of callers that have left stay there until the thread comes to them

_MOST_KINDS = 8  # of exceptions that are logged in a second
_MOST_TURNS = 8  # of the event loop, for the sake of a larger batch

_numbers = count()
_NEVER = object()
_log = logging.getLogger("tensorgate.backend")


class _Job:
    """A task on its way; None once nobody waits for it. Threads only read `task`. answers: of a decoupled model."""

    __slots__ = ("answers", "arrived", "counted", "deadline", "future", "rows", "size", "task")

    def __init__(
        self,
        task: Task,
        deadline: float | None,
        future: asyncio.Future[Sequence[Output]],
        answers: Answers | None = None,
    ) -> None:
        self.task: Task | None = task
        self.deadline = deadline
        self.future = future
        self.answers = answers
        self.counted = False  # in the statistics
        self.rows = task.rows
        self.size = task.size
        self.arrived = monotonic_ns()


class _Batch:
    """Jobs that run together. A thread changes it, and the loop reads it when that is done."""

    __slots__ = ("done", "jobs", "outcomes", "times")

    def __init__(self, jobs: list[_Job]) -> None:
        self.jobs = jobs
        self.outcomes: list[Outcome] = []  # of the jobs that still are in `jobs`
        self.times: Times | None = None
        self.done = False  # for the loop


class Scheduler:
    """The queue and the threads of one model version. `start` starts them, `retire` or `close` ends them.

    ordered: answers leave in the order in which the requests came. most_bytes: of the requests that it holds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        runtime: Runtime,
        devices: Sequence[Device],
        policy: Policy,
        ordered: bool = False,
        most_bytes: int = 2**63,
    ) -> None:
        self.number = next(_numbers)  # that no other has
        self._spec = spec
        self._runtime = runtime
        self._devices = devices
        self._threads: list[Thread] = []
        self._queue: SimpleQueue[_Batch | None] = SimpleQueue()  # for all instances: one that hangs holds up no other
        self._given = 0  # batches in it or in a thread
        self._finished: deque[_Batch] = deque()  # that the loop hasn't been told of
        self._telling = False
        # Where there is nothing to decide, requests needn't wait on the loop for an instance to be idle.
        self._at_once = policy == Policy(max_rows=policy.max_rows)
        self._most_given = len(devices) * (_AHEAD if self._at_once else 1)
        self._batcher: Batcher[_Job] = Batcher(policy)
        self._order: InOrder[_Job] | None = InOrder() if ordered else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pump_comes = False
        self._closed = False
        self._retired = False
        self._most_bytes = most_bytes
        self.held_bytes = 0
        self._quiet_until = 0.0
        self._unlogged = 0
        self._told_kinds: set[type[BaseException] | None] = set()
        self.statistics = Statistics()

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
    def ended(self) -> bool:
        """Whether it takes no further requests."""
        return self._closed or self._retired

    @property
    def waiting(self) -> int:
        """Requests that no thread has begun to work on."""
        return len(self._batcher) + self._queue.qsize()

    async def submit(
        self, task: Task, deadline: float | None, priority: int = 0, queue_timeout: int = 0
    ) -> Sequence[Output]:
        """Run a task in one of the threads, with others if they fit.

        deadline: on the clock of time.monotonic. priority and queue_timeout, in ns: see `Batcher.add`.
        Raises InferenceError. A caller that is cancelled while its task still waits keeps it from ever running.
        """
        loop = self._loop = asyncio.get_running_loop()
        job = _Job(task, deadline, loop.create_future())
        entry = self._admit(job, task, priority, queue_timeout)
        try:
            return await job.future
        finally:
            self._forget(job, entry)
            del job, task, entry

    async def submit_stream(
        self, task: Task, deadline: float | None, priority: int = 0, queue_timeout: int = 0
    ) -> AsyncGenerator[Sequence[Output], None]:
        """The same for a decoupled model: its answers, one by one. A caller that closes this ends the model's work."""
        loop = self._loop = asyncio.get_running_loop()
        answers = Answers()
        job = _Job(task, deadline, loop.create_future(), answers)
        entry = self._admit(job, task, priority, queue_timeout)
        try:
            async for outputs in answers.until(job.future):
                yield outputs
                del outputs
        finally:
            answers.leave()
            self._forget(job, entry)
            del job, task, entry

    def retire(self) -> None:
        """Take no further requests; run those that wait; then finalize and end. On the event loop; doesn't wait."""
        self._retired = True
        self._end_if_idle()

    def close(self) -> None:
        """Ask the threads to finalize and end, after what they were given. What waits is refused. Doesn't wait: see
        `join`. From any thread."""
        self._closed = True
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._loop is None or self._loop is here or self._loop.is_closed():
            self._close()
        else:
            self._loop.call_soon_threadsafe(self._close)

    def join(self, timeout: float) -> None:
        """Wait for the threads, at most so many seconds altogether."""
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                _log.warning("model %s is still running; it is cut off", thread.name)

    # -- on the event loop

    def _admit(self, job: _Job, task: Task, priority: int, queue_timeout: int) -> Entry[_Job] | None:
        """Put it into the queue -> its entry there, unless a thread gets it at once. Raises InferenceError."""
        if self.ended:
            raise self._unloaded()
        self._check_room(job)
        self.held_bytes += job.size
        if self._order is not None:
            self._order.add(job)
        if self._at_once and not len(self._batcher) and self._given < self._most_given:
            self._given += 1
            self._queue.put(_Batch([job]))
            return None
        try:
            entry = self._batcher.add(job, task.key, job.rows, job.arrived, priority, queue_timeout)
        except QueueFull as full:
            self._unadmit(job)
            raise self._refused(
                job,
                Code.UNAVAILABLE,
                f"exceeds maximum queue size: {full.most} requests wait already, which is max_queue_size; "
                "try again later",
            ) from None
        except TooManyShapes:
            self._unadmit(job)
            raise self._refused(
                job, Code.RESOURCE_EXHAUSTED, f"requests of {MOST_SHAPES} shapes wait already, which is the limit"
            ) from None
        self._pump_soon()
        return entry

    def _unadmit(self, job: _Job) -> None:
        self.held_bytes -= job.size
        self._ended(job, None)

    def _check_room(self, job: _Job) -> None:
        if self.waiting >= MOST_WAITING:
            raise self._refused(
                job,
                Code.RESOURCE_EXHAUSTED,
                f"is busy: {MOST_WAITING} requests wait for it, which is the limit; try again later",
            )
        # One by itself is for the limit of all models to refuse.
        if self.held_bytes and self.held_bytes + job.size > self._most_bytes:
            raise self._refused(
                job,
                Code.RESOURCE_EXHAUSTED,
                f"holds {self.held_bytes} bytes of requests; {job.size} more would exceed its limit of "
                f"{self._most_bytes} (half of --memory-limit-bytes); send less at a time, or try again later",
            )

    def _refused(self, job: _Job, code: Code, why: str) -> InferenceError:
        self.statistics.failed(job.arrived, monotonic_ns(), REJECTED)
        return InferenceError(code, f"model '{self._spec.name}' {why}")

    def _forget(self, job: _Job, entry: Entry[_Job] | None) -> None:
        """Nobody waits for it any more.

        Its tensors must stay neither in the queue, until a thread comes to it, nor in the cycle of a failed job with
        the future that holds its exception, whose traceback holds the caller's frame.
        """
        job.task = None
        self.held_bytes -= job.size
        if entry is not None:
            self._batcher.drop(entry)
        future = job.future
        if not job.counted:
            job.counted = True
            self.statistics.failed(job.arrived, monotonic_ns(), CANCELED)
        if not future.done():
            future.cancel()
        elif future.cancelled():
            pass
        else:
            future.exception()  # nobody will ask any more; asyncio would take that for a mistake
        self._ended(job, None)  # those behind it needn't wait for it any more, if its caller has left

    def _end_if_idle(self) -> None:
        # What was given to the threads comes before the None that ends them.
        if self._retired and not self._closed and not len(self._batcher):
            self._closed = True
            self._close()

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for entry in self._batcher.clear():
            entry.item.counted = True
            self.statistics.failed(entry.arrived, monotonic_ns(), OTHER)
            self._ended(entry.item, self._unloaded())
        for _ in self._threads:
            self._queue.put(None)

    def _unloaded(self) -> InferenceError:
        return InferenceError(Code.UNAVAILABLE, f"model '{self._spec.name}' is being unloaded")

    def _pump_soon(self) -> None:
        """When all that comes at about this time is in the queue, so that it can run together."""
        if not self._pump_comes and self._loop is not None:
            self._pump_comes = True
            self._loop.call_soon(self._pump_unless_more_come, len(self._batcher), 0)

    def _pump_unless_more_come(self, known: int, turns: int) -> None:
        """Clients that were answered together ask again together: as long as each turn of the loop brings requests, the
        next one is waited for. A turn with nothing to do takes a few microseconds."""
        waiting, enough = len(self._batcher), self._batcher.policy.max_rows
        if known < waiting < enough and turns < _MOST_TURNS and self._loop is not None:
            self._loop.call_soon(self._pump_unless_more_come, waiting, turns + 1)
        else:
            self._pump()

    def _pump(self) -> None:
        """Give idle instances what is due."""
        self._pump_comes = False
        if self._closed:
            return
        batcher = self._batcher
        now = monotonic_ns()
        for entry in batcher.expire(now):
            entry.item.counted = True
            self.statistics.failed(entry.arrived, now, REJECTED)
            self._ended(
                entry.item,
                InferenceError(Code.UNAVAILABLE, f"model '{self._spec.name}': request timeout expired in its queue"),
            )
        # No more: what waits here can still be joined, overtaken, refused and dropped.
        while self._given < self._most_given and (entries := batcher.take(now)):
            self._given += 1
            self._queue.put(_Batch([entry.item for entry in entries]))
        self._wake_up(now)
        self._end_if_idle()

    def _wake_up(self, now: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._batcher.due(now, idle=self._given < self._most_given)
        if due is not None and self._loop is not None:
            self._timer = self._loop.call_later((due - now) / 1e9, self._pump)

    def _told(self) -> None:
        self._telling = False
        finished = self._finished
        while finished:
            self._done(finished.popleft())

    def _done(self, batch: _Batch) -> None:
        """A thread has worked on a batch."""
        if batch.done:
            return  # a thread that was interrupted behind its report has made another
        batch.done = True
        self._given -= 1
        now = monotonic_ns()
        arrived: list[int] = []
        rows = 0
        for job, outcome in zip(batch.jobs, batch.outcomes, strict=True):
            if job.counted:
                pass  # when its caller left
            elif isinstance(outcome, InferenceError):
                self.statistics.failed(job.arrived, now, _reason(outcome))
            else:
                arrived.append(job.arrived)
                rows += job.rows
            job.counted = True
            self._ended(job, outcome)
        if batch.times is not None:
            self.statistics.executed(batch.times, arrived, rows, now)
        if not self._at_once or len(self._batcher):
            self._pump()

    def _ended(self, job: _Job, outcome: Outcome | None) -> None:
        """The outcome of a job is known, or None when nobody waits for it."""
        if self._order is None:
            _settle(job, outcome)
            return
        for one, its in self._order.end(job, outcome):
            _settle(one, its)

    # -- in an instance's thread

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
        while not self._serve(instance):
            pass
        self._protected("finalize", instance.finalize)

    def _serve(self, instance: Instance) -> bool:
        """Work until the end -> whether it was asked for. It isn't when a model's code has ended this thread from
        elsewhere (PyThreadState_SetAsyncExc), at whatever place that hit it: other requests need the thread."""
        held: list[_Batch | None] = []
        # From the queue into the list without a bytecode between: an interruption waits for one, above all that of an
        # idle thread, and would lose what `get` has just returned.
        queued = iter(self._queue.get, _NEVER)
        try:
            while True:
                held.extend(islice(queued, 1))
                batch = held[0]
                if batch is None:
                    return True
                self._work(batch, instance)
                del batch  # its tensors must not stay until the next one comes
                held.clear()
        except BaseException:  # noqa: BLE001
            _log.warning("the thread of model %s was interrupted; it goes on", self._spec.name, exc_info=True)
            if held and held[0] is None:
                return True
            if held and held[0] is not None:
                batch = held[0]
                why = f"model '{self._spec.name}' failed: its thread was interrupted"
                batch.outcomes = [InferenceError(Code.INTERNAL, why) for _ in batch.jobs]
                self._telling = False  # it may have been hit before the loop was told
                self._report(batch)
            return False

    def _work(self, batch: _Batch, instance: Instance) -> None:
        now = monotonic_ns() / 1e9
        jobs: list[_Job] = []
        tasks: list[Task] = []
        outcomes: list[Outcome] = []
        late: list[_Job] = []
        for job in batch.jobs:
            task = job.task  # once: the loop takes it away when its caller leaves
            if task is None or (job.deadline is not None and now >= job.deadline):
                late.append(job)
            else:
                jobs.append(job)
                tasks.append(task)
        if tasks and jobs[0].answers is not None:
            put = jobs[0].answers.put
            outcomes, batch.times = run_decoupled(self._spec.name, instance, tasks[0], put, self._log_failure)
        elif tasks:
            outcomes, batch.times = run_together(self._spec.name, instance, tasks, self._log_failure)
        batch.jobs = jobs + late
        batch.outcomes = outcomes + [
            InferenceError(Code.DEADLINE_EXCEEDED, "deadline passed in the model's queue") for _ in late
        ]
        del task, tasks  # not until the next batch comes
        self._report(batch)

    def _report(self, batch: _Batch) -> None:
        """Tell the loop, unless it is about to look: to wake it up costs as much as a small model."""
        self._finished.append(batch)  # before the flag is read, which `_told` takes back before it looks
        if self._telling:
            return
        self._telling = True
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._told)
        except RuntimeError:
            pass  # the loop is closed: the process ends, and nobody waits

    def _log_failure(self) -> None:
        """With the traceback, once a second for each of a few kinds: clients must not fill the disk with what makes a
        model fail."""
        now, kind, told = time.monotonic(), sys.exc_info()[0], self._told_kinds
        if now >= self._quiet_until:
            told.clear()
            self._quiet_until = now + 1
        elif kind in told or len(told) >= _MOST_KINDS:
            self._unlogged += 1
            return
        told.add(kind)
        missed, self._unlogged = self._unlogged, 0
        more = f" ({missed} more failures before this one were not logged)" if missed else ""
        _log.warning("model %s version %s failed%s", self._spec.name, self._spec.version, more, exc_info=True)

    def _protected(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException:  # noqa: BLE001  (a model's last words)
            _log.warning("%s of model %s failed", what, self._spec.name, exc_info=True)


def _reason(error: InferenceError) -> str:
    return BACKEND if error.code is Code.INTERNAL else OTHER


def _settle(job: _Job, outcome: Outcome | None) -> None:
    if outcome is None or job.future.done():
        return
    if isinstance(outcome, InferenceError):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)
