"""The clients of the soak, each kind a process of its own.

    python -m tests.bench.soak_clients KIND PORT CERTIFICATE       until the end of its input
    python -m tests.bench.soak_clients attack NAME PORT SECONDS    an attack, from an address of its own

The first form prints a line of JSON a second, {"calls": N}, and one for each call that did not end as it should,
{"lost": WORDS, "at": SECONDS of the monotonic clock, which all processes share}. A call counts if it ended as its kind
says: most with their own bytes, those of `deadlines` by their deadline.
"""

import json
import random
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc  # type: ignore[import-untyped]
from h2.exceptions import H2Error

from tests.support.rawh2 import H2Client, grpc_headers, tls_context, tls_socket

from . import attack_kinds, machine, wire
from .connection import Connection, Problem, client_context

CALL_SECONDS = 15.0
SIZES = (205, 65_536, 614_400)
ATTACKER = "127.0.0.9"
_IP_BIND_ADDRESS_NO_PORT = 24
_LARGE = SIZES[-1]
_INITIAL_WINDOW_SIZE = 4


class Report:
    """What a client process says of its calls; nothing once it is told to end, which cuts calls off."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._calls = 0
        self._lock = threading.Lock()

    def done(self, count: int = 1) -> None:
        with self._lock:
            self._calls += count

    def lost(self, words: str) -> None:
        if not self.over.is_set():
            self._say({"lost": words, "at": time.monotonic()})
            self.over.wait(0.1)  # a client that is refused at once would try without end

    def tell(self) -> None:
        with self._lock:
            calls, self._calls = self._calls, 0
        self._say({"calls": calls})

    def _say(self, what: dict[str, object]) -> None:
        with self._lock:
            print(json.dumps(what), flush=True)


class Gate:
    """Where the clients call, and what they know of it."""

    def __init__(self, port: int, certificate: bytes) -> None:
        self.port = port
        self.certificate = certificate
        self._context = client_context()
        self._dice = random.Random()

    def channel(self) -> grpc.Channel:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        options += [("grpc.enable_http_proxy", 0)]
        credentials = grpc.ssl_channel_credentials(self.certificate)
        return grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, options)

    def connection(self, size: int, calls: int, streams: int) -> Connection:
        """One that answers are read on as fast as they come."""
        style = self._dice.choice(list(wire.STYLES.values()))
        encoded = wire.blocks(style, self._dice.randrange(1000))
        blocks = [next(encoded) for _ in range(calls)]
        return Connection(self.port, streams, blocks, wire.message(size), self._context)

    def h2(self, window: int) -> H2Client:
        """One that takes no more than so many bytes at once, and does with windows and streams as it is told."""
        sock = tls_socket(self.port, tls_context(self.certificate))
        return H2Client(sock, settings={_INITIAL_WINDOW_SIZE: window})  # type: ignore[dict-item]


# -- grpcio's


def unary(gate: Gate, report: Report) -> None:
    """Small calls on one connection that is there all the time."""
    with gate.channel() as channel:
        echo = channel.unary_unary(wire.METHOD)
        while not report.over.wait(0.02):
            payload = random.randbytes(200)
            try:
                if echo(payload, timeout=CALL_SECONDS) != payload:
                    report.lost("an answer isn't an echo")
                    continue
            except grpc.RpcError as error:
                report.lost(_words(error))
            else:
                report.done()


def streams(gate: Gate, report: Report) -> None:
    """Bidirectional streams of some seconds; the upstream answers when the client has said all."""
    with gate.channel() as channel:
        method = channel.stream_stream(wire.STREAM_METHOD)
        while not report.over.is_set():
            messages = [random.randbytes(random.choice((10, 205, 4000, 20_000))) for _ in range(40)]
            try:
                answers = list(method(_slowly(messages, 0.05), timeout=2 * CALL_SECONDS))
            except grpc.RpcError as error:
                report.lost(_words(error))
            else:
                report.done() if answers == messages else report.lost("the answers aren't the stream's messages")


def cancels(gate: Gate, report: Report) -> None:
    """Calls that are cancelled a moment after their beginning, or somewhat later than their end."""
    with gate.channel() as channel:
        echo = channel.unary_unary(wire.METHOD)
        while not report.over.wait(0.05):
            call = echo.future(random.randbytes(random.choice((200, 60_000, 300_000))), timeout=CALL_SECONDS)
            time.sleep(random.choice((0, 0.001, 0.005, 0.02)))
            call.cancel()
            code = call.code()
            if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK):
                report.done()
            else:
                report.lost(f"{code}: {call.details()}")


def deadlines(gate: Gate, report: Report) -> None:
    """Calls whose client never says all: their deadline ends them."""
    with gate.channel() as channel:
        method = channel.stream_stream(wire.STREAM_METHOD)
        while not report.over.wait(0.05):
            told = threading.Event()
            messages = [bytes(random.choice((10, 5000, 30_000)))] * random.randint(0, 3)
            call = method(_unended(messages, told), timeout=random.choice((0.02, 0.1, 0.3, 1.0)))
            code = call.code()  # waits for the end
            told.set()
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                report.done()
            else:
                report.lost(f"{code}: {call.details()}")


def _slowly(messages: list[bytes], pause: float) -> Iterator[bytes]:
    for message in messages:
        yield message
        time.sleep(pause)


def _unended(messages: list[bytes], told: threading.Event) -> Iterator[bytes]:
    yield from messages
    told.wait()


def _words(error: grpc.RpcError) -> str:
    return f"{error.code()}: {error.details()}"


# -- raw connections


def bursts(gate: Gate, report: Report) -> None:
    """Many calls of one size at once, on a connection for that, with a pause behind it."""
    while not report.over.wait(random.uniform(0.2, 1.0)):
        size = random.choice(SIZES)
        calls, at_once = (300, 32) if size < 1000 else (40, 16) if size < _LARGE else (8, 4)
        connection = None
        try:
            connection = gate.connection(size, calls, at_once)
            _all_calls(connection, calls)
        except (Problem, OSError) as error:
            report.lost(f"bursts of {size} bytes: {type(error).__name__}: {error}")
        if connection is not None:
            report.done(len(connection.done))
            connection.tls.close()


def _all_calls(connection: Connection, calls: int) -> None:
    connection.tls.sock.setblocking(False)
    connection.due(calls, time.time())
    until = time.monotonic() + CALL_SECONDS
    while connection.open_calls:
        if time.monotonic() > until:
            raise Problem(f"{connection.open_calls} calls not answered")
        unsent = [] if connection.flush() else [connection]
        select.select([connection], unsent, [], 0.2)
        connection.receive(time.time())


def visitors(gate: Gate, report: Report) -> None:
    """Connect, call once, and leave: in good order, or by a TCP reset."""
    while not report.over.wait(random.uniform(0.0, 0.2)):
        connection = None
        try:
            connection = gate.connection(random.choice(SIZES[:2]), 1, 1)
            connection.call()
            report.done()
        except (Problem, OSError) as error:
            report.lost(f"visitors: {type(error).__name__}: {error}")
        if connection is not None:
            if random.random() < 0.3:
                connection.tls.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.tls.sock.close()
            else:
                connection.tls.close()


def slow(gate: Gate, report: Report) -> None:
    """Answers of 600 KiB taken slowly, by the socket or by windows; both faster than what counts as not taken."""
    while not report.over.wait(0.5):
        try:
            _slow_socket(gate) if random.random() < 0.5 else _slow_window(gate)
            report.done()
        except (Problem, OSError, H2Error) as error:
            report.lost(f"slow: {type(error).__name__}: {error}")


def _slow_socket(gate: Gate) -> None:
    connection = gate.connection(_LARGE, 4, 4)
    try:
        connection.tls.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.tls.sock.setblocking(False)
        connection.due(4, time.time())
        until = time.monotonic() + 2 * CALL_SECONDS
        while connection.open_calls:
            if time.monotonic() > until:
                raise Problem(f"{connection.open_calls} calls not answered")
            connection.flush()
            time.sleep(0.1)
            connection.receive(time.time())
    finally:
        connection.tls.close()


def _slow_window(gate: Gate) -> None:
    client = gate.h2(window=random.choice((1000, 20_000, 100_000)))
    try:
        client.credit = False
        message = wire.message(random.choice(SIZES[1:]))
        stream = client.request(grpc_headers(wire.METHOD), end=False)
        client.send_all(stream, message)
        reply, taken = client.replies[stream], 0

        def more() -> bool:
            return reply.over or len(reply.body) > taken

        until = time.monotonic() + 2 * CALL_SECONDS
        while not reply.over:
            client.pump(more, "more of the answer", until - time.monotonic())
            time.sleep(0.02)
            if not reply.over:
                client.acknowledge(stream, len(reply.body) - taken)
                taken = len(reply.body)
        if bytes(reply.body) != message or reply.grpc_status != "0":
            raise Problem(f"{len(reply.body)} bytes of {len(message)}, then {reply.grpc_status}: {reply.grpc_message}")
    finally:
        client.close()


def resets(gate: Gate, report: Report) -> None:
    """Streams reset with a part of their request sent, or while their answer comes; and a whole call now and then."""
    while not report.over.wait(0.5):
        try:
            client = gate.h2(window=65_535)
            try:
                for _ in range(20):
                    _reset_some(client)
                    report.done()
                    if report.over.wait(0.1):
                        break
            finally:
                client.close()
        except (Problem, OSError, H2Error) as error:
            report.lost(f"resets: {type(error).__name__}: {error}")


def _reset_some(client: H2Client) -> None:
    part = wire.message(30_000)[: random.choice((5, 3000, 16_000))]
    opened = [client.request(grpc_headers(wire.METHOD), part, end=random.random() < 0.5) for _ in range(2)]
    if random.random() < 0.5:
        client.settle()
    for stream in opened:
        if not client.replies[stream].over:
            client.h2.reset_stream(stream, 8)
    client.flush()
    whole = wire.message(205)
    reply = client.finish(client.request(grpc_headers(wire.METHOD), whole), CALL_SECONDS)
    if bytes(reply.body) != whole or reply.grpc_status != "0":
        raise Problem(f"{len(reply.body)} bytes, then {reply.grpc_status}: {reply.grpc_message}, reset {reply.reset}")


KINDS: dict[str, tuple[Callable[[Gate, Report], None], int]] = {
    # kind -> what one of them does, and how many there are
    "unary": (unary, 2),
    "streams": (streams, 2),
    "bursts": (bursts, 2),
    "visitors": (visitors, 3),
    "slow": (slow, 2),
    "resets": (resets, 1),
    "cancels": (cancels, 1),
    "deadlines": (deadlines, 2),
}


def _call(kind: str, port: int, certificate: Path) -> int:
    machine.raise_open_files()
    report = Report()
    gate = Gate(port, certificate.read_bytes())
    work, count = KINDS[kind]
    threads = [threading.Thread(target=work, args=(gate, report), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    while not select.select([sys.stdin], [], [], 1.0)[0] and all(thread.is_alive() for thread in threads):
        report.tell()
    if not all(thread.is_alive() for thread in threads):
        report.lost("a client of this kind has ended by itself")
    report.over.set()
    for thread in threads:
        thread.join(2.0)
    report.tell()
    return 0


class _FromElsewhere(socket.socket):
    """The attackers' sockets: what they spoil for their own address is not to spoil it for the good clients."""

    def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        # The port is chosen when connected, as otherwise: each may then be used for several targets.
        self.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        self.bind((ATTACKER, 0))
        super().connect(address)


def _attack(name: str, port: int, seconds: str) -> int:
    socket.socket = _FromElsewhere  # type: ignore[misc]
    sys.argv = ["attack", name, f"127.0.0.1:{port}", seconds]
    return attack_kinds.main()


def main() -> int:
    if sys.argv[1] == "attack":
        return _attack(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    return _call(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))


if __name__ == "__main__":
    sys.exit(main())
