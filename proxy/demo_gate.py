"""The gate of the demo: a process of its own, with its log in a file, that ends with the demo whatever happens."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proxy.config.load import PREFIX

_START_SECONDS = 60.0  # the backend loads its models first, on a slow machine too
_STOP_SECONDS = 20.0
_SCRAPE_SECONDS = 30.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_READY = re.compile(r"ready: grpc on \S+:(\d+), admin on (\S+:\d+)")


class GateError(Exception):
    """The gate doesn't start, or has ended; the message ends with the last lines of its log."""


@dataclass
class Gate:
    """The running gate: its process, its log file, and where it listens."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0
    admin: str = ""

    def log_text(self, start: int = 0) -> str:
        return self.log.read_bytes()[start:].decode(errors="replace")

    def log_size(self) -> int:
        return self.log.stat().st_size

    def handshakes(self) -> dict[str, float]:
        """{result: count} of tensorgate_handshakes_total."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.admin}/metrics", timeout=_SCRAPE_SECONDS) as answer:
            text = answer.read().decode()
        found = re.findall(r'^tensorgate_handshakes_total\{result="(\w+)"\} (\S+)$', text, re.MULTILINE)
        return {result: float(count) for result, count in found}


@contextmanager
def running_gate(folder: Path, config: Path) -> Iterator[Gate]:
    log = folder / "gate.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
            [sys.executable, "-m", "proxy", "serve", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_child_environment(),
            start_new_session=True,  # Ctrl-C is for the demo, which then stops the gate in order
            preexec_fn=_death_signal(),
        )
    gate = Gate(process, log)
    try:
        _await_ready(gate)
        yield gate
    finally:
        _stop(process)


def _child_environment() -> dict[str, str]:
    """This process's without settings of a gate, and with this very package, whatever the current folder holds."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    package = str(Path(__file__).resolve().parent.parent)
    path = [package, *filter(None, [kept.get("PYTHONPATH", "")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def _death_signal() -> Callable[[], None]:
    """What a child calls before it runs, so that it gets SIGTERM when this process is killed outright."""
    if sys.platform != "linux":
        return lambda: None
    # Looked up here: between fork and exec the loader's lock may be held for ever by a thread that was not forked.
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _await_ready(gate: Gate) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while (found := _READY.search(gate.log_text())) is None:
        if gate.process.poll() is not None:
            raise GateError(f"the gate ended with exit code {gate.process.returncode}:\n{tail(gate)}")
        if time.monotonic() > deadline:
            raise GateError(f"the gate was not ready after {_START_SECONDS:.0f} s:\n{tail(gate)}")
        time.sleep(_POLL_SECONDS)
    gate.port, gate.admin = int(found[1]), found[2]


def tail(gate: Gate) -> str:
    lines = gate.log_text().splitlines()[-12:]
    return textwrap.indent("\n".join(lines) or "(its log is empty)", "  ") + f"\n  (all of it: {gate.log})"


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
