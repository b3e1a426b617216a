"""Promise: a network's numbers are those of ONNX Runtime called directly, whoever asks, with whom, and in which way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http

from proxy.backend.samples import heldout, repository_path
from tests.backend import networks
from tests.backend.models import ECHO, write_model
from tests.backend.serving import Served, answer, http_input, message, serving
from tests.support.processes import LIVENESS

Array = np.ndarray[Any, Any]
MOST_ROWS = 16
# A batch is filled or runs after this time: long beside the way of a request, so that clients meet.
BATCHING = "max_queue_delay_microseconds: 20000"
CLIENTS, CALLS = 8, 6
HIDDEN = 256  # a network for numbers, not for speed
# What one row's numbers may differ by in a batch of another size, where ONNX Runtime takes other kernels; those of the
# same rows in one request have to be the same to the bit. ONNX Runtime itself differs by 3e-6 for magika, whose scores
# pass a softmax, and not at all for the two others.
TOLERANCE = {"digits": 1e-6, "convnet": 1e-6, "magika": 1e-5}
WAYS = ("gRPC", "REST")
FILES: dict[str, bytes] = {
    "python": b"from __future__ import annotations\n\nimport asyncio\n\n\nclass Gate:\n"
    b'    """A door."""\n\n    def __init__(self) -> None:\n        self.open = False\n\n'
    b"    async def wait(self) -> bool:\n        while not self.open:\n            await asyncio.sleep(0.1)\n"
    b"        return self.open\n" * 3,
    "json": json.dumps([{"name": f"n{at}", "value": at, "more": [None, True]} for at in range(40)], indent=2).encode(),
    "html": b"<!DOCTYPE html>\n<html><head><title>A page</title></head>\n<body><h1>Page</h1>\n"
    + b"<p>Some <b>text</b> and a <a href='/x'>link</a>.</p>\n" * 20
    + b"</body></html>\n",
    "onnx": networks.convnet(hidden=HIDDEN),
    "shell": b"#!/bin/sh\nset -eu\nfor file in *.txt; do\n    if test -f $file; then\n      echo $file\n    fi\ndone\n",
}

TWICE = """
input { name: "IN" data_type: TYPE_FP32 dims: [-1] }
input { name: "COUNT" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_FP32 dims: [-1] }
model_transaction_policy { decoupled: true }
"""
POWERS = """
class Model:
    def execute(self, batch):
        array = batch["IN"]
        for _ in range(int(batch["COUNT"][0])):
            array = array * 2
            yield {"OUT": array}
"""
FLOATS = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}
VECTORS = "\n".join(
    f'input {{ name: "IN_{name}" data_type: TYPE_{name} dims: -1 }} '
    f'output {{ name: "OUT_{name}" data_type: TYPE_{name} dims: -1 }}'
    for name in FLOATS
)


@dataclass
class Network:
    """A network here and on the server: `rows` are its input, one for each call at batch size 1."""

    name: str
    session: onnxruntime.InferenceSession
    rows: Array

    @property
    def input(self) -> str:
        return str(self.session.get_inputs()[0].name)

    def here(self, rows: Array) -> dict[str, Array]:
        """What ONNX Runtime gives for them, scalars as the server shows them."""
        outputs = [node.name for node in self.session.get_outputs()]
        made = self.session.run(outputs, {self.input: rows})
        return {name: part.reshape(len(rows), -1) for name, part in zip(outputs, made, strict=True)}


def opened(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def write_digits(repository: Path) -> bytes:
    made = shutil.copytree(repository_path() / "digits", repository / "digits")
    config = made / "config.pbtxt"
    text = config.read_text().replace("max_batch_size: 64", f"max_batch_size: {MOST_ROWS}")
    alone = re.sub(r"dynamic_batching\s*\{[^{}]*\}", "", text)
    config.write_text(f"{alone}\ndynamic_batching {{ {BATCHING} }}\n")
    return (made / "1/model.onnx").read_bytes()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("networks") / "models"
    write_digits(repository)
    networks.write_convnet(repository, "convnet", MOST_ROWS, BATCHING, HIDDEN)
    if (file := networks.magika_file()) is not None:
        files: Mapping[str, str | bytes] = {"1/model.onnx": file.read_bytes()}
        write_model(repository, "magika", networks.magika_config(MOST_ROWS, BATCHING), files)
    write_model(repository, "powers", TWICE, {"1/model.py": POWERS})
    write_model(repository, "floats", VECTORS, {"1/model.py": ECHO})
    with serving(repository) as served:
        yield served


def magika_rows() -> Array:
    return np.stack([networks.magika_row(content) for content in FILES.values()])


def network(name: str) -> Network:
    if name == "digits":
        return Network(name, opened((repository_path() / "digits/1/model.onnx").read_bytes()), heldout()[0][:40])
    if name == "convnet":
        return Network(name, opened(networks.convnet(hidden=HIDDEN)), networks.convnet_image(rows=12))
    return Network(name, opened(networks.require_magika().read_bytes()), magika_rows())


@pytest.fixture(params=["digits", "convnet", "magika"])
def chosen(request: pytest.FixtureRequest) -> Network:
    return network(request.param)


Ask = Callable[[Network, Array], dict[str, Array]]


def over_grpc(client: tritonclient.grpc.InferenceServerClient, one: Network, rows: Array) -> dict[str, Array]:
    sent = tritonclient.grpc.InferInput(one.input, rows.shape, "INT32" if rows.dtype == np.int32 else "FP32")
    sent.set_data_from_numpy(rows)
    return read(client.infer(one.name, [sent], client_timeout=LIVENESS), one)


def over_rest(client: tritonclient.http.InferenceServerClient, one: Network, rows: Array) -> dict[str, Array]:
    return read(client.infer(one.name, [http_input(one.input, rows)]), one)


def read(result: Any, one: Network) -> dict[str, Array]:
    return {node.name: result.as_numpy(node.name) for node in one.session.get_outputs()}


@pytest.fixture(params=WAYS)
def ask(request: pytest.FixtureRequest, served: Served) -> Iterator[Ask]:
    """One client for the whole test, which any number of threads may use."""
    if request.param == "gRPC":
        with tritonclient.grpc.InferenceServerClient(served.grpc) as client:
            yield lambda one, rows: over_grpc(client, one, rows)
    else:
        # Its connections are of gevent, which ties them to a thread: one client for each call.
        def call(one: Network, rows: Array) -> dict[str, Array]:
            with tritonclient.http.InferenceServerClient(served.http, network_timeout=LIVENESS) as client:
                return over_rest(client, one, rows)

        yield call


def same_bits(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes(), name


def close(got: Mapping[str, Array], wanted: Mapping[str, Array], most: float) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(got[name], array, rtol=most, atol=most, err_msg=name)


def test_one_row_has_the_same_bits(chosen: Network, ask: Ask) -> None:
    for at in range(min(len(chosen.rows), 8)):
        row = chosen.rows[at : at + 1]
        same_bits(ask(chosen, row), chosen.here(row))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_rows_of_one_request_have_the_same_bits(chosen: Network, ask: Ask, count: int) -> None:
    same_bits(ask(chosen, chosen.rows[:count]), chosen.here(chosen.rows[:count]))


def sizes(served: Served, name: str) -> dict[int, int]:
    """Batch size -> executions."""
    return {one.batch_size: one.compute_infer.count for one in served.statistics(name).batch_stats}


def wanted_rows(one: Network, picked: Sequence[int]) -> dict[str, Array]:
    """What each row has alone, so that a row of somebody else's shows."""
    alone = [one.here(one.rows[at : at + 1]) for at in picked]
    return {name: np.concatenate([part[name] for part in alone]) for name in alone[0]}


def test_clients_whose_requests_are_joined_get_their_own_rows(chosen: Network, ask: Ask, served: Served) -> None:
    before, counted = sizes(served, chosen.name), served.statistics(chosen.name)
    random = np.random.default_rng(5)
    counts = random.integers(1, 8, (CLIENTS, CALLS))
    plans = [[random.integers(0, len(chosen.rows), count) for count in calls] for calls in counts]

    def client(plan: list[Array]) -> list[dict[str, Array]]:
        return [ask(chosen, chosen.rows[picked]) for picked in plan]

    with ThreadPoolExecutor(CLIENTS) as pool:
        came = list(pool.map(client, plans))
    for plan, answers in zip(plans, came, strict=True):
        for picked, got in zip(plan, answers, strict=True):
            close(got, wanted_rows(chosen, picked.tolist()), TOLERANCE[chosen.name])
    after = served.statistics(chosen.name)
    rows = sum(len(picked) for plan in plans for picked in plan)
    ran = {size: count - before.get(size, 0) for size, count in sizes(served, chosen.name).items()}
    assert sum(size * count for size, count in ran.items()) == after.inference_count - counted.inference_count == rows
    assert sum(ran.values()) == after.execution_count - counted.execution_count < CLIENTS * CALLS
    # More than any one request has: it was joined of several.
    assert any(size > 7 and count for size, count in ran.items()), ran
    assert after.inference_stats.fail.count == 0
    served.until_idle()


def test_digits_are_recognized(ask: Ask) -> None:
    images, digits = heldout()
    one = network("digits")
    labels = [ask(one, images[at : at + MOST_ROWS])["label"].ravel() for at in range(0, 160, MOST_ROWS)]
    assert np.mean(np.concatenate(labels) == digits[:160]) > 0.9


def test_kinds_of_files_are_told_apart_as_magika_does(ask: Ask) -> None:
    file = networks.require_magika()
    from magika import Magika

    labels, itself = networks.magika_labels(file), Magika()
    scores = ask(network("magika"), magika_rows())["target_label"]
    assert [labels[at] for at in scores.argmax(axis=1)] == list(FILES)
    for row, content in zip(scores, FILES.values(), strict=True):
        prediction = itself.identify_bytes(content).prediction
        assert str(prediction.dl.label) == labels[row.argmax()]
        # It runs the same file with threads of its own choice.
        assert prediction.score == pytest.approx(float(row.max()), abs=TOLERANCE["magika"])


SENT = np.array([0.1, np.inf, -0.0, 1e-40], np.float32)


def test_answers_of_a_decoupled_model_over_grpc(served: Served) -> None:
    asked = message("powers", IN=SENT, COUNT=np.array([5], np.int32))
    came = list(served.stub.ModelStreamInfer(iter([asked]), timeout=LIVENESS))
    assert [one.error_message for one in came] == [""] * 5
    for power, one in enumerate(came, 1):
        assert answer(one.infer_response, "<f4").tobytes() == (SENT * np.float32(2**power)).tobytes()
    served.until_idle()


def test_answers_of_a_decoupled_model_over_rest(served: Served) -> None:
    import http.client

    body = json.dumps({"IN": [0.5, 3, -7], "COUNT": 4})
    connection = http.client.HTTPConnection(served.http, timeout=LIVENESS)
    connection.request("POST", "/v2/models/powers/generate_stream", body)
    response = connection.getresponse()
    events = response.read().decode().split("\n\n")
    connection.close()
    assert (response.status, events.pop()) == (200, "")
    told = [json.loads(event.removeprefix("data: "))["OUT"] for event in events]
    assert told == [[0.5 * 2**power, 3 * 2**power, -7 * 2**power] for power in (1, 2, 3, 4)]
    served.until_idle()


def specials(datatype: type[np.floating[Any]]) -> Array:
    """Infinities, zeros of both signs, subnormal numbers, and NaN: quiet and signalling, of both signs, with payloads.

    As integers: an operation on floating-point numbers may change a NaN."""
    bits = np.dtype(datatype).itemsize * 8
    mantissa = np.finfo(datatype).nmant
    top, quiet, sign = ((1 << (bits - 1 - mantissa)) - 1) << mantissa, 1 << (mantissa - 1), 1 << (bits - 1)
    signalling, silent = [top | 1, sign | top | 5], [top | quiet, sign | top | quiet, top | quiet | 7]
    values = [0, sign, 1, sign | 1, top, sign | top, *signalling, *silent]
    return np.array(values, f"<u{bits // 8}").view(f"<f{bits // 8}")


def test_every_bit_of_special_numbers_passes(served: Served) -> None:
    arrays = {f"IN_{name}": specials(datatype) for name, datatype in FLOATS.items()}
    assert all(np.isnan(array).sum() == 5 and np.isinf(array).sum() == 2 for array in arrays.values())
    response = served.stub.ModelInfer(message("floats", **arrays), timeout=LIVENESS)
    raw = zip(response.outputs, response.raw_output_contents, strict=True)
    assert {one.name.replace("OUT", "IN"): data for one, data in raw} == {k: v.tobytes() for k, v in arrays.items()}
    with tritonclient.http.InferenceServerClient(served.http) as client:
        result = client.infer("floats", [http_input(name, array) for name, array in arrays.items()])
        for name, array in arrays.items():
            assert result.as_numpy(name.replace("IN", "OUT")).tobytes() == array.tobytes()


def test_networks_are_given_nan_and_give_it_back(ask: Ask) -> None:
    one = network("convnet")
    rows = one.rows[:3].copy()
    rows[1, 0, 3, 3] = np.nan
    rows[2] = np.inf
    got = ask(one, rows)
    same_bits(got, one.here(rows))
    assert np.isfinite(got["scores"][0]).all()
