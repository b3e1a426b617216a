"""model_warmup: every instance runs the samples of the configuration before the version becomes ready.

A sample is `batch_size` requests of one row each, which run together, `count` times. They go the way of any request:
what a client couldn't send is refused here, too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from proxy.backend.config import FILE_NAME
from proxy.backend.dataplane import Inference, InputTensor, Request, check
from proxy.backend.derive import datatype_of
from proxy.backend.errors import InferenceError, LoadError
from proxy.backend.execution import Output, run_decoupled, run_together
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.runtimes import Instance, Runtime
from proxy.backend.spec import Device, ModelSpec
from proxy.backend.tensors import BF16, BYTES, DataType

_log = logging.getLogger("tensorgate.backend")
_FOLDER = "warmup"
_MOST_BYTES = 2**30  # of a sample
_MOST_TIMES = 10_000  # that it runs, and requests of it: an override with 2**32 would load for ever


@dataclass(frozen=True, slots=True)
class _Sample:
    label: str
    tensors: Sequence[InputTensor]  # of one request
    requests: int
    count: int


class Warmed:
    """A runtime whose instances have run the samples when `start` returns them."""

    def __init__(self, runtime: Runtime, config: pb.ModelConfig, spec: ModelSpec) -> None:
        """Reads the samples' files, in the directory `warmup` beside the version's. Raises LoadError."""
        self._runtime = runtime
        self.shared_outputs = runtime.shared_outputs
        folder = spec.directory.parent / _FOLDER
        # Triton leaves those of 0 rows out.
        self._samples = [_sample(one, config, folder) for one in config.model_warmup if one.batch_size]

    def describe(self, config: pb.ModelConfig) -> None:
        self._runtime.describe(config)

    def choose(self, device: Device) -> Device:
        return self._runtime.choose(device)

    def start(self, spec: ModelSpec, device: Device) -> Instance:
        instance = self._runtime.start(spec, device)
        try:
            for sample in self._samples:
                _run(sample, spec, instance, self._runtime.shared_outputs)
        except BaseException:
            with contextlib.suppress(BaseException):
                instance.finalize()
            raise
        return instance


def _sample(warmup: pb.ModelWarmup, config: pb.ModelConfig, folder: Path) -> _Sample:
    label = f"{config.name}/{FILE_NAME}: model_warmup '{warmup.name}'"
    batched = config.max_batch_size > 0
    if batched and warmup.batch_size > config.max_batch_size:
        raise LoadError(f"{label}: batch_size is {warmup.batch_size}; max_batch_size is {config.max_batch_size}")
    for field, value in (("batch_size", warmup.batch_size), ("count", warmup.count)):
        if value > _MOST_TIMES:
            raise LoadError(f"{label}: {field} is {value}; at most {_MOST_TIMES} is supported")
    tensors = []
    total = 0
    for name, given in sorted(warmup.inputs.items()):
        tensor = _tensor(f"{label}: input '{name}'", name, given, batched, folder)
        total += warmup.batch_size * tensor.size
        if total > _MOST_BYTES:
            raise LoadError(f"{label}: its inputs take more than {_MOST_BYTES} bytes, which is the limit")
        tensors.append(tensor)
    return _Sample(label, tensors, warmup.batch_size, max(warmup.count, 1))


def _tensor(label: str, name: str, given: pb.ModelWarmup.Input, batched: bool, folder: Path) -> InputTensor:
    if given.data_type not in pb.DataType.values() or given.data_type == pb.TYPE_INVALID:
        raise LoadError(f"{label}: data_type is missing")
    if any(dim < 0 for dim in given.dims):
        raise LoadError(f"{label}: dims {list(given.dims)}; a sample has to say every size")
    datatype = datatype_of(given.data_type)
    size = prod(given.dims) * (datatype.size or 4)  # an empty string is its length, 0, in 4 bytes
    if size > _MOST_BYTES:
        raise LoadError(f"{label}: dims {list(given.dims)} take {size} bytes; at most {_MOST_BYTES} are supported")
    shape = (1, *given.dims) if batched else tuple(given.dims)
    return InputTensor(name, datatype.name, shape, raw=_data(label, given, datatype, size, folder))


def _data(label: str, given: pb.ModelWarmup.Input, datatype: DataType, size: int, folder: Path) -> bytes:
    kind = given.WhichOneof("input_data_type")
    if kind == "input_data_file":
        return _read(label, given.input_data_file, datatype, size, folder)
    if kind == "random_data" and datatype is not BYTES:
        return _random(datatype, size)
    if kind in ("zero_data", "random_data"):
        return bytes(size)
    raise LoadError(f"{label}: has no data; give zero_data, random_data or input_data_file")


def _random(datatype: DataType, size: int) -> bytes:
    """Any bits, but no floating-point number that a client wouldn't send either, as NaN."""
    random = np.random.default_rng(size)
    if datatype.dtype.kind == "f":
        return random.random(size // datatype.size).astype(datatype.dtype).tobytes()
    if datatype is BF16:
        return (random.random(size // 2, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return random.bytes(size)


def _read(label: str, name: str, datatype: DataType, size: int, folder: Path) -> bytes:
    # A client may have written this configuration: it must not get at the machine's files.
    if "/" in name or name in ("", ".", "..") or not name.isprintable():
        raise LoadError(f"{label}: input_data_file is '{name}'; it must be a plain file name in {_FOLDER}/")
    try:
        with (folder / name).open("rb") as file:
            data = file.read(_MOST_BYTES + 1 if datatype is BYTES else size)
    except OSError as error:
        raise LoadError(f"{label}: {_FOLDER}/{name} cannot be read: {error.strerror}") from None
    if datatype is not BYTES and len(data) < size:
        raise LoadError(f"{label}: {_FOLDER}/{name} has {len(data)} bytes; its dims and data_type take {size}")
    return data


def _run(sample: _Sample, spec: ModelSpec, instance: Instance, shared_outputs: bool) -> None:
    tasks = [_task(sample, spec, shared_outputs) for _ in range(sample.requests)]
    # Rows run together only where the model has a batch dimension.
    groups = [tasks] if spec.max_batch_size and not spec.decoupled else [[task] for task in tasks]
    for _ in range(sample.count):
        for group in groups:
            if spec.decoupled:
                outcomes, _times = run_decoupled(spec.name, instance, group[0], _ignore, _report)
            else:
                outcomes, _times = run_together(spec.name, instance, group, _report)
            for outcome in outcomes:
                if isinstance(outcome, InferenceError):
                    raise LoadError(f"{sample.label} failed: {outcome}")


def _task(sample: _Sample, spec: ModelSpec, shared_outputs: bool) -> Inference:
    try:
        return check(spec, Request(sample.tensors), shared_outputs=shared_outputs)
    except InferenceError as error:
        raise LoadError(f"{sample.label}: {error}") from None


def _ignore(outputs: Sequence[Output]) -> None:
    pass


def _report() -> None:
    _log.debug("warm-up failed", exc_info=True)
