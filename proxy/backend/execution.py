"""One run of a model for one request or several: arrays made and joined, the model run, its outputs split.

All of it happens in an instance's thread. What is wrong with one request fails that one; what the model raises fails
those that ran together, with its message and without its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Protocol

import numpy as np

from proxy.backend.errors import Code, InferenceError, description
from proxy.backend.runtimes import Instance
from proxy.backend.statistics import Times
from proxy.backend.tensors import Array, Buffer


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the answer, as it goes onto the wire."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer


class CallerLeft(Exception):
    """Nobody waits for the answers of a decoupled model any more."""


class Task(Protocol):
    """A checked request. Those with equal keys can run together; `rows` is its first dimension, 1 without batches."""

    @property
    def key(self) -> Hashable: ...

    @property
    def rows(self) -> int: ...

    @property
    def size(self) -> int:
        """Bytes of its inputs."""
        ...

    def arrays(self) -> Mapping[str, Array]:
        """The inputs by name. Raises InferenceError."""
        ...

    def outputs(self, made: Mapping[str, Array]) -> Sequence[Output]:
        """The answer, of the model's outputs for these rows. Raises TypeError for what they can't be."""
        ...


Outcome = Sequence[Output] | InferenceError


def run_together(
    name: str, instance: Instance, tasks: Sequence[Task], report: Callable[[], None]
) -> tuple[list[Outcome], Times | None]:
    """Run these tasks in one execution -> the outcome of each, and times unless the model wasn't run.

    name: the model's. report: called while an exception of the model's is being handled.
    """
    started = monotonic_ns()
    outcomes: dict[int, Outcome] = {}
    arrays: dict[int, Mapping[str, Array]] = {}

    def failure(error: BaseException) -> InferenceError:
        return _failure(name, error, report)

    for index, task in enumerate(tasks):
        try:
            arrays[index] = task.arrays()
        except BaseException as error:  # noqa: BLE001  (fails this request alone)
            outcomes[index] = failure(error)
    times = None
    if arrays:
        rows = [tasks[index].rows for index in arrays]
        times = Times(sum(rows), started, 0, 0, 0)
        made_at = ran_at = monotonic_ns()
        try:
            joined = _joined(list(arrays.values()))
            made_at = monotonic_ns()
            made = instance.execute(joined)
            ran_at = monotonic_ns()
            parts = _split(made, rows)
        except BaseException as error:  # noqa: BLE001  (whatever a model raises fails those that ran together)
            ran_at = max(ran_at, monotonic_ns())
            failed = failure(error)
            outcomes.update({index: InferenceError(failed.code, str(failed)) for index in arrays})
        else:
            for index, part in zip(arrays, parts, strict=True):
                try:
                    outcomes[index] = tasks[index].outputs(part)
                except BaseException as error:  # noqa: BLE001
                    outcomes[index] = failure(error)
        times = Times(sum(rows), started, made_at - started, ran_at - made_at, monotonic_ns() - ran_at)
    return [outcomes[index] for index in range(len(tasks))], times


def run_decoupled(
    name: str, instance: Instance, task: Task, put: Callable[[Sequence[Output]], None], report: Callable[[], None]
) -> tuple[list[Outcome], Times | None]:
    """Run one task of a decoupled model: `put` gets each answer -> its outcome, without outputs, as `run_together`.

    put: may raise CallerLeft, which stops the model.
    """
    started = monotonic_ns()
    outcome: Outcome = ()
    made_at = started
    try:
        arrays = task.arrays()
        made_at = monotonic_ns()
        with contextlib.closing(instance.stream(arrays)) as answers:
            for made in answers:
                put(task.outputs(made))
    except BaseException as error:  # noqa: BLE001
        outcome = _failure(name, error, report)
    return [outcome], Times(task.rows, started, made_at - started, monotonic_ns() - made_at, 0)


def _failure(name: str, error: BaseException, report: Callable[[], None]) -> InferenceError:
    if isinstance(error, InferenceError):
        return InferenceError(error.code, str(error))  # without the frames, which would hold the tasks in a cycle
    if isinstance(error, CallerLeft):
        return InferenceError(Code.CANCELLED, "the caller left")
    report()
    return InferenceError(Code.INTERNAL, f"model '{name}' failed: {description(error)}")


def _joined(arrays: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    if len(arrays) == 1:
        return arrays[0]
    joined = {name: np.concatenate([one[name] for one in arrays]) for name in arrays[0]}
    for array in joined.values():
        array.flags.writeable = False  # as a single request's are
    return joined


def _split(made: Mapping[str, Array], rows: Sequence[int]) -> list[Mapping[str, Array]]:
    if len(rows) == 1:
        return [made]
    total = sum(rows)
    whole = {name: np.asarray(array) for name, array in made.items()}
    for name, array in whole.items():
        if array.ndim == 0 or array.shape[0] != total:
            raise TypeError(f"returned '{name}' with shape {list(array.shape)} for a batch of {total}")
    parts: list[Mapping[str, Array]] = []
    at = 0
    for count in rows:
        parts.append({name: array[at : at + count] for name, array in whole.items()})
        at += count
    return parts
