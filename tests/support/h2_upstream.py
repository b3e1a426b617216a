"""A scripted HTTP/2 upstream on `h2`, one thread a connection, for what no real server can be made to do on demand:
never answer, refuse a stream, go away, change its settings, close in the middle of a message."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.settings

from tests.support.processes import wait_for

Pairs = Sequence[tuple[str, str]]
ANSWER: Pairs = ((":status", "200"), ("content-type", "application/grpc"))
OK: Pairs = (("grpc-status", "0"),)
_OPENING = (h2.events.WindowUpdated, h2.events.RemoteSettingsChanged)  # what may open a window


@dataclass
class Call:
    """One stream as the upstream sees it. Data that the gate's windows have no room for goes out as they open."""

    connection: UpstreamConnection
    stream: int
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None
    unsent: deque[tuple[bytes, bool]] = field(default_factory=deque)
    """(DATA, whether it ends the stream) that waits for a window."""
    trailers: Pairs | None = None
    """What comes behind that."""

    def answer(self, body: bytes = b"", headers: Pairs = ANSWER, trailers: Pairs = OK) -> None:
        """A whole answer."""
        with self.connection.lock:
            self.connection.h2.send_headers(self.stream, list(headers))
            if body:
                self.unsent.append((body, False))
            self.trailers = trailers
            self.pump()
            self.connection.flush()

    def send_headers(self, headers: Pairs = ANSWER, *, end: bool = False) -> None:
        with self.connection.lock:
            self.connection.h2.send_headers(self.stream, list(headers), end_stream=end)
            self.connection.flush()

    def send_data(self, data: bytes, *, end: bool = False) -> None:
        with self.connection.lock:
            self.unsent.append((data, end))
            self.pump()
            self.connection.flush()

    def send_reset(self, code: int) -> None:
        with self.connection.lock:
            self.drop()
            self.connection.h2.reset_stream(self.stream, code)
            self.connection.flush()

    def pump(self) -> None:
        """Send what the windows allow."""
        h2_connection = self.connection.h2
        while self.unsent:
            data, end = self.unsent[0]
            room = min(h2_connection.local_flow_control_window(self.stream), h2_connection.max_outbound_frame_size)
            if data and room <= 0:
                return
            last = len(data) <= room
            h2_connection.send_data(self.stream, data[:room], end_stream=end and last)
            if last:
                self.unsent.popleft()
            else:
                self.unsent[0] = data[room:], end
        if self.trailers is not None:
            trailers, self.trailers = self.trailers, None
            h2_connection.send_headers(self.stream, list(trailers), end_stream=True)

    def drop(self) -> None:
        """Forget what was not sent."""
        self.unsent.clear()
        self.trailers = None

    def grant(self, count: int) -> None:
        """Credit for the stream."""
        with self.connection.lock:
            self.connection.h2.increment_flow_control_window(count, self.stream)
            self.connection.flush()

    def wait_reset(self) -> int:
        wait_for(lambda: self.reset is not None, f"an RST_STREAM on upstream stream {self.stream}")
        assert self.reset is not None
        return self.reset

    def wait_ended(self) -> None:
        wait_for(lambda: self.ended, f"the end of the request on upstream stream {self.stream}")


class UpstreamConnection:
    def __init__(self, upstream: H2Upstream, sock: socket.socket) -> None:
        self.upstream = upstream
        self.sock = sock
        self.lock = threading.RLock()
        self.calls: dict[int, Call] = {}
        self.pings = 0
        self.goaways = 0
        self.closed = False
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        if upstream.settings:
            self.h2.local_settings = h2.settings.Settings(client=False, initial_values=upstream.settings)
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.sock.sendall(data)

    def go_away(self, last_stream: int | None = None, code: int = 0) -> None:
        with self.lock:
            self.h2.close_connection(code, last_stream_id=last_stream)
            # h2 refuses to send anything after a GOAWAY; a real server finishes the streams it has accepted.
            self.h2.state_machine.state = h2.connection.ConnectionState.SERVER_OPEN
            self.flush()

    def change_settings(self, settings: dict[h2.settings.SettingCodes, int]) -> None:
        with self.lock:
            self.h2.update_settings(dict(settings))
            self.flush()

    def grant_connection(self, count: int) -> None:
        """Credit for the connection as a whole, not for a stream."""
        with self.lock:
            self.h2.increment_flow_control_window(count)
            self.flush()

    def abort(self) -> None:
        """Close with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def close(self) -> None:
        # shutdown first: it ends a recv that waits in the connection's own thread.
        try:
            self.sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass
        self.sock.close()

    def serve(self) -> None:
        try:
            while data := self.sock.recv(262144):
                with self.lock:
                    events = self.h2.receive_data(data)
                    for event in events:
                        self._handle(event)
                    if any(isinstance(event, _OPENING) for event in events):
                        for call in self.calls.values():
                            call.pump()
                    self.flush()
        except OSError:
            pass
        finally:
            self.closed = True
            self.sock.close()

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            call = Call(self, event.stream_id, dict(event.headers))
            self.calls[event.stream_id] = call
            self.upstream.calls.append(call)
            self.upstream.on_request(call)
        elif isinstance(event, h2.events.DataReceived):
            self.calls[event.stream_id].body += event.data
            if self.upstream.credit and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            call = self.calls[event.stream_id]
            call.ended = True
            self.upstream.on_end(call)
        elif isinstance(event, h2.events.StreamReset):
            self.calls[event.stream_id].reset = event.error_code
            self.calls[event.stream_id].drop()
        elif isinstance(event, h2.events.PingReceived):
            self.pings += 1
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaways += 1


def _nothing(call: Call) -> None:
    pass


class H2Upstream:
    """Listens on 127.0.0.1; `on_request` is called when a request's headers are there, `on_end` when all of it is."""

    def __init__(
        self,
        on_request: Callable[[Call], None] = _nothing,
        on_end: Callable[[Call], None] = _nothing,
        settings: dict[h2.settings.SettingCodes, int] | None = None,
    ) -> None:
        self.on_request, self.on_end = on_request, on_end
        self.settings = settings or {}
        self.credit = True
        self.calls: list[Call] = []
        self.connections: list[UpstreamConnection] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = UpstreamConnection(self, sock)
            self.connections.append(connection)
            thread = threading.Thread(target=connection.serve, daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait_call(self, number: int = 0) -> Call:
        """The call that came as the `number`-th, counted from 0."""
        wait_for(lambda: len(self.calls) > number, f"request number {number} to reach the upstream")
        return self.calls[number]

    def stop(self) -> None:
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()
        for connection in list(self.connections):
            connection.close()
        end = time.monotonic() + 5
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


Script = Callable[..., H2Upstream]
"""`script(on_request, on_end, settings)` starts a scripted upstream."""
