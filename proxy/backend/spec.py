"""What a loaded model takes and gives, in plain values: the part of its configuration that serving needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from proxy.backend.tensors import DataType


@dataclass(frozen=True, slots=True)
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
    def input_named(self) -> Mapping[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.inputs}

    @cached_property
    def output_named(self) -> Mapping[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.outputs}
