"""ONNX models, run by ONNX Runtime: on the CPU, or with CUDA where the instance group asks for it and it is there.

Settings are those of Triton's backend: config.ONNX_PARAMETERS in the `parameters` of config.pbtxt, and the graph's
level and CUDA's accelerator in `optimization`. What config.pbtxt leaves out is derived from the graph, as by Triton.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from proxy.backend.derive import datatype_of, number_of
from proxy.backend.errors import LoadError, invalid
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.runtimes.onnxoptions import Settings, accelerators, cuda_options
from proxy.backend.spec import Device, ModelSpec
from proxy.backend.tensors import BYTES, DATATYPES, Array

_log = logging.getLogger("tensorgate.backend")
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_BATCH = 4  # Triton's --backend-config=onnxruntime,default-max-batch-size
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


_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


class OnnxRuntime:
    """A model.onnx. Its instances on one device share a session: `run` may be called by several threads at once.

    Raises LoadError for settings that don't exist.
    """

    shared_outputs = False

    def __init__(self, path: Path, config: pb.ModelConfig) -> None:
        self._path = path
        self._config = config
        self._settings = Settings.of(config)
        cuda_options(config, 0)
        self._sessions: dict[Device, Any] = {}
        self._lock = threading.Lock()

    def describe(self, config: pb.ModelConfig) -> None:
        """Fills in what Triton's backend derives, and the log says what."""
        if config.model_transaction_policy.decoupled:
            raise LoadError(
                "model_transaction_policy: decoupled: an ONNX model has one answer to a request; remove it, or run the "
                "file from a model.py"
            )
        for name in accelerators(config):
            _log.warning("model %s: execution accelerator '%s' is not there; it has no effect", config.name, name)
        # Inputs and outputs are the same on every device; the CPU is always there.
        session = self._session(Device("cpu"))
        derived = _derive(config, session.get_inputs(), session.get_outputs())
        if derived:
            _log.info("model %s: derived from the ONNX graph: %s", config.name, "; ".join(derived))

    def choose(self, device: Device) -> Device:
        if _CUDA in ort.get_available_providers():
            gpu = Device("gpu", device.index)
            try:
                self._session(gpu)
            except LoadError as error:
                # Built with CUDA, but no driver or no GPU here.
                _log.debug("model %s: %s", self._config.name, error)
            else:
                return gpu
        return Device("cpu")

    def start(self, spec: ModelSpec, device: Device) -> _OnnxInstance:
        if device.kind == "auto":
            device = self.choose(device)
        return _OnnxInstance(self._session(device), spec, self._settings.shrinkage)

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
            providers.insert(0, (_CUDA, cuda_options(self._config, device.index)))
        try:
            session = ort.InferenceSession(self._path, self._options(), providers=providers)
        except Exception as error:  # noqa: BLE001  (its exceptions have no common base)
            raise LoadError(f"{'/'.join(self._path.parts[-3:])}: {_first_line(error)}") from None
        if device.kind == "gpu" and _CUDA not in session.get_providers():
            raise LoadError(f"KIND_GPU: ONNX Runtime cannot use GPU {device.index}; see its messages, or use KIND_CPU")
        return session

    def _options(self) -> Any:
        settings = self._settings
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Threads that spin between requests would take the processor from the event loop and from the gate beside us.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", settings.initializers)
        options.intra_op_num_threads = settings.intra_op_threads
        options.inter_op_num_threads = settings.inter_op_threads
        options.graph_optimization_level = _LEVELS[settings.level]
        if settings.parallel:
            options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        if settings.arena is not None:
            options.enable_cpu_mem_arena = settings.arena
        if settings.pattern is not None:
            options.enable_mem_pattern = settings.pattern
        return options


class _OnnxInstance:
    def __init__(self, session: Any, spec: ModelSpec, shrinkage: str) -> None:
        self._run = session.run
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._texts = [tensor.name for tensor in spec.inputs if tensor.datatype is BYTES]
        # To a client a scalar is a tensor of one element.
        vectors = {tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.model_dims == (1,)}
        scalars = set() if spec.max_batch_size else vectors
        self._scalars_in = [node.name for node in session.get_inputs() if not node.shape and node.name in scalars]
        self._scalars_out = [node.name for node in session.get_outputs() if not node.shape and node.name in scalars]
        self._options: Any = None
        if shrinkage:
            self._options = ort.RunOptions()
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", shrinkage)

    def execute(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        feed = dict(batch)
        for name in self._scalars_in:
            if name in feed:
                feed[name] = feed[name].reshape(())
        for name in self._texts:
            if name in feed:
                feed[name] = _as_text(name, feed[name])
        made = dict(zip(self._outputs, self._run(self._outputs, feed, self._options), strict=True))
        for name in self._scalars_out:
            made[name] = np.asarray(made[name]).reshape(1)
        return made

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


def _derive(config: pb.ModelConfig, inputs: Sequence[Any], outputs: Sequence[Any]) -> list[str]:
    """Check the configuration against the graph and fill in what it leaves out -> what that was."""
    derived: list[str] = []
    if not config.input or not config.output:
        derived += _derive_batching(config, [*inputs, *outputs])
    batched = config.max_batch_size > 0
    derived += _describe(config.input, inputs, "input", batched, whole=True)
    derived += _describe(config.output, outputs, "output", batched, whole=False)
    return derived


def _derive_batching(config: pb.ModelConfig, nodes: Sequence[Any]) -> list[str]:
    """The first dimension is the batch if no tensor says how large it is."""
    derived: list[str] = []
    if not all(node.shape and not _is_size(node.shape[0]) for node in nodes):
        return derived
    if config.max_batch_size == 0:
        config.max_batch_size = _BATCH
        derived.append(f"max_batch_size {_BATCH}")
    if config.max_batch_size > 1 and config.WhichOneof("scheduling_choice") is None:
        config.dynamic_batching.SetInParent()
        derived.append("dynamic_batching")
    return derived


def _describe(tensors: Any, nodes: Sequence[Any], kind: str, batched: bool, *, whole: bool) -> list[str]:
    """Check `tensors` (of a ModelConfig) against the graph's; add all of the graph's if there are none."""
    known = {node.name: node for node in nodes}
    if not tensors:
        for node in nodes:
            tensors.add(name=node.name)
            _add_scalar(tensors[-1], _dims(node, kind, batched), batched)
        return [text for tensor in tensors for text in _fill(tensor, known[tensor.name], kind, batched)]
    for tensor in tensors:
        if tensor.name not in known:
            names = ", ".join(f"'{name}'" for name in known)
            raise LoadError(f"{kind} '{tensor.name}' is not in the ONNX graph, which has {names}")
    derived = [text for tensor in tensors for text in _fill(tensor, known[tensor.name], kind, batched)]
    for tensor in tensors:
        _compare(tensor, known[tensor.name], kind, batched)
    if whole and (missing := known.keys() - {tensor.name for tensor in tensors}):
        raise LoadError(f"{kind} '{min(missing)}' of the ONNX graph is not in config.pbtxt; add it, or name none")
    return derived


def _add_scalar(tensor: Any, dims: Sequence[int], batched: bool) -> None:
    """Triton has no tensor without dimensions: one element a row, or one element."""
    if not dims:
        tensor.dims.append(1)
        if batched:
            tensor.reshape.SetInParent()


def _fill(tensor: Any, node: Any, kind: str, batched: bool) -> list[str]:
    found: list[str] = []
    if tensor.data_type == pb.TYPE_INVALID:
        tensor.data_type = _number(node, kind)
        found.append(_TYPES[node.type])
    if not tensor.dims and not tensor.HasField("reshape") and (dims := _dims(node, kind, batched)):
        tensor.dims.extend(dims)
        found.append(str(dims))
    return [f"{kind} '{tensor.name}' {' '.join(found)}"] if found else []


def _compare(tensor: Any, node: Any, kind: str, batched: bool) -> None:
    label = f"{kind} '{tensor.name}'"
    if tensor.data_type != _number(node, kind):
        configured, actual = datatype_of(tensor.data_type).name, _TYPES[node.type]
        raise LoadError(f"{label}: data_type is {configured} in config.pbtxt, but {actual} in the ONNX graph")
    actual_dims = _dims(node, kind, batched)
    dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    if not batched and dims == [1] and not node.shape:
        return  # a scalar
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
    dims = [dim if _is_size(dim) else -1 for dim in node.shape]
    if not batched:
        return dims
    if not dims or dims[0] != -1:
        raise LoadError(f"{kind} '{node.name}': the ONNX graph fixes its shape, {dims}; set max_batch_size to 0")
    return dims[1:]


def _is_size(dim: Any) -> bool:
    return isinstance(dim, int) and dim > 0
