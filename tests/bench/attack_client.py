"""The good client, a process of its own: one connection, small unary gRPC echo calls one after another.

    python -m tests.bench.attack_client HOST:PORT SECONDS

Prints "ready" once it is connected and warm, begins at a line on standard input, and ends with a line of JSON:
calls, lost, seconds, and p50, p99 and max of the latency in seconds. A call is lost when it is not answered with its
own bytes within `CALL_SECONDS`; the client then connects again and goes on.
"""

import contextlib
import json
import re
import socket
import ssl
import sys
import time

from proxy.http2 import frames

from .attack_wire import Address, headers, loopback, opening
from .load import PREFIX
from .measure import percentile

CALL_SECONDS = 5.0
WARM_CALLS = 200
BODY = PREFIX.pack(0, 200) + bytes(range(200))
_WINDOW = 2**30
_WORDS = re.compile(rb"[ -~]{6,}")  # what of a header block a reader can make sense of, undecoded


class Lost(Exception):
    """The call has no right answer; the message says why."""


class Client:
    """One connection; calls on it, one at a time."""

    def __init__(self, address: Address) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(address, timeout=CALL_SECONDS)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = context.wrap_socket(plain, server_hostname="localhost")
        self._sock.sendall(opening({4: _WINDOW}, _WINDOW))
        self._stream_id = -1
        self._window = frames.DEFAULT_WINDOW  # of the connection; one small body always fits a stream's
        self._partial = b""
        self._head = b""
        self._body = b""

    def call(self) -> None:
        """One call; Lost or OSError when it fails."""
        self._stream_id += 2
        while self._window < len(BODY):
            self._read(b"")
        self._window -= len(BODY)
        data = frames.frame(frames.DATA, frames.END_STREAM, self._stream_id, BODY)
        self._sock.sendall(headers(self._stream_id) + data)
        body = b""
        while (more := self._read(body)) is not None:
            body = more
        if self._body != BODY:
            words = " ".join(word.decode() for word in _WORDS.findall(self._head))
            raise Lost(f"an answer of {len(self._body)} bytes instead of the {len(BODY)} sent: {words or 'no words'}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def _read(self, body: bytes) -> bytes | None:
        """Read once -> the body so far, or None when the answer is complete and in `_body`."""
        data = self._sock.recv(65_536)
        if not data:
            raise Lost("the connection was closed")
        data = self._partial + data
        pos, done = 0, False
        while len(data) - pos >= 9:
            high, low, kind, flags, stream_id = frames.FRAME_HEADER.unpack_from(data, pos)
            stop = pos + 9 + (high << 8 | low)
            if stop > len(data):
                break
            payload = data[pos + 9 : stop]
            pos = stop
            if stream_id == self._stream_id and kind in (frames.DATA, frames.HEADERS):
                body = body + payload if kind == frames.DATA else body
                self._head = payload if kind == frames.HEADERS else self._head
                done = done or bool(flags & frames.END_STREAM)
            elif kind in (frames.RST_STREAM, frames.GOAWAY) and not done:
                raise Lost(f"frame type {kind}, code {frames.uint32(payload[-4:] if kind == 3 else payload, 0)}")
            else:
                self._other(kind, flags, stream_id, payload)
        self._partial = data[pos:]
        self._body = body
        return None if done else body

    def _other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == frames.WINDOW_UPDATE and stream_id == 0:
            self._window += frames.uint31(payload)
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            self._sock.sendall(frames.SETTINGS_ACK)
        elif kind == frames.PING and not flags & frames.ACK:
            self._sock.sendall(frames.ping_ack(payload))


class Calls:
    """Calls for a time, and what became of them."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client: Client | None = None
        self.latency: list[float] = []
        self.lost: list[str] = []

    def warm_up(self) -> None:
        for _ in range(WARM_CALLS):
            self._one()
        self.latency.clear()

    def run(self, seconds: float) -> dict[str, object]:
        began = time.monotonic()
        until = began + seconds
        while time.monotonic() < until:
            self._one()
        took = time.monotonic() - began
        ordered = sorted(self.latency) or [0.0]
        return {
            "calls": len(self.latency), "lost": len(self.lost), "why": self.lost[:3], "seconds": took,
            "p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99), "max": ordered[-1],
        }  # fmt: skip

    def _one(self) -> None:
        began = time.monotonic()
        try:
            if self._client is None:
                self._client = Client(self._address)
            self._client.call()
        except (OSError, Lost) as error:
            self.lost.append(f"{type(error).__name__}: {error}")
            if self._client is not None:
                self._client.close()
            self._client = None
            time.sleep(0.01)
        else:
            self.latency.append(time.monotonic() - began)


def main() -> int:
    calls = Calls(loopback(sys.argv[1]))
    calls.warm_up()
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(calls.run(float(sys.argv[2]))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
