"""The relay between clients whose bytes need no TLS and a backend on a real socket, all in one event loop.

Relay, pool, links and both HTTP/2 cores are the gate's own; what both far ends send and read is made of frames here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import hpack

from proxy.config.model import Address, Limits, Timeouts
from proxy.http2 import Buffer
from proxy.relay.downstream import Downstream
from proxy.relay.relay import Relay
from proxy.relay.upstream import Upstream
from proxy.telemetry.metrics import Counters
from proxy.upstream.link import Link
from proxy.upstream.pool import Pool
from tests.http2 import wire
from tests.http2.wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PREFACE,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    SETTINGS,
    TRAILERS,
    WINDOW_UPDATE,
    Fields,
    Frame,
)

LIVENESS = 10.0
VIEW_FROM = 16_384
SETTINGS_ACK = wire.frame(SETTINGS, ACK)
# What is derived from a header block is remembered for the life of the process, and with it whose numbers count it: one
# set of numbers for all tests here, and a field that no other test sends.
COUNTERS = Counters()
CALL: Fields = [*REQUEST, (b"user-agent", b"harness")]


def counted() -> list[int]:
    """How many calls have ended so far, by code."""
    return [sum(column) for column in zip(*[route.codes for route in COUNTERS.routes.values()], strict=True)]


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIVENESS
    while not condition():
        assert time.monotonic() < end, f"waited {LIVENESS} s for {what}"
        await asyncio.sleep(0.001)


async def settle(loops: int = 20) -> None:
    """Let whatever is on its way arrive."""
    for _ in range(loops):
        await asyncio.sleep(0.001)


def message(size: int) -> bytes:
    """A gRPC message with its prefix, of so many bytes in all; or none of it, where there is no room for that."""
    if size < 5:
        return b""
    return b"\0" + (size - 5).to_bytes(4, "big") + bytes(index * 7 % 251 for index in range(size - 5))


@dataclass
class Message:
    """What has come on one stream."""

    heads: list[Fields] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    def value(self, name: bytes) -> bytes | None:
        """A field of the last header section."""
        return dict(self.heads[-1]).get(name) if self.heads else None

    @property
    def status(self) -> int | None:
        value = self.value(b"grpc-status")
        return None if value is None else int(value)

    @property
    def words(self) -> str:
        return (self.value(b"grpc-message") or b"").decode()


class Inbox:
    """Frames as they come, and the messages that they make."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.messages: dict[int, Message] = {}
        self._decoder = hpack.Decoder(max_header_list_size=2**24)
        self._rest = b""
        self._block = b""

    def take(self, data: bytes) -> list[Frame]:
        self._rest += data
        new = []
        while len(self._rest) >= 9 and len(self._rest) >= (size := 9 + int.from_bytes(self._rest[:3], "big")):
            (item,) = wire.parse(self._rest[:size])
            self._rest = self._rest[size:]
            new.append(item)
            self._note(item)
        self.frames += new
        return new

    def of(self, kind: int, stream: int | None = None) -> list[Frame]:
        return [item for item in self.frames if item.kind == kind and stream in (None, item.stream)]

    def _note(self, item: Frame) -> None:
        if item.kind not in (DATA, HEADERS, CONTINUATION, RST_STREAM):
            return
        message = self.messages.setdefault(item.stream, Message())
        if item.kind == DATA:
            message.body += item.payload
        elif item.kind == RST_STREAM:
            message.reset = item.code
        else:
            self._block += item.payload
            if item.flags & END_HEADERS:
                decoded = self._decoder.decode(self._block, raw=True)
                message.heads.append([(bytes(name), bytes(value)) for name, value in decoded])
                self._block = b""
        message.ended |= item.ends


class Served(asyncio.Protocol):
    """One connection as the backend sees it."""

    def __init__(self, backend: Backend) -> None:
        self.inbox = Inbox()
        self.closed = False
        self._backend = backend
        self._encoder = hpack.Encoder()
        self._magic = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._backend.conns.append(self)
        if self._backend.greets:
            self.send(wire.settings(*self._backend.settings), wire.window_update(0, 2**30))

    def data_received(self, data: bytes) -> None:
        wanted = len(PREFACE) - len(self._magic)
        self._magic += data[:wanted]
        assert PREFACE.startswith(self._magic)
        for item in self.inbox.take(data[wanted:]):
            if self._backend.acknowledges and item.kind == SETTINGS and not item.flags & ACK:
                self.send(SETTINGS_ACK)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    @property
    def calls(self) -> dict[int, Message]:
        return self.inbox.messages

    def send(self, *frames: bytes) -> None:
        self._transport.write(b"".join(frames))

    def headers(self, stream: int, fields: Fields, end: bool = False) -> bytes:
        flags = END_HEADERS | (END_STREAM if end else 0)
        return wire.frame(HEADERS, flags, stream, self._encoder.encode(fields))

    def answer(self, stream: int, body: bytes = b"answer") -> None:
        self.send(self.headers(stream, RESPONSE), wire.data(stream, body), self.headers(stream, TRAILERS, end=True))

    def abort(self) -> None:
        self._transport.abort()

    async def call(self, stream: int = 1, whole: bool = True) -> Message:
        """The request on a stream, when all of it has come, or its head."""
        await until(lambda: stream in self.calls and (self.calls[stream].ended or not whole), f"a call on {stream}")
        return self.calls[stream]

    async def body(self, stream: int, size: int) -> None:
        """Wait until so much of a request has come, and no more."""
        await self.call(stream, whole=False)
        await until(lambda: len(self.calls[stream].body) >= size, f"{size} bytes on {stream}")
        assert len(self.calls[stream].body) == size


class Backend:
    """A server that sends what the test tells it to, and its SETTINGS by itself."""

    def __init__(self, *settings: tuple[int, int], acknowledges: bool = True) -> None:
        self.settings: Sequence[tuple[int, int]] = settings
        self.acknowledges = acknowledges
        self.greets = True  # sends its SETTINGS
        self.conns: list[Served] = []
        self.port = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(partial(Served, self), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop_listening(self) -> None:
        self._server.close()

    async def connection(self, number: int = 0) -> Served:
        await until(lambda: len(self.conns) > number, f"connection {number}")
        return self.conns[number]


class Output:
    """Where a client's connection writes, in place of TLS."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.closed = ""

    unsent = untaken = 0

    def write(self, out: list[Buffer], size: int) -> None:
        self._caller.inbox.take(b"".join(out))

    def close(self, why: str) -> None:
        self.closed = why

    def abort(self) -> None:
        raise AssertionError("an internal error while writing")


class Caller:
    """One client's connection."""

    def __init__(
        self, world: World, *settings: tuple[int, int], acknowledges: bool = True, address: str = "client"
    ) -> None:
        self.world = world
        self.inbox = Inbox()
        self.output = Output(self)
        self.conn = Downstream(world.relay, self.output, f"{address}:1", None)
        self._encoder = hpack.Encoder()
        self.feed(PREFACE, wire.settings(*settings), SETTINGS_ACK if acknowledges else b"")

    def feed(self, *frames: bytes) -> None:
        """Give the gate these bytes, as one read; a large one as the TLS shell does, in a buffer that is used again."""
        data = bytearray(b"".join(frames))
        self.world.relay.begin()
        self.conn.receive(memoryview(data) if len(data) >= VIEW_FROM else bytes(data))
        self.world.relay.flush()
        data[:] = b"\xee" * len(data)

    def head(self, stream: int, *extra: tuple[bytes, bytes], end: bool = False) -> bytes:
        flags = END_HEADERS | (END_STREAM if end else 0)
        return wire.frame(HEADERS, flags, stream, self._encoder.encode([*CALL, *extra]))

    def call(self, stream: int, body: bytes = b"request", *extra: tuple[bytes, bytes], end: bool = True) -> None:
        """A request in one read; `body` goes out in frames of the largest size."""
        pieces = [body[at : at + 16_384] for at in range(0, len(body), 16_384)]
        frames = [wire.data(stream, piece, end and index == len(pieces) - 1) for index, piece in enumerate(pieces)]
        self.feed(self.head(stream, *extra, end=end and not pieces), *frames)

    async def reply(self, stream: int) -> Message:
        messages = self.inbox.messages
        await until(lambda: stream in messages and messages[stream].over, f"the reply on {stream}")
        return messages[stream]

    def window(self, stream: int, sent: int) -> int:
        """How much more this client may send on a stream on which it has sent so much."""
        updates = sum(item.number for item in self.inbox.of(WINDOW_UPDATE, stream))
        return self.conn.first_window + updates - sent

    def alive(self) -> None:
        """Nothing has happened to the connection."""
        assert not self.conn.closed
        assert self.output.closed == ""
        assert self.inbox.of(GOAWAY) == []
        self.feed(wire.ping(b"is-alive"))
        assert self.inbox.frames[-1] == Frame(wire.PING, ACK, 0, b"is-alive")


class World:
    """A relay and its pool."""

    def __init__(self, port: int, limits: Limits, connect_timeout: float, ack_timeout: float) -> None:
        self.relay = Relay(COUNTERS, limits, False, Timeouts(handshake=ack_timeout))
        self.pool = self.relay.pool = Pool(
            Address("127.0.0.1", port),
            self._new_link,
            self.relay.begin,
            self.relay.flush,
            max_connections=limits.upstream_connections,
            max_waiting=limits.pending_requests,
            connect_timeout=connect_timeout,
        )
        self._clients: list[Caller] = []

    def client(self, *settings: tuple[int, int], acknowledges: bool = True, address: str = "client") -> Caller:
        self._clients.append(Caller(self, *settings, acknowledges=acknowledges, address=address))
        return self._clients[-1]

    def _new_link(self, pool: Pool) -> Link:
        relay = self.relay
        return Link(partial(Upstream, relay, pool), COUNTERS, relay.begin, relay.flush, pool.lost)

    async def end(self) -> None:
        for client in self._clients:
            self.relay.begin()
            client.conn.lost()
            self.relay.flush()
            conn = client.conn
            assert (conn.carried, conn.granted, conn.granted_requests) == (0, 0, 0)
            assert (conn.held_bytes, conn.queued, conn.stuck) == (0, 0, 0)
        assert len(self.relay.accounts) == 0
        self.pool.close()
        await until(lambda: not self.pool.links, "the connections upstream to end")
        assert self.relay.held_bytes == 0
        assert self.relay.kept_bytes == 0
        assert not self.relay.deadlines


async def asked(backend: Backend, world: World) -> tuple[Caller, Served]:
    """A client with a call, on stream 1, that the backend has; and the connection that it came on."""
    client = world.client()
    client.call(1)
    conn = await backend.connection()
    await conn.call()
    return client, conn


async def leave_without_room(backend: Backend, world: World, conn: Served) -> None:
    """The backend gives the one call back, and its next connections take none: the call waits."""
    backend.settings = [(wire.MAX_CONCURRENT_STREAMS, 0)]
    conn.send(wire.goaway(0))
    await until(lambda: world.pool.waiting == 1, "the call to wait")


@asynccontextmanager
async def joined(
    backend: Backend,
    *,
    connect_timeout: float = LIVENESS,
    ack_timeout: float = LIVENESS,
    ready: bool = True,
    **limits: int,
) -> AsyncIterator[World]:
    """A gate in front of this backend, and by default connected to it."""
    await backend.start()
    world = World(backend.port, Limits(**limits), connect_timeout, ack_timeout)
    world.pool.start()
    try:
        await until(lambda: not ready or bool(world.pool.ready), "the first connection upstream")
        yield world
        await world.end()
    finally:
        backend.stop_listening()
