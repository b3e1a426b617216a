"""ONNX models, run by ONNX Runtime: on the CPU, or with CUDA where the instance group asks for it and it is there.

Settings in the `parameters` of config.pbtxt, as with Triton: intra_op_thread_count, inter_op_thread_count.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from proxy.backend.config import datatype_of, number_of
from proxy.backend.errors import LoadError, invalid
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.spec import Device, ModelSpec
from proxy.backend.tensors import BYTES, DATATYPES, Array

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class OnnxRuntime:
    """A model.onnx. Its instances on one device share a session: `run` may be called by several threads at once."""

    shared_outputs = False

    def __init__(self, path: Path, config: pb.ModelConfig) -> None:
        self._path = path
        self._parameters = {name: value.string_value for name, value in config.parameters.items()}
        self._sessions: dict[Device, Any] = {}
        self._lock = threading.Lock()

    def describe(self, config: pb.ModelConfig) -> None:
        # Inputs and outputs are the same on every device; the CPU is always there.
        session = self._session(Device("cpu"))
        batched = config.max_batch_size > 0
        _describe(config.input, session.get_inputs(), "input", batched, whole=True)
        _describe(config.output, session.get_outputs(), "output", batched, whole=False)

    def start(self, spec: ModelSpec, device: Device) -> _OnnxInstance:
        if device.kind == "auto":
            device = Device("gpu", device.index) if _CUDA in ort.get_available_providers() else Device("cpu")
            try:
                session = self._session(device)
            except LoadError:
                # Built with CUDA, but no driver or no GPU here.
                session = self._session(Device("cpu"))
        else:
            session = self._session(device)
        return _OnnxInstance(session, spec)

    def _session(self, device: Device) -> Any:
        with self._lock:
            if device not in self._sessions:
                self._sessions[device] = self._open(device)
            return self._sessions[device]

    def _open(self, device: Device) -> Any:
        providers: list[Any] = [_CPU]
        if device.kind == "gpu":
            if _CUDA not in ort.get_available_providers():
                raise LoadError("KIND_GPU: this ONNX Runtime has no CUDA; install tensorgate[gpu], or use KIND_CPU")
            providers.insert(0, (_CUDA, {"device_id": str(device.index)}))
        try:
            session = ort.InferenceSession(self._path, self._options(), providers=providers)
        except Exception as error:  # noqa: BLE001  (its exceptions have no common base)
            raise LoadError(f"{'/'.join(self._path.parts[-3:])}: {_first_line(error)}") from None
        if device.kind == "gpu" and _CUDA not in session.get_providers():
            raise LoadError(f"KIND_GPU: ONNX Runtime cannot use GPU {device.index}; see its messages, or use KIND_CPU")
        return session

    def _options(self) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Threads that spin between requests would take the processor from the event loop and from the gate beside us.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.intra_op_num_threads = self._count("intra_op_thread_count")
        options.inter_op_num_threads = self._count("inter_op_thread_count")
        return options

    def _count(self, name: str) -> int:
        text = self._parameters.get(name, "0")
        if not text.isdecimal():
            raise LoadError(f"parameters: {name} is '{text}'; it must be a number, 0 for ONNX Runtime's default")
        return int(text)


class _OnnxInstance:
    def __init__(self, session: Any, spec: ModelSpec) -> None:
        self._run = session.run
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._texts = [tensor.name for tensor in spec.inputs if tensor.datatype is BYTES]

    def execute(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        feed = dict(batch)
        for name in self._texts:
            if name in feed:
                feed[name] = _as_text(name, feed[name])
        return dict(zip(self._outputs, self._run(self._outputs, feed), strict=True))

    def stream(self, batch: Mapping[str, Array]) -> Generator[Mapping[str, Array], None, None]:
        yield self.execute(batch)

    def finalize(self) -> None:
        del self._run


def _as_text(name: str, array: Array) -> Array:
    # ONNX Runtime turns an element that is no str into str(element): b'x' would become "b'x'".
    try:
        texts = [element.decode() for element in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise invalid(f"input '{name}': the model takes text, and an element is not UTF-8 ({error})") from None
    return np.array(texts, object).reshape(array.shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _describe(tensors: Any, nodes: Sequence[Any], kind: str, batched: bool, *, whole: bool) -> None:
    """Check `tensors` (of a ModelConfig) against the graph's; add all of the graph's if there are none."""
    known = {node.name: node for node in nodes}
    if not tensors:
        for node in nodes:
            tensors.add(name=node.name, data_type=_number(node, kind), dims=_dims(node, kind, batched))
        return
    for tensor in tensors:
        if tensor.name not in known:
            names = ", ".join(f"'{name}'" for name in known)
            raise LoadError(f"{kind} '{tensor.name}' is not in the ONNX graph, which has {names}")
        _compare(tensor, known[tensor.name], kind, batched)
    if whole and (missing := known.keys() - {tensor.name for tensor in tensors}):
        raise LoadError(f"{kind} '{min(missing)}' of the ONNX graph is not in config.pbtxt; add it, or name none")


def _compare(tensor: Any, node: Any, kind: str, batched: bool) -> None:
    label = f"{kind} '{tensor.name}'"
    if tensor.data_type != _number(node, kind):
        configured, actual = datatype_of(tensor.data_type).name, _TYPES[node.type]
        raise LoadError(f"{label}: data_type is {configured} in config.pbtxt, but {actual} in the ONNX graph")
    actual_dims = _dims(node, kind, batched)
    dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    # An unknown size in the graph may be narrowed by the configuration, never the reverse.
    fits = len(dims) == len(actual_dims) and all(b in (-1, a) for a, b in zip(dims, actual_dims, strict=True))
    if not fits:
        batch = " after the batch dimension" if batched else ""
        raise LoadError(f"{label}: dims {dims} in config.pbtxt, but {actual_dims} in the ONNX graph{batch}")


def _number(node: Any, kind: str) -> int:
    if node.type not in _TYPES:
        hint = "; export it with zipmap=False" if "map(" in node.type else ""
        raise LoadError(f"{kind} '{node.name}' is a {node.type}, which cannot be served{hint}")
    return number_of(DATATYPES[_TYPES[node.type]])


def _dims(node: Any, kind: str, batched: bool) -> list[int]:
    dims = [dim if isinstance(dim, int) and dim > 0 else -1 for dim in node.shape]
    if not batched:
        return dims
    if not dims or dims[0] != -1:
        raise LoadError(f"{kind} '{node.name}': the ONNX graph fixes its shape, {dims}; set max_batch_size to 0")
    return dims[1:]
