"""What goes in comes out the same from both servers: all datatypes, both encodings, every option of a request."""

from __future__ import annotations

import asyncio
import http.client
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tritonclient.utils import triton_to_np_dtype

from tests.backend.models import DATATYPES
from tests.parity.clients import GRPC, HTTP, Client, covers, mentions

ROWS = np.arange(32, dtype=np.int32).reshape(2, 16)
_ONES = np.ones((2, 16), np.int32)


def pair(client: Client, json: bool = False) -> list[Any]:
    """Inputs of `simple`."""
    return [client.input("INPUT0", ROWS, json=json), client.input("INPUT1", _ONES, json=json)]


def check_pair(result: Any, *names: str) -> None:
    """Assert that these outputs, and no others, are those of `pair`."""
    wanted = {"OUTPUT0": ROWS + 1, "OUTPUT1": ROWS - 1}
    for name, array in wanted.items():
        found = result.as_numpy(name)
        if name in (names or wanted):
            np.testing.assert_array_equal(found, array, strict=True)
        else:
            assert found is None


def header(client: Client, result: Any) -> dict[str, Any]:
    """The response without its tensors, as a plain dict."""
    response = result.get_response() if client.is_http else result.get_response(as_json=True)
    return {name: value for name, value in response.items() if name not in ("outputs", "raw_output_contents")}


def strings(array: np.ndarray) -> Any:
    """The elements as bytes, which the client makes text of where JSON was the way."""
    return np.vectorize(lambda text: text.encode() if isinstance(text, str) else text, otypes=[object])(array).tolist()


def values(datatype: str) -> np.ndarray:
    """Some values of a datatype, the least and the greatest among them."""
    if datatype == "BYTES":
        return np.array([b"", b"plain", "žluť".encode(), b"\xff\x00", b"x" * 300], dtype=object)
    if datatype == "BOOL":
        return np.array([True, False, True])
    if datatype == "BF16":
        return np.array([0.0, -1.5, 1e30, np.inf], dtype=ml_dtypes.bfloat16)
    kind = np.dtype(triton_to_np_dtype(datatype))
    if kind.kind == "f":
        limits = np.finfo(kind)
        return np.array([0, 1.5, limits.min, limits.max, limits.tiny, np.inf, np.nan], dtype=kind)
    whole = np.iinfo(kind)
    return np.array([0, 1, whole.min, whole.max], dtype=kind)


@covers("infer")
async def test_a_batch(client: Client) -> None:
    for json in client.encodings:
        wanted = [client.output("OUTPUT0", json=json), client.output("OUTPUT1", json=json)]
        check_pair(await client("infer", "simple", pair(client, json), outputs=wanted))


@covers("infer")
async def test_all_outputs_come_if_none_is_named(client: Client) -> None:
    result = await client("infer", "simple", pair(client))
    check_pair(result)
    assert header(client, result) == {"model_name": "simple", "model_version": "1"}


@covers("infer")
async def test_only_named_outputs_come(client: Client) -> None:
    result = await client("infer", "simple", pair(client), outputs=[client.output("OUTPUT1")])
    check_pair(result, "OUTPUT1")
    assert result.get_output("OUTPUT0") is None


@covers("infer")
async def test_the_request_id_and_the_version_come_back(client: Client) -> None:
    result = await client("infer", "simple", pair(client), model_version="1", request_id="žluť 7")
    assert header(client, result) == {"model_name": "simple", "model_version": "1", "id": "žluť 7"}


@covers("infer")
async def test_every_datatype_comes_back(client: Client) -> None:
    for datatype in DATATYPES:
        array = values(datatype)
        outputs = [client.output(f"OUT_{datatype}")]
        result = await client("infer", "identity", [client.input(f"IN_{datatype}", array, datatype)], outputs=outputs)
        np.testing.assert_array_equal(result.as_numpy(f"OUT_{datatype}"), array, strict=True)


@covers("infer", kinds=HTTP)
async def test_every_datatype_comes_back_in_json(client: Client) -> None:
    for datatype in sorted({*DATATYPES} - {"FP16", "BF16"}):
        array = np.array([b"", "žluť".encode(), b'"\\\n'], dtype=object) if datatype == "BYTES" else values(datatype)
        if array.dtype.kind == "f":
            array = array[np.isfinite(array)]
        tensor = client.input(f"IN_{datatype}", array, datatype, json=True)
        outputs = [client.output(f"OUT_{datatype}", json=True)]
        result = await client("infer", "identity", [tensor], outputs=outputs)
        found = result.get_output(f"OUT_{datatype}")["data"]
        if datatype == "BYTES":
            array = np.array([text.decode() for text in array], dtype=object)
        assert found == array.tolist(), datatype


@covers("infer")
async def test_several_datatypes_at_a_time(client: Client) -> None:
    names = ("BYTES", "INT8", "FP64")
    inputs = [client.input(f"IN_{name}", values(name), name) for name in names]
    result = await client("infer", "identity", inputs, outputs=[client.output(f"OUT_{name}") for name in names])
    for name in names:
        np.testing.assert_array_equal(result.as_numpy(f"OUT_{name}"), values(name), strict=True)


@covers("infer")
async def test_an_empty_tensor_comes_back(client: Client) -> None:
    tensor = client.input("IN_INT32", np.zeros(0, np.int32))
    result = await client("infer", "identity", [tensor], outputs=[client.output("OUT_INT32")])
    assert result.as_numpy("OUT_INT32").shape == (0,)


@covers("infer")
async def test_strings_in_a_batch(client: Client) -> None:
    text = np.array([["ab", ""], ["xyz", "1"]], dtype=object)
    for json in client.encodings:
        outputs = [client.output("REVERSED", json=json), client.output("LENGTH", json=json)]
        result = await client("infer", "words", [client.input("TEXT", text, json=json)], outputs=outputs)
        assert strings(result.as_numpy("REVERSED")) == [[b"ba", b""], [b"zyx", b"1"]]
        assert result.as_numpy("LENGTH").tolist() == [[2, 0], [3, 1]]


SCORES = np.array([[0.1, 0.4, 0.2, 0.3], [-4, -30000, -2, -4]], dtype=np.float32)


@covers("infer")
async def test_classification(client: Client) -> None:
    for json in client.encodings:
        outputs = [client.output("SCORES", 2, json), client.output("PLAIN", 9, json)]
        result = await client("infer", "scores", [client.input("IN", SCORES)], outputs=outputs)
        assert strings(result.as_numpy("SCORES")) == [
            [b"0.400000:1:dog", b"0.300000:3"],
            [b"-2.000000:2:fish", b"-4.000000:0:cat"],
        ]
        assert strings(result.as_numpy("PLAIN")) == [
            [b"0.400000:1", b"0.300000:3", b"0.200000:2", b"0.100000:0"],
            [b"-2.000000:2", b"-4.000000:0", b"-4.000000:3", b"-30000.000000:1"],
        ]


@covers("infer")
async def test_classification_of_integers(client: Client) -> None:
    tensor = client.input("IN_INT64", np.array([-5, 2**40], np.int64))
    result = await client("infer", "identity", [tensor], outputs=[client.output("OUT_INT64", 3)])
    assert strings(result.as_numpy("OUT_INT64")) == [b"1099511627776:1", b"-5:0"]


@covers("infer")
@pytest.mark.parametrize(
    ("datatype", "largest"),
    [("BOOL", [b"1:0", b"1:2"]), ("FP16", [b"inf:5", b"65504.000000:3"]), ("BF16", [b"inf:3", b"2.500000:2"])],
)
async def test_classification_of_what_triton_does_not_classify(
    client: Client, datatype: str, largest: list[bytes]
) -> None:
    array = values(datatype)
    if datatype == "FP16":
        array = array[:-1]  # all but NaN
    elif datatype == "BF16":
        array = np.array([0.0, -1.5, 2.5, np.inf], dtype=ml_dtypes.bfloat16)
    asked = {
        "inputs": [client.input(f"IN_{datatype}", array, datatype)],
        "outputs": [client.output(f"OUT_{datatype}", classes=2)],
    }
    # Triton has no text for a value of these datatypes; the embedded server classifies whatever is a number.
    if client.server.is_triton:
        mentions(await client.refused("INVALID_ARGUMENT", "infer", "identity", **asked), datatype)
        return
    result = await client("infer", "identity", **asked)
    assert strings(result.as_numpy(f"OUT_{datatype}")) == largest


@covers("infer")
async def test_options_that_change_no_answer(client: Client) -> None:
    options: dict[str, Any] = {
        "priority": 1,
        "timeout": 10_000_000,
        "sequence_id": 7,
        "sequence_start": True,
        "sequence_end": True,
        "headers": {"x-anything": "1"},
    }
    options |= {"query_params": {"any": ["1", "x y"]}} if client.is_http else {"client_timeout": 20}
    check_pair(await client("infer", "simple", pair(client), **options))


@covers("infer")
async def test_parameters_of_a_request(client: Client) -> None:
    parameters = {"text": "x", "whole": 1, "yes": True, "half": 0.5}
    result = await client("infer", "simple", pair(client), parameters=parameters)
    check_pair(result)
    told = header(client, result)
    back = told.pop("parameters", {})
    assert told == {"model_name": "simple", "model_version": "1"}
    if not client.is_http:
        sent = result.get_response().parameters.items()
        back = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in sent}
    # They come back from the embedded server, for a client to tell its answers apart; Triton keeps them to itself.
    assert back == ({} if client.server.is_triton else parameters)


@covers("infer", kinds=GRPC)
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_compressed_messages(client: Client, algorithm: str) -> None:
    check_pair(await client("infer", "simple", pair(client), compression_algorithm=algorithm))


@covers("infer", kinds=HTTP)
@pytest.mark.parametrize("json", [False, True], ids=["binary", "json"])
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_compressed_bodies(client: Client, algorithm: str, json: bool) -> None:
    options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    outputs = [client.output("OUTPUT0", json=json)]
    check_pair(await client("infer", "simple", pair(client, json), outputs=outputs, **options), "OUTPUT0")


@covers("async_infer", kinds=("grpc",))
async def test_async_infer_with_a_callback(client: Client) -> None:
    loop = asyncio.get_running_loop()
    answered = loop.create_future()

    def callback(result: Any, error: Any) -> None:
        loop.call_soon_threadsafe(answered.set_result, (result, error))

    await client("async_infer", "simple", pair(client), callback, request_id="a")
    result, error = await answered
    assert error is None
    check_pair(result)
    assert header(client, result)["id"] == "a"


@covers("async_infer", kinds=("grpc",))
async def test_async_infer_gives_errors_to_the_callback(client: Client) -> None:
    loop = asyncio.get_running_loop()
    answered = loop.create_future()

    def callback(result: Any, error: Any) -> None:
        loop.call_soon_threadsafe(answered.set_result, (result, error))

    await client("async_infer", "nope", pair(client), callback)
    result, error = await answered
    assert result is None
    assert error.status() == "StatusCode.NOT_FOUND"


@covers("async_infer", kinds=("http",))
async def test_async_infer_with_a_result_to_wait_for(client: Client) -> None:
    asked = client.method("async_infer")("simple", pair(client), request_id="a")
    result = asked.get_result(block=True, timeout=20)
    check_pair(result)
    assert header(client, result)["id"] == "a"


@covers("generate_request_body", "parse_response_body", kinds=HTTP)
async def test_bodies_that_travel_some_other_way(client: Client) -> None:
    body, length = client.method("generate_request_body")(pair(client), request_id="b")
    connection = http.client.HTTPConnection(client.server.http, timeout=20)
    connection.request("POST", "/v2/models/simple/infer", body, {"Inference-Header-Content-Length": str(length)})
    response = connection.getresponse()
    assert response.status == 200
    told = int(response.getheader("Inference-Header-Content-Length", "0"))
    result = client.method("parse_response_body")(response.read(), header_length=told)
    connection.close()
    check_pair(result)
    assert header(client, result)["id"] == "b"
