"""Promise: docs/backend.md is right: examples run as printed, tables of RPCs, paths, limits, metrics are the code's."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from proxy import cli
from proxy.backend import answers, batching, budget, cache, config, control, exposition, metrics, repository, scheduler
from proxy.backend import httpconnections as connections
from proxy.backend import server as backend_server
from proxy.backend.errors import Code, InferenceError
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.repository import Repository
from proxy.backend.samples import repository_path
from proxy.backend.services import call, compression, http2, parameters, streaming, wire
from proxy.backend.services.description import EXTENSIONS
from proxy.backend.services.inference import SERVICE
from proxy.backend.services.rest import compression as rest_compression
from proxy.backend.services.rest import control as rest_control
from proxy.backend.services.rest import exchange, faults, generate, jsontensors, jsontext, service
from proxy.backend.statistics import REASONS
from proxy.inference import status
from proxy.upstream import embedded
from tests.docs.markdown import code_blocks, names, table
from tests.peers import ROOT
from tests.support.processes import LIVENESS, Process

DOCUMENT = ROOT / "docs/backend.md"
MODELS = ROOT / "docs/models.md"
TEXT = " ".join(DOCUMENT.read_text().split())
GRPC, HTTP = "127.0.0.1:9001", "http://127.0.0.1:9000"

REFUSES = """
from proxy.backend.errors import invalid

class Model:
    def execute(self, batch):
        raise invalid("why")
"""


def code(document: Path, language: str) -> list[str]:
    return [block.text for block in code_blocks(document) if block.language == language]


(CONFIG,) = code(DOCUMENT, "protobuf")
MODEL, CLIENT, LOADS = code(DOCUMENT, "python")
COMMAND, INFER, CONTROL, GENERATE = code(DOCUMENT, "sh")
DECOUPLED_CONFIG, _ = code(MODELS, "protobuf")
DECOUPLED, STREAMS = code(MODELS, "python")
(GENERATE_STREAM,) = code(MODELS, "sh")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@dataclass
class Example:
    """The documents' repository, served by the document's command, with other ports."""

    process: Process
    grpc: str
    http: str
    metrics: str
    channel: grpc.Channel

    def run_python(self, text: str) -> str:
        assert GRPC in text
        return _output([sys.executable, "-c", text.replace(GRPC, self.grpc)])

    def run_shell(self, text: str) -> str:
        assert HTTP in text
        return _output(["bash", "-ec", text.replace(HTTP, self.http).replace("curl", "curl -sS")])

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
        try:
            with urlopen(Request(self.http + path, body, method=method), timeout=LIVENESS) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=LIVENESS, check=True).stdout


def write(directory: Path, config: str, model: str) -> None:
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config)
    (directory / "1/model.py").write_text(model)


@contextmanager
def served(place: Path, *more: str) -> Iterator[Example]:
    write(place / "models/softmax", CONFIG, MODEL)
    write(place / "models/words", DECOUPLED_CONFIG, DECOUPLED)
    write(place / "models/refuses", CONFIG, REFUSES)
    write(place / "models/broken", "max_bach_size: 1", MODEL)
    (place / "models/digits/1").mkdir(parents=True)
    shutil.copy(repository_path() / "digits/1/model.onnx", place / "models/digits/1")
    arguments = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:0", COMMAND).split()[1:]
    argv = [sys.executable, "-m", "proxy", *arguments, *more]
    process = Process("example", argv, place, {"PYTHONPATH": str(ROOT)}, cwd=place)
    process.wait_log(r"backend is ready: \d of \d models")
    found = dict(re.findall(r"backend listens: (\w+) on (\S+)", process.log()))
    with grpc.insecure_channel(found["grpc"]) as channel:
        yield Example(process, found["grpc"], f"http://{found['http']}", f"http://{found['metrics']}", channel)
    process.stop()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with served(tmp_path_factory.mktemp("example")) as example:
        yield example


@pytest.fixture(scope="module")
def explicit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with served(tmp_path_factory.mktemp("explicit"), "--model-control-mode", "explicit") as example:
        yield example


# The examples


def softmax(values: Any) -> np.ndarray:
    powers = np.exp(np.array(values) / 2.0)
    return powers / powers.sum()


def test_the_example_is_called_as_printed(example: Example) -> None:
    shown = example.run_python(CLIENT)
    np.testing.assert_allclose(np.array(re.findall(r"\d\.\d+", shown), float), softmax([1, 2, 3]), rtol=1e-5)


@needs_curl
def test_infer_over_rest_as_printed(example: Example) -> None:
    got, printed = json.loads(example.run_shell(INFER)), json.loads(code(DOCUMENT, "json")[0])
    data = [one["outputs"][0].pop("data") for one in (got, printed)]
    assert got == printed
    np.testing.assert_allclose(data[0], data[1], atol=1e-3)


@needs_curl
def test_generate_as_printed(example: Example) -> None:
    got, printed = json.loads(example.run_shell(GENERATE)), json.loads(code(DOCUMENT, "json")[1])
    data = [one.pop("probabilities") for one in (got, printed)]
    assert got == printed
    np.testing.assert_allclose(data[0], data[1], atol=1e-3)


@needs_curl
def test_generate_stream_as_printed(example: Example) -> None:
    blocks = code_blocks(MODELS)
    after = next(at for at, block in enumerate(blocks) if block.text == GENERATE_STREAM)
    assert example.run_shell(GENERATE_STREAM) == blocks[after + 1].text


def test_a_stream_as_printed(example: Example) -> None:
    assert example.run_python(STREAMS).split() == ["one", "two", "three"]


def test_finalize_is_called(tmp_path: Path) -> None:
    with served(tmp_path) as example:
        example.run_python(CLIENT)
        example.process.signal(signal.SIGTERM)
        assert example.process.wait() == 0
        assert "served 1 rows" in example.process.log()


@needs_curl
def test_loading_as_printed(explicit: Example) -> None:
    load, index, unload = CONTROL.splitlines()
    assert "state" not in explicit.run_shell(index)
    explicit.run_shell(load)
    assert {"name": "softmax", "version": "1", "state": "READY"} in json.loads(explicit.run_shell(index))
    explicit.run_shell(unload)
    assert explicit.ask("GET", "/v2/models/softmax/ready")[0] == 400


def test_loading_with_files_as_printed(explicit: Example) -> None:
    assert explicit.run_python(LOADS).strip() == "True"
    status, _, body = explicit.ask("POST", "/v2/models/double/generate", b'{"x": 4}')
    assert (status, json.loads(body)["y"]) == (200, 8)


def request(model: str, rows: int) -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest(model_name=model)
    made.inputs.add(name="logits", datatype="FP32", shape=[rows, 3]).contents.fp32_contents.extend(range(3 * rows))
    return made


def infer(example: Example, wanted: service_pb2.ModelInferRequest) -> service_pb2.ModelInferResponse:
    return service_pb2_grpc.GRPCInferenceServiceStub(example.channel).ModelInfer(wanted, timeout=LIVENESS)


def test_the_example_has_the_batches_that_it_says(example: Example) -> None:
    answer = infer(example, request("softmax", 32))
    sums = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(32, 3).sum(axis=1)
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    with pytest.raises(grpc.RpcError) as failed:
        infer(example, request("softmax", 33))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_can_say_that_the_request_is_wrong(example: Example) -> None:
    assert '`proxy.backend.errors.invalid("why")`: INVALID_ARGUMENT' in " ".join(MODELS.read_text().split())
    with pytest.raises(grpc.RpcError) as failed:
        infer(example, request("refuses", 1))
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "why")


# The command


def test_the_flags() -> None:
    parser = next(
        action.choices["backend"]
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    flags = {action.option_strings[-1]: action for action in parser._actions if action.option_strings}
    rows = {names(flag)[0]: (default, words) for flag, default, words in table(DOCUMENT, "flag", "default", "meaning")}
    assert set(rows) == set(flags) - {"--help"}
    for flag, (default, words) in rows.items():
        action = flags[flag]
        assert (default == "required") == action.required
        if names(default):
            assert float(action.default) == 15.0 if flag.endswith("secs") else names(default) == [action.default]
        if action.choices:
            assert set(names(words)) == set(action.choices)


def test_the_modes() -> None:
    modes = [names(row[0])[0] for row in table(DOCUMENT, "`--model-control-mode`", "")]
    assert modes == list(get_args(get_type_hints(control.Control)["mode"]))


def test_the_times() -> None:
    seconds = f"calls under way have {backend_server._GRACE:g} seconds, models' `finalize` {backend_server._FINALIZE:g}"
    assert seconds in TEXT
    first, last, stable = embedded._FIRST_BACKOFF, embedded._LAST_BACKOFF, embedded._STABLE_SECONDS
    assert f"after {first:g} seconds, then after twice as long each time, up to {last:g}, until" in TEXT
    assert f"until it has lasted for {stable:g}" in TEXT
    assert repository._LOADERS == 2
    assert "Two models are loaded at a time" in TEXT


def test_the_server_is_ready_though_a_model_is_not(example: Example) -> None:
    assert "The server is ready when a model couldn't be loaded; that model isn't." in TEXT
    example.process.wait_log("backend is ready: 4 of 5 models")
    assert example.ask("GET", "/v2/health/ready")[0] == 200
    assert example.ask("GET", "/v2/models/broken/ready")[0] == 400
    index = json.loads(example.ask("POST", "/v2/repository/index")[2])
    (line,) = [line for line in index if line["name"] == "broken"]
    assert line["state"] == "UNAVAILABLE"
    assert "config.pbtxt:1:1" in line["reason"]


# gRPC


def test_the_rpcs(example: Example) -> None:
    rows = {name: words for cell, words in table(DOCUMENT, "RPC", "") for name in names(cell)}
    assert set(rows) == {rpc.name for rpc in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    for name, words in rows.items():
        sent = example.channel.unary_unary(f"/{SERVICE}/{name}").future(b"", timeout=LIVENESS)
        assert (sent.code() is grpc.StatusCode.UNIMPLEMENTED) == words.startswith("UNIMPLEMENTED"), name


def test_what_to_do_instead_of_an_rpc_that_is_not_served(example: Example) -> None:
    rows = {name: words for cell, words in table(DOCUMENT, "RPC", "") for name in names(cell)}
    for name in ("CudaSharedMemoryStatus", "TraceSetting", "LogSettings"):
        sent = example.channel.unary_unary(f"/{SERVICE}/{name}").future(b"", timeout=LIVENESS)
        instead = rows[name].partition(": ")[2]
        assert instead.split()[-1].strip("`") in (sent.details() or ""), name


def test_health_is_served(example: Example) -> None:
    assert "Check and Watch of `grpc.health.v1.Health`" in TEXT
    for name in ("Check", "Watch"):
        sent = iter(example.channel.unary_stream(f"/grpc.health.v1.Health/{name}")(b"", timeout=LIVENESS))
        assert next(sent) == b"\x08\x01"  # SERVING


def test_the_extensions() -> None:
    found = re.search(r"ServerMetadata names the extensions (.*?)\. ", TEXT)
    assert found is not None
    assert names(found[1]) == list(EXTENSIONS)


@pytest.mark.parametrize(
    "row", table(MODELS, "in requests", "in config.pbtxt", "numpy", "typed contents"), ids=lambda row: names(row[0])[0]
)
def test_where_typed_contents_go(row: list[str], example: Example) -> None:
    """A value in another field is refused, and the message names the right one."""
    name, field = names(row[0])[0], names(row[3])[0] if row[3] != "none" else ""
    wrong = "fp32_contents" if field == "fp64_contents" else "fp64_contents"
    made = service_pb2.ModelInferRequest(model_name="softmax")
    sent = made.inputs.add(name="logits", datatype=name, shape=[1, 1])
    getattr(sent.contents, wrong).append(1)
    with pytest.raises(grpc.RpcError) as refused:
        infer(example, made)
    says = f"{name} goes into {field}" if field else f"{name} can only be sent in raw_input_contents"
    assert says in refused.value.details()


def test_a_stream_answers_as_it_says(example: Example) -> None:
    """A fault is told in its answer, the stream goes on, and answers say whether they are the last."""
    sent = [request("nope", 1), request("softmax", 1)]
    for number, one in enumerate(sent):
        one.id = str(number)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(example.channel)
    came = {one.infer_response.id: one for one in stub.ModelStreamInfer(iter(sent), timeout=LIVENESS)}
    assert "'nope'" in came["0"].error_message
    assert came["1"].infer_response.parameters["triton_final_response"].bool_param


def test_the_parameters_that_mean_something() -> None:
    rows = table(DOCUMENT, "parameter", "of", "meaning")
    named = {name for row in rows for name in names(row[0])}
    outside = {"triton_final_response"}  # of answers
    elsewhere = {"classification", "binary_data", "binary_data_size", "shared_memory_region"}  # of tensors
    assert named == parameters.RESERVED - outside | elsewhere


def test_other_parameters_come_back(example: Example) -> None:
    assert "All others of a request come back with its answer" in TEXT
    asked = request("softmax", 1)
    asked.parameters["mine"].string_param = "x"
    asked.parameters["sequence_id"].int64_param = 1
    assert list(infer(example, asked).parameters) == ["mine"]


def test_shared_memory_is_refused(example: Example) -> None:
    asked = request("softmax", 1)
    asked.inputs[0].parameters["shared_memory_region"].string_param = "x"
    with pytest.raises(grpc.RpcError) as refused:
        infer(example, asked)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# REST

PATHS = {names(row[0])[0]: row for row in table(DOCUMENT, "path", "methods", "")}


def test_the_paths() -> None:
    """As they are in the code."""
    routes = service._routes(Repository(Path("nowhere")), lambda: True)
    found = {path: set(route) for path, route in routes._fixed.items()}
    found |= {f"/v2/models/MODEL/{rest}".rstrip("/"): set(route) for rest, route in routes._of_model.items()}
    found |= {f"/v2/repository/models/MODEL/{rest}": set(route) for rest, route in routes._of_repository.items()}
    assert {path: set(names(row[1])) for path, row in PATHS.items()} == found


@pytest.mark.parametrize("path", PATHS)
def test_a_path(path: str, example: Example) -> None:
    _, methods, words = PATHS[path]
    for method in names(methods):
        found = example.ask(method, path.replace("MODEL", "softmax"), b"{}" if method == "POST" else None)[0]
        assert found not in (404, 405)
        assert (found == 501) == (words == "501")


def test_what_is_no_path(example: Example) -> None:
    assert example.ask("GET", "/v2/models/softmax/nothing")[0] == 404
    status, fields, _ = example.ask("HEAD", "/v2")
    assert (status, fields["Allow"]) == (405, "GET")
    assert example.ask("GET", "/v2/models/soft%6dax/versions/1/ready")[0] == 200


def test_a_body_that_is_no_json(example: Example) -> None:
    assert "Malformed JSON is 400, not 500." in TEXT
    status, _, body = example.ask("POST", "/v2/models/softmax/infer", b"{")
    assert status == 400
    assert list(json.loads(body)) == ["error"]


@pytest.mark.parametrize("text", ["", "one two"])
def test_generate_is_for_one_answer(text: str, example: Example) -> None:
    body = json.dumps({"text_input": text}).encode()
    assert example.ask("POST", "/v2/models/words/generate", body)[0] == 400
    assert example.ask("POST", "/v2/models/words/generate", b'{"text_input": "one"}')[0] == 200


JSON = {"inputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
STRICTER = {
    "a value out of range": json.dumps(JSON).replace("[1, 2, 3]", "[1e40, 2, 3]"),
    "a number that is none": json.dumps(JSON).replace("[1, 2, 3]", "[1e999, 2, 3]"),
    "a key that is there twice": json.dumps(JSON)[:-1] + ', "id": "a", "id": "b"}',
    "a negative timeout": json.dumps(JSON)[:-1] + ', "parameters": {"timeout": -1}}',
}


@pytest.mark.parametrize("what", STRICTER)
def test_what_is_checked_more_strictly_than_by_triton(what: str, example: Example) -> None:
    path = "/v2/models/softmax/infer"
    assert example.ask("POST", path, json.dumps(JSON).encode())[0] == 200
    assert example.ask("POST", path, STRICTER[what].encode())[0] == 400


def test_more_contents_than_inputs_are_refused(example: Example) -> None:
    asked = service_pb2.ModelInferRequest(model_name="softmax", raw_input_contents=[b"1234", b"5678"])
    asked.inputs.add(name="logits", datatype="FP32", shape=[1, 1])
    with pytest.raises(grpc.RpcError) as refused:
        infer(example, asked)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# Statuses


def test_the_statuses() -> None:
    """Each row's HTTP status is that of its gRPC status, but where the code says otherwise."""
    rows = table(DOCUMENT, "what happened", "gRPC", "REST")
    others = {"a message that can't be parsed or inflated, or is cut off", "a message over a limit of its own"}
    for what, code, rest in rows:
        name = code.split(",")[0]
        assert name in grpc.StatusCode.__members__
        if rest[:3].isdigit() and what not in others:
            assert int(rest[:3]) == faults.status_of(InferenceError(Code[name], "")), what
    assert others <= {what for what, *_ in rows}
    assert f"from `generate` {generate._FAILED}" in TEXT
    assert faults.too_large("").status == 413


def test_loading_is_for_explicit(example: Example, explicit: Example) -> None:
    assert example.ask("POST", "/v2/repository/models/softmax/load")[0] == 503
    assert explicit.ask("POST", "/v2/repository/models/nowhere/load")[0] == 500
    broken = json.dumps({"parameters": {"config": "{}", "file:1/model.py": ""}}).encode()
    assert explicit.ask("POST", "/v2/repository/models/broken/load", broken)[0] == 400


# Limits

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "characters": 1, "s": 1}
LIMITS = {
    "a message of gRPC, either way": call.LARGEST_MESSAGE,
    "a body of REST, either way": exchange.LARGEST_BODY,
    "a compressed message, inflated": compression.LARGEST_INFLATED,
    "a message of a call but ModelInfer, ModelStreamInfer and those of the repository": call.LARGEST_QUESTION,
    "a ModelInferRequest besides its raw contents": wire._MOST_PARSED,
    "fields of a ModelInferRequest above 1 MiB": wire._MOST_FIELDS,
    "JSON of a request": jsontext.MOST_PARSED,
    "lists and objects in JSON above 64 KiB": jsontext.MOST_LISTS,
    "quotes in it": jsontext.MOST_QUOTES,
    "lists in it that may have no numbers": jsontext._MOST_SILENT,
    "outputs as JSON": jsontensors._MOST_SENT,
    "elements of outputs as JSON": jsontensors._MOST_ELEMENTS,
    "a load over REST": rest_control._MOST_LOADED,
    "a load's files, together": control._MOST_BYTES,
    "a load's files": control._MOST_FILES,
    "a load's configuration": config._MOST_OVERRIDE,
    "loaded models that are not in the repository": repository._MOST_UNLISTED,
    "parameters of a request, an input or an output": parameters.MOST_PARAMETERS,
    "outputs that a request names": parameters.MOST_OUTPUTS,
    "requests that wait for a version of a model": scheduler.MOST_WAITING,
    "shapes of the requests that wait for it": batching.MOST_SHAPES,
    "requests of a stream that are worked on": streaming.MOST_IN_FLIGHT,
    "answers of a decoupled model that its client hasn't taken": answers.MOST_AHEAD,
    "time to take one of these": answers._PATIENCE,
    "the response cache": cache.DEFAULT_LIMIT,
    "calls at once on a connection of gRPC": http2.MOST_STREAMS,
    "headers of a call": http2.HEADER_LIST,
    "connections of REST, but at most half of the files that the process may open": connections.MOST_CONNECTIONS,
    "time in which a client of REST sends a header section or a part of a body, or takes something": service._PATIENCE,
    "time between two requests on a connection of REST": service._KEEP_ALIVE,
    "time in which a client of the metrics sends a request, or takes the page": metrics._PATIENCE,
    "connections to the metrics": metrics._MOST_CONNECTIONS,
    "text of an error of gRPC": status._MAX_MESSAGE,
    "text of an error of REST": faults._LONGEST_TEXT,
}


def test_the_limits() -> None:
    rows = {}
    for limit, value in table(DOCUMENT, "limit", "value"):
        number, _, unit = value.partition(" ")
        rows[limit] = int(number) * UNITS[unit or "bytes"]
    assert rows == LIMITS
    assert rest_compression.LARGEST_INFLATED == compression.LARGEST_INFLATED
    assert jsontext.LONG_TO_PARSE == 64 * 2**10
    assert jsontext.MOST_PARSED == 16 * 2**20
    assert "16 MiB are the most that is read as JSON" in TEXT
    assert wire._MOST_UNUSUAL == 64 * 2**10
    assert f"{streaming.MOST_IN_FLIGHT} requests of a stream are worked on at a time" in TEXT
    assert budget._SHARE == 4
    assert "are a quarter of the machine's memory" in TEXT


def test_a_model_may_hold_half_of_the_memory(tmp_path: Path) -> None:
    assert "Requests of one version of a model may hold half of that; one request alone may hold more." in TEXT
    made = backend_server.Backend(tmp_path, most_bytes=1000)
    assert (made.budget.limit, made.repository._most_bytes) == (1000, 500)


# Metrics


def test_the_metrics(example: Example) -> None:
    rows = {name: set(names(labels)) for cell, labels in table(DOCUMENT, "metric", "labels") for name in names(cell)}
    families = (exposition.FAILURES, *exposition.NUMBERS, *exposition.CACHE)
    of_server = [found for found in vars(exposition).values() if isinstance(found, exposition.Family)]
    assert set(rows) == {family.name for family in (*families, *of_server)}
    with urlopen(f"{example.metrics}/metrics", timeout=LIVENESS) as answer:
        page = answer.read().decode()
    for name, labels in rows.items():
        if name in {family.name for family in exposition.CACHE}:
            assert name not in page  # no model has one here
            continue
        lines = re.findall(rf"^{name}(?:_count)?(?:{{(.*)}})? ", page, re.MULTILINE)
        assert lines, name
        assert set(re.findall(r'(\w+)="', lines[0])) == labels, name
    assert "process_cpu_seconds_total" in page
    assert "python_info" in page


def test_the_reasons_of_failures() -> None:
    found = re.search(r"`reason` is (.*?)\. ", TEXT)
    assert found is not None
    assert re.findall(r"[A-Z]{4,}", found[1]) == list(REASONS)


def test_what_the_lag_says() -> None:
    assert f"gives way after {backend_server._SWITCH * 1000:g} ms" in TEXT
