"""HTTP as any client may speak it: paths, methods, headers, bodies, and `generate`, which Triton's clients lack."""

from __future__ import annotations

import gzip
import http.client
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.parity.clients import mentions
from tests.parity.servers import Server

SIXTEEN = list(range(16))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The text of an error, which is JSON whatever the content type says."""
        told = json.loads(self.body)
        assert set(told) == {"error"}
        return str(told["error"])


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """One request; `body` is bytes, or what is sent as JSON. In the names of headers `_` stands for `-`."""
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(server.http, timeout=20)
    try:
        connection.request(method, path, sent, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        connection.close()


def tensor(name: str, data: Any = None, datatype: str = "INT32", **more: Any) -> dict[str, Any]:
    data = SIXTEEN if data is None else data
    return {"name": name, "datatype": datatype, "shape": [1, 16], "data": data, **more}


def request(**more: Any) -> dict[str, Any]:
    """A request for `simple`."""
    return {"inputs": [tensor("INPUT0"), tensor("INPUT1")], **more}


PATHS = [
    ("GET", "/v2", 200),
    ("GET", "/v2/health/live", 200),
    ("GET", "/v2/health/ready", 200),
    ("GET", "/v2/models/simple", 200),
    ("GET", "/v2/models/simple/versions/1", 200),
    ("GET", "/v2/models/simple/versions/1/ready", 200),
    ("GET", "/v2/models/simple/config", 200),
    ("GET", "/v2/models/simple/versions/1/stats", 200),
    ("GET", "/v2/models/stats", 200),
    ("GET", "/v2/health/live?any=thing", 200),
    ("POST", "/v2/repository/index", 200),
    ("GET", "/v2/models/nope", 404),
    ("GET", "/v2/models/simple/versions/9", 404),
    ("GET", "/v2/models/nope/ready", 400),
    ("GET", "/v2/models/nope/stats", 400),
    ("POST", "/v2/models/nope/infer", 404),
    ("POST", "/v2/models/nope/generate", 404),
    ("GET", "/", 404),
    ("GET", "/v2/nothing", 404),
    ("GET", "/v2/models/simple/nothing", 404),
    ("GET", "/v2/models/simple/versions/x", 404),
    ("GET", "/metrics", 404),
    ("POST", "/v2", 405),
    ("DELETE", "/v2/models/simple", 405),
    ("POST", "/v2/health/live", 405),
    ("GET", "/v2/models/simple/infer", 405),
    ("GET", "/v2/models/simple/generate_stream", 405),
    ("GET", "/v2/repository/index", 405),
    ("PUT", "/v2/repository/models/simple/load", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), PATHS, ids=lambda value: str(value))
def test_the_status_of_a_path(server: Server, method: str, path: str, status: int) -> None:
    answer = ask(server, method, path, b"{}" if method == "POST" else None)
    assert answer.status == status
    if status != 200:
        assert answer.error
    elif "/health/" in path or path.endswith("/ready"):
        assert answer.body == b""
    else:
        assert answer.json


def test_numbers_are_numbers_and_versions_are_strings(server: Server) -> None:
    [stats] = ask(server, "GET", "/v2/models/simple/stats").json["model_stats"]
    assert stats["version"] == "1"
    assert type(stats["inference_count"]) is int
    assert type(stats["last_inference"]) is int
    assert type(stats["inference_stats"]["success"]["ns"]) is int
    config = ask(server, "GET", "/v2/models/simple/config").json
    assert config["input"][0]["dims"] == [16]
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert ask(server, "GET", "/v2/models/simple").json["inputs"][0]["shape"] == [-1, 16]


def test_the_index_of_ready_models(server: Server) -> None:
    ready = ask(server, "POST", "/v2/repository/index", {"ready": True}).json
    every = ask(server, "POST", "/v2/repository/index").json
    assert ("simple", "1") in {(entry["name"], entry["version"]) for entry in ready}
    assert {entry["state"] for entry in ready} == {"READY"}
    assert {"name": "idle"} in every
    assert [entry["name"] for entry in every] == sorted(entry["name"] for entry in every)


def test_json_in_and_out(server: Server) -> None:
    answer = ask(server, "POST", "/v2/models/simple/infer", request(id="7", outputs=[{"name": "OUTPUT0"}]))
    assert answer.json == {
        "id": "7",
        "model_name": "simple",
        "model_version": "1",
        "outputs": [{"name": "OUTPUT0", "datatype": "INT32", "shape": [1, 16], "data": [2 * n for n in SIXTEEN]}],
    }
    assert "inference-header-content-length" not in answer.headers


def test_nested_data_is_read_and_flat_data_is_written(server: Server) -> None:
    nested = {"inputs": [tensor("INPUT0", [SIXTEEN]), tensor("INPUT1", [SIXTEEN[:8], SIXTEEN[8:]])]}
    answer = ask(server, "POST", "/v2/models/simple/infer", nested)
    assert answer.json["outputs"][0]["data"] == [2 * n for n in SIXTEEN]


def test_binary_in_and_out(server: Server) -> None:
    raw = struct.pack("<16i", *SIXTEEN)
    binary = {"name": "INPUT0", "datatype": "INT32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}
    asked = {"inputs": [binary, tensor("INPUT1")], "parameters": {"binary_data_output": True}}
    head = json.dumps(asked).encode()
    length = str(len(head))
    answer = ask(server, "POST", "/v2/models/simple/infer", head + raw, Inference_Header_Content_Length=length)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    told = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.body[:told])["outputs"]
    assert [output["parameters"] for output in outputs] == [{"binary_data_size": 64}] * 2
    assert "data" not in outputs[0]
    assert answer.body[told:] == struct.pack("<16i", *(2 * n for n in SIXTEEN)) + bytes(64)


def test_outputs_that_are_named_are_binary_each_by_itself(server: Server) -> None:
    outputs = [{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}]
    answer = ask(server, "POST", "/v2/models/simple/infer", request(outputs=outputs))
    told = json.loads(answer.body[: int(answer.headers["inference-header-content-length"])])["outputs"]
    assert told[0]["parameters"] == {"binary_data_size": 64}
    assert told[1]["data"] == [0] * 16
    outputs = [{"name": "OUTPUT1"}]
    answer = ask(
        server, "POST", "/v2/models/simple/infer", request(outputs=outputs, parameters={"binary_data_output": True})
    )
    assert answer.json["outputs"][0]["data"] == [0] * 16


def test_a_body_of_nothing_but_the_tensor(server: Server) -> None:
    answer = ask(
        server, "POST", "/v2/models/repeat/infer", struct.pack("<i", 1), Inference_Header_Content_Length="0"
    )
    assert answer.status == 501  # decoupled, which is looked at first
    answer = ask(server, "POST", "/v2/models/simple/infer", bytes(64), Inference_Header_Content_Length="0")
    assert answer.status == 400
    mentions(answer.error, "simple", "2", "1")
    answer = ask(server, "POST", "/v2/models/scores/infer", bytes(16), Inference_Header_Content_Length="0")
    assert answer.status == 200
    told = int(answer.headers["inference-header-content-length"])
    assert [output["shape"] for output in json.loads(answer.body[:told])["outputs"]] == [[1, 4]] * 2
    assert answer.body[told:] == bytes(32)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("br;q=1.0, deflate;q=0.5, gzip;q=0.9", "gzip"), ("br", None),
     ("gzip;q=0", None)],
)  # fmt: skip
def test_the_coding_of_an_answer(server: Server, accepted: str, coding: str | None) -> None:
    answer = ask(server, "POST", "/v2/models/simple/infer", request(), Accept_Encoding=accepted)
    assert answer.headers.get("content-encoding") == coding
    decode = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}[coding]
    assert json.loads(decode(answer.body))["outputs"][1]["data"] == [0] * 16


def test_the_coding_of_a_request(server: Server) -> None:
    body = json.dumps(request()).encode()
    for coding, sent in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)):
        assert ask(server, "POST", "/v2/models/simple/infer", sent, Content_Encoding=coding).status == 200
    refused = ask(server, "POST", "/v2/models/simple/infer", body, Content_Encoding="br")
    assert refused.status == 501
    assert refused.headers["accept-encoding"] == "gzip, deflate"
    assert ask(server, "POST", "/v2/models/simple/infer", b"not gzip", Content_Encoding="gzip").status == 400


_BINARY = {"name": "INPUT0", "datatype": "INT32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}


def first(**members: Any) -> dict[str, Any]:
    """A request for `simple` whose INPUT0 has these members, and none of those that are None."""
    made = {**tensor("INPUT0"), **members}
    return {"inputs": [{name: value for name, value in made.items() if value is not None}, tensor("INPUT1")]}


MALFORMED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no JSON": (b"{nope", ("JSON",)),
    "half of it": (b'{"inputs": [', ("JSON",)),
    "more after it": (json.dumps(request()).encode() + b"xx", ("JSON",)),
    "a list": ([], ("object",)),
    "no inputs": ({"id": "1"}, ("inputs",)),
    "inputs that are no list": ({"inputs": {}}, ("inputs",)),
    "a null": ({"inputs": None}, ("inputs",)),
    "no name": (first(name=None), ("name",)),
    "no shape": (first(shape=None), ("shape",)),
    "no datatype": (first(datatype=None), ("datatype",)),
    "no data": (first(data=None), ("data",)),
    "unknown datatype": (first(datatype="INT33"), ("INPUT0",)),
    "a shape of text": (first(shape=["1", "16"]), ("shape",)),
    "a negative shape": (first(shape=[-1, 16]), ("shape",)),
    "too little data": (first(data=[1, 2]), ("data",)),
    "too much data": (first(data=[*SIXTEEN, 1]), ("data",)),
    "text for numbers": (first(data=["a"] * 16), ("integer",)),
    "halves for integers": (first(data=[0.5] * 16), ("integer",)),
    "nulls for numbers": (first(data=[None] * 16), ("integer",)),
    "FP16 in JSON": (first(datatype="FP16"), ("FP16", "INPUT0", "binary")),
    "an id of digits": (request(id=7), ("id",)),
    "a parameter that is null": (request(parameters={"foo": None}), ("foo",)),
    "a parameter that is a list": (request(parameters={"foo": [1]}), ("foo",)),
    "a priority of text": (request(parameters={"priority": "x"}), ("priority",)),
    "a reserved name": (request(parameters={"triton_foo": 1}), ("triton_",)),
    "binary data that is not there": ({"inputs": [_BINARY, tensor("INPUT1")]}, ("INPUT0", "64")),
    "binary data and data": (
        {"inputs": [{**_BINARY, "data": SIXTEEN}, tensor("INPUT1")]}, ("data", "binary_data_size"),
    ),
    "classes of text": (
        request(outputs=[{"name": "OUTPUT0", "parameters": {"classification": "x"}}]), ("classification",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", MALFORMED)
def test_a_malformed_request(server: Server, label: str) -> None:
    body, words = MALFORMED[label]
    answer = ask(server, "POST", "/v2/models/simple/infer", body)
    # Triton calls its own what it finds while it reads the JSON.
    assert answer.status in ((400, 500) if server.is_triton else (400,))
    mentions(answer.error, *words)
    assert ask(server, "GET", "/v2/health/live").status == 200


@pytest.mark.parametrize(
    ("length", "size", "sent"),
    [("-1", 64, 64), ("99999", 64, 64), (None, 60, 60), (None, 64, 60), (None, 64, 68)],
    ids=["negative", "beyond the body", "too few for the shape", "fewer than told", "more than told"],
)
def test_binary_data_that_does_not_fit(server: Server, length: str | None, size: int, sent: int) -> None:
    head = json.dumps({"inputs": [{**_BINARY, "parameters": {"binary_data_size": size}}, tensor("INPUT1")]}).encode()
    length = str(len(head)) if length is None else length
    body = head + bytes(sent)
    answer = ask(server, "POST", "/v2/models/simple/infer", body, Inference_Header_Content_Length=length)
    assert answer.status == 400
    if int(length) != len(head):
        mentions(answer.error, length)
    elif sent <= size:
        mentions(answer.error, "INPUT0")


def test_generate(server: Server) -> None:
    answer = ask(server, "POST", "/v2/models/simple/generate", {"INPUT0": SIXTEEN, "INPUT1": SIXTEEN, "id": "7"})
    assert answer.json == {
        "id": "7", "model_name": "simple", "model_version": "1",
        "OUTPUT0": [2 * n for n in SIXTEEN], "OUTPUT1": [0] * 16,
    }  # fmt: skip
    answer = ask(server, "POST", "/v2/models/words/versions/1/generate", {"TEXT": "ab", "unknown": 1})
    assert answer.json == {"model_name": "words", "model_version": "1", "REVERSED": "ba", "LENGTH": 2}


def test_generate_with_one_response_of_a_decoupled_model(server: Server) -> None:
    answer = ask(server, "POST", "/v2/models/repeat/generate", {"COUNT": 1})
    assert answer.json == {"model_name": "repeat", "model_version": "1", "OUT": 0}
    for number in (0, 2):
        answer = ask(server, "POST", "/v2/models/repeat/generate", {"COUNT": number})
        mentions(answer.error, "exactly", "stream")


def events(answer: Answer) -> list[Any]:
    assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
    found = answer.body.decode().split("\n\n")
    assert found.pop() == ""
    return [json.loads(event.removeprefix("data: ")) for event in found]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_generate_stream(server: Server, number: int) -> None:
    answer = ask(server, "POST", "/v2/models/repeat/generate_stream", {"COUNT": number})
    assert answer.status == 200
    assert events(answer) == [{"model_name": "repeat", "model_version": "1", "OUT": one} for one in range(number)]


def test_generate_stream_of_a_model_with_one_response(server: Server) -> None:
    answer = ask(server, "POST", "/v2/models/words/generate_stream", {"TEXT": ["ab"]})
    assert events(answer) == [{"model_name": "words", "model_version": "1", "REVERSED": "ba", "LENGTH": 2}]


def test_generate_stream_that_fails_after_responses(server: Server) -> None:
    answer = ask(server, "POST", "/v2/models/repeat/generate_stream", {"COUNT": -2})
    assert answer.status == 200
    *fine, last = events(answer)
    assert [event["OUT"] for event in fine] == [0, 1]
    mentions(last["error"], "gave up after 2")


def test_generate_that_fails(server: Server) -> None:
    answer = ask(server, "POST", "/v2/models/fails/generate", {"IN": 5})
    assert answer.status in (400, 500)  # Triton says 400 whatever the model's error is
    mentions(answer.error, "boom at 5")
    for body, word in ((b"", "JSON"), ({"TEXT": 5}, "string"), ({"TEXT": "a", "foo": None}, "foo")):
        answer = ask(server, "POST", "/v2/models/words/generate", body)
        assert answer.status in ((400, 500) if server.is_triton else (400,))
        mentions(answer.error, word)
