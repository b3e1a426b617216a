"""What a loaded model takes and gives, in plain values: the part of its configuration that serving needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

from proxy.backend.tensors import DataType


@dataclass(frozen=True)
class TensorSpec:
    """An input or output. `dims` leaves the batch dimension out; -1 is any size.

    `reshape`, when not None, is what the model itself sees in place of `dims`; its -1 stand for those of `dims`.
    `labels` are the names of an output's elements, for the classification extension.
    """

    name: str
    datatype: DataType
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None
    optional: bool = False
    labels: tuple[str, ...] = ()

    @cached_property
    def fixed_size(self) -> int:
        """Bytes of a row, or of the tensor where there are no batches; -1 where they vary."""
        if not self.dims or -1 in self.dims or not self.datatype.size:
            return -1
        return prod(self.dims) * self.datatype.size

    @property
    def model_dims(self) -> tuple[int, ...]:
        """The shape on the model's side, without the batch dimension."""
        return self.dims if self.reshape is None else self.reshape


DeviceKind = Literal["cpu", "gpu", "auto"]


@dataclass(frozen=True, slots=True)
class Device:
    """Where an instance runs; `index` is that of a GPU."""

    kind: DeviceKind
    index: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """One version of a model. `directory` is that of the version; `parameters` are those of config.pbtxt."""

    name: str
    version: int
    directory: Path
    max_batch_size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, str]
    decoupled: bool = False
    """A request has any number of answers."""

    @cached_property
    def first_dim(self) -> int:
        """Where the dimensions of a row begin in a shape: behind the batch, if there is one."""
        return 1 if self.max_batch_size else 0

    @cached_property
    def input_named(self) -> Mapping[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.inputs}

    @cached_property
    def output_named(self) -> Mapping[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.outputs}
