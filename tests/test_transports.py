"""What a peer has not taken of what was written to it."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import uvloop

from proxy.transports import let_others_read, untaken


class Reader(asyncio.Protocol):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.sizes.append(len(data))
        let_others_read(self.transport)


async def pair() -> tuple[Reader, socket.socket]:
    """A TCP connection: our end, and the peer's, from which nothing is read."""
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(listener.getsockname())
    ours, _ = listener.accept()
    listener.close()
    _, protocol = await loop.connect_accepted_socket(Reader, ours)
    return protocol, peer


def test_what_the_kernel_holds_is_not_taken() -> None:
    async def run() -> None:
        ours, peer = await pair()
        total = 1_000_000
        ours.transport.write(bytes(total))
        await asyncio.sleep(0.05)
        in_our_buffer = ours.transport.get_write_buffer_size()
        left = untaken(ours.transport)
        assert in_our_buffer < left <= total
        assert left > 0.9 * total  # but for what the peer's socket has
        peer.settimeout(5)
        got = 0
        while got < total:
            got += len(await asyncio.to_thread(peer.recv, 65_536))
        for _ in range(200):
            if not untaken(ours.transport):
                break
            await asyncio.sleep(0.01)
        assert untaken(ours.transport) == 0
        peer.close()
        ours.transport.abort()
        await asyncio.sleep(0.01)
        assert untaken(ours.transport) == 0

    uvloop.run(run())


def test_reading_stops_for_a_turn_of_the_loop() -> None:
    async def run() -> None:
        ours, peer = await pair()
        peer.sendall(b"first")
        while not ours.sizes:
            await asyncio.sleep(0.001)
        peer.sendall(b"second")
        while sum(ours.sizes) < 11:
            await asyncio.sleep(0.001)
        peer.sendall(b"third")
        peer.close()
        while sum(ours.sizes) < 16:
            await asyncio.sleep(0.001)
        ours.transport.abort()

    uvloop.run(run())
