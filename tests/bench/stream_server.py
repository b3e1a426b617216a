"""The upstream of the row of streams: an h2c server that sends each piece of a request's body back as it comes.

    python -m tests.bench.stream_server PORT

It reads frames and nothing in them, and so costs less than any gRPC library would: what is measured is the proxy.
"""

import asyncio
import sys
from typing import cast

import uvloop

from . import wire

# :status 200 (static table), content-type: application/grpc; then grpc-status: 0. Neither touches the dynamic table.
_HEAD = b"\x88" + wire.integer(31, 4, 0) + wire.plain(b"application/grpc")
_TRAILERS = b"\x00" + wire.plain(b"grpc-status") + wire.plain(b"0")
_CREDIT_BYTES = 1 << 20


class EchoProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._data = b""
        self._preface = len(wire.PREFACE)
        self._owed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self._transport.write(wire.opening())

    def data_received(self, data: bytes) -> None:
        data = self._data + data
        if self._preface:
            if len(data) < self._preface:
                self._data = data
                return
            data, self._preface = data[self._preface :], 0
        out: list[bytes] = []
        pos = 0
        while len(data) - pos >= wire.FRAME_BYTES:
            high, low, kind, flags, stream = wire.FRAME.unpack_from(data, pos)
            stop = pos + wire.FRAME_BYTES + (high << 8 | low)
            if stop > len(data):
                break
            self._frame(kind, flags, stream, data[pos + wire.FRAME_BYTES : stop], out)
            pos = stop
        self._data = data[pos:]
        if out:
            self._transport.write(b"".join(out))

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes, out: list[bytes]) -> None:
        if kind == wire.HEADERS:
            out.append(wire.frame(wire.HEADERS, wire.END_HEADERS, stream, _HEAD))
        elif kind == wire.DATA and payload:
            out.append(wire.frame(wire.DATA, 0, stream, payload))
            self._owed += len(payload)
            if self._owed > _CREDIT_BYTES:
                # A stream's own window is a gibibyte, which no run uses up.
                out.append(wire.window_update(0, self._owed))
                self._owed = 0
        elif kind == wire.SETTINGS and not flags & wire.ACK:
            out.append(wire.frame(wire.SETTINGS, wire.ACK, 0))
        elif kind == wire.PING and not flags & wire.ACK:
            out.append(wire.frame(wire.PING, wire.ACK, 0, payload))
        if kind in (wire.HEADERS, wire.DATA) and flags & wire.END_STREAM:
            out.append(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, stream, _TRAILERS))


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(EchoProtocol, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
