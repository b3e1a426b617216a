"""Promise: generate and generate_stream are Triton's, and a client that leaves takes the model's work along."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.backend.repository import Repository
from tests.backend import rendezvous
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, write_model
from tests.backend.test_rest import Rest, serve, write_rest_repository
from tests.backend.test_rest_malformed import wait_for
from tests.support.processes import LIVENESS

ONCE, STREAM = "/v2/models/{}/generate", "/v2/models/{}/generate_stream"


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    yield from serve(Repository(write_rest_repository(tmp_path_factory.mktemp("rest") / "models")))


def events(rest: Rest, model: str, body: Any) -> tuple[int, list[dict[str, Any]]]:
    status, fields, answer = rest.ask(STREAM.format(model), body)
    assert fields["content-type"] == "text/event-stream; charset=utf-8"
    parts = answer.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return status, [json.loads(part.removeprefix("data: ")) for part in parts]


def tokens(count: int, **more: Any) -> dict[str, Any]:
    return {"text_input": "a", "count": count, **more}


def token(at: int) -> dict[str, str]:
    return {"model_name": "tokens", "model_version": "1", "text_output": f"a{at}"}


def test_one_answer_of_a_usual_model(rest: Rest) -> None:
    body = {"id": "7", "text_input": "h\u00fc\n", "stream": True, "temperature": 0.5, "parameters": {"top": 3}}
    answer = rest.json(ONCE.format("gen"), body)
    assert list(answer) == ["id", "model_name", "model_version", "numbers", "text_output"]
    assert answer == {
        "id": "7", "model_name": "gen", "model_version": "1", "numbers": 0.0, "text_output": "h\u00fc\n",
    }  # fmt: skip
    assert events(rest, "gen", body) == (200, [answer])
    assert rest.quiet() == 0


@pytest.mark.parametrize(("count", "numbers"), [(0, []), (1, 0.0), (3, [0.0, 1.0, 2.0]), ([2], [0.0, 1.0])])
def test_one_element_is_no_list(rest: Rest, count: Any, numbers: Any) -> None:
    assert rest.json(ONCE.format("gen"), {"text_input": ["x"], "count": count})["numbers"] == numbers


def test_an_input_may_be_called_id(tmp_path: Path) -> None:
    config = NUMBER_TO_NUMBER.replace('"IN"', '"id"')
    path = write_model(tmp_path / "models", "m", config, {"1/model.py": ECHO.replace('"IN"', '"id"')}).parent
    for rest in serve(Repository(path)):
        assert rest.json(ONCE.format("m"), {"id": 5}) == {"model_name": "m", "model_version": "1", "OUT": 5}


def test_a_large_answer(rest: Rest) -> None:
    body = {"text_input": "x\u00e9" * 100_000, "count": 20_000}
    answer = rest.json(ONCE.format("gen"), body)
    assert answer["text_output"] == body["text_input"]
    assert answer["numbers"] == [float(number) for number in range(20_000)]
    assert events(rest, "gen", body) == (200, [answer])
    assert rest.quiet() == 0


def test_a_version_is_named(rest: Rest) -> None:
    assert rest.json("/v2/models/gen/versions/1/generate", {"text_input": "x"})["text_output"] == "x"


@pytest.mark.parametrize("count", [0, 1, 40])
def test_all_answers_of_a_decoupled_model(rest: Rest, count: int) -> None:
    assert events(rest, "tokens", tokens(count)) == (200, [token(at) for at in range(count)])
    assert rest.quiet() == 0


def test_one_answer_of_a_decoupled_model(rest: Rest) -> None:
    assert rest.json(ONCE.format("tokens"), tokens(1)) == token(0)


@pytest.mark.parametrize(("count", "says"), [(0, "no answer"), (2, "more than one"), (1000, "more than one")])
def test_generate_of_none_or_many_answers_is_an_error(rest: Rest, count: int, says: str) -> None:
    text = rest.refused(ONCE.format("tokens"), tokens(count))
    assert text.startswith("400 model 'tokens' gave")
    assert says in text
    assert "generate_stream" in text
    assert rest.quiet() == 0


def test_an_error_after_answers_is_an_event(rest: Rest) -> None:
    status, told = events(rest, "tokens", tokens(-2))
    assert (status, told[:2]) == (200, [token(0), token(1)])
    assert "counted enough" in told[2]["error"]
    assert "Traceback" not in told[2]["error"]
    assert len(told) == 3


def test_an_error_before_any_answer_has_a_status(rest: Rest) -> None:
    body = {"IN": 9}
    status, told = events(rest, "fails", body)
    assert status == 400  # as Triton, here alone
    assert "boom" in told[0]["error"]
    assert rest.refused(ONCE.format("fails"), body) == f"400 {told[0]['error']}"


# model, request, what the answer must hold
FAULTS: dict[str, tuple[str, Any, list[str]]] = {
    "empty": ("gen", b"", ["400", "empty"]),
    "no JSON": ("gen", b"{x", ["400", "not valid JSON"]),
    "a list": ("gen", [], ["400", "a list", "an object"]),
    "unknown model": ("nope", {}, ["404", "'nope'"]),
    "not ready": ("broken_code", {}, ["503", "no_such_module"]),
    "missing input": ("tokens", {"count": 1}, ["400", "'text_input' is missing"]),
    "number for text": ("gen", {"text_input": 5}, ["400", "element 0 is 5", "a string"]),
    "object for text": ("gen", {"text_input": {"a": 1}}, ["400", "element 0 is an object"]),
    "null for text": ("gen", {"text_input": None}, ["400", "element 0 is null"]),
    "list too long": ("gen", {"text_input": ["a", "b"]}, ["400", "2 elements", "[1]"]),
    "list empty": ("gen", {"text_input": []}, ["400", "0 elements"]),
    "string for number": ("gen", {"text_input": "a", "count": "x"}, ["400", "element 0 is 'x'", "an integer"]),
    "float for integer": ("gen", {"text_input": "a", "count": 1.5}, ["400", "element 0 is 1.5"]),
    "integer for boolean": ("gen", {"text_input": "a", "stream": 1}, ["400", "element 0 is 1", "true or false"]),
    "an object among the parameters": ("gen", {"text_input": "a", "x": {"b": 1}}, ["400", "'x' is an object"]),
    "null among the parameters": ("gen", {"text_input": "a", "x": None}, ["400", "'x' is null"]),
    "a list in parameters": ("gen", {"text_input": "a", "parameters": {"x": [1]}}, ["400", "'x' is a list"]),
    "parameters no object": ("gen", {"text_input": "a", "parameters": 1}, ["400", "'parameters' is 1"]),
    "too many parameters": ("gen", {"text_input": "a", **dict.fromkeys(map(str, range(65)), 1)}, ["400", "65"]),
    "id no string": ("gen", {"text_input": "a", "id": 3}, ["400", "'id' is 3"]),
    "FP16 and BF16": ("echo", {"IN_BOOL": True}, ["400", "'OUT_FP16'", "use infer, with binary_data"]),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=list(FAULTS))
@pytest.mark.parametrize("path", [ONCE, STREAM])
def test_the_fault_is_told(rest: Rest, path: str, case: tuple[str, Any, list[str]]) -> None:
    model, body, says = case
    text = rest.refused(path.format(model), body, method="POST")
    assert all(part in text for part in says), text
    assert rest.quiet() == 0


@pytest.mark.parametrize("pause", [True, False])
def test_a_client_that_leaves_stops_the_model(rest: Rest, pause: bool) -> None:
    """With `pause` the client took nothing, and the model is held back by it; else it is in the middle."""
    rendezvous.reset()
    body = json.dumps(tokens(2**31 - 1)).encode()
    path = STREAM.format("tokens").encode()
    request = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
    with socket.create_connection((rest.host, rest.port), LIVENESS) as sock:
        sock.sendall(request + body)
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        while not pause and b'"text_output":"a50"' not in sock.recv(65536):
            pass
    wait_for(lambda: rendezvous.finalized == ["tokens"])
    assert rest.quiet() == 0
    assert rest.json(ONCE.format("tokens"), tokens(1)) == token(0)


def test_a_stream_for_a_client_of_http_1_0_ends_with_the_connection(rest: Rest) -> None:
    body = json.dumps(tokens(2)).encode()
    with socket.create_connection((rest.host, rest.port), LIVENESS) as sock:
        sock.sendall(b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % (STREAM.format("tokens").encode(), len(body)))
        sock.sendall(body)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    head, _, stream = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert stream.count(b"data: ") == 2
