"""Promise: Triton's own HTTP clients get from infer what they ask for, and JSON and bytes mean the same."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import InferenceServerException

from proxy.backend.repository import Repository
from tests.backend.test_rest import INFER, SIMPLE, Rest, serve, simple, tensor, write_rest_repository
from tests.support.processes import LIVENESS


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    yield from serve(Repository(write_rest_repository(tmp_path_factory.mktemp("rest") / "models")))


@pytest.fixture(scope="module")
def client(rest: Rest) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(rest.target) as client:
        yield client


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_simple(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None) -> None:
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("OUTPUT0", "OUTPUT1")]
    result = client.infer("simple", simple(binary_in), outputs=outputs, request_id="a1")
    assert result.as_numpy("OUTPUT0").tolist() == [[2 * value for value in range(16)]]
    assert result.as_numpy("OUTPUT1").tolist() == [[0] * 16]
    head = result.get_response()
    assert (head["id"], head["model_name"], head["model_version"]) == ("a1", "simple", "1")
    assert ("data" in head["outputs"][0]) == (binary_out is False)


async def test_the_asyncio_client(rest: Rest) -> None:
    async with triton_aio.InferenceServerClient(rest.target) as client:
        assert await client.is_model_ready("simple")
        results = await asyncio.gather(*(client.infer("simple", simple()) for _ in range(20)))
        assert all(result.as_numpy("OUTPUT0")[0, 1] == 2 for result in results)
        with pytest.raises(InferenceServerException, match="'nope'"):
            await client.infer("nope", simple())


def test_the_answer_as_json(rest: Rest) -> None:
    answer = rest.json(INFER, {**SIMPLE, "id": "7", "parameters": {"a": 1, "b": "x", "c": True, "d": 1.5}})
    assert list(answer) == ["id", "model_name", "model_version", "parameters", "outputs"]
    assert answer["parameters"] == {"a": 1, "b": "x", "c": True, "d": 1.5}
    assert answer["outputs"][1] == {"name": "OUTPUT1", "datatype": "INT32", "shape": [1, 16], "data": [0] * 16}
    assert "id" not in rest.json(INFER, SIMPLE)


def test_binary_data_output_counts_where_no_outputs_are_named(rest: Rest) -> None:
    everything = {"binary_data_output": True}
    status, fields, body = rest.ask(INFER, {**SIMPLE, "parameters": everything})
    header = int(fields["inference-header-content-length"])
    head = json.loads(body[:header])
    assert (status, fields["content-type"]) == (200, "application/octet-stream")
    assert [one["parameters"] for one in head["outputs"]] == [{"binary_data_size": 64}] * 2
    assert np.frombuffer(body[header:], np.int32).tolist() == [*range(0, 32, 2), *([0] * 16)]
    named = rest.json(INFER, {**SIMPLE, "parameters": everything, "outputs": [{"name": "OUTPUT1"}]})
    assert [one["name"] for one in named["outputs"]] == ["OUTPUT1"]
    mixed = [{"name": "OUTPUT0"}, {"name": "OUTPUT1", "parameters": {"binary_data": True}}]
    status, fields, body = rest.ask(INFER, {**SIMPLE, "outputs": mixed})
    assert len(body) - int(fields["inference-header-content-length"]) == 64


def test_nested_data(rest: Rest) -> None:
    def answer(data: Any, shape: list[int]) -> Any:
        tensor = {"name": "IN", "datatype": "FP32", "shape": shape, "data": data}
        return rest.json("/v2/models/grid/infer", {"inputs": [tensor]})["outputs"][0]["data"]

    assert answer([[1, 2], [3, 4.5]], [2, 2]) == [1, 2, 3, 4.5]
    assert answer([1, 2, 3, 4.5], [2, 2]) == [1, 2, 3, 4.5]
    assert answer([[[1], [2]]], [1, 2]) == [1, 2]
    assert answer([], [0, 2]) == []


def test_what_json_cannot_say_is_said_as_triton_does(rest: Rest) -> None:
    body = b'{"inputs":[{"name":"IN","datatype":"FP32","shape":[2,2],"data":[NaN,Infinity,-Infinity,1]}]}'
    status, _, answer = rest.ask("/v2/models/grid/infer", body)
    assert status == 200
    assert b"[NaN,Infinity,-Infinity,1.0]" in answer


def test_classification(client: triton.InferenceServerClient) -> None:
    scores = tensor("IN", np.array([[0.1, 0.4, 0.3, 0.2]], np.float32))
    for binary in (True, False):
        output = triton.InferRequestedOutput("OUT", binary_data=binary, class_count=2)
        found = client.infer("labels", [scores], outputs=[output]).as_numpy("OUT").astype(str).tolist()
        assert found == [["0.400000:1:dog", "0.300000:2:bird"]]


def test_a_raw_binary_request(rest: Rest) -> None:
    header = {"Inference-Header-Content-Length": "0"}
    row = np.array([[1, 2, 3, 4]], np.float32).tobytes()
    status, fields, body = rest.ask("/v2/models/labels/infer", row, header)
    assert (status, fields["content-type"]) == (200, "application/octet-stream")
    assert body[int(fields["inference-header-content-length"]) :] == row
    status, fields, body = rest.ask("/v2/models/grid/infer", row * 2, header)
    assert json.loads(body[: int(fields["inference-header-content-length"])])["outputs"][0]["shape"] == [4, 2]
    assert "2 inputs" not in rest.refused("/v2/models/labels/infer", row[1:], header)
    assert "'simple' has 2" in rest.refused(INFER, row, header)


ARRAYS: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": hnp.arrays(np.bool_, st.integers(0, 9)),
    **{
        f"{kind}{bits}": hnp.arrays(f"{kind.lower()}{bits}", st.integers(0, 9))
        for kind in ("INT", "UINT")
        for bits in (8, 16, 32, 64)
    },
    "FP32": hnp.arrays(np.float32, st.integers(0, 9)),
    "FP64": hnp.arrays(np.float64, st.integers(0, 9)),
    "BYTES": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=9).map(
        lambda texts: np.array([text.encode() for text in texts], object)
    ),
}


@pytest.mark.parametrize("datatype", [*ARRAYS, "FP16", "BF16"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_datatype_as_json_and_as_bytes(rest: Rest, datatype: str, data: st.DataObject) -> None:
    half = datatype in ("FP16", "BF16")
    strategy = hnp.arrays(np.float16 if datatype == "FP16" else np.float32, st.integers(0, 9))
    array = data.draw(strategy if half else ARRAYS[datatype])
    if datatype == "BF16":
        array = array.astype(ml_dtypes.bfloat16)
    with triton.InferenceServerClient(rest.target) as client:
        answers = []
        for binary in (True,) if half else (True, False):
            output = triton.InferRequestedOutput(f"OUT_{datatype}", binary_data=binary)
            given = tensor(f"IN_{datatype}", array, binary, datatype)
            answers.append(client.infer("echo", [given], outputs=[output]).as_numpy(f"OUT_{datatype}"))
    for answer in answers:
        assert answer.shape == array.shape
        if datatype == "BYTES":
            found = [one if isinstance(one, bytes) else one.encode() for one in answer.tolist()]
            assert found == array.tolist()
        elif datatype == "BF16":  # whose NaN numpy doesn't know for equal ones
            assert answer.tobytes() == array.tobytes()
        else:
            np.testing.assert_array_equal(answer, array)


@settings(max_examples=30, deadline=None)
@given(array=hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.just(2))))
def test_shapes_come_back(rest: Rest, array: np.ndarray) -> None:
    with triton.InferenceServerClient(rest.target) as client:
        for binary in (True, False):
            output = triton.InferRequestedOutput("OUT", binary_data=binary)
            answer = client.infer("grid", [tensor("IN", array, binary)], outputs=[output]).as_numpy("OUT")
            np.testing.assert_array_equal(answer, array)


@pytest.mark.parametrize("way", ["gzip", "deflate"])
@pytest.mark.parametrize("rows", [1, 20_000])
def test_compression(client: triton.InferenceServerClient, rest: Rest, way: str, rows: int) -> None:
    array = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    for binary in (True, False):
        result = client.infer(
            "grid",
            [tensor("IN", array, binary)],
            outputs=[triton.InferRequestedOutput("OUT", binary_data=binary)],
            request_compression_algorithm=way,
            response_compression_algorithm=way,
        )
        np.testing.assert_array_equal(result.as_numpy("OUT"), array)
    assert rest.quiet() == 0


@pytest.mark.parametrize(
    ("accepts", "gives"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate, gzip", "deflate"),
        ("deflate;q=0.5, gzip;q=0.9", "gzip"),
        ("br, deflate;q=0.1", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=x", None),
        ("*", None),
        ("br", None),
        ("identity", None),
    ],
)
def test_the_compression_that_a_client_prefers(rest: Rest, accepts: str, gives: str | None) -> None:
    status, fields, body = rest.ask(INFER, SIMPLE, {"Accept-Encoding": accepts})
    assert (status, fields.get("content-encoding")) == (200, gives)
    plain: dict[str | None, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes,
    }  # fmt: skip
    assert json.loads(plain[gives](body))["model_name"] == "simple"


def test_large_tensors(client: triton.InferenceServerClient, rest: Rest) -> None:
    array = np.random.default_rng(1).random((500_000, 2), np.float32)
    for binary in (True, False):
        output = triton.InferRequestedOutput("OUT", binary_data=binary)
        rows = array if binary else array[:50_000]
        result = client.infer("grid", [tensor("IN", rows, binary)], outputs=[output])
        np.testing.assert_array_equal(result.as_numpy("OUT"), rows)
    assert rest.quiet() == 0


def test_continue_is_said_before_a_body_that_waits_for_it(rest: Rest) -> None:
    body = json.dumps(SIMPLE).encode()
    connection = http.client.HTTPConnection(rest.host, rest.port, timeout=LIVENESS)
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(len(body)))
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    assert connection.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(body)
    response = connection.getresponse()
    assert response.status == 200
    assert json.load(response)["model_name"] == "simple"
    connection.close()


def test_numbers_that_are_too_large_and_the_sign_of_zero(rest: Rest) -> None:
    def body(numbers: str) -> bytes:
        return b'{"inputs":[{"name":"IN","datatype":"FP32","shape":[1,2],"data":[' + numbers.encode() + b"]}]}"

    assert "element 1 is too large for FP32" in rest.refused("/v2/models/grid/infer", body("1,1e999"))
    status, _, answer = rest.ask("/v2/models/grid/infer", body("-0,0"))
    assert status == 200
    assert b"[-0.0,0.0]" in answer


def test_what_is_said_last_of_an_output_counts(rest: Rest) -> None:
    scores = {"name": "IN", "datatype": "FP32", "shape": [1, 4], "data": [0.1, 0.4, 0.3, 0.2]}
    binary, top = ({"name": "OUT", "parameters": one} for one in ({"binary_data": True}, {"classification": 1}))
    answer = rest.json("/v2/models/labels/infer", {"inputs": [scores], "outputs": [binary, top]})
    assert answer["outputs"][0]["data"] == ["0.400000:1:dog"]
    status, fields, body = rest.ask("/v2/models/labels/infer", {"inputs": [scores], "outputs": [top, binary]})
    assert status == 200
    assert len(body) - int(fields["inference-header-content-length"]) == 16
