"""Promise: a configuration is served as it says, or refused with the place, the fault and the remedy."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from proxy.backend.dataplane import InputTensor, Request, check
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.repository import Loaded, Repository, State
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, write_model
from tests.backend.onnxfile import onnx_file

IN = 'input { name: "IN" data_type: TYPE_INT32 dims: 1 } '
OUT = 'output { name: "OUT" data_type: TYPE_INT32 dims: 1 } '
PLACE = "m/config.pbtxt"
MODEL = {"1/model.py": ECHO}

# config.pbtxt, what the reason must hold
BAD: dict[str, tuple[str, list[str]]] = {
    "unknown field": ("max_batch_size: 1\nmax_size: 4", [f"{PLACE}:2:1: ", 'no field named "max_size"']),
    "unknown nested field": ('input {\n  name: "A"\n  shape: 1\n}', [f"{PLACE}:3:3: ", '"shape"']),
    "wrong type": ('max_batch_size: "four"', [f"{PLACE}:1:17: ", "four"]),
    "unknown enum value": ("input { data_type: TYPE_FLOAT }", [f"{PLACE}:1:20: ", "TYPE_FLOAT"]),
    "brace not closed": (IN + "output {", [f"{PLACE}:1:"]),
    "not text": ("\x00\x01", [f"{PLACE}:1:1: "]),
    "another name": ('name: "other" ' + IN + OUT, [PLACE, "'other'", "'m'"]),
    "negative batch": ("max_batch_size: -1 " + IN + OUT, [PLACE, "-1", "0 means"]),
    "no inputs": (OUT, [PLACE, "no input"]),
    "no outputs": (IN, [PLACE, "no output"]),
    "input twice": (IN + IN + OUT, [PLACE, "input 'IN'", "2 times"]),
    "no tensor name": ("input { data_type: TYPE_INT32 dims: 1 }" + OUT, [PLACE, "name is missing"]),
    "no data type": (IN + 'output { name: "OUT" dims: 1 }', [PLACE, "output 'OUT'", "data_type is missing"]),
    "data type 99": (IN + OUT.replace("TYPE_INT32", "99"), [PLACE, "output 'OUT'", "data_type 99 does not exist"]),
    "kind 9": (IN + OUT + "instance_group { kind: 9 }", [PLACE, "kind 9 does not exist", "KIND_CPU"]),
    "dimension 0": (IN + OUT.replace("dims: 1", "dims: [2, 0]"), [PLACE, "output 'OUT'", "dimension 0", "1 or more"]),
    "dimension -2": (IN.replace("dims: 1", "dims: -2") + OUT, [PLACE, "input 'IN'", "dimension -2"]),
    "forty dimensions": (IN.replace("dims: 1", f"dims: {[1] * 40}") + OUT, [PLACE, "40 dimensions", "31"]),
    "reshape to another size": (
        IN.replace("dims: 1", "dims: [2, 3] reshape { shape: [7] }") + OUT,
        [PLACE, "input 'IN'", "[2, 3]", "[7]"],
    ),
    "reshape drops a variable dimension": (
        IN.replace("dims: 1", "dims: [-1, 3] reshape { shape: [3] }") + OUT,
        [PLACE, "input 'IN'", "[-1, 3]", "[3]"],
    ),
    "sequence batching": (IN + OUT + "sequence_batching { }", [PLACE, "sequence_batching", "not supported"]),
    "ensemble": (IN + OUT + "ensemble_scheduling { }", ["ensemble_scheduling", "not supported"]),
    "decoupled and in order": (
        IN + OUT + "model_transaction_policy { decoupled: true } dynamic_batching { preserve_ordering: true }",
        [PLACE, "preserve_ordering", "decoupled", "remove one"],
    ),
    "a thousand instances": (IN + OUT + "instance_group { count: 1000 }", [PLACE, "1000 instances", "256"]),
    "batch input": (IN + OUT + "batch_input { } batch_output { }", ["batch_input, batch_output", "not supported"]),
    "agents": (IN + OUT + "model_repository_agents { }", ["model_repository_agents"]),
    "shape tensor": (IN + OUT.replace("}", "is_shape_tensor: true }"), ["is_shape_tensor"]),
    "ragged batch": (IN.replace("}", "allow_ragged_batch: true }") + OUT, ["allow_ragged_batch"]),
    "negative count": (IN + OUT + "instance_group { count: -1 }", [PLACE, "count is -1"]),
    "all passive": (IN + OUT + "instance_group { passive: true }", [PLACE, "passive"]),
    "GPU for a model.py": (IN + OUT + "instance_group { kind: KIND_GPU }", ["KIND_GPU", "KIND_CPU"]),
    "file outside": (IN + OUT + 'default_model_filename: "../model.py"', [PLACE, "'../model.py'", "plain"]),
    "file missing": (IN + OUT + 'default_model_filename: "other.py"', ["m/1 holds no other.py"]),
    "Triton's Python backend": (IN + OUT + 'backend: "python"', ["'python'", "'numpy'", "class Model"]),
    "backend unknown": (IN + OUT + 'backend: "tensorrt"', ["'tensorrt'", "'onnxruntime'"]),
    "platform unknown": (IN + OUT + 'platform: "pytorch_libtorch"', ["'pytorch_libtorch'", "'onnxruntime'"]),
    "backend without its file": (IN + OUT + 'backend: "onnxruntime"', ["m/1 holds no model.onnx"]),
    "version missing": (IN + OUT + "version_policy { specific { versions: [1, 3] } }", ["version 3", "[1]"]),
}

# model.py, what the reason must hold
BAD_CODE: dict[str, tuple[str, list[str]]] = {
    "syntax": ("class Model:\n    def execute(", ["m/1/model.py:2: SyntaxError"]),
    "raises": ("\n\n1 / 0\n", ["m/1/model.py:3: ZeroDivisionError"]),
    "exits": ("import sys\nsys.exit(2)", ["m/1/model.py:2: SystemExit: 2"]),
    "no class": ("def execute(batch): ...", ["m/1/model.py", "no class Model", "execute(self, batch)"]),
    "no execute": ("class Model: ...", ["no class Model with a method execute"]),
    "Triton's class": ("class TritonPythonModel:\n    def execute(self, requests): ...", ["no class Model"]),
    "initialize raises": (
        "class Model:\n    def initialize(self, config):\n        raise OSError('gone')\n    def execute(self, b): ...",
        ["m/1/model.py:3: OSError: gone"],
    ),
    "initialize takes nothing": (
        "class Model:\n    def initialize(self): ...\n    def execute(self, batch): ...",
        ["TypeError", "initialize()"],
    ),
}

GRAPH = onnx_file("Identity", {"IN": ("INT32", ["n", 2])}, {"OUT": ("INT32", ["n", 2])})
ONNX_IN = 'input { name: "IN" data_type: TYPE_INT32 dims: [-1, 2] } '
ONNX_OUT = 'output { name: "OUT" data_type: TYPE_INT32 dims: [-1, 2] } '

BAD_ONNX: dict[str, tuple[str, bytes, list[str]]] = {
    "not ONNX": ("", b"\0" * 100, ["m/1/model.onnx", "INVALID_"]),
    "unknown input": (ONNX_IN.replace('"IN"', '"X"') + ONNX_OUT, GRAPH, ["input 'X'", "which has 'IN'"]),
    "unknown output": (ONNX_IN + ONNX_OUT.replace('"OUT"', '"X"'), GRAPH, ["output 'X'", "which has 'OUT'"]),
    "other type": (ONNX_IN.replace("INT32", "INT64") + ONNX_OUT, GRAPH, ["input 'IN'", "INT64", "INT32"]),
    "other rank": (ONNX_IN.replace("[-1, 2]", "[-1]") + ONNX_OUT, GRAPH, ["input 'IN'", "[-1]", "[-1, 2]"]),
    "other size": (ONNX_IN + ONNX_OUT.replace("[-1, 2]", "[-1, 3]"), GRAPH, ["output 'OUT'", "[-1, 3]", "[-1, 2]"]),
    "wider than the graph": (
        ONNX_IN.replace("[-1, 2]", "[-1, -1]") + ONNX_OUT,
        GRAPH,
        ["input 'IN'", "[-1, -1]", "[-1, 2]"],
    ),
    "dims with the batch": ("max_batch_size: 2 " + ONNX_IN, GRAPH, ["input 'IN'", "[-1, 2]", "[2]", "batch"]),
    "fixed batch": (
        "max_batch_size: 2",
        onnx_file("Identity", {"IN": ("INT32", [1, 2])}, {"OUT": ("INT32", [1, 2])}),
        ["input 'IN'", "[1, 2]", "max_batch_size to 0"],
    ),
    "an input left out": (
        ONNX_IN + ONNX_OUT,
        onnx_file("Add", {"IN": ("INT32", ["n", 2]), "MORE": ("INT32", ["n", 2])}, {"OUT": ("INT32", ["n", 2])}),
        ["input 'MORE'", "not in config.pbtxt"],
    ),
    "type not served": (
        "",
        onnx_file("Identity", {"IN": ("BF16", ["n"])}, {"OUT": ("BF16", ["n"])}),
        ["input 'IN'", "tensor(bfloat16)"],
    ),
    "threads": (
        'parameters { key: "intra_op_thread_count" value { string_value: "many" } }',
        GRAPH,
        ["intra_op_thread_count", "'many'"],
    ),
    "decoupled": (
        "model_transaction_policy { decoupled: true }",
        GRAPH,
        ["decoupled", "one answer", "model.py"],
    ),
    "no CUDA": ("instance_group { kind: KIND_GPU }", GRAPH, ["KIND_GPU", "KIND_CPU"]),
}


async def reason(folder: Path, config: str | None, files: dict[str, str | bytes]) -> str:
    """Why a model in a repository of its own isn't ready, as the log says it."""
    write_model(folder, "m", config, files)
    repository = Repository(folder)
    await repository.load()
    model = repository.models["m"]
    assert model.latest is None
    return model.reason or next(version.reason for version in model.versions.values())


@pytest.mark.parametrize("case", BAD.values(), ids=list(BAD))
async def test_a_bad_config(tmp_path: Path, case: tuple[str, list[str]], caplog: pytest.LogCaptureFixture) -> None:
    says = await reason(tmp_path, case[0], MODEL)
    assert [part for part in case[1] if part not in says] == [], says
    assert says in caplog.text


@pytest.mark.parametrize("case", BAD_CODE.values(), ids=list(BAD_CODE))
async def test_a_bad_model_py(tmp_path: Path, case: tuple[str, list[str]]) -> None:
    says = await reason(tmp_path, IN + OUT, {"1/model.py": case[0]})
    assert [part for part in case[1] if part not in says] == [], says


@pytest.mark.parametrize("case", BAD_ONNX.values(), ids=list(BAD_ONNX))
async def test_an_onnx_model_that_is_not_as_configured(tmp_path: Path, case: tuple[str, bytes, list[str]]) -> None:
    config, graph, parts = case
    says = await reason(tmp_path, config, {"1/model.onnx": graph})
    assert [part for part in parts if part not in says] == [], says


async def test_directories_that_hold_nothing(tmp_path: Path) -> None:
    assert "holds no version directory" in await reason(tmp_path / "a", IN + OUT, {"model.py": ECHO})
    assert "m/1 holds no model.onnx or model.py" in await reason(tmp_path / "b", None, {"1/model.txt": ""})
    assert "cannot be read" in await reason(tmp_path / "c", None, {"1/model.py": ECHO, "config.pbtxt/x": ""})
    latin = {"1/model.py": ECHO, "config.pbtxt": b"# \xe9\n"}
    assert "config.pbtxt: cannot be read: 'utf-8' codec" in await reason(tmp_path / "d", None, latin)


async def loaded(folder: Path, config: str | None, files: dict[str, str | bytes]) -> Loaded:
    write_model(folder, "m", config, files)
    repository = Repository(folder)
    await repository.load()
    try:
        return repository.find("m", "")
    finally:
        repository.close(timeout=10)


@pytest.mark.parametrize(
    ("policy", "served", "latest"),
    [
        ("", [10], 10),
        ("latest { num_versions: 2 }", [9, 10], 10),
        ("all { }", [2, 9, 10], 10),
        ("specific { versions: [9, 2] }", [2, 9], 9),
    ],
)
async def test_version_policies(tmp_path: Path, policy: str, served: list[int], latest: int) -> None:
    files = {f"{version}/model.py": ECHO for version in (2, 9, 10)} | {"old/model.py": "", "007/model.py": ""}
    write_model(tmp_path, "m", IN + OUT + (f"version_policy {{ {policy} }}" if policy else ""), files)
    repository = Repository(tmp_path)
    await repository.load()
    assert [version.number for version in repository.models["m"].ready()] == served
    assert repository.find("m", "").spec.version == latest
    assert repository.find("m", str(served[0])).spec.version == served[0]
    repository.close(timeout=10)


async def test_a_broken_version_keeps_the_others_back(tmp_path: Path) -> None:
    """As with Triton: a model is served as its version_policy says, or not at all."""
    files = {"1/model.py": ECHO, "2/model.py": "1 / 0"}
    write_model(tmp_path, "m", IN + OUT + "version_policy { all { } }", files)
    repository = Repository(tmp_path)
    await repository.load()
    states = {number: (one.state, one.reason) for number, one in repository.models["m"].versions.items()}
    assert states[1] == (State.UNAVAILABLE, "unloaded")
    assert states[2][0] is State.UNAVAILABLE
    assert "m/2/model.py:1: ZeroDivisionError" in states[2][1]
    assert not repository.is_ready("m", "")
    assert not repository.is_ready("m", "1")
    repository.close(timeout=10)


INEFFECTIVE: dict[str, str] = {
    "optimization.graph": "optimization { graph { level: 1 } }",
    "optimization.cuda": "optimization { cuda { graphs: true } }",
    "optimization.input_pinned_memory": "optimization { input_pinned_memory { enable: true } }",
    "instance_group.rate_limiter": "instance_group { rate_limiter { priority: 2 } }",
    "instance_group.host_policy": 'instance_group { } instance_group { host_policy: "x" }',
    "instance_group.profile": 'instance_group { profile: "x" }',
    "instance_group.secondary_devices": "instance_group { secondary_devices { device_id: 1 } }",
    "input.format": IN.replace("}", "format: FORMAT_NHWC optional: true }").replace('"IN"', '"MORE"'),
    "output.is_non_linear_format_io": OUT.replace("}", "is_non_linear_format_io: true }").replace('"OUT"', '"MORE"'),
    "runtime": 'runtime: "x"',
    "cc_model_filenames": 'cc_model_filenames { key: "8.0" value: "x" }',
    "metric_tags": 'metric_tags { key: "x" value: "y" }',
    "model_operations": 'model_operations { op_library_filename: "x.so" }',
    "model_metrics": 'model_metrics { metric_control { metric_identifier { family: "x" } } }',
}


@pytest.mark.parametrize(("field", "text"), INEFFECTIVE.items(), ids=list(INEFFECTIVE))
async def test_what_has_no_effect_is_said(
    tmp_path: Path, field: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    await loaded(tmp_path, IN + OUT + text, MODEL)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [f"model m: {field} is set and has no effect here"]


async def test_what_is_done_or_says_nothing_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """
    max_batch_size: 2 backend: "numpy" version_policy { latest { num_versions: 1 } } default_model_filename: "model.py"
    instance_group { name: "a" count: 1 kind: KIND_CPU rate_limiter { } } instance_group { passive: true }
    dynamic_batching { preferred_batch_size: 2 max_queue_delay_microseconds: 1 preserve_ordering: true
                       default_queue_policy { max_queue_size: 5 } }
    parameters { key: "anything" value { string_value: "1" } }
    response_cache { enable: false } optimization { } model_transaction_policy { }
    """
    await loaded(tmp_path, IN + OUT + text, MODEL)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_parameter_that_onnx_runtime_has_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = 'parameters { key: "intra_op_threads" value { string_value: "1" } } optimization { graph { level: -1 } }'
    await loaded(tmp_path, odd, {"1/model.onnx": GRAPH})
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["model m: parameters['intra_op_threads'] is set and has no effect here"]


async def test_it_is_said_once_for_all_versions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, str | bytes] = {f"{number}/model.py": ECHO for number in (1, 2, 3)}
    await loaded(tmp_path, IN + OUT + 'version_policy { all { } } runtime: "x"', files)
    assert caplog.text.count("runtime is set and has no effect here") == 1


async def test_kind_auto_says_what_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = (await loaded(tmp_path, IN + OUT + "instance_group { count: 2 gpus: [0, 1] }", MODEL)).config
    assert [(group.kind, group.count, list(group.gpus)) for group in config.instance_group] == [
        (pb.ModelInstanceGroup.KIND_CPU, 2, [])
    ]
    assert "model m: KIND_AUTO takes the CPU" in caplog.text


async def test_dynamic_batching_is_shown_with_its_size(tmp_path: Path) -> None:
    config = (await loaded(tmp_path, IN + OUT + "max_batch_size: 6 dynamic_batching { }", MODEL)).config
    assert list(config.dynamic_batching.preferred_batch_size) == [6]


async def test_another_file_name(tmp_path: Path) -> None:
    found = await loaded(tmp_path, 'default_model_filename: "net.onnx"', {"1/net.onnx": GRAPH})
    assert (found.config.backend, found.config.default_model_filename) == ("onnxruntime", "net.onnx")


async def test_a_model_is_told_of_its_configuration(tmp_path: Path) -> None:
    code = """
class Model:
    def initialize(self, config):
        found = [config.name, config.version, config.directory.name, config.max_batch_size, dict(config.parameters)]
        found += [config.inputs[0].name, config.inputs[0].datatype.name, config.inputs[0].dims, config.outputs[0].name]
        (config.directory / "found").write_text(repr(found))
    def execute(self, batch): ...
"""
    config = NUMBER_TO_NUMBER + 'max_batch_size: 3 parameters { key: "depth" value { string_value: "5" } }'
    await loaded(tmp_path, config, {"7/model.py": code})
    found = (tmp_path / "m/7/found").read_text()
    assert found == repr(["m", 7, "7", 3, {"depth": "5"}, "IN", "INT32", (1,), "OUT"])


async def test_each_instance_is_an_object_and_a_thread_of_its_own(tmp_path: Path) -> None:
    code = """
import threading
class Model:
    def initialize(self, config):
        self.directory, self.thread = config.directory, threading.current_thread()
    def execute(self, batch): ...
    def finalize(self):
        assert threading.current_thread() is self.thread
        (self.directory / f"{id(self)}-{self.thread.name.replace('/', '.')}").touch()
"""
    groups = "instance_group { count: 2 } instance_group { kind: KIND_CPU }"
    await loaded(tmp_path, IN + OUT + groups, {"1/model.py": code})
    ended = sorted(path.name.split("-")[1] for path in (tmp_path / "m/1").glob("*-m.1*"))
    assert ended == ["m.1#0", "m.1#1", "m.1#2"]
    assert len({path.name.split("-")[0] for path in (tmp_path / "m/1").glob("*-m.1*")}) == 3


async def test_reshape_both_ways(tmp_path: Path) -> None:
    code = """
class Model:
    def execute(self, batch):
        assert batch["IN"].shape == (2, 3, 5), batch["IN"].shape
        return {"OUT": batch["IN"].sum((1, 2)).astype("i4")}
"""
    config = 'max_batch_size: 4 input { name: "IN" data_type: TYPE_INT32 dims: [-1, 1, 5] reshape { shape: [-1, 5] } }'
    config += 'output { name: "OUT" data_type: TYPE_INT32 dims: 1 reshape { } }'
    write_model(tmp_path, "m", config, {"1/model.py": code})
    repository = Repository(tmp_path)
    await repository.load()
    sent = InputTensor("IN", "INT32", (2, 3, 1, 5), values=[1] * 15 + [2] * 15)
    (output,) = await repository.find("m", "").infer(Request([sent]))
    assert (output.shape, bytes(output.data)) == ((2, 1), b"\x0f\0\0\0\x1e\0\0\0")
    repository.close(timeout=10)


async def test_an_optional_input_may_be_missing(tmp_path: Path) -> None:
    config = IN + IN.replace('"IN"', '"MORE"').replace("}", "optional: true }") + OUT
    spec = (await loaded(tmp_path, config, MODEL)).spec
    sent = InputTensor("IN", "INT32", (1,), raw=b"abcd")
    assert len(check(spec, Request([sent]), shared_outputs=True).inputs) == 1


async def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=re.escape(f"model repository {tmp_path}/none cannot be read: No such file")):
        await Repository(tmp_path / "none").load()


async def test_an_empty_repository(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").touch()
    repository = Repository(tmp_path)
    await repository.load()
    assert not repository.models
    assert "holds no models" in caplog.text
