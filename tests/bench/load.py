"""One run of h2load: the shape of the load, the command, what it reported, and whether that is what it should be."""

import re
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .machine import find_program

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CIPHER = "TLS_AES_128_GCM_SHA256"
SAMPLE_SECONDS = 0.02
INACTIVITY_SECONDS = 15
PREFIX = struct.Struct(">BI")  # a gRPC message: compressed flag, length


@dataclass(frozen=True)
class Shape:
    """A unary echo of `body_bytes` (with gRPC's prefix) on `connections` with `streams` in flight on each."""

    name: str
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
        size = f"{self.body_bytes} B" if self.body_bytes < 1024 else f"{self.body_bytes // 1024} KiB"
        connections = "connection" if self.connections == 1 else "connections"
        streams = "stream" if self.streams == 1 else "streams"
        return f"{self.name}: {size} echo, {self.connections} {connections} x {self.streams} {streams}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("4x16", 205, 4, 16),
        Shape("4x1", 205, 4, 1),
        Shape("64x1", 205, 64, 1),
        Shape("1x1", 205, 1, 1),
        Shape("64k-4x4", 64 << 10, 4, 4),
        Shape("600k-4x2", 600 << 10, 4, 2),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What one run of h2load did.

    `ended` and `latency` are of the requests in the order of their ends: seconds since the epoch, and seconds.
    `problem` says in words why the run doesn't count, or is empty.
    """

    requests: int
    seconds: float
    ended: list[float]
    latency: list[float]
    problem: str = ""


def body_file(folder: Path, size: int) -> Path:
    """A file with one uncompressed gRPC message of `size` bytes in all."""
    path = folder / f"body-{size}"
    if not path.exists():
        payload = bytes(range(256)) * (size // 256 + 1)
        length = size - PREFIX.size
        path.write_bytes(PREFIX.pack(0, length) + payload[:length])
    return path


def run_h2load(
    shape: Shape, port: int, requests: int, folder: Path, limit: float, tick: Callable[[], None]
) -> Outcome:
    """Send `requests` to https://127.0.0.1:port; `tick` is called before, about every 20 ms meanwhile, and after.

    A run longer than `limit` seconds is stopped and has a problem; nothing is raised for a server's faults.
    """
    log, report = folder / "h2load.tsv", folder / "h2load.txt"
    log.unlink(missing_ok=True)
    command = _command(shape, port, requests, body_file(folder, shape.body_bytes), log)
    tick()
    began = time.monotonic()
    with report.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
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
        return Outcome(requests, seconds, [], [], f"h2load didn't finish within {limit:.0f} s")
    problem = check(report.read_text(errors="replace"), shape, requests)
    if problem:
        return Outcome(requests, seconds, [], [], problem)
    ended, latency = read_log(log)
    return Outcome(requests, seconds, ended, latency)


def _command(shape: Shape, port: int, requests: int, body: Path, log: Path) -> list[str]:
    # One cipher suite, so that no proxy's preference gives it AES-256 while another has AES-128.
    # -d makes the method POST. h2load's own windows are 1 GiB: a proxy never waits for it.
    return [
        find_program("h2load") or "h2load",
        *("-n", str(requests), "-c", str(shape.connections), "-m", str(shape.streams), "-t", "1"),
        *("-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers"),
        *("--tls13-ciphers", CIPHER, "-N", str(INACTIVITY_SECONDS), "--log-file", str(log)),
        f"https://127.0.0.1:{port}{METHOD}",
    ]


def check(report: str, shape: Shape, requests: int) -> str:
    """Why h2load's report isn't that of `requests` whole echoes over TLS 1.3 and h2; empty if it is."""
    done = re.search(r"^requests: .*?(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", report, re.M)
    codes = re.search(r"^status codes: (\d+) 2xx, (.*)$", report, re.M)
    traffic = re.search(r"^traffic: .*\((\d+)\) data$", report, re.M)
    if not (done and codes and traffic):
        return f"h2load gave no summary: {' | '.join(report.split(chr(10))[-4:]).strip() or '(no output)'}"
    succeeded, failed, errored, timeout = map(int, done.groups())
    if succeeded != requests:
        lost = f"{failed} failed, {errored} errored, {timeout} timeout"
        return f"{succeeded} of {requests} requests succeeded ({lost}; {codes.group(0)})"
    if int(codes.group(1)) != requests:
        return f"{codes.group(1)} of {requests} answers were 2xx ({codes.group(2)})"
    if int(traffic.group(1)) != requests * shape.body_bytes:
        return f"{traffic.group(1)} bytes came back, an echo has {requests * shape.body_bytes}"
    for line in ("TLS Protocol: TLSv1.3", f"Cipher: {CIPHER}", "Application protocol: h2"):
        if line not in report.splitlines():
            return f"h2load didn't report {line!r}"
    return ""


def read_log(path: Path) -> tuple[list[float], list[float]]:
    """h2load's log as (end, latency) columns in the order of the ends; seconds since the epoch, and seconds."""
    rows = []
    for line in path.read_text().splitlines():
        start, _, took = map(int, line.split("\t")[:3])
        rows.append((start + took, took))
    rows.sort()
    return [end / 1e6 for end, _ in rows], [took / 1e6 for _, took in rows]
