"""Inputs and checks for the models `simple` and `identity`, in tritonclient's own types."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

ADD_SUB_SHAPE = (1, 16)


def add_sub_arrays(seed: int = 0) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    random = np.random.default_rng(seed)
    left, right = random.integers(-(2**20), 2**20, (2, *ADD_SUB_SHAPE), dtype=np.int32)
    return left, right


def add_sub_inputs(left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]) -> list[triton.InferInput]:
    return [infer_input("INPUT0", left, "INT32"), infer_input("INPUT1", right, "INT32")]


def infer_input(name: str, array: npt.NDArray[Any], datatype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def check_add_sub(result: Any, left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]) -> None:
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), left + right)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), left - right)


def add_sub_request(
    left: npt.NDArray[np.int32], right: npt.NDArray[np.int32], *, typed: bool = False
) -> service_pb2.ModelInferRequest:
    """The request as a message; `typed` puts the numbers into `contents` instead of the raw bytes."""
    request = service_pb2.ModelInferRequest(model_name="simple", id="r-1")
    for name, array in (("INPUT0", left), ("INPUT1", right)):
        tensor = request.inputs.add(name=name, datatype="INT32", shape=array.shape)
        if typed:
            tensor.contents.int_contents.extend(array.flatten().tolist())
        else:
            request.raw_input_contents.append(array.tobytes())
    return request


def check_add_sub_response(
    response: service_pb2.ModelInferResponse, left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]
) -> None:
    assert response.model_name == "simple"
    assert response.id == "r-1"
    raw = {output.name: content for output, content in zip(response.outputs, response.raw_output_contents, strict=True)}
    np.testing.assert_array_equal(np.frombuffer(raw["OUTPUT0"], np.int32).reshape(left.shape), left + right)
    np.testing.assert_array_equal(np.frombuffer(raw["OUTPUT1"], np.int32).reshape(left.shape), left - right)


def messy_strings(count: int = 50) -> npt.NDArray[np.object_]:
    """Byte strings of many lengths: empty, with zero bytes, not UTF-8, longer than a frame."""
    random = np.random.default_rng(3)
    strings = [random.bytes(int(length)) for length in random.integers(0, 2000, count)]
    return np.array([b"", b"\0", b"\xff\xfe", bytes(20_000), *strings], dtype=np.object_)
