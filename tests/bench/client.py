"""A load generator for what h2load can't do: header values that differ on each call, and a rate that is even.

    python -m tests.bench.client PORT --connections 4 --streams 16 --style grpcio --seconds 2 --log FILE [--rate 5000]

A process of its own that makes unary gRPC echo calls over TLS. Without --rate it is a closed loop: each answer makes
room for the next call. With it, calls are due at even intervals, whatever the answers do, and latency counts from when
a call was due: a proxy that stalls is charged for all the calls that it kept waiting. (h2load --rps sends the calls of
10 ms in one burst, and counts from when it sent them.) All that is sent is encoded before the clock starts.

It writes h2load's log format and ends with one line of JSON, {"answers": N, "problem": ""}.
"""

import argparse
import ctypes
import gc
import itertools
import json
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import machine, wire
from .connection import Call, Connection, Problem, client_context

MOST_CALLS = 50_000  # encoded for each second of a closed loop; a run in which more are answered ends early
DRAIN_SECONDS = 5.0
STALL_SECONDS = 5.0
TIMER_SLACK_NS = 1000
_PR_SET_TIMERSLACK = 29


class Load:
    """Connections that share one clock."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self._poll = select.epoll()
        self._of = {connection.fileno(): connection for connection in connections}
        for fileno in self._of:
            self._poll.register(fileno, select.EPOLLIN)
        self._writing: set[int] = set()

    def closed_loop(self, seconds: float, streams: int) -> None:
        now = time.time()
        until = now + seconds
        for connection in self._connections:
            connection.due(streams, now)
            self._flush(connection)
        while now < until:
            for connection in self._wait(min(until - now, STALL_SECONDS)):
                now = time.time()
                answered = connection.receive(now)
                if now < until:
                    connection.due(answered, now)
                self._flush(connection)
            now = time.time()
        self._drain()

    def even(self, seconds: float, rate: float) -> None:
        began = time.time()
        connections = itertools.cycle(self._connections)
        sent, count = 0, int(seconds * rate)
        while sent < count:
            now = time.time()
            while sent < count and (at := began + sent / rate) <= now:
                connection = next(connections)
                connection.due(1, at)
                self._flush(connection)
                sent += 1
            for connection in self._wait(max(0.0, began + sent / rate - time.time())):
                connection.receive(time.time())
                self._flush(connection)
        self._drain()

    def _wait(self, seconds: float) -> list[Connection]:
        """Those with something to read or to write. select, because an epoll's own timeout is in milliseconds."""
        if not select.select([self._poll.fileno()], [], [], seconds)[0]:
            return []
        return [self._of[fileno] for fileno, _ in self._poll.poll(0)]

    def _flush(self, connection: Connection) -> None:
        """Send what can be sent, and ask to be told when the rest can."""
        whole, fileno = connection.flush(), connection.fileno()
        if whole == (fileno in self._writing):
            self._poll.modify(fileno, select.EPOLLIN | (0 if whole else select.EPOLLOUT))
            (self._writing.discard if whole else self._writing.add)(fileno)

    def _drain(self) -> None:
        """Every call that was made is to be answered."""
        deadline = time.time() + DRAIN_SECONDS
        while any(connection.open_calls for connection in self._connections):
            now = time.time()
            if now > deadline:
                raise Problem(f"{sum(connection.open_calls for connection in self._connections)} calls not answered")
            for connection in self._wait(0.1):
                connection.receive(time.time())
                self._flush(connection)


def run(options: argparse.Namespace) -> tuple[list[Call], str]:
    """All calls that were answered, and what went wrong or ""."""
    total = int((options.rate or MOST_CALLS) * options.seconds) + options.connections * options.streams
    calls = -(-total // options.connections)
    connections: list[Connection] = []
    try:
        context = client_context()
        for number in range(options.connections):
            blocks = list(itertools.islice(wire.blocks(wire.STYLES[options.style], number), calls))
            connections.append(Connection(options.port, options.streams, blocks, wire.message(options.body), context))
            connections[-1].tls.sock.setblocking(False)
        load = Load(connections)
        gc.collect()
        gc.disable()
        if options.rate:
            load.even(options.seconds, options.rate)
        else:
            load.closed_loop(options.seconds, options.streams)
    except (Problem, OSError) as error:
        return [call for connection in connections for call in connection.done], f"{type(error).__name__}: {error}"
    return [call for connection in connections for call in connection.done], ""


def write_log(path: Path, calls: Sequence[Call]) -> None:
    """In h2load's format: start in microseconds since the epoch, status, microseconds until the end."""
    path.write_text("".join(f"{start * 1e6:.0f}\t200\t{(end - start) * 1e6:.0f}\n" for start, end in calls))


def main() -> int:
    parser = argparse.ArgumentParser(description="One run of unary echo calls.")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--body", type=int, default=205)
    parser.add_argument("--style", choices=list(wire.STYLES), default="constant")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rate", type=float, help="calls per second of all connections together")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    machine.raise_open_files()
    # By default the kernel wakes a sleeper up to 50 us late, which is half of what some calls take.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)
    calls, problem = run(options)
    if options.log:
        write_log(options.log, calls)
    print(json.dumps({"answers": len(calls), "problem": problem}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
