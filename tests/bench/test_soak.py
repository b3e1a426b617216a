"""Promises: a soak fails for what the gate keeps or loses and for nothing else, has all its figures, and ends clean."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from tests.bench import soak, soak_chart, soak_record
from tests.bench.peers import REPOSITORY
from tests.bench.soak_record import Attacked, Loss, Record, Sample


def a_record() -> Record:
    """Two minutes in which all went well: memory rises at first, and comes down when the clients are gone."""
    record = Record({"cpu": "a processor", "minutes": "2"}, ["unary", "attacks"])
    for at in range(131):
        load = 120 > at > 0
        files, rss = (30, 60_000_000) if load else (18, 45_000_000)
        record.samples.append(Sample(at, rss, files, 5 * load, 10 * load, 8))
    record.samples[0] = replace(record.samples[0], upstream=1, files=11)
    record.loaded = 120.0
    record.outage = (60.0, 61.0)
    record.losses = [Loss("unary", 60.5, "the upstream is gone"), Loss("unary", 65.9, "the same")]
    record.attacks = [Attacked("ping", 10.0, 14.5), Attacked("<settings>", 16.0, 20.0)]
    record.answered("unary", 119.0, 1000)
    return record


def test_a_run_in_which_all_is_well() -> None:
    record = a_record()
    assert record.failures() == []
    assert [check.holds for check in record.checks()] == [True] * 7


def failing(record: Record) -> list[str]:
    return [check.words for check in record.failures()]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"streams": 1}, "1 streams open"),
        ({"streams": None}, "None streams open"),
        ({"connections": 2}, "2 client connections open"),
        ({"files": 21}, "21 files open at the end, at most 20"),
        ({"upstream": 4}, "18 files open at the end, at most 16"),
        ({"rss": 72_000_001}, "memory at the end +12.0 MB"),
    ],
)
def test_what_the_gate_keeps(last: dict[str, int | None], words: str) -> None:
    record = a_record()
    record.samples[-1] = replace(record.samples[-1], **last)  # type: ignore[arg-type]
    (found,) = failing(record)
    assert found.startswith(words)


@pytest.mark.parametrize("at", [59.9, 66.1])
def test_a_call_lost_while_the_upstream_was_there(at: float) -> None:
    record = a_record()
    record.losses.append(Loss("unary", at, "lost"))
    (found,) = failing(record)
    assert found.startswith("1 calls of good clients lost")
    assert f"lost: {soak_record.clock(at)} unary, no attack: lost" in soak_record.text(record)


def test_clients_that_get_no_more_answers() -> None:
    record = a_record()
    record.answered("slow", 100.0, 5)
    (found,) = failing(record)
    assert found.startswith("slow of the good clients without answers")


def test_errors_in_the_log() -> None:
    record = a_record()
    record.wrong_lines.append("internal error: x")
    assert len(failing(record)) == 1
    assert "log: internal error: x" in soak_record.text(record)


def test_the_shape_in_words() -> None:
    text = soak_record.text(a_record())
    memory = next(line for line in text.splitlines() if line.startswith("memory"))
    assert memory.split("  ")[-1].strip() == "45.0 MB"
    assert "60.0 MB" in memory
    assert "unary" in text
    json.dumps(a_record().as_json())


@pytest.mark.parametrize("most", [0, 9, 10, 12_345])
def test_the_chart_is_an_svg(most: int) -> None:
    record = a_record()
    record.samples[50] = replace(record.samples[50], streams=most, connections=None, rss=300_000_000)
    root = ElementTree.fromstring(soak_chart.draw(record))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ping", "<settings>", "upstream killed", "clients gone"} <= set(texts)


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--kinds", "unary,nobody"], ["--attacks", "kindness"]])
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.main(words)
    assert ended.value.code == 2


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.bench.soak", *arguments, "--json", str(folder / "soak.json")]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.nghttp2
def test_a_short_run(tmp_path: Path) -> None:
    chart = tmp_path / "soak.svg"
    kinds = "unary,visitors,resets,deadlines,attacks"
    with start(tmp_path, "--minutes", "0.2", "--kinds", kinds, "--attacks", "ping", "--svg", str(chart)) as process:
        text, _ = process.communicate(timeout=120)
    found = json.loads((tmp_path / "soak.json").read_text())
    assert process.returncode == 0, text
    assert [check["holds"] for check in found["checks"]] == [True] * 7
    assert set(found["calls"]) == set(kinds.split(",")) - {"attacks"}
    assert all(found["calls"].values())
    assert {attack["name"] for attack in found["attacks"]} == {"ping"}
    assert found["metrics"]["tensorgate_connection_abuse_total/ping"] > 0
    assert found["outage"][1] > found["outage"][0]
    ElementTree.fromstring(chart.read_text())


@pytest.mark.nghttp2
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_what_it_has_started(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, "--minutes", "5") as process:
        this = psutil.Process(process.pid)
        until = time.monotonic() + 30
        # The gate, nghttpd, all kinds of good clients and an attacker.
        while len(children := this.children(recursive=True)) < 3 + len(soak.KINDS) and time.monotonic() < until:
            time.sleep(0.1)
        assert len(children) >= 3 + len(soak.KINDS)
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)  # as `timeout` and impatient people do
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
