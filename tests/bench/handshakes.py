"""The load of the rows of connections: new ones with one call each, or many that do nothing.

    python -m tests.bench.handshakes PORT --seconds 2 --log FILE [--resumed]
    python -m tests.bench.handshakes PORT --idle 1000

A process of its own. The first form has `THREADS` threads, each opening one connection after another; OpenSSL works
outside the interpreter's lock. A full handshake brings no session along; a resumed one brings that of the connection
before, and it is a problem if the proxy doesn't take it. It writes what `client` writes, a line for each connection.

The second form opens connections, exchanges SETTINGS, says "ready", and at the end of its input looks whether they are
all open still.
"""

import argparse
import gc
import json
import ssl
import sys
import threading
import time
from pathlib import Path

from . import machine, wire
from .client import write_log
from .connection import Call, Connection, Problem, client_context

THREADS = 8  # in each of which a connection is under way: enough to keep a proxy busy
_BODY = wire.message(205)


class Handshakes:
    """Connections one after another, in several threads; `done` are those whose call was answered."""

    def __init__(self, port: int, resumed: bool, seconds: float) -> None:
        self.done: list[Call] = []
        self.problem = ""
        self._port, self._resumed, self._seconds = port, resumed, seconds
        self._context = client_context()
        self._block = next(wire.blocks(wire.CONSTANT, 0))

    def run(self) -> None:
        threads = [threading.Thread(target=self._thread) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _thread(self) -> None:
        try:
            self._connections()
        except (Problem, OSError) as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _connections(self) -> None:
        session, _ = self._one(None)  # not counted: the first to be resumed needs one before it
        until = time.time() + self._seconds
        while not self.problem and (began := time.time()) < until:
            session, reused = self._one(session if self._resumed else None)
            if reused != self._resumed:
                raise Problem("a session was resumed" if reused else "a session was not resumed")
            self.done.append((began, time.time()))

    def _one(self, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool]:
        """A connection with a call -> what the next one can resume, and whether this one was itself resumed."""
        with Connection(self._port, 1, [self._block], _BODY, self._context, session) as connection:
            connection.call()
            return connection.tls.session, connection.tls.session_reused


def idle(port: int, count: int) -> tuple[int, str]:
    """Open connections, hold them until the end of the input; how many are open then, and a problem or ""."""
    context = client_context()
    connections = []
    try:
        for _ in range(count):
            connections.append(Connection(port, 1, [], _BODY, context))
        print("ready", flush=True)
        sys.stdin.read()
        for connection in connections:
            connection.tls.sock.setblocking(False)
            connection.receive(0.0)
    except (Problem, OSError) as error:
        return 0, f"{len(connections)} connections were opened; {type(error).__name__}: {error}"
    return len(connections), ""


def main() -> int:
    parser = argparse.ArgumentParser(description="One run of connections.")
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--resumed", action="store_true")
    parser.add_argument("--idle", type=int, metavar="N")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    machine.raise_open_files()
    if options.idle:
        answers, problem = idle(options.port, options.idle)
    else:
        gc.disable()
        load = Handshakes(options.port, options.resumed, options.seconds)
        load.run()
        answers, problem = len(load.done), load.problem
        if options.log:
            write_log(options.log, load.done)
    print(json.dumps({"answers": answers, "problem": problem}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
