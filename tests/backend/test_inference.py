"""Promise: Triton's clients work unchanged: metadata, every data type, both forms of contents, large tensors."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from proxy import __version__
from proxy.backend.samples import heldout
from proxy.backend.services.description import EXTENSIONS
from tests.backend.conftest import Running
from tests.backend.models import DATATYPES

Stub = service_pb2_grpc.GRPCInferenceServiceStub
LEFT = np.arange(32, dtype=np.int32).reshape(2, 16)
RIGHT = np.full((2, 16), 7, np.int32)

VALUES: dict[str, np.ndarray[Any, Any]] = {
    "BOOL": np.array([True, False, True]),
    "UINT8": np.array([0, 255], np.uint8),
    "UINT16": np.array([0, 65535], np.uint16),
    "UINT32": np.array([0, 2**32 - 1], np.uint32),
    "UINT64": np.array([0, 2**64 - 1], np.uint64),
    "INT8": np.array([-128, 127], np.int8),
    "INT16": np.array([-32768, 32767], np.int16),
    "INT32": np.array([-(2**31), 2**31 - 1], np.int32),
    "INT64": np.array([-(2**63), 2**63 - 1], np.int64),
    "FP16": np.array([0.5, -np.inf, 65504], np.float16),
    "FP32": np.array([1e-40, np.pi, np.inf], np.float32),
    "FP64": np.array([-1e300, np.e], np.float64),
    "BYTES": np.array([b"", b"\0\xff", "naïve".encode()], object),
}
TYPED = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@pytest.fixture(scope="module")
def client(backend: Running) -> Any:
    with triton.InferenceServerClient(backend.target) as client:
        yield client


def tensor(name: str, array: np.ndarray[Any, Any], datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def add_sub() -> list[triton.InferInput]:
    return [tensor("INPUT0", LEFT, "INT32"), tensor("INPUT1", RIGHT, "INT32")]


def test_liveness_and_readiness(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("simple", "2")
    assert not client.is_model_ready("nope")
    with pytest.raises(InferenceServerException, match="must be a number above 0"):
        client.is_model_ready("simple", "latest")


def test_server_metadata(client: Any) -> None:
    found = client.get_server_metadata()
    assert (found.name, found.version) == ("tensorgate", __version__)
    assert list(found.extensions) == list(EXTENSIONS)


def test_model_metadata(client: Any) -> None:
    found = client.get_model_metadata("simple", as_json=True)
    shape = {"datatype": "INT32", "shape": ["-1", "16"]}
    assert found == {
        "name": "simple",
        "versions": ["1"],
        "platform": "numpy",
        "inputs": [{"name": "INPUT0", **shape}, {"name": "INPUT1", **shape}],
        "outputs": [{"name": "OUTPUT0", **shape}, {"name": "OUTPUT1", **shape}],
    }
    digits = client.get_model_metadata("digits")
    assert digits.platform == "onnxruntime_onnx"
    assert [(t.name, t.datatype, list(t.shape)) for t in digits.outputs] == [
        ("label", "INT64", [-1, 1]),
        ("probabilities", "FP32", [-1, 10]),
    ]


def test_model_config_is_completed(client: Any) -> None:
    found = client.get_model_config("digits").config
    assert (found.name, found.max_batch_size, found.backend) == ("digits", 64, "onnxruntime")
    assert found.version_policy.latest.num_versions == 1
    assert found.default_model_filename == "model.onnx"
    assert [(group.name, group.count) for group in found.instance_group] == [("digits_0", 1)]
    assert found.output[1].label_filename == "labels.txt"


def test_config_of_an_onnx_model_without_one_is_read_off_the_file(client: Any) -> None:
    found = client.get_model_config("text").config
    assert (found.max_batch_size, found.platform) == (4, "onnxruntime_onnx")
    assert found.HasField("dynamic_batching")
    for tensors, name in ((found.input, "IN"), (found.output, "OUT")):
        assert [(t.name, t.data_type, list(t.dims), list(t.reshape.shape)) for t in tensors] == [(name, 13, [1], [])]


def test_add_and_subtract(client: Any) -> None:
    answer = client.infer("simple", add_sub(), request_id="a request")
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), LEFT + RIGHT)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT1"), LEFT - RIGHT)
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("simple", "1", "a request")


def test_requested_outputs_only(client: Any) -> None:
    answer = client.infer("simple", add_sub(), outputs=[triton.InferRequestedOutput("OUTPUT1")])
    assert [output.name for output in answer.get_response().outputs] == ["OUTPUT1"]
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT1"), LEFT - RIGHT)


def test_parameters_of_no_meaning_here_are_let_through(client: Any) -> None:
    answer = client.infer("simple", add_sub(), parameters={"tag": "x"}, sequence_id=5, sequence_start=True, priority=1)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), LEFT + RIGHT)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: Any, algorithm: str) -> None:
    answer = client.infer("simple", add_sub(), compression_algorithm=algorithm)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), LEFT + RIGHT)


def test_the_table_of_values_is_complete() -> None:
    assert sorted([*VALUES, "BF16"]) == sorted(DATATYPES)


@pytest.mark.parametrize("datatype", VALUES)
@pytest.mark.parametrize("count", [None, 0], ids=["some", "none"])
def test_each_datatype_raw(client: Any, datatype: str, count: int | None) -> None:
    values = VALUES[datatype][:count]
    wanted = [triton.InferRequestedOutput(f"OUT_{datatype}")]
    answer = client.infer("echo", [tensor(f"IN_{datatype}", values, datatype)], outputs=wanted)
    returned = answer.as_numpy(f"OUT_{datatype}")
    np.testing.assert_array_equal(returned, values)
    assert returned.dtype == values.dtype
    assert answer.get_output(f"OUT_{datatype}").datatype == datatype


def test_bf16_raw(stub: Stub) -> None:
    """By hand: what tritonclient wants to be given for BF16 has changed between its releases."""
    request = service_pb2.ModelInferRequest(model_name="echo", outputs=[{"name": "OUT_BF16"}])
    request.inputs.add(name="IN_BF16", datatype="BF16", shape=[2])
    request.raw_input_contents.append(b"\x80\x3f\x20\xc0")  # 1.0 and -2.5
    response = stub.ModelInfer(request, timeout=30)
    assert (response.outputs[0].datatype, response.raw_output_contents[0]) == ("BF16", b"\x80\x3f\x20\xc0")


@pytest.mark.parametrize("datatype", TYPED)
def test_each_datatype_typed(stub: Stub, datatype: str) -> None:
    values = VALUES[datatype]
    request = service_pb2.ModelInferRequest(model_name="echo", outputs=[{"name": f"OUT_{datatype}"}])
    sent = request.inputs.add(name=f"IN_{datatype}", datatype=datatype, shape=values.shape)
    getattr(sent.contents, TYPED[datatype]).extend(values.tolist())
    response = stub.ModelInfer(request, timeout=30)
    raw = serialize_byte_tensor(values).item() if datatype == "BYTES" else values.tobytes()
    assert list(response.raw_output_contents) == [raw]


def test_a_bool_that_is_neither_0_nor_1_is_true(stub: Stub) -> None:
    request = service_pb2.ModelInferRequest(model_name="echo", outputs=[{"name": "OUT_BOOL"}])
    request.inputs.add(name="IN_BOOL", datatype="BOOL", shape=[3])
    request.raw_input_contents.append(b"\0\1\xff")
    assert stub.ModelInfer(request, timeout=30).raw_output_contents[0] == b"\0\1\1"


def test_text_through_onnx(client: Any) -> None:
    words = np.array([["naïve".encode()], [b"b'x'"], [b""]], object)
    answer = client.infer("text", [tensor("IN", words, "BYTES")])
    assert answer.as_numpy("OUT").tolist() == words.tolist()


def test_digits_are_recognized(client: Any) -> None:
    images, digits = heldout()
    right = 0
    for at in range(0, len(images), 64):
        answer = client.infer("digits", [tensor("pixels", images[at : at + 64], "FP32")])
        labels = answer.as_numpy("label")
        assert labels.shape == (len(images[at : at + 64]), 1)
        np.testing.assert_array_equal(answer.as_numpy("probabilities").argmax(axis=1), labels[:, 0])
        right += int((labels[:, 0] == digits[at : at + 64]).sum())
    assert right / len(images) > 0.95


def test_16_mib_there_and_back(client: Any) -> None:
    # Two columns: their bytes start at an odd place in the message, so that the array can't be a view of it.
    values = np.random.default_rng(1).random((2**21, 2), np.float32)
    answer = client.infer("grid", [tensor("IN", values, "FP32")])
    assert answer.as_numpy("OUT").tobytes() == values.tobytes()


def test_65_mib_in_one_message(stub: Stub) -> None:
    request = service_pb2.ModelInferRequest(model_name="echo", outputs=[{"name": "OUT_UINT8"}])
    size = 65 * 2**20
    request.inputs.add(name="IN_UINT8", datatype="UINT8", shape=[size])
    request.raw_input_contents.append(bytes(range(256)) * (size // 256))
    assert stub.ModelInfer(request, timeout=60).raw_output_contents[0] == request.raw_input_contents[0]


def test_an_answer_is_the_requests_own(stub: Stub) -> None:
    """`reuses` returns one and the same array every time; answers that wait to be sent must not change with it."""
    calls = []
    for value in range(200):
        request = service_pb2.ModelInferRequest(model_name="reuses", raw_input_contents=[value.to_bytes(4, "little")])
        request.inputs.add(name="IN", datatype="INT32", shape=[1])
        calls.append(stub.ModelInfer.future(request, timeout=30))
    answers = [int.from_bytes(call.result().raw_output_contents[0], "little") for call in calls]
    assert answers == list(range(200))


async def test_a_thousand_calls_at_once_on_one_connection(backend: Running) -> None:
    async with triton_aio.InferenceServerClient(backend.target) as client:

        async def one(value: int) -> bool:
            row = np.full((1, 16), value, np.int32)
            answer = await client.infer("simple", [tensor("INPUT0", row, "INT32"), tensor("INPUT1", row, "INT32")])
            return bool((answer.as_numpy("OUTPUT0") == 2 * value).all())

        assert all(await asyncio.gather(*map(one, range(1000))))


async def test_aio_client(backend: Running) -> None:
    async with triton_aio.InferenceServerClient(backend.target) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("digits")).platform == "onnxruntime_onnx"
        answer = await client.infer("simple", add_sub())
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), LEFT + RIGHT)
        with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED.*TraceSetting is not implemented"):
            await client.get_trace_settings()


def test_statistics_as_tritons_client_reads_them(backend: Running) -> None:
    with triton.InferenceServerClient(backend.target) as client:
        before = client.get_inference_statistics("simple").model_stats[0]
        for _ in range(3):
            client.infer("simple", add_sub())
        (after,) = client.get_inference_statistics("simple", "1").model_stats
        assert (after.name, after.version) == ("simple", "1")
        assert after.inference_count - before.inference_count == 3 * len(LEFT)  # rows
        stats = after.inference_stats
        assert stats.success.count - before.inference_stats.success.count == 3
        parts = [stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output]
        assert {part.count for part in parts} == {stats.success.count}
        assert 0 < sum(part.ns for part in parts) <= stats.success.ns
        assert abs(after.last_inference / 1000 - time.time()) < 60
        assert sum(batch.compute_infer.count for batch in after.batch_stats) == after.execution_count
        assert {one.name for one in client.get_inference_statistics().model_stats} >= {"simple", "digits"}
        with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*'nobody' is not available"):
            client.get_inference_statistics("nobody")


@pytest.mark.parametrize(("name", "value"), [("priority", "high"), ("timeout", -1), ("priority", True)])
def test_scheduling_parameters_that_cannot_be(stub: Stub, name: str, value: str | int) -> None:
    request = service_pb2.ModelInferRequest(model_name="simple")
    if isinstance(value, bool):
        request.parameters[name].bool_param = value
    elif isinstance(value, int):
        request.parameters[name].int64_param = value
    else:
        request.parameters[name].string_param = value
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(request)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"'{name}'" in failed.value.details()


def test_scheduling_parameters_as_tritons_client_sends_them(backend: Running) -> None:
    with triton.InferenceServerClient(backend.target) as client:
        answer = client.infer("simple", add_sub(), priority=1, timeout=5_000_000)
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), LEFT + RIGHT)


INSTEAD = {"SharedMemory": "raw_input_contents", "TraceSetting": "access log", "LogSettings": "--log-level"}
RPCS = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name


@pytest.mark.parametrize("rpc", [name for name in RPCS if any(part in name for part in INSTEAD)])
def test_what_is_not_served_says_what_to_do_instead(channel: grpc.Channel, rpc: str) -> None:
    call = channel.unary_unary(f"/inference.GRPCInferenceService/{rpc}")
    with pytest.raises(grpc.RpcError) as failed:
        call(b"", timeout=30)
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    advice = next(advice for part, advice in INSTEAD.items() if part in rpc)
    assert rpc in failed.value.details()
    assert advice in failed.value.details()
