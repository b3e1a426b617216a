"""Promises: a run that isn't an echo of every request has no figures; a figure is what its name says; nothing is left
running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import peers as tools
from tests.bench import load, measure, report
from tests.bench import peers as bench_peers
from tests.bench.processes import Server, ServerError, cpu_seconds, free_port, running

SHAPE = load.Shape("2x2", 205, 2, 2)
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


def test_a_whole_echo_has_no_problem() -> None:
    assert load.check(REPORT, SHAPE, 20) == ""


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
    assert load.check(REPORT.replace(was, becomes), SHAPE, 20).startswith(problem)


def test_figures_are_of_the_steady_part() -> None:
    # One answer every 10 ms for 10 s; the CPU costs 2 ms an answer, but 500 ms before the first and after the last 5 %.
    ended = [100 + n / 100 for n in range(1, 1001)]
    samples = [(100 + n / 50, n / 50 * 0.2 + 0.5 * (n > 25) + 0.5 * (n > 475)) for n in range(501)]
    outcome = load.Outcome(1000, 10.0, ended, [n / 1000 for n in range(1, 1001)])
    found = measure.figures(outcome, samples, rss=7)
    assert found.cpu_us == pytest.approx(2000, rel=0.01)
    assert found.rate == pytest.approx(100, rel=0.01)
    assert found.busy == pytest.approx(0.2, rel=0.01)
    assert found.p50 == pytest.approx(0.5, rel=0.01)
    assert found.p99 == pytest.approx(0.892, rel=0.01)
    assert found.rss == 7


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_percentiles_are_by_nearest_rank(share: float, value: float) -> None:
    assert measure.percentile([float(n) for n in range(1, 101)], share) == value


def test_each_connection_has_the_same_number_of_requests() -> None:
    shape = load.Shape("64x2", 205, 64, 2)
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
    assert len(pids) == 2
    assert _all_end(pids)


def test_ratios_are_of_medians_and_a_failure_has_none() -> None:
    def run(proxy: str, repeat: int, cpu: float) -> measure.Run:
        figures = measure.Figures(cpu_us=cpu, rate=100, p50=1, p99=2, busy=1, rss=1)
        return measure.Run(SHAPE.name, proxy, repeat, 20, figures)

    runs = [run("gate", n, cpu) for n, cpu in enumerate((10, 12, 30))]
    runs += [run("envoy", n, cpu) for n, cpu in enumerate((20, 30, 40))]
    runs += [run("nginx", 0, 20), measure.Run(SHAPE.name, "nginx", 1, 20, None, "19 of 20 requests succeeded")]
    servers = [_server(name) for name in ("gate", "envoy", "nginx")]
    results = report.Results([SHAPE], servers, runs)
    assert results.ratio(SHAPE.name, "envoy", "cpu_us") == (12 / 30, 12 / 30, 30 / 40)
    assert results.ratio(SHAPE.name, "nginx", "cpu_us") is None
    assert results.failed
    assert "FAILED: 19 of 20 requests succeeded" in report.text(results)


@pytest.mark.nghttp2
def test_h2load_against_an_echo_and_against_none(tmp_path: Path) -> None:
    with _tls_server(tmp_path, "--echo-upload") as server:
        ticks: list[float] = []
        outcome = load.run_h2load(SHAPE, server.port, 40, tmp_path, 60, lambda: ticks.append(server.cpu()))
        assert outcome.problem == ""
        assert len(outcome.ended) == len(outcome.latency) == 40
        assert ticks[-1] > ticks[0]
    with _tls_server(tmp_path) as server:
        outcome = load.run_h2load(SHAPE, server.port, 40, tmp_path, 60, lambda: None)
        assert "0 of 40" in outcome.problem


@pytest.mark.nghttp2
def test_the_whole_benchmark_with_the_gate(tmp_path: Path) -> None:
    tools.require_tool("nghttpd", "apt-get install nghttp2-server")
    tools.require_tool("h2load", "apt-get install nghttp2-client")
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "--gate-only", "--shapes", "4x1,64k-4x4"]
    command += ["--requests", "400", "--repeats", "2", "--json", str(path)]
    done = subprocess.run(command, cwd=tools.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert [run["repeat"] for run in content["runs"]] == [0, 1, 0, 1]
    assert all(run["requests"] == 400 and run["figures"]["cpu_us"] > 0 for run in content["runs"])


@pytest.mark.nghttp2
def test_a_benchmark_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    tools.require_tool("nghttpd", "apt-get install nghttp2-server")
    tools.require_tool("h2load", "apt-get install nghttp2-client")
    command = [sys.executable, "-m", "tests.bench", "--gate-only", "--shapes", "4x1", "--seconds", "1"]
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


@contextlib.contextmanager
def _tls_server(folder: Path, *options: str) -> Iterator[Server]:
    program = tools.require_tool("nghttpd", "apt-get install nghttp2-server")
    tools.require_tool("h2load", "apt-get install nghttp2-client")
    site = bench_peers.make_site(folder, 0)
    port = free_port()
    command = [str(program), *options, "-a", "127.0.0.1", str(port), str(site.key), str(site.certificate)]
    with running("tls-echo", command, port, folder) as server:
        yield server


def _server(name: str) -> Server:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return Server(name, 1, process, Path(os.devnull), start_rss=1)


def _all_end(pids: list[int]) -> bool:
    """Whether all end soon: a process that was killed is seen for a moment longer."""
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
