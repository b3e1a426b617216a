"""A configuration's settings for ONNX Runtime, read and checked. Knows nothing of ONNX Runtime itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from proxy.backend.errors import LoadError
from proxy.backend.protos import model_config_pb2 as pb

_MOST_THREADS = 1024
_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_INITIALIZERS = "session.use_device_allocator_for_initializers"
_ARENAS = re.compile(r"(?:cpu|gpu):[0-9]{1,4}(?:;(?:cpu|gpu):[0-9]{1,4})*")
_CUDA_CHOICES = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
}
_POINTERS = re.compile("user_compute_stream|external")
_LEVELS = {0: "all", -1: "basic", 1: "extended", 2: "none"}


@dataclass(frozen=True, slots=True)
class Settings:
    """level: all, extended, basic or none; what is None is ONNX Runtime's own default, as is a count of 0."""

    intra_op_threads: int
    inter_op_threads: int
    parallel: bool
    arena: bool | None
    pattern: bool | None
    shrinkage: str
    initializers: str
    level: str

    @classmethod
    def of(cls, config: pb.ModelConfig) -> Settings:
        """Raises LoadError."""
        given = {name: value.string_value for name, value in config.parameters.items()}
        arena = _switch(given, "enable_mem_arena")
        return cls(
            intra_op_threads=_number(given, "intra_op_thread_count", _MOST_THREADS, " for ONNX Runtime's default"),
            inter_op_threads=_number(given, "inter_op_thread_count", _MOST_THREADS, " for ONNX Runtime's default"),
            parallel=_number(given, "execution_mode", 1, " for sequential, 1 for parallel") == 1,
            arena=arena,
            pattern=_switch(given, "enable_mem_pattern"),
            shrinkage=_shrinkage(given, arena),
            initializers=_initializers(given),
            level=_level(config),
        )


def _number(given: Mapping[str, str], name: str, most: int, zero: str) -> int:
    text = given.get(name, "0")
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) > most:
        raise LoadError(f"parameters: {name} is '{text}'; it must be a number up to {most}: 0{zero}")
    return int(text)


def _switch(given: Mapping[str, str], name: str) -> bool | None:
    if name not in given:
        return None
    found = {"1": True, "true": True, "0": False, "false": False}.get(given[name].lower())
    if found is None:
        raise LoadError(f"parameters: {name} is '{given[name]}'; it must be 1 or true, 0 or false")
    return found


def _shrinkage(given: Mapping[str, str], arena: bool | None) -> str:
    text = given.get(_SHRINKAGE, "")
    if _SHRINKAGE in given and not _ARENAS.fullmatch(text):
        raise LoadError(f"parameters: {_SHRINKAGE} is '{text}'; it must be devices, as in cpu:0 or cpu:0;gpu:0")
    if "cpu" in text and arena is False:
        raise LoadError(f"parameters: {_SHRINKAGE} is '{text}', but enable_mem_arena is off; remove one of them")
    return text


def _initializers(given: Mapping[str, str]) -> str:
    text = given.get(_INITIALIZERS, "0")
    if text not in ("0", "1"):
        raise LoadError(f"parameters: {_INITIALIZERS} is '{text}'; it must be 0 or 1")
    return text


def _level(config: pb.ModelConfig) -> str:
    level = config.optimization.graph.level
    if level not in _LEVELS:
        raise LoadError(
            f"optimization: graph level is {level}; it must be 0 for all optimizations, 1 for basic and extended ones, "
            "-1 for basic ones, 2 for none"
        )
    return _LEVELS[level]


def accelerators(config: pb.ModelConfig) -> list[str]:
    """The names of the execution accelerators that are asked for and not there: all but CUDA's."""
    asked = config.optimization.execution_accelerators
    others = [one.name for one in asked.gpu_execution_accelerator if one.name != "cuda"]
    return others + [one.name for one in asked.cpu_execution_accelerator]


def cuda_options(config: pb.ModelConfig, index: int) -> dict[str, str]:
    """The options of CUDA's execution provider on that GPU. Raises LoadError."""
    options: dict[str, str] = {}
    for one in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if one.name == "cuda":
            if pointers := sorted(name for name in one.parameters if _POINTERS.search(name)):
                raise LoadError(f"execution accelerator cuda: {pointers[0]} is an address in the process; remove it")
            options.update(one.parameters)
    given = {name: value.string_value for name, value in config.parameters.items()}
    for name, choices in _CUDA_CHOICES.items():
        if name in given:
            named = ", ".join(f"{number} for {choice}" for number, choice in enumerate(choices) if number)
            options[name] = choices[_number(given, name, len(choices) - 1, f" for {choices[0]}, {named}")]
    if "gpu_mem_limit" in given:
        if not re.fullmatch(r"[0-9]{1,20}", given["gpu_mem_limit"]):
            raise LoadError(f"parameters: gpu_mem_limit is '{given['gpu_mem_limit']}'; it must be a number of bytes")
        options["gpu_mem_limit"] = given["gpu_mem_limit"]
    if (stream := _switch(given, "do_copy_in_default_stream")) is not None:
        options["do_copy_in_default_stream"] = "1" if stream else "0"
    options["device_id"] = str(index)
    return options
