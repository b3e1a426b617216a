"""Promise: docs/models.md is right: every field of config.pbtxt is where it belongs, with the effect that it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from proxy.backend import answers, batching, cache, config, derive
from proxy.backend.config import ineffective, read_config
from proxy.backend.errors import LoadError
from proxy.backend.loading import Order, make
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.runtimes.onnxoptions import Settings, cuda_options
from proxy.backend.samples import repository_path
from proxy.backend.tensors import DATATYPES
from tests.docs.markdown import code_blocks, names, table
from tests.docs.test_backend import MODEL
from tests.peers import ROOT

DOCUMENT = ROOT / "docs/models.md"
TEXT = " ".join(DOCUMENT.read_text().split())
CONFIGS = [block.text for block in code_blocks(DOCUMENT) if block.language == "protobuf"]
DIGITS = repository_path() / "digits/1/model.onnx"

IN = 'input { name: "IN" data_type: TYPE_INT32 dims: 1 %s } '
OUT = 'output { name: "OUT" data_type: TYPE_INT32 dims: 1 %s } '
USES = {
    "runtime": 'runtime: "x"',
    "cc_model_filenames": 'cc_model_filenames { key: "8.0" value: "x" }',
    "metric_tags": 'metric_tags { key: "x" value: "y" }',
    "model_operations": 'model_operations { op_library_filename: "x.so" }',
    "model_metrics": "model_metrics { metric_control { } }",
    "format": IN % "format: FORMAT_NHWC",
    "is_non_linear_format_io": IN % "is_non_linear_format_io: true" + OUT % "is_non_linear_format_io: true",
    "rate_limiter": "instance_group { rate_limiter { priority: 1 } }",
    "secondary_devices": "instance_group { secondary_devices { device_id: 1 } }",
    "profile": 'instance_group { profile: "x" }',
    "host_policy": 'instance_group { host_policy: "x" }',
    "priority": "optimization { priority: PRIORITY_MAX }",
    "cuda": "optimization { cuda { graphs: true } }",
    "input_pinned_memory": "optimization { input_pinned_memory { enable: true } }",
    "output_pinned_memory": "optimization { output_pinned_memory { enable: true } }",
    "gather_kernel_buffer_threshold": "optimization { gather_kernel_buffer_threshold: 1 }",
    "eager_batching": "optimization { eager_batching: true }",
    "sequence_batching": "sequence_batching { }",
    "ensemble_scheduling": "ensemble_scheduling { }",
    "batch_input": "batch_input { }",
    "batch_output": "batch_output { }",
    "model_repository_agents": "model_repository_agents { }",
    "is_shape_tensor": OUT % "is_shape_tensor: true",
    "allow_ragged_batch": IN % "allow_ragged_batch: true",
}


def listed(beginning: str, end: str) -> list[str]:
    """The fields that a paragraph names, without the one that only says where others are."""
    found = re.search(rf"{beginning}(.*?){end}", TEXT)
    assert found is not None
    return [name for name in names(found[1]) if name != "optimization"]


WARNED = listed("Accepted without effect, each with a warning", "Refused, so that")
REFUSED = listed("Refused, so that", "ModelConfig shows")
FIELDS = table(DOCUMENT, "field", "")
PARAMETERS = {name: row[1] for row in table(DOCUMENT, "parameter", "what it takes") for name in names(row[0])}


def configured(folder: Path, text: str) -> pb.ModelConfig:
    (folder / "config.pbtxt").write_text(text)
    return read_config(folder)


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field(field: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=rf"\b{field}\b.*not supported"):
        configured(tmp_path, USES[field])


@pytest.mark.parametrize("field", WARNED)
@pytest.mark.parametrize("backend", ["", 'backend: "onnxruntime" '])
def test_a_field_whose_lack_of_effect_is_logged(field: str, backend: str, tmp_path: Path) -> None:
    found = ineffective(configured(tmp_path, backend + USES[field]))
    assert found
    assert {path.rpartition(".")[2] for path in found} == {field}


def test_what_works_for_onnx_alone(tmp_path: Path) -> None:
    """And parameters that ONNX Runtime doesn't know are warned of, those of a model.py are its own."""
    text = "optimization { graph { level: 1 } execution_accelerators { gpu_execution_accelerator { name: 'cuda' } } }"
    text += "parameters { key: 'x' value { string_value: '1' } }"
    (row,) = [row for row in FIELDS if names(row[0]) == ["optimization"]]
    for_onnx = names(row[1])
    assert ineffective(configured(tmp_path, text)) == [f"optimization.{field}" for field in for_onnx]
    assert ineffective(configured(tmp_path, 'backend: "onnxruntime" ' + text)) == ["parameters['x']"]


def test_every_field_is_in_the_document() -> None:
    assert sorted([*WARNED, *REFUSED]) == sorted(USES)
    understood = {name for row in FIELDS for cell in row for name in names(cell)}
    done = {path.rpartition(".")[2] for path in config._DONE | config._DONE_FOR_ONNX}
    assert done <= understood
    assert not set(USES) & done
    messages = (pb.ModelConfig, pb.ModelInput, pb.ModelOutput, pb.ModelInstanceGroup, pb.ModelOptimizationPolicy)
    fields = {field.name for message in messages for field in message.DESCRIPTOR.fields}
    assert fields - understood - set(USES) == set()


def test_an_unknown_field_is_an_error_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"config\.pbtxt:2:1: .*max_bach_size"):
        configured(tmp_path, "max_batch_size: 1\nmax_bach_size: 2")


def test_the_fields_of_batching() -> None:
    rows = table(DOCUMENT, "field of `dynamic_batching`", "meaning")
    assert {name for row in rows for name in names(row[0])} == {
        field.name for field in pb.ModelDynamicBatching.DESCRIPTOR.fields
    }
    policy = {field.name for field in pb.ModelQueuePolicy.DESCRIPTOR.fields}
    assert policy - {name.partition(":")[0] for row in rows for name in names(row[1])} == set()
    assert f"| up to {derive._MOST_LEVELS};" in TEXT
    assert f"Requests of {batching.MOST_SHAPES} different shapes" in TEXT


def test_the_numbers() -> None:
    assert f"at most {answers.MOST_AHEAD} answers ahead" in TEXT
    assert f"for {answers._PATIENCE:g} s gets RESOURCE_EXHAUSTED" in TEXT
    assert f"keep {cache.DEFAULT_LIMIT // 2**20} MiB" in TEXT
    assert f"at most {derive._MOST_INSTANCES} instances of a version" in TEXT
    assert f"is any size; {config._MOST_DIMS} at most" in TEXT


# ONNX

VALUES = {
    "intra_op_thread_count": ("1024", "1025"),
    "inter_op_thread_count": ("1024", "1025"),
    "execution_mode": ("1", "2"),
    "enable_mem_arena": ("true", "yes"),
    "enable_mem_pattern": ("0", "yes"),
    "memory.enable_memory_arena_shrinkage": ("cpu:0;gpu:0", "cpu"),
    "session.use_device_allocator_for_initializers": ("1", "2"),
    "cudnn_conv_algo_search": ("2", "3"),
    "gpu_mem_limit": ("1000", "all"),
    "arena_extend_strategy": ("1", "2"),
    "do_copy_in_default_stream": ("0", "2"),
}


def onnx(name: str, value: str) -> pb.ModelConfig:
    made = pb.ModelConfig(backend="onnxruntime")
    made.parameters[name].string_value = value
    return made


def read(config: pb.ModelConfig) -> None:
    """As a model of ONNX is loaded."""
    Settings.of(config)
    cuda_options(config, 0)


def test_the_parameters_of_onnx() -> None:
    assert set(PARAMETERS) == config.ONNX_PARAMETERS
    assert set(PARAMETERS) - set(VALUES) == {"share_session_between_instances"}


@pytest.mark.parametrize("name", VALUES)
def test_what_a_parameter_takes(name: str) -> None:
    right, wrong = VALUES[name]
    read(onnx(name, right))
    with pytest.raises(LoadError, match=re.escape(name)):
        read(onnx(name, wrong))


@pytest.mark.parametrize("name", ["cudnn_conv_algo_search", "arena_extend_strategy"])
def test_the_choices_of_cuda(name: str) -> None:
    choices = dict(re.findall(r"(\d): (\w+)", PARAMETERS[name]))
    assert choices
    for number, choice in choices.items():
        assert cuda_options(onnx(name, number), 0)[name] == choice


@pytest.mark.parametrize(
    ("level", "words"), [(0, "all"), (1, "basic and extended"), (-1, "basic ones"), (2, "none")], ids=str
)
def test_the_levels_of_the_graph(level: int, words: str) -> None:
    assert f"{level} for {words}" in TEXT
    assert Settings.of(pb.ModelConfig(optimization={"graph": {"level": level}})).level in {"extended", *words.split()}


def loaded(folder: Path, text: str, file: Path | str) -> tuple[pb.ModelConfig | None, str]:
    """(the configuration that is in force, or why it isn't served) of a model with one version."""
    (folder / "1").mkdir()
    (folder / "config.pbtxt").write_text(text)
    if isinstance(file, Path):
        (folder / "1/model.onnx").write_bytes(file.read_bytes())
    else:
        (folder / "1/model.py").write_text(file)
    made = make(Order(folder.name, folder))
    shown = made.versions[1].config if made.versions else None
    reason = made.reason or made.faults.get(1, "")
    made.discard()
    return shown, reason


def test_what_is_read_off_a_graph(tmp_path: Path) -> None:
    assert "`max_batch_size` is 4 unless it is set, and with more than 1 there is `dynamic_batching`" in TEXT
    shown, _ = loaded(tmp_path, "", DIGITS)
    assert shown is not None
    assert shown.max_batch_size == 4
    assert shown.HasField("dynamic_batching")
    assert [list(tensor.dims) for tensor in shown.input] == [[64]]


def test_without_a_batch_dimension_both_are_described(tmp_path: Path) -> None:
    assert "To have no batch dimension, describe both." in TEXT
    shown, reason = loaded(tmp_path, 'input { name: "pixels" } output { name: "label" }', DIGITS)
    assert shown is not None, reason
    assert (shown.max_batch_size, shown.HasField("dynamic_batching")) == (0, False)
    assert [list(tensor.dims) for tensor in shown.input] == [[-1, 64]]


# What else models may ask for


def test_the_sample_of_a_warm_up_is_run(tmp_path: Path) -> None:
    """A model that fails for it isn't served: so it has run."""
    warm = CONFIGS[1]
    assert "model_warmup" in warm
    fine, reason = loaded(tmp_path, warm, MODEL)
    assert fine is not None, reason
    broken = tmp_path / "broken"
    broken.mkdir()
    begins = "    def execute(self, batch):\n"
    assert begins in MODEL
    code = MODEL.replace(begins, begins + "        raise ValueError(batch['logits'].shape)\n")
    shown, reason = loaded(broken, warm, code)
    assert shown is None
    assert "(32, 1000)" in reason


@pytest.mark.parametrize("kind", [names(row[0])[0] for row in table(DOCUMENT, "`kind`", "")])
def test_the_kinds_of_instances_of_a_model_in_python(kind: str, tmp_path: Path) -> None:
    shown, reason = loaded(tmp_path, CONFIGS[1] + f"instance_group {{ kind: {kind} }}", MODEL)
    if kind == "KIND_GPU":
        assert shown is None
        assert "KIND_GPU" in reason
    else:
        assert shown is not None
        chosen = shown.instance_group[0].kind
        assert chosen == pb.ModelInstanceGroup.Kind.Value(kind.replace("AUTO", "CPU"))


def test_the_kinds_are_those_of_the_configuration() -> None:
    kinds = {name for row in table(DOCUMENT, "`kind`", "") for name in names(row[0])}
    assert kinds == set(pb.ModelInstanceGroup.Kind.keys())


TYPES = table(DOCUMENT, "in requests", "in config.pbtxt", "numpy", "typed contents")


def test_the_data_types() -> None:
    assert [names(row[0])[0] for row in TYPES] == list(DATATYPES)
    for row in TYPES:
        name, configured, numpy = (names(cell)[0] for cell in row[:3])
        assert configured == f"TYPE_{name.replace('BYTES', 'STRING')}"
        assert configured in pb.DataType.keys()  # noqa: SIM118  (no dict)
        assert np.dtype(numpy) == DATATYPES[name].dtype
