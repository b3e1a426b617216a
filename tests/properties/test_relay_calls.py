"""Clients and an upstream that send anything, in any order: no exception leaves the relay, and each call is counted
once, whatever ends it. Deadlines pass, transports fill up and break, connections to the upstream come late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.config.model import Limits
from proxy.http2 import Buffer
from proxy.relay.call import Call
from proxy.relay.downstream import Downstream
from proxy.relay.relay import Relay
from proxy.relay.upstream import Upstream
from proxy.telemetry.metrics import Counters
from tests.http2 import wire
from tests.http2.wire import PREFACE, REQUEST, RESPONSE, TRAILERS, parse
from tests.properties.quick import quick
from tests.properties.traffic import any_frame, conversation

# What is derived from a header block is remembered for the life of the process, and with it whose numbers count it.
COUNTERS = Counters()
LIMITS = Limits(streams_per_connection=4, streams_per_upstream_connection=3, pending_requests=2, pending_bytes=20_000)


def counted() -> int:
    return sum(sum(route.codes) for route in COUNTERS.routes.values())


class Transport:
    """Where output goes, and the upstream's link."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = ""
        self.why = ""
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    unsent = untaken = 0

    def write(self, out: list[Buffer], size: int) -> None:
        data = b"".join(out)
        assert len(data) == size
        self.written += data

    def close(self, why: str, orderly: bool = False) -> None:
        self.closed = self.closed or why

    def abort(self) -> None:
        raise AssertionError("an internal error while writing")


class Pool:
    """A pool with one connection, or none."""

    address = "upstream:1"
    connect_timeout = 5.0
    max_waiting = LIMITS.pending_requests

    def __init__(self) -> None:
        self.conn: Upstream | None = None
        self.queue: list[Call] = []

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def pick(self, owner: object = None) -> Upstream | None:
        return self.conn if self.conn is not None and self.conn.room() > 0 else None

    def pick_other(self, refused_by: Upstream) -> Upstream | None:
        return self.pick()

    def wait(self, call: Call, refused_by: Upstream | None = None) -> bool:
        if len(self.queue) >= self.max_waiting:
            return False
        self.queue.append(call)
        return True

    def forget(self, call: Call) -> None:
        if call in self.queue:
            self.queue.remove(call)

    def serve(self) -> None:
        while self.queue and (conn := self.pick()) is not None:
            self.queue.pop(0).connected(conn)

    def has_places(self) -> bool:
        return self.pick() is not None

    def going_away(self, conn: Upstream) -> None:
        if self.conn is conn:
            self.conn = None


class World:
    def __init__(self) -> None:
        self.relay = Relay(COUNTERS, LIMITS, access_log=False)
        self.pool = Pool()
        self.relay.pool = self.pool  # type: ignore[assignment]
        self.calls = 0
        self.before = counted()
        self.clients = [self.client(), self.client()]
        self.upstreams: list[Upstream] = []

    def client(self) -> Downstream:
        world = self

        class Counted(Downstream):
            def new_stream(self, stream_id: int) -> Call:
                world.calls += 1
                return super().new_stream(stream_id)

        conn = Counted(self.relay, Transport(), "client:1", None)
        conn.receive(PREFACE + wire.settings())
        return conn

    def connect(self) -> None:
        conn = Upstream(self.relay, self.pool)  # type: ignore[arg-type]
        conn.link = conn.wire = Transport()  # type: ignore[assignment]
        conn.receive(wire.settings())
        self.upstreams.append(conn)
        self.pool.conn = conn
        self.pool.serve()

    def step(self, what: str, which: int, data: bytes, size: int) -> None:
        relay = self.relay
        relay.now += size / 1000
        client = self.clients[which % 2]
        if what == "client":
            client.receive(data)
        elif what == "call":
            stream = client.last_remote_id + 2 if client.last_remote_id else 1
            client.receive(beginning(stream, size // 2, which >= 2))
        elif what == "body" and client.streams:
            stream = list(client.streams)[which % len(client.streams)]
            client.receive([wire.data(stream, data, size % 4 == 0), head(stream, [(b"x", b"y")], True)][size % 7 == 0])
        elif what == "connect":
            if self.pool.conn is None:
                self.connect()
        elif what == "deadlines":
            for call in relay.deadlines.due(relay.now):
                call.expire()
        elif what == "waited" and self.pool.queue:
            self.pool.queue.pop(0).not_connected("refused")
        elif what == "pause":
            (self.upstreams[-1] if self.upstreams and which % 2 else client).paused = True
        elif what == "resume":
            for conn in [*self.clients, *self.upstreams]:
                conn.resume()
        elif what == "lost":
            client.lost()
            self.clients[which % 2] = self.client()
        elif what == "end":
            client.end_calls("the gate is shutting down")
        elif self.upstreams:
            self.upstream_step(what, self.upstreams[-1 - which % len(self.upstreams)], data)
        if size % 2:
            relay.flush()

    def upstream_step(self, what: str, conn: Upstream, data: bytes) -> None:
        if conn.closed:
            return
        if what == "upstream":
            conn.receive(data)
        elif what == "answer":
            for stream in list(conn.streams):
                conn.receive(answer(stream, data, len(data) + stream))
        elif what == "upstream lost":
            conn.closed = True
            conn.on_link_lost("the connection was closed")
            self.pool.going_away(conn)

    def finish(self) -> None:
        for conn in self.clients:
            conn.lost()
        for conn in self.upstreams:
            assert conn.streams == {}, "what ends a call ends its upstream stream"
            conn.closed = True
            conn.on_link_lost("the end")
        self.relay.flush()
        assert counted() - self.before == self.calls, "each call is counted once"
        assert self.relay.held_bytes == 0
        assert self.relay.kept_bytes == 0
        assert not self.relay.deadlines
        assert self.pool.queue == []
        for conn in [*self.clients, *self.upstreams]:
            assert conn.streams == {}
            assert conn.blocked == {}
            if not conn.server:
                assert conn.wire.written.startswith(PREFACE)
            parse(conn.wire.written)


def literals(fields: list[tuple[bytes, bytes]]) -> bytes:
    """A header block that touches no table, so that any number of them can be mixed."""
    out = b""
    for name, value in fields:
        out += b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
    return out


def head(stream: int, fields: list[tuple[bytes, bytes]], end: bool) -> bytes:
    return wire.frame(wire.HEADERS, wire.END_HEADERS | (wire.END_STREAM if end else 0), stream, literals(fields))


def answer(stream: int, data: bytes, kind: int) -> bytes:
    """A response of some kind, good or bad."""
    ok, status = head(stream, RESPONSE, False), [(b":status", b"200")]
    kinds = (
        head(stream, [*RESPONSE, *TRAILERS], True),
        head(stream, RESPONSE, True),
        head(stream, [(b":status", b"503")], False),
        head(stream, [*status, (b"content-type", b"text/html")], True),
        head(stream, [(b":status", b"103")], False) + ok + head(stream, TRAILERS, True),
        ok + wire.data(stream, data, end=True),
        ok + wire.data(stream, data),
        ok + head(stream, [(b"x", b"y")], True),
        ok + head(stream, [(b"Upper", b"y")], True),
        wire.rst_stream(stream, kind % 14),
        ok + wire.data(stream, data) + head(stream, TRAILERS, True),
        wire.data(stream, data) + head(stream, TRAILERS, True),
    )
    return kinds[kind % len(kinds)]


_HEADS = (
    REQUEST,
    [*REQUEST, (b"grpc-timeout", b"20m")],
    [*REQUEST, (b"grpc-timeout", b"900m")],
    [*REQUEST, (b"grpc-timeout", b"later")],
    [(name, b"/echo.Echo/Echo" if name == b":path" else value) for name, value in REQUEST],
    [(name, b"GET" if name == b":method" else value) for name, value in REQUEST],
    [(name, b"text/html" if name == b"content-type" else value) for name, value in REQUEST],
    [*REQUEST, (b"connection", b"close")],
    [*REQUEST, *[(b"x", b"v" * 100)] * 500],
)


def beginning(stream: int, kind: int, end: bool) -> bytes:
    """The start of a call of some kind, good or bad."""
    block = literals(_HEADS[kind % len(_HEADS)])
    parts = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
    flags = wire.END_STREAM if end else 0
    if len(parts) == 1:
        return wire.frame(wire.HEADERS, flags | wire.END_HEADERS, stream, block)
    out = wire.frame(wire.HEADERS, flags, stream, parts[0])
    for part in parts[1:-1]:
        out += wire.frame(wire.CONTINUATION, 0, stream, part)
    return out + wire.frame(wire.CONTINUATION, wire.END_HEADERS, stream, parts[-1])


pieces = (
    any_frame
    | st.builds(wire.goaway, st.sampled_from([0, 1, 3, 2**31 - 1]), st.integers(0, 14), st.binary(max_size=9))
    | st.builds(wire.data, st.sampled_from([1, 3, 5, 7, 9]), st.binary(max_size=3000), st.booleans())
    | st.builds(wire.settings, st.tuples(st.just(wire.INITIAL_WINDOW_SIZE), st.sampled_from([0, 10, 70_000])))
    | st.builds(wire.window_update, st.sampled_from([0, 1, 3, 5]), st.integers(1, 5000))
)
kinds = st.sampled_from(
    ["call"] * 6
    + ["body", "body", "client", "upstream", "answer", "answer", "answer", "connect", "connect", "deadlines"]
    + ["waited", "pause", "resume", "lost", "end", "upstream lost"]
)
steps = st.lists(st.tuples(kinds, st.integers(0, 3), pieces, st.integers(0, 500)), max_size=50)


async def run(given_steps: Iterator[tuple[str, int, bytes, int]]) -> None:
    world = World()
    for step in given_steps:
        world.step(*step)
    world.finish()


@quick
@given(steps)
def test_each_call_is_counted_once(given_steps: list[tuple[str, int, bytes, int]]) -> None:
    asyncio.run(run(iter(given_steps)))


@quick
@given(st.data())
def test_each_call_of_a_conversation_is_counted_once(data: st.DataObject) -> None:
    conversations: list[Any] = [data.draw(conversation(from_client=True)) for _ in range(2)]
    order = data.draw(steps)

    async def body() -> None:
        world = World()
        world.connect()
        for conn, text in zip(world.clients, conversations, strict=True):
            conn.receive(text[len(PREFACE) :])
            for step in order:
                if step[0] != "lost":
                    world.step(*step)
        world.finish()

    asyncio.run(body())


