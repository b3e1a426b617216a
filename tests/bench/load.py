"""One run of a load generator: its command, what it reported, and whether that is what it should be.

h2load drives the closed loops with constant headers, for nothing else makes so many calls for so little CPU. Fixed
rates, header values that differ on each call, streams and handshakes have generators of our own: see `client`,
`stream` and `handshakes`. All offer one cipher suite and the key share of one group, so that no proxy's preference
gives it AES-256 or a costlier key exchange while another has less to do.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import wire
from .connection import CIPHER
from .machine import find_program

METHOD = wire.METHOD
PREFIX = wire.GRPC_PREFIX
GROUPS = "X25519:P-256"  # with a key share for the first only, which every proxy here takes
SAMPLE_SECONDS = 0.02
INACTIVITY_SECONDS = 15
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Shape:
    """A unary echo of `body_bytes` (with gRPC's prefix) on `connections` with `streams` in flight on each."""

    body_bytes: int
    connections: int
    streams: int

    @property
    def in_flight(self) -> int:
        return self.connections * self.streams

    def whole(self, requests: float) -> int:
        """`requests` rounded up so that each connection has the same number, and at least one for each stream."""
        return max(-(-int(requests) // self.connections), self.streams) * self.connections

    def title(self) -> str:
        size = f"{self.body_bytes} B"
        if self.body_bytes >= 1 << 20:
            size = f"{self.body_bytes >> 20} MiB"
        elif self.body_bytes >= 1 << 10:
            size = f"{self.body_bytes >> 10} KiB"
        connections = "connection" if self.connections == 1 else "connections"
        streams = "stream" if self.streams == 1 else "streams"
        return f"{size}, {self.connections} {connections} x {self.streams} {streams}"


@dataclass(frozen=True)
class Job:
    """A command to run, and what tells from all that it printed why the run doesn't count ("" if it does)."""

    command: list[str]
    check: Callable[[str], str]
    log: Path

    @property
    def report(self) -> Path:
        """Where what it prints is kept."""
        return self.log.with_suffix(".txt")


@dataclass(frozen=True)
class Outcome:
    """What one run of a load generator did.

    `ended` and `latency` are of the calls in the order of their ends: seconds since the epoch, and seconds.
    `problem` says in words why the run doesn't count, or is empty.
    """

    seconds: float
    ended: list[float]
    latency: list[float]
    problem: str = ""


@dataclass(frozen=True)
class Aim:
    """Where a generator is to send to, where it may keep files, and the certificate it will be shown."""

    port: int
    folder: Path
    certificate: Path

    @property
    def log(self) -> Path:
        return self.folder / "load.tsv"


def body_file(folder: Path, size: int) -> Path:
    """A file with one uncompressed gRPC message of `size` bytes in all."""
    path = folder / f"body-{size}"
    if not path.exists():
        path.write_bytes(wire.message(size))
    return path


def run(job: Job, limit: float, tick: Callable[[], None]) -> Outcome:
    """Run it to its end; `tick` is called before, about every 20 ms meanwhile, and after.

    A run longer than `limit` seconds is stopped and has a problem; nothing is raised for a server's faults.
    """
    job.log.unlink(missing_ok=True)  # h2load appends to it
    tick()
    began = time.monotonic()
    process = _start(job, subprocess.DEVNULL)
    try:
        while process.poll() is None and time.monotonic() - began < limit:
            time.sleep(SAMPLE_SECONDS)
            tick()
        late = process.poll() is None
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - began
    if late:
        return Outcome(seconds, [], [], f"the load generator didn't finish within {limit:.0f} s")
    if problem := job.check(job.report.read_text(errors="replace")):
        return Outcome(seconds, [], [], problem)
    try:
        ended, latency = read_log(job.log)
    except (OSError, ValueError) as error:
        return Outcome(seconds, [], [], str(error))
    return Outcome(seconds, ended, latency)


@contextlib.contextmanager
def held_open(job: Job, limit: float) -> Iterator[str]:
    """Start it and go on when it says "ready"; at the end it is told to end, and may take `limit` seconds for each.

    Yields why it isn't ready, or "". What it prints at its end is then in its report.
    """
    process = _start(job, subprocess.PIPE)
    deadline = time.monotonic() + limit
    try:
        while not (ready := job.report.read_text(errors="replace").startswith("ready")):
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(SAMPLE_SECONDS)
        yield "" if ready else job.check(job.report.read_text(errors="replace")) or "the load generator isn't ready"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=limit)
    finally:
        process.kill()
        process.communicate()


def _start(job: Job, stdin: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OPENSSL_CONF": str(_openssl_settings(job.log.parent))}
    with job.report.open("wb") as output:
        return subprocess.Popen(
            job.command, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
        )


def _openssl_settings(folder: Path) -> Path:
    """For the generators in Python: its ssl module can't choose TLS 1.3's cipher suites before Python 3.15."""
    path = folder / "openssl.cnf"
    if not path.exists():
        path.write_text(
            "openssl_conf = init\n[init]\nssl_conf = modules\n[modules]\nsystem_default = tls\n[tls]\n"
            f"MinProtocol = TLSv1.3\nCiphersuites = {CIPHER}\nGroups = {GROUPS}\n"
        )
    return path


def read_log(path: Path) -> tuple[list[float], list[float]]:
    """The log as (end, latency) columns in the order of the ends; seconds since the epoch, and seconds.

    ValueError where a call failed. Status 0 is h2load's for an answer whose head came in its warm-up.
    """
    rows = []
    for line in path.read_text().splitlines():
        start, status, took = map(int, line.split("\t")[:3])
        if status not in (200, 0):
            raise ValueError(f"a call ended with status {status}")
        rows.append((start + took, took))
    if not rows:
        raise ValueError("no call was answered")
    rows.sort()
    return [end / 1e6 for end, _ in rows], [took / 1e6 for _, took in rows]


# -- h2load


def h2load_exact(shape: Shape, aim: Aim, requests: int) -> Job:
    """So many calls, of which each byte is accounted for."""
    command = _h2load(shape, aim, ["-n", str(requests)])
    return Job(command, lambda report: check_exact(report, shape, requests), aim.log)


def h2load_timed(shape: Shape, aim: Aim, warm_up: float, seconds: float) -> Job:
    """As many calls as go into `seconds`, after `warm_up` that is left out of the log."""
    times = ["-D", f"{seconds * 1000:.0f}ms", "--warm-up-time", f"{warm_up * 1000:.0f}ms"]
    return Job(_h2load(shape, aim, times), lambda report: check_timed(report, shape), aim.log)


def _h2load(shape: Shape, aim: Aim, amount: list[str]) -> list[str]:
    # -d makes the method POST. h2load's own windows are 1 GiB: a proxy never waits for it.
    return [
        find_program("h2load") or "h2load",
        *(*amount, "-c", str(shape.connections), "-m", str(shape.streams), "-t", "1"),
        *("-d", str(body_file(aim.folder, shape.body_bytes))),
        *("-H", "content-type: application/grpc", "-H", "te: trailers"),
        *("--tls13-ciphers", CIPHER, "--groups", GROUPS),
        *("-N", str(INACTIVITY_SECONDS), "--log-file", str(aim.log)),
        f"https://127.0.0.1:{aim.port}{METHOD}",
    ]


@dataclass(frozen=True)
class _Summary:
    total: int
    succeeded: int
    lost: str
    lost_count: int
    codes: list[int]
    data: int


def _summary(report: str) -> _Summary | str:
    """h2load's figures, or why there are none."""
    done = re.search(
        r"^requests: (\d+) total, .*?(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", report, re.M
    )
    codes = re.search(r"^status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx$", report, re.M)
    traffic = re.search(r"^traffic: .*\((\d+)\) data$", report, re.M)
    if not (done and codes and traffic):
        return f"h2load gave no summary: {' | '.join(report.split(chr(10))[-4:]).strip() or '(no output)'}"
    total, succeeded, failed, errored, timeout = map(int, done.groups())
    lost = f"{failed} failed, {errored} errored, {timeout} timeout; {codes.group(0)}"
    numbers = [int(number) for number in codes.groups()]
    return _Summary(total, succeeded, lost, failed + errored + timeout, numbers, int(traffic.group(1)))


def check_exact(report: str, shape: Shape, requests: int) -> str:
    """Why h2load's report isn't that of `requests` whole echoes over TLS 1.3 and h2; empty if it is."""
    found = _summary(report)
    if isinstance(found, str):
        return found
    if found.succeeded != requests:
        return f"{found.succeeded} of {requests} requests succeeded ({found.lost})"
    if found.codes[0] != requests:
        return f"{found.codes[0]} of {requests} answers were 2xx ({found.lost})"
    if found.data != requests * shape.body_bytes:
        return f"{found.data} bytes came back, an echo has {requests * shape.body_bytes}"
    return _check_protocol(report)


def check_timed(report: str, shape: Shape) -> str:
    """The same for a run of a given time, whose bytes include its warm-up and calls that were under way at its end."""
    found = _summary(report)
    if isinstance(found, str):
        return found
    if not found.succeeded:
        return f"no request succeeded ({found.lost})"
    if found.lost_count or found.succeeded != found.total:
        return f"{found.succeeded} of {found.total} requests succeeded ({found.lost})"
    # A status that came in the warm-up isn't counted, nor is the end of a call behind the end of the run.
    if any(found.codes[1:]) or abs(found.codes[0] - found.succeeded) > shape.in_flight:
        return f"not all of {found.total} answers were 2xx ({found.lost})"
    if found.data < found.succeeded * shape.body_bytes:
        return f"{found.data} bytes came back, an echo has {found.succeeded * shape.body_bytes}"
    return _check_protocol(report)


def _check_protocol(report: str) -> str:
    for line in ("TLS Protocol: TLSv1.3", f"Cipher: {CIPHER}", "Application protocol: h2"):
        if line not in report.splitlines():
            return f"h2load didn't report {line!r}"
    return ""


# -- our own


def own(module: str, aim: Aim, *arguments: str) -> Job:
    """One of the generators in this package; each ends with a line of JSON that has a problem or ""."""
    command = [sys.executable, "-m", f"tests.bench.{module}", str(aim.port), *arguments, "--log", str(aim.log)]
    return Job(command, check_own, aim.log)


def check_own(report: str) -> str:
    last = report.strip().rpartition("\n")[2]
    try:
        found = json.loads(last)
        answers, problem = int(found["answers"]), str(found["problem"])
    except (ValueError, TypeError, KeyError):
        return f"the load generator ended with {last!r}"
    return problem or ("" if answers else "no call was answered")


def client(shape: Shape, style: str, aim: Aim, seconds: float, rate: float | None = None) -> Job:
    arguments = ["--connections", shape.connections, "--streams", shape.streams, "--body", shape.body_bytes]
    arguments += ["--style", style, "--seconds", seconds, *(["--rate", rate] if rate else [])]
    return own("client", aim, *map(str, arguments))
