"""The log: one line an entry whatever clients send, bounded in rate and in memory, never waiting for its reader."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from proxy.telemetry import log
from proxy.telemetry.log import printable, throttled

LIVENESS = 60


@pytest.mark.parametrize("text", ["", "plain", "größe \U0001f600", "back\\slash and 'quotes'", "a b"])
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "text",
    ["a\nb", "a\rb", "a\tb", "\x1b[31m", "nul\0", "\x7f", "\u2028line", "\u202eback", "\x85", "\udcff", "a\u200bb"],
)
def test_other_text_becomes_one_line_of_ascii(text: str) -> None:
    line = printable(text)
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1


# -- the log of a process of its own: `start` takes over the root logger


def run(level: str, form: str, code: str) -> list[str]:
    """The lines that a process writes to stderr that starts the log and runs this code."""
    program = f"""
import logging, sys
from proxy.telemetry import log
listener = log.start({level!r}, {form!r})
{code}
listener.stop()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIVENESS)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_lines_of_text() -> None:
    lines = run("info", "text", "log.logger.info('hello %s', 'you'); log.logger.warning('careful')")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info    hello you", lines[0])
    assert re.fullmatch(r"\S+Z warning careful", lines[1])
    assert len(lines) == 2


def test_a_client_cannot_forge_a_line() -> None:
    evil = "GET /\n2030-01-01T00:00:00.000Z info    all is well\r\x1b[2K"
    lines = run("info", "text", f"log.logger.info('path %s', {evil!r})")
    assert len(lines) == 1
    assert "all is well" in lines[0]
    assert "\\n2030" in lines[0]
    entries = [json.loads(line) for line in run("info", "json", f"log.logger.info('path %s', {evil!r})")]
    assert [entry["message"] for entry in entries] == [f"path {evil}"]


def test_lines_of_json() -> None:
    lines = run("debug", "json", "log.logger.debug('one'); log.logger.error('two %d', 2)")
    entries = [json.loads(line) for line in lines]
    assert [(entry["level"], entry["message"]) for entry in entries] == [("debug", "one"), ("error", "two 2")]
    assert all(re.fullmatch(r"\S+T\S+Z", entry["time"]) for entry in entries)


def test_an_error_is_written_with_its_traceback() -> None:
    code = "try: 1 / 0\nexcept ZeroDivisionError: log.logger.exception('failed')"
    lines = run("info", "text", code)
    assert lines[0].endswith("error   failed")
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-1] == "    ZeroDivisionError: division by zero"
    (entry,) = [json.loads(line) for line in run("info", "json", code)]
    assert "ZeroDivisionError" in entry["error"]


def test_levels() -> None:
    code = "log.logger.debug('a'); log.logger.info('b'); log.logger.warning('c'); log.logger.error('d')"
    for level, expected in (("debug", 4), ("info", 3), ("warning", 2), ("error", 1)):
        assert len(run(level, "text", code)) == expected


def test_other_libraries_are_heard_from_warnings_on() -> None:
    code = "logging.getLogger('asyncio').info('no'); logging.getLogger('asyncio').warning('yes')"
    assert [line.split()[-1] for line in run("debug", "text", code)] == ["yes"]


def test_what_is_left_is_written_at_the_end() -> None:
    lines = run("info", "text", "for number in range(5000): log.logger.info('line %d', number)")
    assert [line.rpartition(" ")[2] for line in lines] == [str(number) for number in range(5000)]


def test_a_reader_that_is_stuck_stalls_nobody() -> None:
    """stderr is a pipe that nobody reads: the process goes on, and lines beyond the queue are dropped."""
    program = """
import os
from proxy.telemetry import log
log.start("info", "text")
for number in range(50_000):
    log.logger.info("line %d", number)
print("done", flush=True)
os._exit(0)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
        finally:
            process.kill()


def test_a_closed_stderr_stops_nobody() -> None:
    program = "import os, sys; os.close(2)\n" + """
from proxy.telemetry import log
listener = log.start("info", "text")
log.logger.info("nobody reads this")
listener.stop()
print("done", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=LIVENESS)
    assert done.stdout == b"done\n"


# -- what clients can provoke


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> SimpleNamespace:
    """The throttle's clock; begins in a second of its own."""
    clock = SimpleNamespace(now=1e6)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    throttled(logging.INFO, "nothing", "nothing")
    clock.now += 1
    caplog.set_level(logging.INFO, "tensorgate")
    return clock


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_some_lines_of_a_kind_are_written_each_second(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(3):
        for number in range(50):
            throttled(logging.INFO, "few", "line %d of %d", number, second)
        clock.now += 1
    assert len(messages(caplog)) == 150


def test_further_lines_are_counted_and_told_later(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1000):
        throttled(logging.WARNING, "floods", "line %d", number)
        throttled(logging.WARNING, "trickle", "drop") if number < 2 else None
    written = messages(caplog)
    assert written.count("drop") == 2
    assert [line for line in written if line != "drop"] == [f"line {number}" for number in range(50)]
    clock.now += 1
    throttled(logging.WARNING, "trickle", "drop")
    assert messages(caplog) == ["950 more lines about floods were not written", "drop"]
    clock.now += 1
    throttled(logging.WARNING, "floods", "again")
    assert messages(caplog) == ["again"]


def test_lines_below_the_level_are_not_counted(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        throttled(logging.DEBUG, "quiet", "whispered")
    throttled(logging.INFO, "quiet", "said")
    assert messages(caplog) == ["said"]


def test_an_error_can_be_shown(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("broken")
    throttled(logging.ERROR, "errors", "failed: %s", error, error=error)
    assert caplog.records[-1].exc_info is not None
    assert caplog.records[-1].exc_info[1] is error
