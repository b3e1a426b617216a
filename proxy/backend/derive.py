"""A model's configuration turned into what serving needs, and completed as ModelConfig is to show it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from proxy.backend.batching import Policy, QueuePolicy
from proxy.backend.config import FILE_NAME, NUMPY, ONNX, ONNX_PLATFORM
from proxy.backend.errors import LoadError
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.spec import Device, DeviceKind, ModelSpec, TensorSpec
from proxy.backend.tensors import BYTES, DATATYPES, DataType

_log = logging.getLogger("tensorgate.backend")
_DEFAULT_FILES = {ONNX: "model.onnx", NUMPY: "model.py"}
_MOST_LEVELS = 16
_MOST_INSTANCES = 256  # of a version: each is a thread
_KINDS: dict[int, DeviceKind] = {
    pb.ModelInstanceGroup.KIND_AUTO: "auto",
    pb.ModelInstanceGroup.KIND_GPU: "gpu",
    pb.ModelInstanceGroup.KIND_CPU: "cpu",
    pb.ModelInstanceGroup.KIND_MODEL: "cpu",
}


def choose_backend(config: pb.ModelConfig, version: Path) -> tuple[str, str]:
    """(backend, file name) for a version directory: as configured, or by the file that lies there. Raises LoadError."""
    named = config.backend or {"": "", ONNX_PLATFORM: ONNX}.get(config.platform, config.platform)
    if named and named not in _DEFAULT_FILES:
        hint = " (Triton's Python models have another interface: see class Model)" if named == "python" else ""
        raise LoadError(f"backend '{named}' is not supported; there are '{NUMPY}' and '{ONNX}'{hint}")
    for backend in [named] if named else _DEFAULT_FILES:
        file = config.default_model_filename or _DEFAULT_FILES[backend]
        fitting = named or Path(file).suffix == Path(_DEFAULT_FILES[backend]).suffix
        if fitting and (version / file).is_file():
            return backend, file
    wanted = config.default_model_filename or (_DEFAULT_FILES[named] if named else "model.onnx or model.py")
    raise LoadError(f"{version.parent.name}/{version.name} holds no {wanted}")


def choose_versions(config: pb.ModelConfig, available: Sequence[int]) -> list[int]:
    """The versions to serve out of those that have a directory, ascending. Raises LoadError."""
    policy = config.version_policy
    ordered = sorted(available)
    if policy.HasField("all"):
        return ordered
    if policy.HasField("specific"):
        wanted = sorted(set(policy.specific.versions))
        if missing := [version for version in wanted if version not in ordered]:
            raise LoadError(f"version_policy wants version {missing[0]}, which has no directory; there are {ordered}")
        return wanted
    return ordered[-(policy.latest.num_versions or 1) :]


def place(config: pb.ModelConfig, choose: Callable[[Device], Device]) -> None:
    """Turn every KIND_AUTO into the kind that `choose` takes, once for the whole group. Raises LoadError."""
    if not config.instance_group:
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_AUTO)
    for group in config.instance_group:
        if group.kind != pb.ModelInstanceGroup.KIND_AUTO or group.passive:
            continue
        taken = choose(Device("auto", group.gpus[0] if group.gpus else 0))
        if taken.kind == "gpu":
            group.kind = pb.ModelInstanceGroup.KIND_GPU
            _log.info("model %s: KIND_AUTO takes GPU %d", config.name, taken.index)
        else:
            group.kind = pb.ModelInstanceGroup.KIND_CPU
            del group.gpus[:]  # or there would be one instance for each of them
            _log.info("model %s: KIND_AUTO takes the CPU", config.name)


def devices(config: pb.ModelConfig) -> list[Device]:
    """One entry per instance to start. Raises LoadError."""
    if not config.instance_group:
        return [Device("auto")]
    groups = [group for group in config.instance_group if not group.passive]
    if not groups:
        raise LoadError(f"{config.name}/{FILE_NAME}: every instance_group is passive; nothing would run requests")
    count = sum(max(group.count, 1) * max(len(group.gpus), 1) for group in groups)
    if count > _MOST_INSTANCES:
        raise LoadError(
            f"{config.name}/{FILE_NAME}: instance_group: {count} instances; at most {_MOST_INSTANCES} are started"
        )
    return [
        Device(_KINDS[group.kind], index)
        for group in groups
        for index in group.gpus or [0]
        for _ in range(max(group.count, 1))
    ]


def batching(config: pb.ModelConfig) -> tuple[Policy, bool]:
    """(how requests are gathered, whether their answers keep their order). Raises LoadError."""
    rules = config.dynamic_batching
    place = f"{config.name}/{FILE_NAME}: dynamic_batching"
    most = config.max_batch_size
    for size in rules.preferred_batch_size:
        if not 1 <= size <= max(most, 1):
            raise LoadError(f"{place}: preferred_batch_size is {size}; it must be 1 to max_batch_size, which is {most}")
    levels, default = rules.priority_levels, rules.default_priority_level
    if levels > _MOST_LEVELS:
        raise LoadError(f"{place}: priority_levels is {levels}; at most {_MOST_LEVELS} are supported")
    if levels and not 1 <= default <= levels:
        raise LoadError(f"{place}: default_priority_level is {default}; it must be 1 to priority_levels, {levels}")
    if wrong := [level for level in rules.priority_queue_policy if not 1 <= level <= levels]:
        raise LoadError(f"{place}: priority_queue_policy for level {wrong[0]}; there are 1 to {levels}")
    own = rules.priority_queue_policy
    policies = [own.get(level, rules.default_queue_policy) for level in range(1, max(levels, 1) + 1)]
    policy = Policy(
        max_rows=max(most, 1),
        joins=config.HasField("dynamic_batching") and most > 1 and not config.model_transaction_policy.decoupled,
        delay=1000 * rules.max_queue_delay_microseconds,
        preferred=tuple(sorted(set(rules.preferred_batch_size))),
        levels=tuple(_queue_policy(one) for one in policies),
        default_level=default or 1,
    )
    return policy, rules.preserve_ordering


def _queue_policy(rules: pb.ModelQueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        timeout=1000 * rules.default_timeout_microseconds,
        delay=rules.timeout_action == pb.ModelQueuePolicy.DELAY,
        override=rules.allow_timeout_override,
        most=rules.max_queue_size,
    )


def complete(config: pb.ModelConfig, backend: str, file: str) -> None:
    """Write the values in force into fields that were left empty, as ModelConfig is to show them."""
    config.backend = backend
    if backend == ONNX:
        config.platform = ONNX_PLATFORM
    config.default_model_filename = file
    if not config.version_policy.WhichOneof("policy_choice"):
        config.version_policy.latest.num_versions = 1
    if not config.instance_group:
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_AUTO)
    for index, group in enumerate(config.instance_group):
        group.name = group.name or f"{config.name}_{index}"
        group.count = group.count or 1
    rules = config.dynamic_batching if config.HasField("dynamic_batching") else None
    if rules is not None and not rules.preferred_batch_size and config.max_batch_size > 0:
        rules.preferred_batch_size.append(config.max_batch_size)


def build_spec(config: pb.ModelConfig, version: int, directory: Path) -> ModelSpec:
    """What serving needs to know. Raises LoadError when inputs or outputs are missing, or their types."""
    place = f"{config.name}/{FILE_NAME}"
    if not config.input or not config.output:
        missing = "input" if not config.input else "output"
        raise LoadError(f"{place}: no {missing} is described; give name, data_type and dims of each")
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for tensor in tensors:
            if tensor.data_type == pb.TYPE_INVALID:
                raise LoadError(f"{place}: {kind} '{tensor.name}': data_type is missing")
    return ModelSpec(
        name=config.name,
        version=version,
        directory=directory,
        max_batch_size=config.max_batch_size,
        inputs=tuple(_tensor(tensor, tensor.optional) for tensor in config.input),
        outputs=tuple(_tensor(tensor, False, _labels(tensor, directory.parent)) for tensor in config.output),
        parameters={name: value.string_value for name, value in config.parameters.items()},
        decoupled=config.model_transaction_policy.decoupled,
    )


def _tensor(tensor: pb.ModelInput | pb.ModelOutput, optional: bool, labels: tuple[str, ...] = ()) -> TensorSpec:
    reshape = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None
    return TensorSpec(tensor.name, datatype_of(tensor.data_type), tuple(tensor.dims), reshape, optional, labels)


def _labels(tensor: pb.ModelOutput, directory: Path) -> tuple[str, ...]:
    """The lines of the output's label_filename, which lies in the model's directory. Raises LoadError."""
    name = tensor.label_filename
    if not name:
        return ()
    if "/" in name or name in (".", ".."):
        raise LoadError(f"output '{tensor.name}': label_filename is '{name}'; it must be a plain file name")
    try:
        return tuple((directory / name).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"output '{tensor.name}': label_filename '{name}' cannot be read: {error}") from None


def datatype_of(number: int) -> DataType:
    """The data type behind a number of the enumeration inference.DataType."""
    name = pb.DataType.Name(number).removeprefix("TYPE_")
    return BYTES if name == "STRING" else DATATYPES[name]


def number_of(datatype: DataType) -> int:
    """The reverse of datatype_of."""
    return pb.DataType.Value("TYPE_STRING" if datatype is BYTES else f"TYPE_{datatype.name}")
