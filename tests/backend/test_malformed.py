"""Promise: whatever is wrong with a request, its client is told what, with both values; and the server goes on."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import text_format
from tritonclient.grpc import service_pb2, service_pb2_grpc

Stub = service_pb2_grpc.GRPCInferenceServiceStub
SIMPLE = 'model_name: "simple" '
IN0 = 'inputs { name: "INPUT0" datatype: "INT32" shape: [1, 16] } '
IN1 = 'inputs { name: "INPUT1" datatype: "INT32" shape: [1, 16] } '
ROW = bytes(64)
TWO = [ROW, ROW]
SIXTEEN = f"contents {{ int_contents: {list(range(16))} }}"
ECHO = 'model_name: "echo" '
BAD = "INVALID_ARGUMENT"


def echo(kind: str, shape: str, contents: str = "") -> str:
    wanted = f'outputs {{ name: "OUT_{kind}" }}'
    return f'{ECHO} inputs {{ name: "IN_{kind}" datatype: "{kind}" shape: {shape} {contents} }} {wanted}'


def with_contents(tensor: str, contents: str) -> str:
    return tensor.replace("}", contents + "}")


def elements(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


# request (text), raw_input_contents, code, what the message must hold
def asking(parameter: str, value: str) -> str:
    return f'outputs {{ name: "OUTPUT0" parameters {{ key: "{parameter}" value {{ {value} }} }} }}'


CASES: dict[str, tuple[str, list[bytes], str, list[str]]] = {
    "unknown model": ('model_name: "nope"' + IN0, [ROW], "NOT_FOUND", ["unknown model: 'nope'"]),
    "no model name": (IN0, [ROW], "NOT_FOUND", ["unknown model: ''"]),
    "unknown version": (SIMPLE + 'model_version: "7"', [], "NOT_FOUND", ["'simple'", "version 7"]),
    "version is no number": (SIMPLE + 'model_version: "one"', [], BAD, ["'one'", "number above 0"]),
    "version zero": (SIMPLE + 'model_version: "0"', [], "NOT_FOUND", ["'simple'", "version 0 is not found"]),
    "no inputs": (SIMPLE, [], BAD, ["'INPUT0'", "requires 2", "got 0"]),
    "missing input": (SIMPLE + IN0, [ROW], BAD, ["'INPUT1'", "requires 2", "got 1"]),
    "too many inputs": (SIMPLE + IN0 + IN1 + IN1, [ROW] * 3, BAD, ["takes 2 inputs", "got 3"]),
    "unknown input": (SIMPLE + IN0 + IN1.replace("INPUT1", "X"), TWO, BAD, ["'X'", "'INPUT0', 'INPUT1'"]),
    "the same input twice": (SIMPLE + IN0 + IN0, TWO, BAD, ["'INPUT0'", "twice"]),
    "wrong datatype": (SIMPLE + IN0 + IN1.replace("INT32", "FP32"), TWO, BAD, ["'INPUT1'", "'FP32'", "'INT32'"]),
    "no such datatype": (SIMPLE + IN0 + IN1.replace("INT32", "INT"), TWO, BAD, ["'INPUT1'", "'INT' (no such"]),
    "no datatype": (SIMPLE + IN0 + IN1.replace("INT32", ""), TWO, BAD, ["'INPUT1'", "''", "'INT32'"]),
    "rank too low": (SIMPLE + IN0 + IN1.replace("1, 16", "16"), TWO, BAD, ["'INPUT1'", "[16]", "expects 2"]),
    "rank zero": (SIMPLE + IN0 + IN1.replace("1, 16", ""), TWO, BAD, ["'INPUT1'", "[]", "expects 2"]),
    "rank too high": (SIMPLE + IN0 + IN1.replace("16", "4, 4"), TWO, BAD, ["[1, 4, 4]", "[-1, 16]"]),
    "a hundred dimensions": (SIMPLE + IN0.replace("16", ", ".join("1" * 100)), [ROW], BAD, ["'INPUT0'", "101", "64"]),
    "twenty dimensions": (SIMPLE + IN0.replace("16", ", ".join("1" * 19)) + IN1, TWO, BAD, ["20 dim", "..."]),
    "wrong dimension": (SIMPLE + IN0 + IN1.replace("16", "15"), TWO, BAD, ["'INPUT1'", "[1, 15]", "[-1, 16]"]),
    "negative batch": (SIMPLE + IN0 + IN1.replace("1, ", "-1, "), TWO, BAD, ["'INPUT1'", "[-1, 16]", "negative"]),
    "two negatives": (SIMPLE + IN0 + IN1.replace("1, 16", "-1, -16"), TWO, BAD, ["'INPUT1'", "negative"]),
    "no batch": (SIMPLE + (IN0 + IN1).replace("1, ", "0, "), [b"", b""], BAD, ["'INPUT0'", "batch is 0", "1 to 8"]),
    "batch too large": (SIMPLE + (IN0 + IN1).replace("1, ", "9, "), [ROW * 9] * 2, BAD, ["batch is 9", "1 to 8"]),
    "batches differ": (SIMPLE + IN0 + IN1.replace("1, ", "2, "), [ROW, ROW * 2], BAD, ["'INPUT1'", "is 2", "is 1"]),
    "2**62 rows": (SIMPLE + (IN0 + IN1).replace("1, ", f"{2**62}, "), TWO, BAD, [str(2**62), "larger"]),
    "product wraps to the right size": (
        'model_name: "grid" inputs { name: "IN" datatype: "FP32" shape: [9223372036854775807, 2] }',
        [bytes(8)],
        BAD,
        ["9223372036854775807", "larger"],
    ),
    "one byte short": (SIMPLE + IN0 + IN1, [ROW, ROW[1:]], BAD, ["'INPUT1'", "64 bytes", "63"]),
    "one byte over": (SIMPLE + IN0 + IN1, [ROW, ROW + b"x"], BAD, ["'INPUT1'", "64 bytes", "65"]),
    "too little raw": (SIMPLE + IN0 + IN1, [ROW], BAD, ["1 entries", "2 inputs"]),
    "too much raw": (SIMPLE + IN0 + IN1, [ROW] * 3, BAD, ["3 entries", "2 inputs"]),
    "no data": (SIMPLE + IN0 + IN1, [], BAD, ["'INPUT0'", "16 elements", "has 0"]),
    "typed and raw": (SIMPLE + with_contents(IN0, SIXTEEN) + IN1, TWO, BAD, ["'INPUT0'", "must be empty"]),
    "typed too short": (
        SIMPLE + with_contents(IN0, SIXTEEN) + with_contents(IN1, "contents { int_contents: [1, 2] }"),
        [],
        BAD,
        ["'INPUT1'", "16 elements", "has 2"],
    ),
    "typed in the wrong field": (
        SIMPLE + with_contents(IN0, SIXTEEN) + with_contents(IN1, "contents { fp32_contents: [1, 2] }"),
        [],
        BAD,
        ["'INPUT1'", "fp32_contents", "int_contents"],
    ),
    "typed in two fields": (
        SIMPLE + with_contents(IN0, SIXTEEN) + with_contents(IN1, SIXTEEN.replace("}", " uint_contents: 1 }")),
        [],
        BAD,
        ["'INPUT1'", "uint_contents", "int_contents"],
    ),
    "typed FP16": (echo("FP16", "[1]", "contents { fp32_contents: 1 }"), [], BAD, ["FP16", "raw_input_contents"]),
    "typed INT8 too large": (echo("INT8", "[2]", "contents { int_contents: [1, 128] }"), [], BAD, ["-128 to 127"]),
    "typed INT16 too small": (echo("INT16", "[1]", "contents { int_contents: -40000 }"), [], BAD, ["-40000", "INT16"]),
    "typed UINT8 too large": (echo("UINT8", "[1]", "contents { uint_contents: 256 }"), [], BAD, ["256", "0 to 255"]),
    "too few strings": (echo("BYTES", "[2]"), [elements(b"abcdefgh")], BAD, ["'IN_BYTES'", "1 elements", "for 2"]),
    "hardly any strings": (echo("BYTES", "[9]"), [elements(b"a")], BAD, ["9 elements", "36 bytes", "got 5"]),
    "too many strings": (echo("BYTES", "[1]"), [elements(b"a", b"b")], BAD, ["'IN_BYTES'", "more", "the 1"]),
    "string cut off": (echo("BYTES", "[2]"), [elements(b"a", b"bcd")[:-1]], BAD, ["element 1", "length 3", "only 2"]),
    "length cut off": (echo("BYTES", "[2]"), [elements(b"abc") + b"\1\0"], BAD, ["element 1", "4-byte", "only 2"]),
    "length 2**32-1": (echo("BYTES", "[1]"), [b"\xff\xff\xff\xff"], BAD, ["element 0", "4294967295", "only 0"]),
    "2**62 strings": (echo("BYTES", f"[{2**62}]"), [b""], BAD, [str(2**62)]),
    "text that is none": (
        'model_name: "text" inputs { name: "IN" datatype: "BYTES" shape: [1, 1] }',
        [elements(b"\xff")],
        BAD,
        ["'IN'", "UTF-8"],
    ),
    "unknown output": (SIMPLE + IN0 + IN1 + 'outputs { name: "X" }', TWO, BAD, ["'X'", "'OUTPUT0', 'OUTPUT1'"]),
    "classification": (
        SIMPLE + IN0 + IN1 + asking("classification", 'string_param: "3"'),
        TWO,
        BAD,
        ["'OUTPUT0'", "'classification' is '3'"],
    ),
    "fewer than no classes": (
        SIMPLE + IN0 + IN1 + asking("classification", 'int64_param: -1'),
        TWO,
        BAD,
        ["'OUTPUT0'", "'classification' is -1"],
    ),
    "shared memory in": (
        SIMPLE + IN0 + with_contents(IN1, 'parameters { key: "shared_memory_region" value { string_param: "r" } }'),
        [ROW],
        "UNIMPLEMENTED",
        ["'INPUT1'", "'shared_memory_region'"],
    ),
    "shared memory out": (
        SIMPLE + IN0 + IN1 + asking("shared_memory_region", 'string_param: "r"'),
        TWO,
        "UNIMPLEMENTED",
        ["'OUTPUT0'", "'shared_memory_region'"],
    ),
    "parameter without a value": (
        SIMPLE + IN0 + IN1 + 'parameters { key: "tag" value { } }',
        TWO,
        BAD,
        ["'tag'", "no value"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_malformed_request(stub: Stub, case: tuple[str, list[bytes], str, list[str]]) -> None:
    text, raw, code, parts = case
    request = text_format.Parse(text, service_pb2.ModelInferRequest())
    request.raw_input_contents.extend(raw)
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(request, timeout=30)
    details = failed.value.details()
    assert failed.value.code().name == code, details
    assert [part for part in parts if part not in details] == [], details
    assert "Traceback" not in details


def test_the_server_goes_on_after_all_that(stub: Stub) -> None:
    request = text_format.Parse(SIMPLE + IN0 + IN1, service_pb2.ModelInferRequest())
    request.raw_input_contents.extend(TWO)
    assert stub.ModelInfer(request, timeout=30).model_name == "simple"


MODEL_FAULTS = [
    ("fails", 0, "ValueError: boom: naïve %d%%"),
    ("fails", 1, "SystemExit: 3"),
    ("fails", 2, "Untold"),
    ("fails", 3, "half of a pair: ?"),
    ("fails", 4, "\u6c49\u6c49..."),
    ("lies", 0, "'OTHER', which is not one of its outputs"),
    ("lies", 1, "no 'OUT'"),
    ("lies", 2, "'OUT' as int64, which is not INT32"),
    ("lies", 3, "shape [2], which is not [1]"),
    ("lies", 4, "returned str"),
    ("lies", 5, "shape [1, 1], which is not [1]"),
    ("lies", 6, "IndexError"),
]


@pytest.mark.parametrize(("model", "value", "says"), MODEL_FAULTS)
def test_a_model_that_fails_fails_its_request_alone(stub: Stub, model: str, value: int, says: str) -> None:
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[value.to_bytes(4, "little")])
    request.inputs.add(name="IN", datatype="INT32", shape=[1])
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as failed:
            stub.ModelInfer(request, timeout=30)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert failed.value.details().startswith(f"model '{model}' failed: ")
        assert says in failed.value.details()


BROKEN: list[tuple[str, list[str]]] = [
    ("broken_code", ["broken_code/1/model.py:2: ModuleNotFoundError: No module named 'no_such_module'"]),
    ("broken_config", ["broken_config/config.pbtxt:2:3: ", 'no field named "max_size"']),
    ("broken_onnx", ["broken_onnx/1/model.onnx", "INVALID_PROTOBUF"]),
]


@pytest.mark.parametrize(("model", "says"), BROKEN)
def test_a_broken_model_says_why(stub: Stub, backend: Any, model: str, says: list[str]) -> None:
    assert not stub.ModelReady(service_pb2.ModelReadyRequest(name=model)).ready
    rpcs = [
        (stub.ModelInfer, service_pb2.ModelInferRequest(model_name=model)),
        (stub.ModelMetadata, service_pb2.ModelMetadataRequest(name=model)),
        (stub.ModelConfig, service_pb2.ModelConfigRequest(name=model, version="1")),
    ]
    for rpc, request in rpcs:
        with pytest.raises(grpc.RpcError) as failed:
            rpc(request, timeout=30)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [part for part in [f"model '{model}'", *says] if part not in failed.value.details()] == []
    log = backend.process.log()
    assert f"model {model} " in log
    assert [part for part in says if part not in log] == []
