"""Facts about the machine and the programs, printed with the figures that mean nothing without them."""

import os
import platform
import re
import resource
import shutil
import ssl
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from .processes import Server

# Daemons live in sbin, which an ordinary user's PATH often lacks.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
TEST_VARIABLES = ("TENSORGATE_PEERS_DIR", "TENSORGATE_REQUIRE_PEERS")  # the tests' own, no settings of the gate


def find_program(name: str) -> str | None:
    """The path of a program: beside this interpreter (PyPI's envoy), then on PATH, then in sbin; None if absent."""
    folders = [str(Path(sys.executable).parent), *os.get_exec_path(), *SBIN]
    return shutil.which(name, path=os.pathsep.join(folders))


def program_version(path: str, flag: str) -> str:
    """The version number that `path flag` prints, or "unknown"."""
    try:
        done = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    # Envoy prints a commit hash first; its number stands between slashes.
    found = re.search(r"(?:^|[ /])v?(\d+\.\d+(?:\.\d+)?)", done.stdout + done.stderr)
    return found.group(1) if found else "unknown"


def raise_open_files() -> None:
    """As many open files as this process may have: a thousand connections are more than most shells' limit of 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def facts() -> dict[str, str]:
    """The machine and this Python: name -> words."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load average at start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": f"{platform.python_version()}, {_openssl()}, uvloop {_package('uvloop')}",
    }


def gate_environment() -> list[str]:
    """Settings of the gate that come from the environment: with any of these it doesn't run at its defaults."""
    return sorted(
        f"{key}={value}"
        for key, value in os.environ.items()
        if key.startswith("TENSORGATE_") and key not in TEST_VARIABLES
    )


class Neighbours:
    """How much of the machine's CPU went to processes that have no part in the benchmark, since this was made."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._began = self._now()

    def share(self) -> float:
        """0.0: it had the machine to itself. From about 0.05 the figures say more about the neighbours."""
        all_time, busy, own = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return max(0.0, busy - own) / all_time if all_time else 0.0

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        # Interrupts are left out: the benchmark's own traffic causes most of them, and no process is charged for them.
        busy = times.user + times.nice + times.system + times.steal
        own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
        ours += sum(server.cpu() for server in self._servers)
        return busy + times.idle + times.iowait, busy, ours


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _openssl() -> str:
    return " ".join(ssl.OPENSSL_VERSION.split()[:2])


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
