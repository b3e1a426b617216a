"""The backend's HTTP/2 connections: the wire core of the gate in the server's role, and the transport that feeds it.

What came in one read is parsed as a whole and what goes out in one turn of the event loop is written at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Collection, Mapping
from typing import cast

from proxy import transports
from proxy.backend.budget import Budget
from proxy.backend.errors import Code, InferenceError
from proxy.backend.services.call import ENOUGH, Call
from proxy.backend.services.rpc import Facts, Method, serve, timeout
from proxy.http2 import (
    Backlog,
    Buffer,
    ConnectionFault,
    ErrorCode,
    RequestHead,
    Sender,
    ServerConnection,
    Stream,
    Trailers,
)
from proxy.http2.control import Control
from proxy.http2.guards import BUDGETS, OF_SERVERS, RESET
from proxy.http2.headers import INTERNED_BYTES
from proxy.spawn import spawn
from proxy.telemetry.log import throttled

MOST_STREAMS = 16_384
STREAM_WINDOW = 8 * 2**20
HEADER_LIST = 2**21  # bytes; gates send less
_MOST_FACTS = 512
_INTERVAL = 1.0  # seconds, see proxy.http2.guards
_READ_BYTES = 262_144
_VIEW_FROM = 16_384
_JOIN_BELOW = 65_536
_WRITE_BUFFER = 2**20
_UNREAD_LIMIT = 16 * 2**20
_LINGER = 1.0  # seconds for what is left to be written when a connection is closed for a fault
_PATIENCE = 20.0  # the same when it ends in good order

# A gate carries the calls of many clients, whose headers it has bounded and whose resets are not its own.
_BUDGETS = {**OF_SERVERS, RESET: 20 * BUDGETS[RESET]}

# One buffer for all connections: the event loop fills it and calls buffer_updated before it asks for it again.
_read_buffer = memoryview(bytearray(_READ_BYTES))


class Connections:
    """All that is open, for the server's end; and what connections share."""

    def __init__(self, methods: Mapping[bytes, Method], budget: Budget) -> None:
        self.open: set[ServerProtocol] = set()
        self.calls: set[Call] = set()
        self.budget = budget
        self._methods = methods
        self._facts: dict[RequestHead, Facts] = {}
        self.spenders = _Spenders()
        self._idle = asyncio.Event()

    def facts(self, head: RequestHead) -> Facts:
        """Of a header section; equal ones are the same object (proxy.http2.headers)."""
        found = self._facts.get(head)
        if found is None:
            if head.size > INTERNED_BYTES:
                return Facts(head, self._methods)  # it isn't the same object next time
            if len(self._facts) >= _MOST_FACTS:
                self._facts.clear()
            found = self._facts[head] = Facts(head, self._methods)
        return found

    def ended(self, call: Call) -> None:
        self.calls.discard(call)
        if not self.calls:
            self._idle.set()

    def lost(self, connection: ServerProtocol) -> None:
        self.open.discard(connection)
        if not self.open:
            self._idle.set()

    async def idle(self, seconds: float) -> bool:
        """Wait until no call is left, at most so long -> whether none is."""
        return await self._until_empty(self.calls, seconds)

    async def closed(self, seconds: float) -> bool:
        """The same for connections, from which answers may still be read."""
        return await self._until_empty(self.open, seconds)

    async def _until_empty(self, left: Collection[object], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while left:
            self._idle.clear()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._idle.wait()
            except TimeoutError:
                return False
        return True


class _Wake(list[Sender]):
    """Where a connection puts itself when it has output: which is written when this turn of the event loop is over."""

    def __init__(self, protocol: ServerProtocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()

    def append(self, sender: Sender) -> None:
        if not self._protocol.reading:
            self._loop.call_soon(self._protocol.flush)


class _Spenders(list[Control]):
    """Where a connection puts itself when it has used some of its budgets: which are full again a second later."""

    def append(self, sender: Control) -> None:
        if not self:
            asyncio.get_running_loop().call_later(_INTERVAL, self._refill)
        super().append(sender)

    def _refill(self) -> None:
        for sender in self:
            sender.refill()
        self.clear()


class Connection(ServerConnection):
    """One client's connection: streams are calls. `stalled`: those that have more to send than could be sent."""

    __slots__ = ("_shared", "stalled")

    def __init__(self, protocol: ServerProtocol, shared: Connections) -> None:
        self._shared = shared
        self.stalled: dict[Call, None] = {}
        super().__init__(_Wake(protocol), STREAM_WINDOW, MOST_STREAMS, HEADER_LIST)
        self.wire = protocol
        self.spenders = shared.spenders
        self._budgets = _BUDGETS

    def new_stream(self, stream_id: int) -> Call:
        call = Call(self, stream_id, self.stream_window, self.peer.initial_window, self._shared.budget)
        self._shared.calls.add(call)
        return call

    def on_request(self, call: Call, head: RequestHead, end: bool) -> None:  # type: ignore[override]
        facts = call.facts = self._shared.facts(head)
        if facts.refusal is not None:
            call.refuse(facts.refusal)
            return
        try:
            if facts.fault is not None:
                raise InferenceError(facts.fault.code, str(facts.fault))
            seconds = timeout(facts, call.passing)
        except InferenceError as error:
            call.end(error.code, str(error))
            return
        call.passing = None  # a call may last, and they may be many
        call.most = facts.method.most
        if seconds is not None:
            call.timeout = seconds
            call.deadline = time.monotonic() + seconds
            call.timer = asyncio.get_running_loop().call_later(seconds, call.expire)
        if end or facts.method.streams:
            call.task = spawn(serve(call), "call")

    def on_request_too_large(self, call: Call, limit: int) -> None:  # type: ignore[override]
        call.end(Code.RESOURCE_EXHAUSTED, f"the request's headers take more than {limit} bytes, which is the limit")

    def on_data(self, call: Call, chunk: Buffer, end: bool) -> None:  # type: ignore[override]
        if call.ended:
            return
        if chunk:
            try:
                call.feed(chunk)
            except InferenceError as error:
                call.end(error.code, str(error))
                call.stop()
                return
        if end:
            self._request_ended(call)

    def on_trailers(self, call: Call, trailers: Trailers) -> None:  # type: ignore[override]
        call.passing = None
        if not call.ended:
            self._request_ended(call)

    def _request_ended(self, call: Call) -> None:
        if call.facts.method.streams:
            call.end_of_request()
        else:
            call.task = spawn(serve(call), "call")

    def _backlog_sent(self, stream: Stream, backlog: Backlog) -> None:
        super()._backlog_sent(stream, backlog)
        call = cast(Call, stream)
        if call.has_more:
            self.stalled[call] = None

    def on_stream_closed(self, call: Stream) -> None:
        assert isinstance(call, Call)
        call.closed()
        self._shared.ended(call)
        if self.goaway_received and not self.streams:
            self.wire.close(_PATIENCE)

    def on_goaway(self, last_stream_id: int, code: int, debug: bytes) -> None:
        if not self.streams:
            self.wire.close(_PATIENCE)

    def drop_all(self) -> None:
        """The transport is gone."""
        self.closed = True
        for stream in list(self.streams.values()):
            self._remove(stream)

    def on_connection_fault(self, fault: ConnectionFault) -> None:
        throttled(logging.INFO, "connection errors", "%s: connection error: %s", self.wire.peer_name, fault.reason)


class ServerProtocol(asyncio.BufferedProtocol):
    """One connection's transport, registered in `connections` for as long as it lasts."""

    def __init__(self, connections: Connections) -> None:
        self._shared = connections
        self._closing = False
        self._abort: asyncio.TimerHandle | None = None
        self.reading = False
        self.peer_name = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        sock = transport.get_extra_info("socket")
        self.peer_name = "unix socket"
        if sock is not None and sock.family != socket.AF_UNIX:
            self.peer_name = str(transport.get_extra_info("peername"))
            # A client whose host has vanished says nothing any more.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        self.conn = Connection(self, self._shared)
        self._shared.open.add(self)
        self.flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = _read_buffer[:nbytes]
        conn = self.conn
        self.reading = True
        try:
            conn.receive(data if nbytes >= _VIEW_FROM else bytes(data))
        finally:
            self.reading = False
            self.flush()
        if conn.closed:
            self._end()
        elif nbytes == _READ_BYTES and not self.transport.is_closing():
            transports.let_others_read(self.transport)

    def flush(self) -> None:
        """Write what there is, as much as the transport takes."""
        conn = self.conn
        while True:
            if conn.blocked:
                conn.pump()
            if conn.stalled and not conn.paused:
                for call in list(conn.stalled):
                    if conn.out_size >= ENOUGH:
                        break
                    call.push()
            size = conn.out_size
            if not size:
                return
            out = conn.take_output()
            if self._closing or self.transport.is_closing():
                return
            if size < _JOIN_BELOW:
                self.transport.write(b"".join(out))
            else:
                self.transport.writelines(out)
            if conn.paused:
                # DATA and trailers wait in the streams meanwhile; these are heads, and what answers frames.
                if self.transport.get_write_buffer_size() > _UNREAD_LIMIT:
                    what = "%s left %d bytes unread; its connection is ended"
                    throttled(logging.INFO, "unread answers", what, self.peer_name, _UNREAD_LIMIT)
                    self.transport.abort()
                return

    def pause_writing(self) -> None:
        self.conn.paused = True

    def resume_writing(self) -> None:
        self.conn.resume()
        self.flush()

    def eof_received(self) -> None:
        pass  # the transport closes, and connection_lost cancels what runs

    def connection_lost(self, exc: BaseException | None) -> None:
        self._shared.lost(self)
        if self._abort is not None:
            self._abort.cancel()
        self.conn.drop_all()

    def go_away(self) -> None:
        """Ask the client to open no more streams here; those that are open go on."""
        if not self.conn.closed:
            self.conn.drain()

    def close(self, patience: float = _LINGER) -> None:
        """Cancel the calls and close the connection, once all is written, or so many seconds later."""
        conn = self.conn
        if self._closing:
            return
        if not conn.closed:
            conn.send_goaway(ErrorCode.NO_ERROR, "server is shutting down")
        self._end(patience)

    def _end(self, patience: float = _LINGER) -> None:
        for stream in list(self.conn.streams.values()):
            cast(Call, stream).stop()
        self.flush()
        self._closing = True
        self.transport.close()
        self._abort = asyncio.get_running_loop().call_later(patience, self.transport.abort)
