"""Promise: docs/backend.md is right: its example runs as printed, its tables and lists are those of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from proxy.backend.config import ineffective, read_config
from proxy.backend.errors import LoadError
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.protos import model_config_pb2 as config_pb
from proxy.backend.samples import repository_path
from proxy.backend.services.call import LARGEST_MESSAGE
from proxy.backend.services.compression import LARGEST_INFLATED
from proxy.backend.services.http2 import MOST_STREAMS
from proxy.backend.services.inference import SERVICE
from proxy.backend.tensors import DATATYPES
from tests.docs.markdown import code_blocks, names, table
from tests.peers import ROOT
from tests.support.processes import LIVENESS, Process

DOCUMENT = ROOT / "docs/backend.md"
TEXT = " ".join(DOCUMENT.read_text().split())
LISTEN = "127.0.0.1:9001"

REFUSES = """
from proxy.backend.errors import invalid

class Model:
    def execute(self, batch):
        raise invalid("why")
"""


def code(language: str) -> list[str]:
    return [block.text for block in code_blocks(DOCUMENT) if block.language == language]


CONFIG = code("protobuf")[0]
MODEL, CLIENT = code("python")


@dataclass
class Example:
    """The document's repository, served by the document's command."""

    target: str
    channel: grpc.Channel


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    place = tmp_path_factory.mktemp("example")
    write(place / "models/softmax", CONFIG, MODEL)
    write(place / "models/refuses", CONFIG, REFUSES)
    (place / "models/digits/1").mkdir(parents=True)
    shutil.copy(repository_path() / "digits/1/model.onnx", place / "models/digits/1")
    command = f"tensorgate backend models --listen {LISTEN}"
    assert f"`{command}`" in TEXT
    arguments = command.replace(LISTEN, "127.0.0.1:0").split()[1:]
    argv = [sys.executable, "-m", "proxy", *arguments]
    process = Process("example", argv, place, {"PYTHONPATH": str(ROOT)}, cwd=place)
    target = process.wait_log(r"backend listens: grpc on (\S+)")[1]
    process.wait_log("backend is ready: 3 of 3 models")
    with grpc.insecure_channel(target) as channel:
        yield Example(target, channel)
    process.stop()


def write(directory: Path, config: str, model: str) -> None:
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config)
    (directory / "1/model.py").write_text(model)


def test_the_example_is_called_as_printed(example: Example) -> None:
    assert LISTEN in CLIENT
    argv = [sys.executable, "-c", CLIENT.replace(LISTEN, example.target)]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=LIVENESS, check=True).stdout
    powers = np.exp(np.array([1, 2, 3]) / 2.0)
    got = np.array(re.findall(r"\d\.\d+", shown), float)
    np.testing.assert_allclose(got, powers / powers.sum(), rtol=1e-5)


def request(model: str, rows: int) -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest(model_name=model)
    made.inputs.add(name="logits", datatype="FP32", shape=[rows, 3]).contents.fp32_contents.extend(range(3 * rows))
    return made


def test_the_example_has_the_batches_that_it_says(example: Example) -> None:
    infer = service_pb2_grpc.GRPCInferenceServiceStub(example.channel).ModelInfer
    answer = infer(request("softmax", 32), timeout=LIVENESS)
    sums = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(32, 3).sum(axis=1)
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    with pytest.raises(grpc.RpcError) as failed:
        infer(request("softmax", 33), timeout=LIVENESS)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_can_say_that_the_request_is_wrong(example: Example) -> None:
    assert '`proxy.backend.errors.invalid("why")`: INVALID_ARGUMENT' in TEXT
    with pytest.raises(grpc.RpcError) as failed:
        service_pb2_grpc.GRPCInferenceServiceStub(example.channel).ModelInfer(request("refuses", 1), timeout=LIVENESS)
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "why")


def test_the_rpcs_that_are_served(example: Example) -> None:
    listed = re.search(r"Served are (.*?), and Check and Watch of", TEXT)
    assert listed is not None
    served = set()
    for rpc in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        call = example.channel.unary_unary(f"/{SERVICE}/{rpc.name}").future(b"", timeout=LIVENESS)
        if call.code() is not grpc.StatusCode.UNIMPLEMENTED:
            served.add(rpc.name)
    assert set(re.split(", | and ", listed[1])) == served


TYPES = table(DOCUMENT, "in requests", "in config.pbtxt", "numpy", "typed contents")


def test_the_data_types() -> None:
    assert [names(row[0])[0] for row in TYPES] == list(DATATYPES)
    for row in TYPES:
        name, configured, numpy = (names(cell)[0] for cell in row[:3])
        assert configured == f"TYPE_{name.replace('BYTES', 'STRING')}"
        assert configured in config_pb.DataType.keys()  # noqa: SIM118  (no dict)
        assert np.dtype(numpy) == DATATYPES[name].dtype


@pytest.mark.parametrize("row", TYPES, ids=lambda row: names(row[0])[0])
def test_where_typed_contents_go(row: list[str], example: Example) -> None:
    """A value in another field is refused, and the message names the right one."""
    name, field = names(row[0])[0], name_of_field(row)
    wrong = "fp32_contents" if field == "fp64_contents" else "fp64_contents"
    made = service_pb2.ModelInferRequest(model_name="softmax")
    sent = made.inputs.add(name="logits", datatype=name, shape=[1, 1])
    getattr(sent.contents, wrong).append(1)
    with pytest.raises(grpc.RpcError) as refused:
        service_pb2_grpc.GRPCInferenceServiceStub(example.channel).ModelInfer(made, timeout=LIVENESS)
    says = f"{name} goes into {field}" if field else f"{name} can only be sent in raw_input_contents"
    assert says in refused.value.details()


def name_of_field(row: list[str]) -> str:
    """The last cell of a row of `TYPES`: "" for none."""
    return names(row[3])[0] if row[3] != "none" else ""


# config.pbtxt

IN = 'input { name: "IN" data_type: TYPE_INT32 dims: 1 %s } '
OUT = 'output { name: "OUT" data_type: TYPE_INT32 dims: 1 %s } '
USES = {
    "response_cache": "response_cache { enable: true }",
    "model_warmup": "model_warmup { }",
    "optimization": "optimization { }",
    "rate_limiter": "instance_group { rate_limiter { } }",
    "runtime": 'runtime: "x"',
    "cc_model_filenames": 'cc_model_filenames { key: "8.0" value: "x" }',
    "metric_tags": 'metric_tags { key: "x" value: "y" }',
    "model_operations": 'model_operations { op_library_filename: "x.so" }',
    "model_metrics": "model_metrics { }",
    "format": IN % "format: FORMAT_NHWC",
    "label_filename": OUT % 'label_filename: "x"',
    "is_non_linear_format_io": IN % "is_non_linear_format_io: true" + OUT % "is_non_linear_format_io: true",
    "secondary_devices": "instance_group { secondary_devices { } }",
    "profile": 'instance_group { profile: "x" }',
    "host_policy": 'instance_group { host_policy: "x" }',
    "name": 'instance_group { name: "x" }',
    "sequence_batching": "sequence_batching { }",
    "ensemble_scheduling": "ensemble_scheduling { }",
    "batch_input": "batch_input { }",
    "batch_output": "batch_output { }",
    "model_repository_agents": "model_repository_agents { }",
    "is_shape_tensor": OUT % "is_shape_tensor: true",
    "allow_ragged_batch": IN % "allow_ragged_batch: true",
    "decoupled": "model_transaction_policy { decoupled: true }",
}


def listed(beginning: str, end: str) -> list[str]:
    """The fields that a paragraph names, without those that only say where a field is."""
    found = re.search(rf"{beginning}(.*?){end}", TEXT)
    assert found is not None
    return [name for name in names(found[1]) if name != "model_transaction_policy"]


LOGGED = listed("Accepted without effect, and logged:", "Accepted")
SILENT = listed("Accepted without effect or a word:", "Refused")
REFUSED = listed("Refused, so that", "Unknown fields")


def configured(folder: Path, text: str) -> config_pb.ModelConfig:
    (folder / "config.pbtxt").write_text(text)
    return read_config(folder)


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field(field: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=rf"\b{field}\b.*not supported"):
        configured(tmp_path, USES[field])


@pytest.mark.parametrize("field", LOGGED)
def test_a_field_whose_lack_of_effect_is_logged(field: str, tmp_path: Path) -> None:
    assert ineffective(configured(tmp_path, USES[field])) == [field]


@pytest.mark.parametrize("field", SILENT)
def test_a_field_that_is_accepted_without_a_word(field: str, tmp_path: Path) -> None:
    assert ineffective(configured(tmp_path, USES[field])) == []


def test_every_field_is_in_the_document() -> None:
    assert sorted([*LOGGED, *SILENT, *REFUSED]) == sorted(USES)
    understood = {name for row in table(DOCUMENT, "field", "") for cell in row for name in names(cell)}
    messages = (config_pb.ModelConfig, config_pb.ModelInput, config_pb.ModelOutput, config_pb.ModelInstanceGroup)
    fields = {field.name for message in messages for field in message.DESCRIPTOR.fields}
    assert fields - understood - set(USES) - {"model_transaction_policy"} == set()


def test_the_limits() -> None:
    assert f"either way: {LARGEST_MESSAGE} bytes" in TEXT
    assert f"{LARGEST_INFLATED // 2**20} MiB when inflated" in TEXT
    assert f"{MOST_STREAMS} calls at once" in TEXT


def test_the_statuses_are_those_of_grpc() -> None:
    rows = table(DOCUMENT, "what happened", "status")
    assert [row[1] for row in rows if row[1].split(",")[0] not in grpc.StatusCode.__members__] == []
