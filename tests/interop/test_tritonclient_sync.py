"""Promise: Triton's own synchronous gRPC client works through the gate unchanged, with its own TLS options."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.support.certs import Authority
from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays, add_sub_inputs, check_add_sub, infer_input, messy_strings

OpenClient = Callable[[Gate], triton.InferenceServerClient]


@pytest.fixture
def open_client(authority: Authority) -> Iterator[OpenClient]:
    opened: list[triton.InferenceServerClient] = []

    def start(gate: Gate) -> triton.InferenceServerClient:
        client = triton.InferenceServerClient(gate.target, ssl=True, root_certificates=str(authority.ca_file))
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.close()


def test_health_and_metadata(inference_gate: Gate, open_client: OpenClient) -> None:
    client = open_client(inference_gate)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert not client.is_model_ready("no-such-model")
    assert client.get_server_metadata().version
    metadata = client.get_model_metadata("simple")
    assert [(tensor.name, tensor.datatype) for tensor in metadata.inputs] == [("INPUT0", "INT32"), ("INPUT1", "INT32")]
    assert [tensor.name for tensor in metadata.outputs] == ["OUTPUT0", "OUTPUT1"]
    config = client.get_model_config("simple").config
    assert config.name == "simple"
    assert [tensor.name for tensor in config.input] == ["INPUT0", "INPUT1"]


def test_infer(inference_gate: Gate, open_client: OpenClient) -> None:
    client = open_client(inference_gate)
    for seed in range(20):
        left, right = add_sub_arrays(seed)
        result = client.infer("simple", add_sub_inputs(left, right), request_id=f"n{seed}", client_timeout=30)
        check_add_sub(result, left, right)
        assert result.get_response().id == f"n{seed}"


def test_only_the_requested_output(inference_gate: Gate, open_client: OpenClient) -> None:
    left, right = add_sub_arrays()
    wanted = [triton.InferRequestedOutput("OUTPUT1")]
    result = open_client(inference_gate).infer("simple", add_sub_inputs(left, right), outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["OUTPUT1"]
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), left - right)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_messages(inference_gate: Gate, open_client: OpenClient, algorithm: str) -> None:
    left, right = add_sub_arrays()
    client = open_client(inference_gate)
    check_add_sub(client.infer("simple", add_sub_inputs(left, right), compression_algorithm=algorithm), left, right)


def test_an_unknown_model_is_the_servers_own_error(inference_gate: Gate, open_client: OpenClient) -> None:
    left, right = add_sub_arrays()
    with pytest.raises(InferenceServerException) as raised:
        open_client(inference_gate).infer("no-such-model", add_sub_inputs(left, right))
    assert raised.value.status() == "StatusCode.NOT_FOUND"
    assert "no-such-model" in raised.value.message()


def test_a_wrong_shape_is_the_servers_own_error(inference_gate: Gate, open_client: OpenClient) -> None:
    wrong = infer_input("INPUT0", np.zeros((1, 3), np.int32), "INT32")
    right = infer_input("INPUT1", np.zeros((1, 16), np.int32), "INT32")
    with pytest.raises(InferenceServerException) as raised:
        open_client(inference_gate).infer("simple", [wrong, right])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.triton
def test_numbers_of_any_shape(triton_gate: Gate, open_client: OpenClient) -> None:
    client = open_client(triton_gate)
    random = np.random.default_rng(1)
    for shape in ((1, 1), (3, 5), (1, 70_000), (257, 1021)):
        numbers = random.standard_normal(shape, dtype=np.float32)
        result = client.infer("identity", [infer_input("NUMBERS", numbers, "FP32")])
        np.testing.assert_array_equal(result.as_numpy("NUMBERS_OUT"), numbers)


@pytest.mark.triton
def test_strings_of_any_length(triton_gate: Gate, open_client: OpenClient) -> None:
    strings = messy_strings()
    result = open_client(triton_gate).infer("identity", [infer_input("STRINGS", strings, "BYTES")])
    np.testing.assert_array_equal(result.as_numpy("STRINGS_OUT"), strings)
