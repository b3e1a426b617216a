"""Promise: an ONNX model is set up as Triton's backend would: what config.pbtxt leaves out, and its settings."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.derive import datatype_of
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.repository import Loaded, Repository
from proxy.backend.runtimes.onnxoptions import accelerators, cuda_options
from tests.backend.models import write_model
from tests.backend.onnxfile import Dims, onnx_file

GRAPH = onnx_file("Identity", {"IN": ("FP32", ["n", 2])}, {"OUT": ("FP32", ["n", 2])})


class Models:
    """A repository of one ONNX model, `m`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = Repository(folder)

    async def load(self, config: str | None, graph: bytes = GRAPH) -> Loaded:
        write_model(self.folder, "m", config, {"1/model.onnx": graph})
        await self.repository.load()
        return self.repository.find("m", "")

    async def refused(self, config: str) -> str:
        write_model(self.folder, "m", config, {"1/model.onnx": GRAPH})
        await self.repository.load()
        return self.repository.models["m"].versions[1].reason


@pytest.fixture
async def models(tmp_path: Path) -> AsyncIterator[Models]:
    made = Models(tmp_path / "models")
    yield made
    made.repository.close(timeout=10)


def identity(shape: Dims, out: Dims | None = None, datatype: str = "FP32") -> bytes:
    return onnx_file("Identity", {"IN": (datatype, shape)}, {"OUT": (datatype, shape if out is None else out)})


def described(config: pb.ModelConfig) -> list[tuple[str, str, list[int], list[int] | None]]:
    return [
        (t.name, datatype_of(t.data_type).name, list(t.dims), list(t.reshape.shape) if t.HasField("reshape") else None)
        for t in (*config.input, *config.output)
    ]


# shape in the graph, max_batch_size, dims, reshape
DERIVED: dict[str, tuple[Dims, int, list[int], list[int] | None]] = {
    "batched": (["n", 2], 4, [2], None),
    "batched, any size": (["n", "m", 3], 4, [-1, 3], None),
    "a scalar a row": (["n"], 4, [1], []),
    "fixed": ([3, 2], 0, [3, 2], None),
    "fixed first": ([3, "m"], 0, [3, -1], None),
    "a scalar": ([], 0, [1], None),
}


@pytest.mark.parametrize("case", DERIVED.values(), ids=list(DERIVED))
async def test_without_a_config(
    models: Models, case: tuple[Dims, int, list[int], list[int] | None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shape, size, dims, reshape = case
    config = (await models.load(None, identity(shape))).config
    assert config.max_batch_size == size
    assert config.HasField("dynamic_batching") == (size > 0)
    assert described(config) == [("IN", "FP32", dims, reshape), ("OUT", "FP32", dims, reshape)]
    said = ["max_batch_size 4; dynamic_batching; "] if size else []
    assert f"derived from the ONNX graph: {''.join(said)}input 'IN' FP32" in caplog.text


async def infer(loaded: Loaded, shape: tuple[int, ...]) -> tuple[tuple[int, ...], bytes]:
    sent = np.arange(np.prod(shape), dtype=np.float32)
    (output,) = await loaded.infer(Request([InputTensor("IN", "FP32", shape, raw=sent.tobytes())]))
    assert bytes(output.data) == sent.tobytes()
    return output.shape, bytes(output.data)


@pytest.mark.parametrize(
    ("dims", "shape"), [(["n"], (3, 1)), ([], (1,)), ([3, 2], (3, 2)), (["n", "m"], (2, 5))], ids=str
)
async def test_what_was_derived_can_be_asked(models: Models, dims: Dims, shape: tuple[int, ...]) -> None:
    assert (await infer(await models.load(None, identity(dims)), shape))[0] == shape


async def test_one_tensor_with_a_fixed_size_rules_out_batches(models: Models) -> None:
    config = (await models.load(None, identity(["n", 2], [5, 2]))).config
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert described(config) == [("IN", "FP32", [-1, 2], None), ("OUT", "FP32", [5, 2], None)]


IN = 'input { name: "IN" data_type: TYPE_FP32 dims: %s } '
OUT = 'output { name: "OUT" data_type: TYPE_FP32 dims: %s } '
# config.pbtxt, max_batch_size, whether dynamic_batching, dims of both
PARTIAL: dict[str, tuple[str, int, bool, list[int]]] = {
    "a batch size": ("max_batch_size: 9", 9, True, [2]),
    "a batch size of 1": ("max_batch_size: 1", 1, False, [2]),
    "an input": (IN % "2", 4, True, [2]),
    "an output": (OUT % "2", 4, True, [2]),
    "all tensors": (IN % "[-1, 2]" + OUT % "[-1, 2]", 0, False, [-1, 2]),
    "all tensors and a batch size": ("max_batch_size: 8 " + IN % "2" + OUT % "2", 8, False, [2]),
    "names alone": ('input { name: "IN" } output { name: "OUT" }', 0, False, [-1, 2]),
    "names and a batch size": ('max_batch_size: 8 input { name: "IN" } output { name: "OUT" }', 8, False, [2]),
    "a type": ('input { name: "IN" data_type: TYPE_FP32 } ' + OUT % "[-1, 2]", 0, False, [-1, 2]),
    "dims": ('input { name: "IN" dims: [-1, 2] } ' + OUT % "[-1, 2]", 0, False, [-1, 2]),
}


@pytest.mark.parametrize("case", PARTIAL.values(), ids=list(PARTIAL))
async def test_with_a_partial_config(models: Models, case: tuple[str, int, bool, list[int]]) -> None:
    text, size, dynamic, dims = case
    config = (await models.load(text)).config
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (size, dynamic)
    assert described(config) == [("IN", "FP32", dims, None), ("OUT", "FP32", dims, None)]


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }} '


SETTINGS: dict[str, str] = {
    "threads": parameter("intra_op_thread_count", "2") + parameter("inter_op_thread_count", "2"),
    "defaults": parameter("intra_op_thread_count", "0") + parameter("execution_mode", "0"),
    "parallel": parameter("execution_mode", "1") + parameter("inter_op_thread_count", "2"),
    "no arena": parameter("enable_mem_arena", "0") + parameter("enable_mem_pattern", "false"),
    "arena": parameter("enable_mem_arena", "True") + parameter("enable_mem_pattern", "1"),
    "shrinkage": parameter("memory.enable_memory_arena_shrinkage", "cpu:0"),
    "initializers": parameter("session.use_device_allocator_for_initializers", "1"),
    "level 1": "optimization { graph { level: 1 } }",
    "level -1": "optimization { graph { level: -1 } }",
    "level 2": "optimization { graph { level: 2 } }",
    "CUDA's, without CUDA": 'optimization { execution_accelerators { gpu_execution_accelerator { name: "cuda" } } }',
}


@pytest.mark.parametrize("text", SETTINGS.values(), ids=list(SETTINGS))
async def test_settings_that_are_taken(models: Models, text: str, caplog: pytest.LogCaptureFixture) -> None:
    loaded = await models.load(text)
    for _ in range(2):
        assert (await infer(loaded, (3, 2)))[0] == (3, 2)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_settings_reach_onnx_runtime(models: Models) -> None:
    text = parameter("intra_op_thread_count", "3") + parameter("execution_mode", "1")
    loaded = await models.load(text + parameter("enable_mem_arena", "0") + "optimization { graph { level: -1 } }")
    (session,) = loaded.scheduler._runtime._sessions.values()  # type: ignore[attr-defined]
    options = session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.execution_mode.name == "ORT_PARALLEL"
    assert options.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    assert options.enable_cpu_mem_arena is False


# config.pbtxt, what the reason must hold
BAD: dict[str, tuple[str, list[str]]] = {
    "a word": (parameter("inter_op_thread_count", "many"), ["inter_op_thread_count", "'many'", "number"]),
    "negative": (parameter("intra_op_thread_count", "-1"), ["intra_op_thread_count", "'-1'", "0 for"]),
    "too many": (parameter("intra_op_thread_count", "100000"), ["'100000'", "1024"]),
    "mode 2": (parameter("execution_mode", "2"), ["execution_mode", "'2'", "0 for sequential, 1 for parallel"]),
    "arena": (parameter("enable_mem_arena", "yes"), ["enable_mem_arena", "'yes'", "1 or true"]),
    "pattern": (parameter("enable_mem_pattern", ""), ["enable_mem_pattern", "''", "1 or true"]),
    "shrinkage": (parameter("memory.enable_memory_arena_shrinkage", "all"), ["arena_shrinkage", "'all'", "cpu:0"]),
    "shrinkage without an arena": (
        parameter("memory.enable_memory_arena_shrinkage", "cpu:0") + parameter("enable_mem_arena", "0"),
        ["arena_shrinkage", "enable_mem_arena is off"],
    ),
    "initializers": (
        parameter("session.use_device_allocator_for_initializers", "x"),
        ["initializers", "'x'", "0 or 1"],
    ),
    "level": ("optimization { graph { level: 3 } }", ["graph level is 3", "-1 for basic"]),
    "search": (parameter("cudnn_conv_algo_search", "3"), ["cudnn_conv_algo_search", "'3'", "1 for HEURISTIC"]),
    "memory": (parameter("gpu_mem_limit", "4G"), ["gpu_mem_limit", "'4G'", "bytes"]),
    "first dimension": ('max_batch_size: 2 input { name: "IN" } output { name: "X" }', ["output 'X'", "has 'OUT'"]),
}


@pytest.mark.parametrize("case", BAD.values(), ids=list(BAD))
async def test_settings_that_are_refused(models: Models, case: tuple[str, list[str]]) -> None:
    says = await models.refused(case[0])
    assert [part for part in case[1] if part not in says] == [], says


async def test_an_accelerator_that_is_not_there(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    asked = "gpu_execution_accelerator { name: 'tensorrt' } cpu_execution_accelerator { name: 'openvino' }"
    await models.load(f"optimization {{ execution_accelerators {{ {asked} }} }}")
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [
        f"model m: execution accelerator '{name}' is not there; it has no effect" for name in ("tensorrt", "openvino")
    ]


def test_options_for_cuda() -> None:
    config = pb.ModelConfig()
    cuda = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
    cuda.parameters["cudnn_conv_use_max_workspace"] = "0"
    for name, value in (
        ("cudnn_conv_algo_search", "1"),
        ("arena_extend_strategy", "1"),
        ("gpu_mem_limit", "1000"),
        ("do_copy_in_default_stream", "true"),
    ):
        config.parameters[name].string_value = value
    assert accelerators(config) == []
    assert cuda_options(config, 3) == {
        "cudnn_conv_use_max_workspace": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "1000",
        "do_copy_in_default_stream": "1",
        "device_id": "3",
    }


@pytest.mark.parametrize("name", ["user_compute_stream", "gpu_external_alloc"])
async def test_options_for_cuda_that_are_addresses(models: Models, name: str) -> None:
    cuda = f'gpu_execution_accelerator {{ name: "cuda" parameters {{ key: "{name}" value: "1" }} }}'
    says = await models.refused(f"optimization {{ execution_accelerators {{ {cuda} }} }}")
    assert f"{name} is an address in the process" in says


async def test_batches_are_run_by_the_graph(models: Models) -> None:
    loaded = await models.load(None)
    with pytest.raises(Exception, match="batch is 5, model 'm' takes 1 to 4"):
        await infer(loaded, (5, 2))
    assert (await infer(loaded, (4, 2)))[0] == (4, 2)
