"""Processes under test: started with their output in a file, waited for by what they print, and always ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import psutil

T = TypeVar("T")

LIVENESS = 30.0
"""Seconds after which something that should have happened is called hung. Never a measure of speed."""


class ProcessFailed(AssertionError):
    """A process ended, or stayed silent, where it should not have; the message carries its output."""


class Process:
    """One child process. `log` is stdout and stderr together, in the order written."""

    running: ClassVar[list[Process]] = []

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        folder: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        with self.log_file.open("ab") as out:
            self.popen = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                cwd=cwd,
                # A group of its own, so that what it started itself ends with it.
                start_new_session=True,
            )
        Process.running.append(self)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def mark(self) -> int:
        """A position in the log, to look only at what comes after it."""
        return self.log_file.stat().st_size

    def log(self, since: int = 0) -> str:
        with self.log_file.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def wait_log(self, pattern: str, since: int = 0, timeout: float = LIVENESS) -> re.Match[str]:
        """Wait for a line that `pattern` (a regular expression, case ignored) is found in, and return the match."""
        expression = re.compile(pattern, re.IGNORECASE)

        def look() -> re.Match[str] | None:
            ended = self.popen.poll() is not None
            if (found := expression.search(self.log(since))) is None and ended:
                raise ProcessFailed(
                    f"{self.name} ended with {self.popen.returncode} before it printed {pattern!r}:\n{self.log()}"
                )
            return found

        try:
            return wait_for(look, f"{self.name} to print {pattern!r}", timeout)
        except TimeoutError as silent:
            raise ProcessFailed(f"{silent}; it printed:\n{self.log(since)}") from None

    def rss(self) -> int:
        """Resident bytes of the process itself, without its children."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def forget_peak(self) -> int:
        """Let `peak_rss` count from here on; returns what is resident now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self.rss()

    def peak_rss(self) -> int:
        """Most resident bytes since `forget_peak`, as the kernel counted them (nothing is missed between samples)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.pid).children(recursive=True))

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, timeout: float = LIVENESS) -> int:
        """The exit status; waits for it."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} did not end in {timeout} s:\n{self.log()}") from None

    def kill(self) -> None:
        """SIGKILL to the process and all that it started, and wait until it is gone."""
        # The group outlives its leader while a child lives, so it is sent the signal even when the leader is gone.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.popen.wait()
        if self in Process.running:
            Process.running.remove(self)

    def stop(self, grace: float = 5.0) -> None:
        """SIGTERM, and SIGKILL to what is left after `grace` seconds."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(grace)
            except subprocess.TimeoutExpired:
                pass
        self.kill()


def wait_for(probe: Callable[[], T | None], what: str, timeout: float = LIVENESS) -> T:
    """Call `probe` until it returns something true. Raises TimeoutError naming `what`."""
    end = time.monotonic() + timeout
    while not (value := probe()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.02)
    return value


def port_answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
