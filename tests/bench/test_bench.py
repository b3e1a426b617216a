"""Promises: a run that isn't what it should be has no figures and makes the exit code 1; a figure is what its name
says; every kind of row runs; nothing is left running."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import hpack
import psutil  # type: ignore[import-untyped]
import pytest

from tests import peers as tools
from tests.bench import __main__ as program
from tests.bench import chart, load, measure, report, wire
from tests.bench import peers as bench_peers
from tests.bench.processes import Server, ServerError, cpu_seconds, running
from tests.bench.rows import CPU, IDLE, MEMORY, P99, RATE, ROWS, START, Target
from tests.support.ports import free_port

SHAPE = load.Shape(205, 2, 2)
REPORT = """\
starting benchmark...
TLS Protocol: TLSv1.3
Cipher: TLS_AES_128_GCM_SHA256
Application protocol: h2

finished in 102.89ms, 19437.86 req/s, 4.51MB/s
requests: 20 total, 20 started, 20 done, 20 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 20 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 4.75KB (4864) total, 202B (202) headers (space savings 91.95%), 4.00KB (4100) data
"""


# -- what counts as a run


def test_a_whole_echo_has_no_problem() -> None:
    assert load.check_exact(REPORT, SHAPE, 20) == ""
    assert load.check_timed(REPORT, SHAPE) == ""


@pytest.mark.parametrize(
    ("was", "becomes", "problem"),
    [
        ("20 succeeded, 0 failed", "19 succeeded, 1 failed", "19 of 20 requests succeeded (1 failed"),
        ("20 2xx, 0 3xx, 0 4xx, 0 5xx", "18 2xx, 0 3xx, 0 4xx, 2 5xx", "18 of 20 answers were 2xx"),
        ("(4100) data", "(3895) data", "3895 bytes came back, an echo has 4100"),
        ("TLSv1.3", "TLSv1.2", "h2load didn't report 'TLS Protocol: TLSv1.3'"),
        ("AES_128_GCM", "AES_256_GCM", "h2load didn't report 'Cipher: TLS_AES_128_GCM_SHA256'"),
        ("protocol: h2", "protocol: http/1.1", "h2load didn't report 'Application protocol: h2'"),
        ("requests: ", "", "h2load gave no summary"),
    ],
)
def test_what_is_no_whole_echo_is_a_problem(was: str, becomes: str, problem: str) -> None:
    assert was in REPORT
    changed = REPORT.replace(was, becomes)
    assert load.check_exact(changed, SHAPE, 20).startswith(problem)
    assert load.check_timed(changed, SHAPE)


@pytest.mark.parametrize(
    ("was", "becomes", "problem"),
    [
        ("(4100) data", "(5125) data", ""),  # with what came in the warm-up
        ("20 2xx", "16 2xx", ""),  # no more than were under way when the clock started
        ("20 2xx", "15 2xx", "not all of 20 answers were 2xx"),
        ("20 succeeded, 0 failed, 0 errored", "19 succeeded, 0 failed, 1 errored", "19 of 20 requests succeeded"),
        ("20 total, 20 started, 20 done, 20 succeeded", "0 total, 0 started, 0 done, 0 succeeded", "no request"),
    ],
)
def test_a_run_of_a_given_time(was: str, becomes: str, problem: str) -> None:
    assert was in REPORT
    found = load.check_timed(REPORT.replace(was, becomes), SHAPE)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


@pytest.mark.parametrize(
    ("printed", "problem"),
    [
        ('{"answers": 3, "problem": ""}', ""),
        ('ready\n{"answers": 3, "problem": ""}\n', ""),
        ('{"answers": 3, "problem": "Problem: GOAWAY with code 11"}', "Problem: GOAWAY with code 11"),
        ('{"answers": 0, "problem": ""}', "no call was answered"),
        ("Traceback\nValueError: no", "the load generator ended with 'ValueError: no'"),
        ("", "the load generator ended with ''"),
    ],
)
def test_what_our_own_generators_print(printed: str, problem: str) -> None:
    assert load.check_own(printed) == problem


def test_a_log_is_in_the_order_of_the_ends_and_has_no_failures(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("1000000\t200\t500000\n1100000\t0\t100000\n")
    assert load.read_log(log) == ([1.2, 1.5], [0.1, 0.5])
    for text in ("1000000\t200\t5\n1000000\t-1\t5\n", "1000000\t503\t5\n", ""):
        log.write_text(text)
        with pytest.raises(ValueError):
            load.read_log(log)


# -- header blocks


def _decoded(style: str, count: int, seed: int = 1) -> list[dict[str, str]]:
    decoder = hpack.Decoder()
    blocks = itertools.islice(wire.blocks(wire.STYLES[style], seed), count)
    return [{str(name): str(value) for name, value in decoder.decode(block)} for block in blocks]


@pytest.mark.parametrize("style", list(wire.STYLES))
def test_every_block_is_a_grpc_request(style: str) -> None:
    for fields in _decoded(style, 400):  # several times around the dynamic table
        assert list(fields)[:4] == [":path", ":authority", ":method", ":scheme"]
        assert fields[":path"] == wire.METHOD
        assert fields["content-type"] == "application/grpc"
        assert fields["te"] == "trailers"


@pytest.mark.parametrize("style", ["grpcio", "go"])
def test_unique_values_are_unique(style: str) -> None:
    blocks = [*_decoded(style, 300, seed=1), *_decoded(style, 300, seed=2)]
    for name in ("grpc-timeout", "traceparent", "x-request-id"):
        assert len({fields[name] for fields in blocks}) == 600


def test_a_second_call_is_encoded_as_grpcio_encodes_it() -> None:
    """Captured from grpcio 1.85; over TLS the scheme is https, 0x87, instead of 0x86."""
    blocks = wire.blocks(wire.GRPCIO, 1)
    fields = _decoded("grpcio", 2)[1]
    next(blocks)
    expected = b"\xc4\xc3\x83\x87\xc2\xc1\xc0@\x0cgrpc-timeout" + wire.plain(fields["grpc-timeout"].encode())
    expected += b"\xbf\x00\x0btraceparent7" + fields["traceparent"].encode()
    expected += b"\x00\x0cx-request-id$" + fields["x-request-id"].encode()
    assert next(blocks) == expected


# -- figures


def test_figures_are_of_the_steady_part() -> None:
    # One answer every 10 ms for 10 s; the CPU costs 2 ms an answer, but 500 ms before the first and after the last 5 %.
    ended = [100 + n / 100 for n in range(1, 1001)]
    samples = [(100 + n / 50, n / 50 * 0.2 + 0.5 * (n > 25) + 0.5 * (n > 475)) for n in range(501)]
    outcome = load.Outcome(10.0, ended, [n / 1000 for n in range(1, 1001)])
    found = measure.figures(outcome, samples)
    expected = {"cpu_us": 2000, "rate": 100, "busy": 0.2, "p50": 0.5, "p99": 0.892}
    assert found == {name: pytest.approx(value, rel=0.01) for name, value in expected.items()}


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_percentiles_are_by_nearest_rank(share: float, value: float) -> None:
    assert measure.percentile([float(n) for n in range(1, 101)], share) == value


def test_each_connection_has_the_same_number_of_requests() -> None:
    shape = load.Shape(205, 64, 2)
    assert shape.whole(1000) == 1024
    assert shape.whole(1) == 128


def test_a_process_clock_counts_what_the_process_used() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        used = cpu_seconds(process.pid)
        ticks = psutil.Process(process.pid).cpu_times()
        process.kill()
    assert used >= 0.3
    assert used == pytest.approx(ticks.user + ticks.system, abs=0.05)


# -- results


def _results() -> report.Results:
    """The gate and two peers in two rows; nginx failed once in one of them."""
    row = dataclasses.replace(ROWS["4x16"], targets=(Target(CPU, 0.5, "envoy"), Target(P99, 0.2, "envoy")))
    figures = {"gate": (10, 12, 30), "envoy": (20, 30, 40), "nginx": (20, 20)}
    runs = [
        measure.Run(row.name, name, repeat, measure.CLOSED, {CPU: float(cpu), RATE: 100.0, P99: cpu / 1000})
        for name, values in figures.items()
        for repeat, cpu in enumerate(values)
    ]
    runs.append(measure.Run(row.name, "nginx", 2, measure.EVEN, {}, "RST_STREAM with code 7"))
    for name, size in (("gate", 50.0), ("envoy", 70.0), ("nginx", 20.0)):
        runs.append(measure.Run(MEMORY, name, 0, measure.HELD, {START: size}))
        runs.append(measure.Run("idle", name, 0, measure.HELD, {IDLE: size / 2}))
    return report.Results([row, ROWS["idle"]], ["gate", "envoy", "nginx"], runs, {row.name: 50.0})


def test_ratios_are_of_medians_and_a_failure_has_none() -> None:
    results = _results()
    assert results.ratio("4x16", "envoy", CPU) == report.Ratio(12 / 30, 12 / 30, 30 / 40)
    assert results.ratio("4x16", "nginx", CPU) is None
    assert results.failed
    assert "FAILED: RST_STREAM with code 7" in report.text(results)


def test_targets_are_met_or_missed() -> None:
    found = {(verdict.row, verdict.target.metric): verdict.met for verdict in _results().verdicts()}
    assert found == {("4x16", CPU): True, ("4x16", P99): False, ("idle", IDLE): True, (MEMORY, START): True}
    words = report.text(_results())
    assert "0.40 (0.40-0.75)  <= 0.50 met" in words
    assert "<= 0.20 MISSED" in words
    assert "targets: 3 of 4 met" in words


def test_no_target_is_missed_that_was_not_looked_at() -> None:
    results = _results()
    found = report.Results(results.rows, results.proxies, results.runs).verdicts()
    assert [verdict.target.metric for verdict in found] == [CPU, IDLE, START]


def test_targets_against_a_peer_that_failed_are_not_met() -> None:
    results = _results()
    runs = [*results.runs, measure.Run("4x16", "envoy", 3, measure.CLOSED, {}, "gone")]
    verdicts = report.Results(results.rows, results.proxies, runs, results.rates).verdicts()
    assert [verdict.met for verdict in verdicts[:2]] == [None, None]


def test_the_chart_is_well_formed_and_has_what_was_measured() -> None:
    for proxies in (["gate", "envoy", "nginx"], ["gate"], ["nginx"]):
        results = _results()
        results.proxies = proxies
        drawing = chart.draw(results, {"cpu": "a < b & c", "plan": "3 repeats"}, {"envoy": "1.2"})
        words = [element.text for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
        assert {"4x16", "memory"} <= set(words)
        assert {chart.NAMES[name] for name in proxies} <= set(words)
        assert ("nginx failed" in words) == ("nginx" in proxies)
        assert ("12 µs" in words) == ("gate" in proxies)


# -- processes


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path: Path) -> None:
    code = "raise SystemExit('no such key')"
    with pytest.raises(ServerError, match="bad ended with exit code 1; its log ends: no such key"):  # noqa: SIM117
        with running("bad", [sys.executable, "-c", code], free_port(), tmp_path):
            pass


def test_a_server_that_ignores_term_is_stopped_with_its_children(tmp_path: Path) -> None:
    port = free_port()
    code = f"""
import os, signal, socket, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
listener = socket.create_server(("127.0.0.1", {port}))
time.sleep(600)
"""
    with running("stubborn", [sys.executable, "-c", code], port, tmp_path) as server:
        pids = list(server.pids)
        assert server.held() > 1e6
    assert len(pids) == 2
    assert _all_end(pids)


# -- runs, with the tools that they need


@pytest.mark.nghttp2
@pytest.mark.parametrize("body", [205, 100_000])
def test_the_generators_against_an_echo(tmp_path: Path, body: int) -> None:
    shape = load.Shape(body, 2, 2)
    with _tls_server(tmp_path, "--echo-upload") as (server, aim):
        ticks: list[float] = []
        outcome = load.run(load.h2load_exact(shape, aim, 40), 60, lambda: ticks.append(server.cpu()))
        assert outcome.problem == ""
        assert len(outcome.ended) == len(outcome.latency) == 40
        assert ticks[-1] > ticks[0]
        for job in (load.h2load_timed(shape, aim, 0.1, 0.2), load.client(shape, "grpcio", aim, 0.1)):
            outcome = load.run(job, 60, lambda: None)
            assert outcome.problem == ""
            assert outcome.ended
        outcome = load.run(load.client(shape, "constant", aim, 0.2, rate=100), 60, lambda: None)
        due = sorted(end - took for end, took in zip(outcome.ended, outcome.latency, strict=True))
        assert len(due) == 20
        assert [after - before for before, after in itertools.pairwise(due)] == pytest.approx([0.01] * 19, abs=1e-5)


@pytest.mark.nghttp2
def test_the_generators_against_a_server_that_echoes_nothing(tmp_path: Path) -> None:
    with _tls_server(tmp_path) as (_, aim):
        outcome = load.run(load.h2load_exact(SHAPE, aim, 40), 60, lambda: None)
        assert "0 of 40" in outcome.problem
        outcome = load.run(load.h2load_timed(SHAPE, aim, 0.1, 0.2), 60, lambda: None)
        assert outcome.problem
        for job in (load.client(SHAPE, "constant", aim, 0.1), load.own("handshakes", aim, "--seconds", "0.1")):
            assert load.run(job, 60, lambda: None).problem == "Problem: an answer begins with 404"
    outcome = load.run(load.client(SHAPE, "constant", aim, 0.1), 60, lambda: None)
    assert outcome.problem.startswith("ConnectionRefusedError")
    with load.held_open(ROWS["idle"].kind.closed(aim, 0.0, 0.0), 10) as problem:
        assert problem.startswith("0 connections were opened; ConnectionRefusedError")


@pytest.mark.nghttp2
def test_every_kind_of_row_with_the_gate(tmp_path: Path) -> None:
    _require_tools()
    figures, drawing = tmp_path / "figures.json", tmp_path / "chart.svg"
    rows = ["4x1", "unique", "stream", "resumed", "idle"]
    command = [sys.executable, "-m", "tests.bench", "--gate-only", "--rows", ",".join(rows), "--repeats", "1"]
    command += ["--seconds", "0.2", "--json", str(figures), "--svg", str(drawing)]
    done = subprocess.run(command, cwd=tools.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(figures.read_text())
    assert all(content["medians"][row]["gate"] for row in rows)
    assert all(content["medians"][row]["gate"]["cpu_us"] > 0 for row in rows if row != "idle")
    assert all(content["medians"][row]["gate"]["p99"] > 0 for row in content["rate_of_latency"])
    assert [target["row"] for target in content["targets"]] == ["idle", MEMORY]
    ElementTree.fromstring(drawing.read_text())


@pytest.mark.nghttp2
def test_a_failing_row_makes_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    @contextlib.contextmanager
    def no_echo(folder: Path) -> Iterator[Server]:
        port = free_port()
        command = [str(_require_tools()), "--no-tls", "-a", "127.0.0.1", str(port)]
        with running("upstream", command, port, folder) as server:
            yield server

    monkeypatch.setattr(bench_peers, "upstream", no_echo)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    figures = tmp_path / "figures.json"
    options = ["--gate-only", "--rows", "handshake", "--repeats", "1", "--seconds", "0.2", "--json", str(figures)]
    assert program.main(options) == 1
    assert "FAILED: in warm-up: Problem: an answer of 0 bytes ends with grpc-status 12 " in capsys.readouterr().out
    assert json.loads(figures.read_text())["medians"]["handshake"]["gate"].startswith("FAILED")


@pytest.mark.nghttp2
def test_a_benchmark_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    _require_tools()
    command = [sys.executable, "-m", "tests.bench", "--gate-only", "--rows", "4x1", "--seconds", "0.3"]
    command += ["--repeats", "1000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tools.ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        first = process.stderr.readline()
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, first
    assert len(children) >= 2  # the upstream and the gate
    assert _all_end(children)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--rows", "--peers"):
        with pytest.raises(SystemExit) as ended:
            program.main([option, "nosuch"])
        assert ended.value.code == 2
        assert "unknown: nosuch" in capsys.readouterr().err
    assert program.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)


def _require_tools() -> Path:
    tools.require_tool("h2load", "apt-get install nghttp2-client")
    return Path(tools.require_tool("nghttpd", "apt-get install nghttp2-server"))


@contextlib.contextmanager
def _tls_server(folder: Path, *options: str) -> Iterator[tuple[Server, load.Aim]]:
    site = bench_peers.make_site(folder, 0)
    port = free_port()
    command = [str(_require_tools()), *options, "--trailer", "grpc-status: 0", "-a", "127.0.0.1"]
    command += [str(port), str(site.key), str(site.certificate)]
    with running("tls-echo", command, port, folder) as server:
        yield server, load.Aim(port, folder, site.certificate)


def _all_end(pids: list[int]) -> bool:
    """Whether all end soon: a process that was killed is seen for a moment longer."""
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
