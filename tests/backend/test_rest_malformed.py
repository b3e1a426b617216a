"""Promise: whatever is wrong with an HTTP request, its client is told what, as a client of gRPC is; nothing is kept."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2, service_pb2_grpc

from proxy.backend.repository import Repository
from proxy.backend.services.rest import jsontext
from tests.backend import rendezvous
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, WAITS, write_model
from tests.backend.test_rest import INFER, SIMPLE, Rest, serve, write_rest_repository
from tests.support.processes import LIVENESS

ROW = list(range(16))
IN0 = {"name": "INPUT0", "datatype": "INT32", "shape": [1, 16], "data": ROW}
IN1 = {**IN0, "name": "INPUT1"}
VECTOR = 'input { name: "IN" data_type: TYPE_INT8 dims: -1 } output { name: "OUT" data_type: TYPE_INT8 dims: -1 }'
NAN = b'{"inputs":[{"name":"INPUT0","datatype":"INT32","shape":[1,16],"data":[NaN'


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    yield from serve(Repository(write_rest_repository(tmp_path_factory.mktemp("rest") / "models")))


def two(**changed: Any) -> dict[str, Any]:
    """A request to `simple`, its second input changed; None leaves a key out."""
    second = {key: value for key, value in {**IN1, **changed}.items() if value is not None}
    return {"inputs": [IN0, second]}


def binary(size: Any, **more: Any) -> dict[str, Any]:
    return two(data=None, parameters={"binary_data_size": size}, **more)


def echo(kind: str, data: Any, shape: list[int] | None = None) -> dict[str, Any]:
    tensor = {"name": f"IN_{kind}", "datatype": kind, "shape": shape or [len(data)], "data": data}
    return {"inputs": [tensor], "outputs": [{"name": f"OUT_{kind}"}]}


def wanting(name: str = "OUTPUT0", **parameters: Any) -> dict[str, Any]:
    return {**SIMPLE, "outputs": [{"name": name, "parameters": parameters}]}


# request, what the answer must hold, the status first; to `simple` unless it asks for an input of `echo`
CASES: dict[str, tuple[Any, list[str]]] = {
    "empty": (b"", ["400", "empty"]),
    "no JSON": (b"{x", ["400", "line 1, column 2"]),
    "cut off": (NAN, ["400", "not valid JSON"]),
    "two documents": (b"{}{}", ["400", "Extra data"]),
    "not UTF-8": (b'{"id":"\xff"}', ["400", "byte 7 is not UTF-8"]),
    "byte order mark": (b"\xef\xbb\xbf{}", ["400", "line 1, column 1"]),
    "deep": (b"[" * 100_000, ["400", "nested too deep"]),
    "deep objects": (b'{"a":' * 100_000, ["400", "nested too deep"]),
    "number of 5000 digits": (b'{"id":' + b"9" * 5000 + b"}", ["400", "4300 digits"]),
    "a key twice": (b'{"id":"a","id":"b"}', ["400", "'id' is there twice"]),
    "a list": ([], ["400", "request is a list", "an object"]),
    "null": (b"null", ["400", "request is null"]),
    "no inputs key": ({}, ["400", "no 'inputs'"]),
    "inputs no list": ({"inputs": {}}, ["400", "'inputs' is an object", "a list"]),
    "no inputs": ({"inputs": []}, ["400", "'INPUT0' is missing", "requires 2", "got 0"]),
    "missing input": ({"inputs": [IN0]}, ["400", "'INPUT1'", "requires 2", "got 1"]),
    "too many inputs": ({"inputs": [IN0, IN1, IN1]}, ["400", "takes 2 inputs", "got 3"]),
    "same input twice": ({"inputs": [IN0, IN0]}, ["400", "'INPUT0' is there twice"]),
    "input no object": ({"inputs": [IN0, 5]}, ["400", "'inputs' has 5", "an object"]),
    "input without name": (two(name=None), ["400", "no 'name'"]),
    "name no string": (two(name=["x"]), ["400", "'name' is a list"]),
    "unknown input": (two(name="X"), ["400", "'X'", "'INPUT0', 'INPUT1'"]),
    "no shape": (two(shape=None), ["400", "'INPUT1'", "no 'shape'"]),
    "shape no list": (two(shape="16"), ["400", "'shape' is '16'"]),
    "dimension no integer": (two(shape=[1, 16.0]), ["400", "'shape' has 16.0"]),
    "dimension is a boolean": (two(shape=[True, 16]), ["400", "'shape' has true"]),
    "dimension beyond 64 bits": (two(shape=[2**63, 16]), ["400", "'shape' has 9223372036854775808"]),
    "huge dimension": (two(shape=[10**100, 16]), ["400", "an integer of 333 bits"]),
    "negative dimension": (two(shape=[-1, 16]), ["400", "'INPUT1'", "negative dimension -1"]),
    "a hundred dimensions": (two(shape=[1] * 100), ["400", "100 dimensions", "64"]),
    "rank": (two(shape=[16]), ["400", "[16]", "expects 2"]),
    "product wraps": (two(shape=[2**62, 16]), ["400", "larger"]),
    "wrong dimension": (two(shape=[1, 15], data=ROW[1:]), ["400", "[1, 15]", "[-1, 16]"]),
    "batch too large": ({"inputs": [{**one, "shape": [9, 16], "data": ROW * 9} for one in (IN0, IN1)]}, ["batch is 9"]),
    "no datatype": (two(datatype=None), ["400", "''", "'INT32'"]),
    "datatype no string": (two(datatype=3), ["400", "'datatype' is 3"]),
    "no such datatype": (two(datatype="INT"), ["400", "'INT' (no such data type)"]),
    "other datatype": (two(datatype="FP32"), ["400", "'FP32'", "'INT32'"]),
    "too few elements": (two(data=ROW[1:]), ["400", "16 elements", "data has 15"]),
    "too many elements": (two(data=[*ROW, 1]), ["400", "16 elements", "data has 17"]),
    "data no list": (two(data=5), ["400", "data is 5", "a list"]),
    "data null": (two(data=[None] * 16), ["400", "element 0 is null", "an integer"]),
    "ragged": (two(data=[ROW[:4], ROW[4:]]), ["400", "lists of different lengths"]),
    "lists beside elements": (two(data=[ROW, 1]), ["400", "lists beside elements"]),
    "seventy lists deep": (two(data=json.loads("[" * 70 + "]" * 70)), ["400", "more than 64 deep"]),
    "float for integer": (two(data=[*ROW[1:], 1.5]), ["400", "element 15 is 1.5", "INT32"]),
    "boolean for integer": (two(data=[True, *ROW[1:]]), ["400", "element 0 is true"]),
    "string for integer": (two(data=["x" * 9999, *ROW[1:]]), ["400", "element 0 is 'xxx"]),
    "integer out of range": (two(data=[2**31, *ROW[1:]]), ["400", "2147483648 is no INT32", "2147483647"]),
    "no data": (two(data=None), ["400", "'INPUT1': has no data"]),
    "data and binary_data_size": (two(parameters={"binary_data_size": 4}), ["400", "give one of them"]),
    "binary_data_size is negative": (binary(-1), ["400", "'binary_data_size' is -1"]),
    "binary_data_size is a boolean": (binary(True), ["400", "'binary_data_size' is true"]),
    "binary_data_size beyond the body": (binary(64), ["400", "is 64", "only 0 bytes follow"]),
    "shared memory": (two(parameters={"shared_memory_region": "r"}), ["501", "'shared_memory_region'"]),
    "input's parameters no object": (two(parameters=[1]), ["400", "'parameters' is a list"]),
    "parameters no object": ({**SIMPLE, "parameters": 5}, ["400", "'parameters' is 5"]),
    "a parameter is null": ({**SIMPLE, "parameters": {"n": None}}, ["400", "'n' is null"]),
    "a parameter is a list": ({**SIMPLE, "parameters": {"n": [1]}}, ["400", "'n' is a list"]),
    "a parameter beyond 64 bits": ({**SIMPLE, "parameters": {"n": 2**64}}, ["400", "'n' is 18446744073709551616"]),
    "half a pair in a parameter": ({**SIMPLE, "parameters": {"n": "\ud800"}}, ["400", "surrogate"]),
    "too many parameters": ({**SIMPLE, "parameters": dict.fromkeys(map(str, range(65)), 1)}, ["400", "65", "64"]),
    "a reserved parameter": ({**SIMPLE, "parameters": {"triton_x": 1}}, ["400", "'triton_x'", "reserved"]),
    "priority": ({**SIMPLE, "parameters": {"priority": -1}}, ["400", "'priority' is -1"]),
    "timeout": ({**SIMPLE, "parameters": {"timeout": "1"}}, ["400", "'timeout' is '1'"]),
    "binary_data_output": ({**SIMPLE, "parameters": {"binary_data_output": 1}}, ["400", "'binary_data_output' is 1"]),
    "id no string": ({**SIMPLE, "id": 7}, ["400", "'id' is 7", "a string"]),
    "id is half a pair": ({**SIMPLE, "id": "\udcff"}, ["400", "'id' is"]),
    "id too long": ({**SIMPLE, "id": "x" * 5000}, ["400", "5000 characters", "4096"]),
    "unknown output": (wanting("NOPE"), ["400", "'NOPE'", "'OUTPUT0', 'OUTPUT1'"]),
    "outputs no list": ({**SIMPLE, "outputs": "OUTPUT0"}, ["400", "'outputs' is 'OUTPUT0'"]),
    "output no object": ({**SIMPLE, "outputs": ["OUTPUT0"]}, ["400", "'outputs' has 'OUTPUT0'"]),
    "many outputs": ({**SIMPLE, "outputs": [{"name": "OUTPUT0"}] * 1025}, ["400", "1025 outputs", "1024"]),
    "binary_data": (wanting(binary_data=1), ["400", "'binary_data' is 1"]),
    "classification": (wanting(classification=-1), ["400", "'classification' is -1"]),
    "classification no integer": (wanting(classification="2"), ["400", "'classification' is '2'"]),
    "output into shared memory": (wanting(shared_memory_region="r"), ["501", "'shared_memory_region'"]),
    "FP16 in": (echo("FP16", [1.0]), ["400", "FP16 can't be sent as JSON", "binary tensor extension"]),
    "BF16 in": (echo("BF16", [1.0]), ["400", "BF16 can't be sent as JSON"]),
    "FP16 out": ({**echo("BOOL", [True]), "outputs": [{"name": "OUT_FP16"}]}, ["400", "'OUT_FP16'", "binary_data"]),
    "integer for boolean": (echo("BOOL", [True, 1]), ["400", "element 1 is 1", "true or false"]),
    "negative for unsigned": (echo("UINT8", [1, -1]), ["400", "-1 is no UINT8", "0 to 255"]),
    "number for string": (echo("BYTES", ["a", 1]), ["400", "element 1 is 1", "a string"]),
    "half a pair": (echo("BYTES", ["\ud800"]), ["400", "surrogate"]),
    "string for float": (echo("FP32", ["NaN"]), ["400", "element 0 is 'NaN'", "a number"]),
    "boolean for float": (echo("FP64", [True]), ["400", "element 0 is true"]),
    "too large for FP32": (echo("FP32", [1.0, 1e39]), ["400", "1e+39 is too large for FP32"]),
    "too large for FP64": (echo("FP64", [10**400]), ["400", "too large for FP64"]),
}


def ask(rest: Rest, request: Any, headers: dict[str, str] | None = None) -> str:
    to_echo = isinstance(request, dict) and "IN_" in json.dumps(request)
    return rest.refused("/v2/models/echo/infer" if to_echo else INFER, request, headers, "POST")


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_fault_is_told_and_the_server_goes_on(rest: Rest, case: tuple[Any, list[str]]) -> None:
    request, says = case
    text = ask(rest, request)
    assert all(part in text for part in says), text
    assert text[:3] in ("400", "501")
    assert "Traceback" not in text
    assert len(text) < 500
    assert rest.quiet() == 0
    assert rest.json(INFER, SIMPLE)["model_name"] == "simple"


HEAD = json.dumps(binary(64)).encode()
RAW = bytes(64)
LENGTH = "Inference-Header-Content-Length"
HEADERS: dict[str, tuple[bytes, dict[str, str], list[str]]] = {
    "no number": (HEAD, {LENGTH: "x"}, ["400", "'x'", "number of bytes"]),
    "negative": (HEAD, {LENGTH: "-1"}, ["400", "'-1'"]),
    "not ASCII digits": (HEAD, {LENGTH: "\xb2"}, ["400", "number of bytes"]),
    "beyond the body": (HEAD, {LENGTH: "9999"}, ["400", "is 9999", f"has {len(HEAD)} bytes"]),
    "huge": (HEAD, {LENGTH: "9" * 30}, ["400", "number of bytes"]),
    "too little": (HEAD + RAW[1:], {LENGTH: str(len(HEAD))}, ["400", "is 64", "only 63 bytes"]),
    "too much": (HEAD + RAW + b"x", {LENGTH: str(len(HEAD))}, ["400", "65 bytes", "are 64 together"]),
    "in the JSON": (HEAD + RAW, {LENGTH: "9"}, ["400", "not valid JSON"]),
    "raw for two inputs": (RAW, {LENGTH: "0"}, ["400", "1 input, 'simple' has 2"]),
    "unknown compression": (HEAD, {"Content-Encoding": "br"}, ["501", "'br'", "gzip"]),
    "not gzip": (b"not gzip", {"Content-Encoding": "gzip"}, ["400", "decompressed as gzip"]),
    "not zlib": (gzip.compress(HEAD), {"Content-Encoding": "deflate"}, ["400", "decompressed as deflate"]),
    "gzip cut off": (gzip.compress(HEAD)[:-9], {"Content-Encoding": "gzip"}, ["400", "cut off"]),
    "empty gzip": (b"", {"Content-Encoding": "gzip"}, ["400", "cut off"]),
    "two members": (gzip.compress(HEAD) * 2, {"Content-Encoding": "gzip"}, ["400", "after the end"]),
    "expectation": (HEAD, {"Expect": "tea"}, ["417", "'tea'"]),
}


@pytest.mark.parametrize("case", HEADERS.values(), ids=list(HEADERS))
def test_faults_of_header_and_encoding(rest: Rest, case: tuple[bytes, dict[str, str], list[str]]) -> None:
    body, headers, says = case
    text = ask(rest, body, headers)
    assert all(part in text for part in says), text
    assert rest.quiet() == 0


@pytest.mark.parametrize("size", [63, 65])
def test_bytes_that_do_not_fit_the_shape(rest: Rest, size: int) -> None:
    head = json.dumps(binary(size)).encode()
    assert f"takes 64 bytes, got {size}" in ask(rest, head + bytes(size), {LENGTH: str(len(head))})


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (struct.pack("<I", 20) + b"ab", "length 20, but only 2 bytes follow"),
        (struct.pack("<I", 0) * 2, "more elements than the 1"),
        (b"abcde", "length"),
    ],
)
def test_strings_that_are_cut_off(rest: Rest, raw: bytes, says: str) -> None:
    tensor = {"name": "IN_BYTES", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "OUT_BYTES"}]}).encode()
    assert says in rest.refused("/v2/models/echo/infer", head + raw, {LENGTH: str(len(head))})


def test_strings_that_are_no_text_are_not_put_into_json(rest: Rest) -> None:
    raw = struct.pack("<I", 2) + b"\xff\xfe"
    tensor = {"name": "IN_BYTES", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    outputs = [{"name": "OUT_BYTES"}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    text = rest.refused("/v2/models/echo/infer", head + raw, {LENGTH: str(len(head))})
    assert text.startswith("400 output 'OUT_BYTES': element 0 is not UTF-8")
    assert "binary_data" in text


MODELS: dict[str, tuple[str, Any, list[str]]] = {
    "unknown": ("nope", SIMPLE, ["404 Request for unknown model: 'nope' is not found"]),
    "unknown version": ("simple/versions/9", SIMPLE, ["404", "'simple' version 9"]),
    "version zero": ("simple/versions/0", SIMPLE, ["404", "version 0 is not found"]),
    "not ready": ("broken_code", SIMPLE, ["503", "no_such_module"]),
    "decoupled": ("counts", SIMPLE, ["501", "decoupled", "generate_stream"]),
    "raises": ("fails", 9, ["500", "boom: naïve %d%%"]),
    "raises what has no text": ("fails", 2, ["500", "Untold"]),
    "raises half a pair": ("fails", 3, ["500", "half of a pair: ?"]),
    "raises a long text": ("fails", 4, ["500", "\u6c49" * 3000]),
    "gives something else": ("lies", 0, ["500", "'OTHER'"]),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=list(MODELS))
def test_faults_of_models(rest: Rest, case: tuple[str, Any, list[str]]) -> None:
    model, asked, says = case
    if isinstance(asked, int):
        asked = {"inputs": [{"name": "IN", "datatype": "INT32", "shape": [1], "data": [asked]}]}
    text = rest.refused(f"/v2/models/{model}/infer", asked)
    assert all(part in text for part in says), text
    assert "Traceback" not in text
    assert rest.quiet() == 0


SAME = [
    "no inputs", "missing input", "too many inputs", "same input twice", "unknown input", "rank", "wrong dimension",
    "negative dimension", "a hundred dimensions", "other datatype", "no such datatype", "batch too large",
    "unknown output", "a reserved parameter", "priority", "timeout", "classification", "shared memory",
]  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_both_protocols_tell_a_fault_in_the_same_words(
    rest: Rest, stub: service_pb2_grpc.GRPCInferenceServiceStub, name: str
) -> None:
    document = CASES[name][0]
    request = service_pb2.ModelInferRequest(model_name="simple")
    for tensor in document["inputs"]:
        added = request.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        fill(added.parameters, tensor.get("parameters", {}))
        request.raw_input_contents.append(bytes(4 * len(tensor["data"])))
    for output in document.get("outputs", []):
        fill(request.outputs.add(name=output["name"]).parameters, output["parameters"])
    fill(request.parameters, document.get("parameters", {}))
    with pytest.raises(grpc.RpcError) as told:
        stub.ModelInfer(request, timeout=LIVENESS)
    text = ask(rest, document)[4:]
    if name == "a reserved parameter":  # gRPC has one that HTTP has not
        assert told.value.details().startswith(text)
    else:
        assert text == told.value.details()


def fill(parameters: Any, values: dict[str, Any]) -> None:
    kinds = {int: "int64Param", str: "stringParam", bool: "boolParam"}
    for name, value in values.items():
        json_format.ParseDict({kinds[type(value)]: value}, parameters[name])


def test_an_unknown_model_is_told_in_the_same_words(
    rest: Rest, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    for version in ("", "3"):
        with pytest.raises(grpc.RpcError) as told:
            stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="x", version=version), timeout=LIVENESS)
        path = "/v2/models/x" + (f"/versions/{version}" if version else "")
        assert rest.refused(path) == f"404 {told.value.details()}"


# -- limits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    """A server with little memory and little patience, and the model `waits`."""
    path = tmp_path_factory.mktemp("small") / "models"
    write_model(path, "waits", NUMBER_TO_NUMBER, {"1/model.py": WAITS})
    write_model(path, "vector", VECTOR, {"1/model.py": ECHO})
    yield from serve(Repository(path), patience=0.5, memory=2**20)


def vector(size: int) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "IN", "datatype": "INT8", "shape": [size], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + bytes(size), {LENGTH: str(len(head))}


def test_a_body_larger_than_the_memory_is_refused_at_once(small: Rest) -> None:
    text = small.refused("/v2/models/vector/infer", *vector(2**20))
    assert text.startswith("413 ")
    assert str(2**20) in text
    assert small.quiet() == 0


def test_a_body_that_does_not_say_its_size_is_counted(small: Rest) -> None:
    with socket.create_connection((small.host, small.port), LIVENESS) as sock:
        sock.sendall(b"POST /v2/models/vector/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            sock.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert str(2**20).encode() in answer
    assert small.quiet() == 0


def test_what_grows_when_decompressed_is_counted(small: Rest) -> None:
    bomb = gzip.compress(bytes(64 * 2**20))
    text = small.refused("/v2/models/vector/infer", bomb, {"Content-Encoding": "gzip"})
    assert text.startswith("429 ")
    assert "1048576" in text
    assert small.quiet() == 0


def test_a_response_is_counted(small: Rest) -> None:
    status, _, body = small.ask("/v2/models/vector/infer", *vector(900_000))
    assert (status, len(body) > 900_000) == (200, True)
    assert small.quiet() == 0


def test_json_has_a_limit_of_its_own(rest: Rest) -> None:
    text = ask(rest, b" " * (jsontext.MOST_PARSED + 1))
    assert text.startswith("413 JSON of 16777217 bytes is larger than 16777216 bytes")
    assert "binary" in text
    assert rest.quiet() == 0


def test_a_large_document_is_parsed_with_the_same_words(rest: Rest) -> None:
    padding = " " * jsontext.LONG_TO_PARSE
    for name in ("a key twice", "number of 5000 digits", "cut off", "not UTF-8"):
        assert ask(rest, CASES[name][0] + padding.encode()).startswith("400 ")
    assert "element 1 is true" in ask(rest, echo("FP32", [0.5, True, *([0.25] * 20_000)]))
    assert rest.quiet() == 0


def test_outputs_too_large_for_json(rest: Rest) -> None:
    size = 4 * 2**20 + 1
    tensor = {"name": "IN_INT8", "datatype": "INT8", "shape": [size], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "OUT_INT8"}]}).encode()
    text = rest.refused("/v2/models/echo/infer", head + bytes(size), {LENGTH: str(len(head))})
    assert text.startswith("413 ")
    assert "binary_data" in text
    assert rest.quiet() == 0


def talk(rest: Rest, sent: bytes) -> bytes:
    """All that a server says until it closes."""
    with socket.create_connection((rest.host, rest.port), LIVENESS) as sock:
        sock.sendall(sent)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer


POST = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
WIRE: dict[str, tuple[bytes, bytes]] = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b" 400 "),
    "a header field too long": (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 20_000 + b"\r\n\r\n", b" 400 "),
    "too many header fields": (b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 500 + b"\r\n", b" 400 "),
    "a path too long": (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b" 400 "),
    "a length that is none": (POST + b"Content-Length: x\r\n\r\n", b" 400 "),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b" 400 "),
    "length and chunks": (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b" 400 "),
    "a chunk that is none": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", b" 400 "),
}


@pytest.mark.parametrize("case", WIRE.values(), ids=list(WIRE))
def test_what_is_not_http(rest: Rest, case: tuple[bytes, bytes]) -> None:
    sent, status = case
    answer = talk(rest, sent)
    assert status in answer.split(b"\r\n")[0] + b" "
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert b"aiohttp" not in answer
    assert rest.quiet() == 0


def test_a_body_that_stops_coming(small: Rest) -> None:
    answer = talk(small, b"POST /v2/models/vector/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"0.5 s" in answer
    assert small.quiet() == 0


def test_a_client_that_takes_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "models", "vector", VECTOR, {"1/model.py": ECHO}).parent
    for rest in serve(Repository(path), patience=0.5):
        body, headers = vector(30 * 2**20)
        with socket.create_connection((rest.host, rest.port), LIVENESS) as sock:
            fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            request = f"POST /v2/models/vector/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{fields}\r\n"
            sock.sendall(request.encode() + body)
            assert rest.quiet() == 0



def test_a_client_that_leaves_in_its_body(rest: Rest) -> None:
    for sent in (POST + b"Content-Length: 100\r\n\r\n{", POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        with socket.create_connection((rest.host, rest.port), LIVENESS) as sock:
            sock.sendall(sent)
            wait_for(lambda: rest.service.running == 1)
        assert rest.quiet() == 0


def wait_for(condition: Any) -> None:
    until = time.monotonic() + LIVENESS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_client_that_leaves_takes_its_request_out_of_the_queue(small: Rest) -> None:
    rendezvous.reset()
    body = json.dumps({"inputs": [{"name": "IN", "datatype": "INT32", "shape": [1], "data": [1]}]}).encode()
    sent = b"POST /v2/models/waits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    scheduler = small.repository.find("waits", "").scheduler
    with socket.create_connection((small.host, small.port), LIVENESS) as first:
        first.sendall(sent)
        assert rendezvous.running.acquire(timeout=LIVENESS)
        with socket.create_connection((small.host, small.port), LIVENESS) as second:
            second.sendall(sent)
            wait_for(lambda: scheduler.waiting == 1)
        wait_for(lambda: small.service.running == 1)
        rendezvous.release.set()
        assert first.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert rendezvous.ran == [1]
    assert small.quiet() == 0


def test_requests_that_run_end_before_the_server_does(tmp_path: Path) -> None:
    rendezvous.reset()
    path = write_model(tmp_path / "models", "waits", NUMBER_TO_NUMBER, {"1/model.py": WAITS}).parent
    body = json.dumps({"inputs": [{"name": "IN", "datatype": "INT32", "shape": [1], "data": [5]}]}).encode()
    for rest in serve(Repository(path)):
        with (
            socket.create_connection((rest.host, rest.port), LIVENESS) as sock,
            socket.create_connection((rest.host, rest.port), LIVENESS) as idle,
        ):
            sock.sendall(b"POST /v2/models/waits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
            sock.sendall(body)
            assert rendezvous.running.acquire(timeout=LIVENESS)

            async def stop(rest: Rest = rest) -> None:
                rest.loop.call_later(0.05, rendezvous.release.set)
                await rest.service.stop(LIVENESS)

            rest.run(stop())
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            assert idle.recv(1) == b""
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((rest.host, rest.port), 1)


def test_requests_one_behind_the_other(rest: Rest) -> None:
    one = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = talk(rest, one * 3 + one.replace(b"Host", b"Connection: close\r\nHost"))
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 4
