"""config.pbtxt: read it, check it, complete it, and turn it into what serving needs.

What would change the meaning of a request or its answer and isn't supported is refused, so that a model never runs
otherwise than its configuration says. What only tunes performance is accepted and has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from google.protobuf import text_format

from proxy.backend.batching import Policy, QueuePolicy
from proxy.backend.errors import LoadError
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.spec import Device, DeviceKind, ModelSpec, TensorSpec
from proxy.backend.tensors import BYTES, DATATYPES, DataType

FILE_NAME = "config.pbtxt"
NUMPY = "numpy"
ONNX = "onnxruntime"
_ONNX_PLATFORM = "onnxruntime_onnx"
_DEFAULT_FILES = {ONNX: "model.onnx", NUMPY: "model.py"}
_MOST_LEVELS = 16
_MOST_DIMS = 31  # numpy 1 stops at 32, one of which is the batch

_KINDS: dict[int, DeviceKind] = {
    pb.ModelInstanceGroup.KIND_AUTO: "auto",
    pb.ModelInstanceGroup.KIND_GPU: "gpu",
    pb.ModelInstanceGroup.KIND_CPU: "cpu",
    pb.ModelInstanceGroup.KIND_MODEL: "cpu",
}


def read_config(directory: Path) -> pb.ModelConfig:
    """The configuration in a model's directory; an empty one when there is no file. Raises LoadError."""
    path = directory / FILE_NAME
    place = f"{directory.name}/{FILE_NAME}"
    config = pb.ModelConfig()
    if not directory.name.isprintable():  # bytes that are not UTF-8 are not
        raise LoadError(f"{directory.name!r}: no client can ask for a model of that name; rename the directory")
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except FileNotFoundError:
        pass
    except text_format.ParseError as error:
        line, column = error.GetLine() or 1, error.GetColumn() or 1
        raise LoadError(f"{place}:{line}:{column}: {_without_place(str(error), line, column)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{place}: cannot be read: {error}") from None
    if config.name and config.name != directory.name:
        raise LoadError(f"{place}: name is '{config.name}', but the directory is '{directory.name}'; make them equal")
    config.name = directory.name
    _refuse_unsupported(config, place)
    _check_values(config, place)
    return config


def _without_place(text: str, line: int, column: int) -> str:
    return text.removeprefix(f"{line}:{column} : ")


def _refuse_unsupported(config: pb.ModelConfig, place: str) -> None:
    found = {
        "sequence_batching": config.HasField("sequence_batching"),
        "ensemble_scheduling": config.HasField("ensemble_scheduling"),
        "batch_input": bool(config.batch_input),
        "batch_output": bool(config.batch_output),
        "model_repository_agents": config.HasField("model_repository_agents"),
        "is_shape_tensor": any(tensor.is_shape_tensor for tensor in _tensors(config)),
        "allow_ragged_batch": any(tensor.allow_ragged_batch for tensor in config.input),
    }
    if names := [name for name, used in found.items() if used]:
        raise LoadError(f"{place}: {', '.join(names)}: not supported by this backend; remove it or use another server")


def _tensors(config: pb.ModelConfig) -> list[pb.ModelInput | pb.ModelOutput]:
    return [*config.input, *config.output]


def _check_values(config: pb.ModelConfig, place: str) -> None:
    if config.max_batch_size < 0:
        raise LoadError(f"{place}: max_batch_size is {config.max_batch_size}; 0 means no batch dimension")
    for kind, tensors in (("input", config.input), ("output", config.output)):
        names = [tensor.name for tensor in tensors]
        if twice := [name for name in names if names.count(name) > 1]:
            raise LoadError(f"{place}: {kind} '{twice[0]}' is there {names.count(twice[0])} times")
        for tensor in tensors:
            _check_tensor(tensor, f"{place}: {kind} '{tensor.name}'")
    for group in config.instance_group:
        if group.count < 0:
            raise LoadError(f"{place}: instance_group: count is {group.count}; it must be 1 or more")
        if group.kind not in _KINDS:
            raise LoadError(f"{place}: instance_group: kind {group.kind} does not exist; name one, as in KIND_CPU")
    chosen = config.default_model_filename
    if chosen in (".", "..") or "/" in chosen:
        raise LoadError(f"{place}: default_model_filename is '{chosen}'; it must be a plain file name")


def _check_tensor(tensor: pb.ModelInput | pb.ModelOutput, label: str) -> None:
    if not tensor.name:
        raise LoadError(f"{label}: name is missing")
    if tensor.data_type == pb.TYPE_INVALID:
        raise LoadError(f"{label}: data_type is missing")
    if tensor.data_type not in pb.DataType.values():
        raise LoadError(f"{label}: data_type {tensor.data_type} does not exist; name one, as in TYPE_FP32")
    for dims in (tensor.dims, tensor.reshape.shape):
        if len(dims) > _MOST_DIMS:
            raise LoadError(f"{label}: {len(dims)} dimensions; at most {_MOST_DIMS} are supported")
        if wrong := [dim for dim in dims if dim < 1 and dim != -1]:
            raise LoadError(f"{label}: dimension {wrong[0]}; it must be 1 or more, or -1 for any size")
    if tensor.HasField("reshape") and not _same_elements(tensor.dims, tensor.reshape.shape):
        before, after = list(tensor.dims), list(tensor.reshape.shape)
        raise LoadError(f"{label}: dims {before} and reshape {after} differ in their number of elements")


def _same_elements(before: Sequence[int], after: Sequence[int]) -> bool:
    variable = [sum(dim == -1 for dim in dims) for dims in (before, after)]
    return variable[0] == variable[1] and abs(prod(before)) == abs(prod(after))


def choose_backend(config: pb.ModelConfig, version: Path) -> tuple[str, str]:
    """(backend, file name) for a version directory: as configured, or by the file that lies there. Raises LoadError."""
    named = config.backend or {"": "", _ONNX_PLATFORM: ONNX}.get(config.platform, config.platform)
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


def devices(config: pb.ModelConfig) -> list[Device]:
    """One entry per instance to start. Raises LoadError."""
    if not config.instance_group:
        return [Device("auto")]
    groups = [group for group in config.instance_group if not group.passive]
    if not groups:
        raise LoadError(f"{config.name}/{FILE_NAME}: every instance_group is passive; nothing would run requests")
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


def ineffective(config: pb.ModelConfig) -> list[str]:
    """Settings for performance that are accepted and change nothing here."""
    found = {
        "response_cache": config.response_cache.enable,
        "model_warmup": bool(config.model_warmup),
        "optimization": config.HasField("optimization"),
        "rate_limiter": any(group.HasField("rate_limiter") for group in config.instance_group),
    }
    return [name for name, used in found.items() if used]


def complete(config: pb.ModelConfig, backend: str, file: str) -> None:
    """Write the values in force into fields that were left empty, as ModelConfig is to show them."""
    config.backend = backend
    if backend == ONNX:
        config.platform = _ONNX_PLATFORM
    config.default_model_filename = file
    if not config.version_policy.WhichOneof("policy_choice"):
        config.version_policy.latest.num_versions = 1
    if not config.instance_group:
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_AUTO)
    for index, group in enumerate(config.instance_group):
        group.name = group.name or f"{config.name}_{index}"
        group.count = group.count or 1


def build_spec(config: pb.ModelConfig, version: int, directory: Path) -> ModelSpec:
    """What serving needs to know. Raises LoadError when inputs or outputs are missing."""
    if not config.input or not config.output:
        missing = "input" if not config.input else "output"
        raise LoadError(f"{config.name}/{FILE_NAME}: no {missing} is described; give name, data_type and dims of each")
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
