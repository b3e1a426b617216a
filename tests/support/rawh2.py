"""A client on `h2` and a plain socket, for what no gRPC client would do: stop reading, change its settings, wait."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
from hyperframe.frame import Frame, GoAwayFrame

from tests.support.processes import LIVENESS

Headers = list[tuple[bytes, bytes]]


def grpc_headers(path: str, *extra: tuple[str, str], authority: str = "localhost") -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *extra,
    ]


def grpc_message(payload: bytes) -> bytes:
    """A length-prefixed message as gRPC has it on the wire, not compressed."""
    return b"\0" + len(payload).to_bytes(4, "big") + payload


@dataclass
class Reply:
    """What has come on one stream so far."""

    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    informational: list[dict[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None
    """Error code of an RST_STREAM, None where there was none."""

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    @property
    def grpc_status(self) -> str | None:
        return self.trailers.get("grpc-status", self.headers.get("grpc-status"))

    @property
    def grpc_message(self) -> str:
        return self.trailers.get("grpc-message", self.headers.get("grpc-message", ""))


class _Connection(h2.connection.H2Connection):
    """h2 takes a GOAWAY for the end of the connection; it only ends the opening of streams (RFC 9113 section 6.8)."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        result = super()._receive_goaway_frame(frame)
        if frame.error_code == 0:
            self.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN
        return result


class H2Client:
    """One HTTP/2 connection. `credit` tells whether what arrives is acknowledged at once."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        settings: dict[h2.settings.SettingCodes, int] | None = None,
        connection_window: int = 0,
        validate: bool = True,
    ) -> None:
        self.sock = sock
        self.credit = True
        self.replies: dict[int, Reply] = {}
        self.goaways: list[h2.events.ConnectionTerminated] = []
        self.pongs: list[bytes] = []
        self.settings_acknowledged = 0
        self.closed = False
        self.close_notify = False
        """Whether the peer ended TLS before it ended TCP."""
        config = h2.config.H2Configuration(
            header_encoding="utf-8", validate_outbound_headers=validate, normalize_outbound_headers=validate
        )
        self.h2 = _Connection(config)
        if settings:
            self.h2.local_settings = h2.settings.Settings(client=True, initial_values=settings)
        self.h2.initiate_connection()
        if connection_window:
            self.h2.increment_flow_control_window(connection_window)
        self.flush()

    # -- sending

    def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.sock.sendall(data)

    def request(self, headers: Iterable[tuple[str, str]], body: bytes = b"", *, end: bool = True) -> int:
        """Open a stream; `body` must fit the peer's windows. Returns the stream's id."""
        stream = self.h2.get_next_available_stream_id()
        self.replies[stream] = Reply()
        self.h2.send_headers(stream, list(headers), end_stream=end and not body)
        if body:
            self.h2.send_data(stream, body, end_stream=end)
        self.flush()
        return stream

    def send_all(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """Send as much as the peer's windows allow, reading in between, until all is gone or the reply is over."""
        view, reply = memoryview(body), self.replies[stream]
        while view:
            self.pump(lambda: reply.over or self.sendable(stream) > 0, "the peer's window to open")
            if reply.over:
                return
            piece = view[: self.sendable(stream)]
            view = view[len(piece) :]
            self.h2.send_data(stream, piece.tobytes(), end_stream=end and not view)
            self.flush()

    def sendable(self, stream: int) -> int:
        return min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)

    def acknowledge(self, stream: int, count: int) -> None:
        self.h2.acknowledge_received_data(count, stream)
        self.flush()

    # -- receiving

    def pump(self, done: Callable[[], bool], what: str, timeout: float = LIVENESS) -> None:
        """Read until `done()`. Raises TimeoutError naming `what`, ConnectionError where the peer closes before."""
        end = time.monotonic() + timeout
        while not done():
            if self.closed:
                raise ConnectionError(f"closed by the peer while waiting for {what}")
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"waited {timeout} s for {what}")
            self._read_once(left)

    def finish(self, stream: int, timeout: float = LIVENESS) -> Reply:
        """Wait for the end of a stream."""
        reply = self.replies[stream]
        self.pump(lambda: reply.over, f"the end of stream {stream}: {reply}", timeout)
        return reply

    def settle(self) -> None:
        """A PING there and back: what was sent before has been handled, what was sent to us before has been read."""
        before = len(self.pongs)
        self.h2.ping(b"settle..")
        self.flush()
        self.pump(lambda: len(self.pongs) > before, "the answer to a PING")

    def wait_closed(self, timeout: float = LIVENESS) -> None:
        end = time.monotonic() + timeout
        while not self.closed:
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError("the connection stays open")
            self._read_once(left)

    def close(self) -> None:
        self.sock.close()

    def _read_once(self, timeout: float) -> None:
        self.sock.settimeout(timeout)
        try:
            data = self.sock.recv(262144)
        except TimeoutError:
            return
        except (ConnectionError, ssl.SSLEOFError):
            self.closed = True
            return
        if not data:
            self.closed = self.close_notify = True
            return
        for event in self.h2.receive_data(data):
            self._handle(event)
        try:
            self.flush()
        except (OSError, ssl.SSLError):
            pass  # what the peer said before it closed is still to be read

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.PingAckReceived):
            self.pongs.append(event.ping_data)
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self.settings_acknowledged += 1
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaways.append(event)
        elif (reply := self.replies.get(getattr(event, "stream_id", None) or 0)) is not None:
            self._handle_stream(event, reply)

    def _handle_stream(self, event: h2.events.Event, reply: Reply) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            reply.headers = dict(event.headers)
        elif isinstance(event, h2.events.TrailersReceived):
            reply.trailers = dict(event.headers)
        elif isinstance(event, h2.events.InformationalResponseReceived):
            reply.informational.append(dict(event.headers))
        elif isinstance(event, h2.events.DataReceived):
            reply.body += event.data
            if self.credit and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            reply.ended = True
        elif isinstance(event, h2.events.StreamReset):
            reply.reset = event.error_code


def tls_socket(port: int, context: ssl.SSLContext, server_hostname: str = "localhost") -> ssl.SSLSocket:
    """A TLS connection to 127.0.0.1; raises ssl.SSLError where the handshake fails."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=LIVENESS)
    # As every real client does: otherwise small WINDOW_UPDATEs wait for the other side's delayed ACKs.
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        # Otherwise Python takes an end without close_notify for a clean one.
        return context.wrap_socket(plain, server_hostname=server_hostname, suppress_ragged_eofs=False)
    except BaseException:
        plain.close()
        raise


def tls_context(root: bytes, alpn: tuple[str, ...] = ("h2",)) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=root.decode())
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


Connect = Callable[..., H2Client]
"""`connect(gate, client=None, **options)`: an HTTP/2 connection to a gate through TLS."""
