"""Promises: a call counts only if its answer is right, gRPC's errors included, which h2load takes for answers; a ratio
is that of its medians; what isn't installed is said in its row; nothing is left running."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from tests import peers as tools
from tests.backend import networks
from tests.bench import inference, inference_load, inference_servers, load
from tests.bench.inference_calls import HEADER_LENGTH, PREFIX_BYTES, Call, Protocol, Tensors, WrongAnswer
from tests.bench.inference_report import Results, text
from tests.bench.inference_rows import GRPC, GRPC_GOALS, MLSERVER_SINGLE, OURS, ROWS, TRITON_ADD_SUB, Goal, Row
from tests.bench.inference_servers import ADD_SUB, CONVNET, DIGITS, DIGITS_BATCHED, EMBEDDED, MLSERVER, Site, tensors
from tests.bench.measure import CLOSED, Run
from tests.bench.rows import CPU, RATE

SHAPE = load.Shape(0, 2, 2)
REPORT = """\
finished in 102.89ms, 19437.86 req/s, 4.51MB/s
requests: 20 total, 20 started, 20 done, 20 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 20 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 4.75KB (4864) total, 202B (202) headers (space savings 91.95%), 2.25KB (2300) data
"""


# -- what counts


@pytest.mark.parametrize(
    ("was", "becomes", "problem"),
    [
        ("", "", ""),
        ("20 succeeded, 0 failed", "19 succeeded, 1 failed", "19 of 20 requests succeeded (1 failed"),
        ("20 2xx, 0 3xx, 0 4xx", "18 2xx, 0 3xx, 2 4xx", "20 of 20 requests succeeded (0 failed"),
        ("(2300) data", "(2185) data", "2185 bytes came back, 2300 are due: an answer was no tensor"),
        ("requests: ", "", "h2load gave no summary"),
    ],
)
def test_what_is_no_run_of_right_answers_is_a_problem(was: str, becomes: str, problem: str) -> None:
    assert was in REPORT
    found = inference_load.check(REPORT.replace(was, becomes), 20, 115)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_the_bytes_of_json_may_differ() -> None:
    assert inference_load.check(REPORT.replace("(2300) data", "(2185) data"), 20, None) == ""


@pytest.mark.parametrize("model", [DIGITS, ADD_SUB])
def test_a_binary_body_is_json_and_then_the_tensors(model: str) -> None:
    call = Call("binary", model, tensors(model))
    length = int(call.headers()[HEADER_LENGTH])
    head, rest = json.loads(call.body()[:length]), call.body()[length:]
    assert [one["parameters"]["binary_data_size"] for one in head["inputs"]] == [
        array.nbytes for array in call.tensors.inputs.values()
    ]
    assert rest == b"".join(array.tobytes() for array in call.tensors.inputs.values())
    assert all(one["parameters"] == {"binary_data": True} for one in head["outputs"])


# -- ratios and goals


def _results(figures: Mapping[str, tuple[float, ...]], problem: str = "") -> Results:
    row = Row("r", "a row", SHAPE, GRPC, GRPC_GOALS)
    runs = [
        Run("r", name, repeat, CLOSED, {RATE: value, CPU: 1e6 / value})
        for name, values in figures.items()
        for repeat, value in enumerate(values)
    ]
    if problem:
        runs.append(Run("r", OURS.name, 9, CLOSED, {}, problem))
    return Results([row], runs, {("r", MLSERVER_SINGLE.name): "not installed (so)"})


def test_a_ratio_is_of_medians_and_says_how_far_repeats_differ() -> None:
    results = _results({OURS.name: (100.0, 300.0, 200.0), TRITON_ADD_SUB.name: (100.0, 100.0, 50.0)})
    ratio = results.ratio("r", Goal(RATE, OURS.name, TRITON_ADD_SUB.name, 2))
    assert str(ratio) == "2.00 (1.00-4.00)"
    goals = {(goal["metric"], goal["ours"], goal["theirs"]): goal["met"] for goal in results.as_json()["goals"]}  # type: ignore[attr-defined]
    assert goals[CPU, OURS.name, TRITON_ADD_SUB.name] is True
    assert goals[RATE, OURS.name, MLSERVER_SINGLE.name] is None
    assert "not installed (so)" in text(results)


def test_a_run_that_failed_leaves_no_ratio() -> None:
    results = _results({OURS.name: (100.0,), TRITON_ADD_SUB.name: (100.0,)}, "boom")
    assert results.failed
    assert results.ratio("r", Goal(RATE, OURS.name, TRITON_ADD_SUB.name, 2)) is None
    assert "FAILED: boom" in text(results)


@pytest.mark.parametrize(("least", "value", "met"), [(True, 3, True), (True, 2.9, False), (False, 3.1, False)])
def test_a_goal(least: bool, value: float, met: bool) -> None:
    assert Goal(RATE, "a", "b", 3, least).met(value) is met


# -- the network


def test_the_network_gives_a_row_the_same_scores_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "HIDDEN", 64)
    assert networks.convnet() == networks.convnet() != networks.convnet(seed=8)
    session, images = inference_servers.session(networks.convnet()), networks.convnet_image(rows=5)
    (together,) = session.run(None, {networks.CONVNET_INPUT: images})
    alone = [session.run(None, {networks.CONVNET_INPUT: images[row : row + 1]})[0] for row in range(5)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    assert np.ptp(together, axis=0).min() > 0.01


# -- against servers


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(networks, "HIDDEN", 64)
    inference_servers._convnet.cache_clear()
    yield
    inference_servers._convnet.cache_clear()


@pytest.fixture
def embedded(tmp_path: Path, small_network: None) -> Iterator[Site]:
    with inference_servers.site(tmp_path, [EMBEDDED]) as site:
        yield site


@pytest.mark.nghttp2
def test_runs_against_the_embedded_backend(embedded: Site) -> None:
    tools.require_tool("h2load", "apt-get install nghttp2-client")
    server, port = embedded.servers[EMBEDDED], embedded.ports[EMBEDDED, "grpc"]
    for model in (DIGITS, DIGITS_BATCHED, ADD_SUB, CONVNET):
        call = Call("grpc", model, tensors(model))
        loaded = inference_load.Load(call, SHAPE, server, port, embedded.folder)
        assert loaded.warm_up() == ""
        for rate in (None, 100.0):
            values, problem = loaded.measure(0.1, rate)
            assert problem == ""
            assert values[CPU] > 0
    answer = call.make(port)
    assert answer > PREFIX_BYTES
    # A model that isn't there: HTTP says 200, and only the missing message tells.
    unknown = inference_load.job(Call("grpc", "nosuch", call.tensors), SHAPE, port, embedded.folder, 20, answer)
    assert load.run(unknown, 60, lambda: None).problem.startswith(f"0 bytes came back, {20 * answer} are due")


def test_a_wrong_answer_is_told_from_a_right_one(embedded: Site) -> None:
    right = tensors(ADD_SUB)
    for outputs, words in (
        ({"OUTPUT0": right.outputs["OUTPUT1"]}, "simple gave OUTPUT0"),
        ({"OUTPUT0": right.outputs["OUTPUT0"][0]}, "simple gave OUTPUT0"),
        ({"OTHER": right.outputs["OUTPUT0"]}, "simple gave no output OTHER"),
    ):
        with pytest.raises(WrongAnswer, match=words):
            Call("grpc", ADD_SUB, Tensors(right.inputs, outputs)).make(embedded.ports[EMBEDDED, "grpc"])


@pytest.mark.parametrize("protocol", ["json", "binary"])
def test_rest_of_the_embedded_backend(embedded: Site, protocol: Protocol) -> None:
    if words := embedded.why_absent(EMBEDDED, protocol):
        pytest.skip(words)
    for model in (DIGITS, ADD_SUB):
        assert Call(protocol, model, tensors(model)).make(embedded.ports[EMBEDDED, protocol]) > 0


def test_mlserver_gives_the_same_answers(tmp_path: Path) -> None:
    if tools.mlserver_program() is None:
        pytest.skip(f"MLServer is not installed ({tools.INSTALL_MLSERVER})")
    with inference_servers.site(tmp_path, [MLSERVER]) as site:
        for protocol in ("grpc", "json"):
            for model in (DIGITS, DIGITS_BATCHED):
                assert Call(protocol, model, tensors(model)).make(site.ports[MLSERVER, protocol]) > 0
        assert site.why_absent(MLSERVER, "binary")


@pytest.mark.nghttp2
def test_the_program_with_the_embedded_backend_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_network: None
) -> None:
    tools.require_tool("h2load", "apt-get install nghttp2-client")
    monkeypatch.setattr(inference, "SERVERS", (EMBEDDED,))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before, figures = set(psutil.Process().children(recursive=True)), tmp_path / "figures.json"
    rows = ["grpc-4x1", "rest-16", "batching"]
    options = ["--rows", ",".join(rows), "--repeats", "1", "--seconds", "0.1", "--json", str(figures)]
    assert inference.main(options) == 0, capsys.readouterr()
    medians = json.loads(figures.read_text())["medians"]
    assert list(medians) == rows
    assert medians["grpc-4x1"][OURS.name][RATE] > 0
    assert medians["grpc-4x1"][TRITON_ADD_SUB.name] == "not started"
    assert medians["batching"]["batching, half the rate"]["p99"] > 0
    assert not {child for child in psutil.Process().children(recursive=True) if child.is_running()} - before


def test_unknown_rows_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        inference.main(["--rows", "nosuch"])
    assert ended.value.code == 2
    assert "unknown: nosuch" in capsys.readouterr().err
    assert len(ROWS) == 4
