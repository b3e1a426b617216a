"""What runs a model's file. One Runtime per loaded version, one Instance per thread that runs it.

A runtime knows nothing of requests: it gets arrays whose names, types and shapes fit the model's description, and
what it returns is checked by its caller.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Protocol

from proxy.backend.config import ONNX
from proxy.backend.errors import LoadError
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.spec import Device, ModelSpec
from proxy.backend.tensors import Array


class Instance(Protocol):
    """Made, used and finalized by one and the same thread."""

    def execute(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by name. Inputs are read-only arrays, with a leading batch dimension if the model has one."""

    def stream(self, batch: Mapping[str, Array]) -> Generator[Mapping[str, Array], None, None]:
        """The same for a decoupled model: any number of answers. Closed by who wants no more of them."""

    def finalize(self) -> None:
        """Called once, after the last execute."""


class Runtime(Protocol):
    """A model's file, loaded."""

    shared_outputs: bool
    """Whether an array that `execute` returned may change afterwards."""

    def describe(self, config: pb.ModelConfig) -> None:
        """Check the inputs and outputs of `config` against the file, or fill them in. Raises LoadError."""

    def choose(self, device: Device) -> Device:
        """Where an instance for a device of the kind "auto" runs: one of another kind."""

    def start(self, spec: ModelSpec, device: Device) -> Instance:
        """Called in the thread that the instance is for. Raises LoadError."""


def open_runtime(backend: str, path: Path, config: pb.ModelConfig) -> Runtime:
    """Load a model's file. Raises LoadError."""
    # Imported when a model needs it: ONNX Runtime takes a quarter of a second and 50 MB.
    if backend == ONNX:
        try:
            from proxy.backend.runtimes.onnx import OnnxRuntime
        except ImportError as error:
            raise LoadError(f"ONNX Runtime cannot be imported ({error}); pip install 'tensorgate[backend]'") from None
        return OnnxRuntime(path, config)
    from proxy.backend.runtimes.numpy import NumpyRuntime

    return NumpyRuntime(path)
