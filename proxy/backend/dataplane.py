"""Requests checked against what a model takes; the same for every protocol.

Everything that a client says is checked here before any of it is used: names, number, data types, shapes, sizes.
On the event loop that costs a few comparisons per tensor; what costs time by the byte (reading strings, copying what
is badly aligned, the bytes of the answer) happens in the model's thread, in `Inference.arrays` and `outputs`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proxy.backend.classification import classify
from proxy.backend.errors import invalid
from proxy.backend.execution import Output
from proxy.backend.spec import ModelSpec, TensorSpec
from proxy.backend.tensors import (
    BYTES,
    DATATYPES,
    Array,
    Buffer,
    element_count,
    fits,
    from_raw,
    from_values,
    to_raw,
)

_MOST_ROWS = 2**31


@dataclass(slots=True)
class InputTensor:
    """A tensor as a client sent it: either `raw` bytes or a flat sequence of `values`, the other one is None."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: Buffer | None = None
    values: Sequence[Any] | None = None

    @property
    def size(self) -> int:
        """Bytes; a value that is not raw counts 8."""
        return len(self.raw) if self.raw is not None else 8 * len(self.values or ())


@dataclass(slots=True)
class Request:
    """What a client asks of a model, in no protocol's words.

    outputs: name -> number of classes, 0 for the tensor itself; empty for all outputs as they are.
    priority: 0 for the model's default. queue_timeout: ns, 0 for none. deadline: on the clock of time.monotonic.
    """

    inputs: Sequence[InputTensor]
    outputs: Mapping[str, int] = field(default_factory=dict)
    priority: int = 0
    queue_timeout: int = 0
    deadline: float | None = None


@dataclass(slots=True)
class Inference:
    """A checked request. `batch` is the first dimension of every input, None where the model has no batches."""

    spec: ModelSpec
    inputs: Sequence[tuple[TensorSpec, InputTensor]]
    wanted: Mapping[str, int]
    batch: int | None
    shared_outputs: bool

    @property
    def key(self) -> Hashable:
        """See execution.Task: names and shapes of the inputs, but for the batch. Types are the model's for all."""
        if self.batch is None or not self.inputs:
            return None  # without an input, there is nothing to tell the rows of one from those of others by
        if len(self.inputs) == 1:
            tensor = self.inputs[0][1]
            return tensor.name, tensor.shape[1:]
        return frozenset([(tensor.name, tensor.shape[1:]) for _, tensor in self.inputs])

    @property
    def rows(self) -> int:
        return 1 if self.batch is None else self.batch

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.size for _, tensor in self.inputs)

    def arrays(self) -> Mapping[str, Array]:
        return {spec.name: _array(spec, tensor, self.batch) for spec, tensor in self.inputs}

    def outputs(self, made: Mapping[str, Array]) -> Sequence[Output]:
        known = self.spec.output_named
        if strange := [name for name in made if name not in known]:
            raise TypeError(f"returned '{strange[0]}', which is not one of its outputs")
        outputs = []
        for spec in self.spec.outputs:
            if self.wanted and spec.name not in self.wanted:
                continue
            if spec.name not in made:
                raise TypeError(f"returned no '{spec.name}'")
            classes = self.wanted.get(spec.name, 0)
            outputs.append(_output(spec, np.asarray(made[spec.name]), self.batch, self.shared_outputs, classes))
        return outputs


def check(spec: ModelSpec, request: Request, *, shared_outputs: bool) -> Inference:
    """The request as something that can be run. Raises InferenceError."""
    known = spec.input_named
    inputs, wanted = request.inputs, request.outputs
    pairs: list[tuple[TensorSpec, InputTensor]] = []
    seen = set()
    for tensor in inputs:
        expected = known.get(tensor.name)
        if expected is None:
            raise invalid(f"input '{tensor.name}' is not an input of model '{spec.name}', which has {_names(known)}")
        if tensor.name in seen:
            raise invalid(f"input '{tensor.name}' is there twice")
        seen.add(tensor.name)
        pairs.append((expected, tensor))
    if len(seen) != len(known):
        _check_complete(spec, seen)
    for expected, tensor in pairs:
        _check_input(spec, expected, tensor)
    batch = _check_batch(spec, pairs) if spec.max_batch_size else None
    for name, classes in wanted.items():
        _check_output(spec, name, classes)
    return Inference(spec, pairs, wanted, batch, shared_outputs)


def _check_output(spec: ModelSpec, name: str, classes: int) -> None:
    output = spec.output_named.get(name)
    if output is None:
        has = _names(spec.output_named)
        raise invalid(f"output '{name}' is not an output of model '{spec.name}', which has {has}")
    if classes < 0:
        raise invalid(f"output '{name}': classification is {classes}; it must be a number of classes, 1 or more")
    if classes and output.datatype is BYTES:
        raise invalid(f"output '{name}': classification asks for numbers, model '{spec.name}' gives BYTES")


def _names(tensors: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"'{name}'" for name in tensors)


def _shown(shape: Sequence[int]) -> str:
    # The client chooses how many there are; a message has to stay a message.
    return str(list(shape)) if len(shape) <= 16 else f"[{', '.join(map(str, shape[:8]))}, ...]"


def _check_complete(spec: ModelSpec, seen: set[str]) -> None:
    required = [tensor.name for tensor in spec.inputs if not tensor.optional]
    missing = [name for name in required if name not in seen]
    if missing:
        raise invalid(
            f"input '{missing[0]}' is missing: model '{spec.name}' requires {len(required)} inputs, got {len(seen)}"
        )


def _check_input(spec: ModelSpec, expected: TensorSpec, tensor: InputTensor) -> None:
    datatype = expected.datatype
    shape = tensor.shape
    if (
        expected.fixed_size >= 0
        and tensor.datatype == datatype.name
        and tensor.raw is not None
        and shape[spec.first_dim :] == expected.dims
        and 0 < shape[0] <= _MOST_ROWS
        and len(tensor.raw) == expected.fixed_size * (shape[0] if spec.first_dim else 1)
    ):
        return  # what most are: the shape of which only the batch may vary, with as many bytes
    label = f"input '{tensor.name}'"
    if tensor.datatype != datatype.name:
        known = "" if tensor.datatype in DATATYPES else " (no such data type)"
        raise invalid(f"{label}: datatype is '{tensor.datatype}'{known}, model '{spec.name}' expects '{datatype.name}'")
    dims = expected.dims if not spec.max_batch_size else (-1, *expected.dims)
    if len(shape) != len(dims):
        batch = ", the first being the batch" if spec.max_batch_size else ""
        raise invalid(
            f"{label}: shape {_shown(shape)} has {len(shape)} dimensions, "
            f"model '{spec.name}' expects {len(dims)}{batch}: {list(dims)}"
        )
    for got, wanted in zip(shape, dims, strict=True):
        if got < 0:
            raise invalid(f"{label}: shape {list(shape)} has the negative dimension {got}")
        if wanted not in (-1, got):
            raise invalid(f"{label}: shape is {list(shape)}, model '{spec.name}' expects {list(dims)}")
    _check_size(label, expected, tensor)


def _check_size(label: str, expected: TensorSpec, tensor: InputTensor) -> None:
    size = expected.datatype.size
    count = element_count(label, tensor.shape, size)
    if tensor.values is not None:
        if len(tensor.values) != count:
            given = len(tensor.values)
            raise invalid(f"{label}: shape {list(tensor.shape)} has {count} elements, contents has {given}")
    elif tensor.raw is None:
        raise invalid(f"{label}: has no data")
    elif expected.datatype is BYTES:
        # Every element has at least its length; the elements themselves are checked when they are read.
        if len(tensor.raw) < 4 * count:
            raise invalid(
                f"{label}: shape {list(tensor.shape)} has {count} elements, which take {4 * count} bytes or more, "
                f"got {len(tensor.raw)} bytes"
            )
    elif len(tensor.raw) != count * size:
        shape, given = list(tensor.shape), len(tensor.raw)
        raise invalid(f"{label}: shape {shape} of {tensor.datatype} takes {count * size} bytes, got {given}")


def _check_batch(spec: ModelSpec, pairs: Sequence[tuple[TensorSpec, InputTensor]]) -> int:
    first: InputTensor | None = None
    for _, tensor in pairs:
        batch = tensor.shape[0]
        if not 1 <= batch <= spec.max_batch_size:
            raise invalid(
                f"input '{tensor.name}': batch is {batch}, model '{spec.name}' takes 1 to {spec.max_batch_size}"
            )
        first = first or tensor
        if batch != first.shape[0]:
            raise invalid(f"input '{tensor.name}': batch is {batch}, but that of '{first.name}' is {first.shape[0]}")
    return first.shape[0] if first else 1


def _array(spec: TensorSpec, tensor: InputTensor, batch: int | None) -> Array:
    label = f"input '{tensor.name}'"
    if tensor.values is not None:
        array = from_values(label, spec.datatype, tensor.shape, tensor.values)
    else:
        assert tensor.raw is not None
        array = from_raw(label, spec.datatype, tensor.shape, tensor.raw)
    array.flags.writeable = False  # however it came: a model must not work with some clients only
    if spec.reshape is None:
        return array
    return array.reshape(_translated(tensor.shape, batch, spec.dims, spec.reshape))


def _translated(
    shape: Sequence[int], batch: int | None, dims: Sequence[int], into: Sequence[int]
) -> tuple[int, ...]:
    """`shape`, which fits `dims`, as a shape that fits `into`: the sizes where `dims` has -1 go where `into` has it."""
    lead = () if batch is None else (shape[0],)
    sizes = iter([size for size, dim in zip(shape[len(lead) :], dims, strict=True) if dim == -1])
    return (*lead, *(next(sizes) if dim == -1 else dim for dim in into))


def _output(spec: TensorSpec, array: Array, batch: int | None, shared: bool, classes: int) -> Output:
    if not fits(array, spec.datatype):
        raise TypeError(f"returned '{spec.name}' as {array.dtype}, which is not {spec.datatype.name}")
    expected = spec.model_dims if batch is None else (batch, *spec.model_dims)
    shape = array.shape
    if len(shape) != len(expected) or any(want not in (-1, got) for got, want in zip(shape, expected, strict=True)):
        raise TypeError(f"returned '{spec.name}' with shape {list(shape)}, which is not {list(expected)}")
    if spec.reshape is not None:
        shape = _translated(shape, batch, spec.reshape, spec.dims)
    if classes:
        named = classify(array, spec, classes, batched=batch is not None)
        return Output(spec.name, BYTES.name, named.shape, to_raw(named, BYTES, shared=False))
    return Output(spec.name, spec.datatype.name, shape, to_raw(array, spec.datatype, shared=shared))
