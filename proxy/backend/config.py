"""config.pbtxt, or the JSON that takes its place: read it and check it.

What would change the meaning of a request or its answer and isn't supported is refused, so that a model never runs
otherwise than its configuration says. What only tunes performance is accepted, and `ineffective` names it. What the
configuration comes to is in derive.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.message import Message

from proxy.backend.errors import LoadError, description
from proxy.backend.protos import model_config_pb2 as pb

FILE_NAME = "config.pbtxt"
NUMPY = "numpy"
ONNX = "onnxruntime"
ONNX_PLATFORM = "onnxruntime_onnx"
_MOST_DIMS = 31  # numpy 1 stops at 32, one of which is the batch
_MOST_OVERRIDE = 2**20  # bytes of JSON
_MOST_TEXT = 500  # characters of the parser's complaint, which repeats what it read

ONNX_PARAMETERS = frozenset(
    (
        "intra_op_thread_count",
        "inter_op_thread_count",
        "execution_mode",
        "enable_mem_arena",
        "enable_mem_pattern",
        "memory.enable_memory_arena_shrinkage",
        "session.use_device_allocator_for_initializers",
        "share_session_between_instances",  # those of one device always do
        "cudnn_conv_algo_search",
        "gpu_mem_limit",
        "arena_extend_strategy",
        "do_copy_in_default_stream",
    )
)

_DONE = frozenset(
    (
        *("name", "platform", "backend", "version_policy", "max_batch_size", "dynamic_batching", "parameters"),
        *("default_model_filename", "model_warmup", "model_transaction_policy", "response_cache"),
        *("input.name", "input.data_type", "input.dims", "input.reshape", "input.optional"),
        *("output.name", "output.data_type", "output.dims", "output.reshape", "output.label_filename"),
        *("instance_group.name", "instance_group.count", "instance_group.kind", "instance_group.gpus"),
        "instance_group.passive",
    )
)
_DONE_FOR_ONNX = frozenset(("optimization.graph", "optimization.execution_accelerators"))
_PARTLY = frozenset(("input", "output", "instance_group", "optimization"))  # told of by their own fields


def read_config(directory: Path, name: str = "") -> pb.ModelConfig:
    """The configuration in a model's directory; an empty one when there is no file. Raises LoadError.

    name: the model's, where the directory has another.
    """
    path = directory / FILE_NAME
    name = name or directory.name
    place = f"{name}/{FILE_NAME}"
    config = pb.ModelConfig()
    if not name.isprintable():  # bytes that are not UTF-8 are not
        raise LoadError(f"{name!r}: no client can ask for a model of that name; rename the directory")
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except FileNotFoundError:
        pass
    except text_format.ParseError as error:
        line, column = error.GetLine() or 1, error.GetColumn() or 1
        raise LoadError(f"{place}:{line}:{column}: {_without_place(str(error), line, column)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{place}: cannot be read: {error}") from None
    return _checked(config, name, place)


def parse_override(text: str, name: str) -> pb.ModelConfig:
    """The configuration in a client's JSON, which takes the place of the model's config.pbtxt. Raises LoadError."""
    place = f"config of '{name}'"
    if len(text) > _MOST_OVERRIDE:
        raise LoadError(f"{place}: {len(text)} characters; at most {_MOST_OVERRIDE} are taken")
    if not text.lstrip().startswith("{"):
        raise LoadError(f"{place}: it must be a JSON object, a ModelConfig")
    config = pb.ModelConfig()
    try:
        json_format.Parse(text, config)
    except Exception as error:  # noqa: BLE001  (what it raises for odd numbers is nowhere listed)
        why = str(error) if isinstance(error, json_format.ParseError) else description(error)
        raise LoadError(f"{place}: {why[:_MOST_TEXT]}") from None
    return _checked(config, name, place)


def _checked(config: pb.ModelConfig, name: str, place: str) -> pb.ModelConfig:
    if config.name and config.name != name:
        raise LoadError(f"{place}: name is '{config.name}', but the directory is '{name}'; make them equal")
    config.name = name
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
        if group.kind not in pb.ModelInstanceGroup.Kind.values():
            raise LoadError(f"{place}: instance_group: kind {group.kind} does not exist; name one, as in KIND_CPU")
    if config.model_transaction_policy.decoupled and config.dynamic_batching.preserve_ordering:
        raise LoadError(
            f"{place}: preserve_ordering can't be had with decoupled: the answers of one request would hold up those "
            "of all others; remove one of them"
        )
    chosen = config.default_model_filename
    if chosen in (".", "..") or "/" in chosen:
        raise LoadError(f"{place}: default_model_filename is '{chosen}'; it must be a plain file name")


def _check_tensor(tensor: pb.ModelInput | pb.ModelOutput, label: str) -> None:
    if not tensor.name:
        raise LoadError(f"{label}: name is missing")
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


def ineffective(config: pb.ModelConfig) -> list[str]:
    """The fields that are set and change nothing here, as `instance_group.rate_limiter`."""
    onnx = config.backend == ONNX or config.platform == ONNX_PLATFORM
    found = list(dict.fromkeys(_unused(config, "", _DONE | _DONE_FOR_ONNX if onnx else _DONE)))
    if onnx:
        found += [f"parameters[{name!r}]" for name in sorted(config.parameters) if name not in ONNX_PARAMETERS]
    return found


def _unused(message: Message, path: str, done: frozenset[str]) -> Iterator[str]:
    for descriptor, value in message.ListFields():
        here = path + descriptor.name
        if here in done:
            continue
        if here in _PARTLY:
            for part in [value] if isinstance(value, Message) else value:
                yield from _unused(part, here + ".", done)
        elif not _says_nothing(value):
            yield here


def _says_nothing(value: Any) -> bool:
    """Whether it is a message in which nothing is set, as in `rate_limiter { }`, or some of them."""
    if isinstance(value, Message):
        return not value.ListFields()
    return not isinstance(value, (str, bytes, int, float)) and all(
        isinstance(one, Message) and not one.ListFields() for one in value
    )
