"""Server processes: start, wait for the port, read CPU time and memory, stop in any case.

Linux only: CPU time is read from the kernel's process clocks.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

READY_SECONDS = 30.0
LOG_KEPT_BYTES = 1 << 20


class ServerError(Exception):
    """A server didn't start; the message names it and ends with the last lines of its log."""


@dataclass
class Server:
    """A running server and its children (nginx answers in one), measured together."""

    name: str
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path
    start_rss: int = 0
    pids: list[int] = field(default_factory=list)

    def refresh(self) -> None:
        """Look up the children again: walking all of /proc is too dear to do at each sample."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            self.pids = [root.pid, *(child.pid for child in root.children(recursive=True))]

    def cpu(self) -> float:
        """Seconds of CPU time, user and system, of the process and its children."""
        return sum(cpu_seconds(pid) for pid in self.pids)

    def rss(self) -> int:
        """Resident bytes of the process and its children; pages that they share count once for each."""
        total = 0
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += psutil.Process(pid).memory_info().rss
        return total

    def held(self) -> int:
        """Bytes of memory that are the processes' own, and their share of what they have in common with others."""
        return sum(_proportional(pid) for pid in self.pids)

    def death(self) -> str | None:
        """None while it runs, else how it ended, with the end of its log."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{self.name} ended {how}; its log ends: {self.log_tail()}"

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-5:]) or "(empty)"

    def trim_log(self) -> None:
        """Keep an access log from filling the disk: the file is open for appending, so it can be cut at any time."""
        if self.log.stat().st_size > LOG_KEPT_BYTES:
            os.truncate(self.log, 0)


def _proportional(pid: int) -> int:
    """The proportional set size of one process (proc(5): smaps_rollup), or what is resident of it where that may not be
    read; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except PermissionError:
        return int(psutil.Process(pid).memory_info().rss)
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def cpu_seconds(pid: int) -> float:
    """CPU seconds of one process, all threads, at the scheduler's own resolution; 0.0 for one that is gone.

    The figures in /proc (psutil's cpu_times) are cut to ticks of 10 ms, which is several per cent of a short run at
    a low rate. The kernel's clock of a process (clock_getcpuclockid(3), which Python doesn't wrap) has no such step.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


@contextlib.contextmanager
def running(name: str, command: Sequence[str], port: int, folder: Path, cwd: Path | None = None) -> Iterator[Server]:
    """Start `command`, wait until it accepts on 127.0.0.1:port, and stop it with its children at the end.

    Raises ServerError when it ends or doesn't accept in time.
    """
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd or folder,
            start_new_session=True,  # a Ctrl-C is for the benchmark, which then stops its servers in order
        )
    server = Server(name, port, process, log)
    try:
        _wait_until_it_accepts(server)
        server.refresh()
        server.start_rss = server.rss()
        yield server
    finally:
        _stop(process)


def _wait_until_it_accepts(server: Server) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if (death := server.death()) is not None:
            raise ServerError(death)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=1):
            return
        time.sleep(0.05)
    raise ServerError(
        f"{server.name} doesn't accept on port {server.port} after {READY_SECONDS:.0f} s; log: {server.log_tail()}"
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """TERM, TERM again (the gate ends its drain early on a second one), then KILL for the whole group."""
    for number, patience in ((signal.SIGTERM, 0.5), (signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    # A child may outlive the leader of its group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
