"""The attacking process's sockets and bytes: connections that send as fast as the target takes it, prebuilt requests.

Loopback only: whoever connects here checks with `loopback` first.
"""

import contextlib
import ipaddress
import itertools
import random
import select
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from proxy.http2 import frames

from .load import METHOD

Address = tuple[str, int]

STEP_SECONDS = 0.1  # the longest wait before the clock is looked at again
HANDSHAKE_SECONDS = 5.0
_KEPT_CHUNKS = 2000
RECORD = 16_384  # bytes of a TLS record: chunks of about this size cost the attacker least

_GOAWAY_BYTES = 17  # of a GOAWAY frame, up to its code
_CODES = (
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
    "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
)  # fmt: skip


def loopback(text: str) -> Address:
    """HOST:PORT or [v6]:PORT -> (address, port). ValueError unless every address of the host is loopback."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{host}: {error.strerror}") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise ValueError(f"{host} is not a loopback address: attacks are for servers on this machine only")
    return addresses[0], int(port)


# -- bytes


def literal(name: bytes, value: bytes, index: bool = False) -> bytes:
    """A header field with a literal name (RFC 7541 section 6.2), put into the dynamic table if `index`."""
    return (b"\x40" if index else b"\x00") + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    length = len(text)
    if length < 0x7F:
        return bytes((length,)) + text
    length -= 0x7F
    out = bytearray((0x7F,))
    while length >= 0x80:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out) + text


# The fields of a gRPC request, without the dynamic table: the same block is good any number of times.
REQUEST = (
    b"\x83\x87"  # :method POST, :scheme https
    + b"\x04" + _string(METHOD.encode())
    + b"\x01" + _string(b"localhost")
    + b"\x0f\x10" + _string(b"application/grpc")
    + literal(b"te", b"trailers")
)  # fmt: skip


def headers(stream_id: int, block: bytes = REQUEST, end: bool = False) -> bytes:
    flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
    return frames.frame(frames.HEADERS, flags, stream_id, block)


def opening(settings: dict[int, int] | None = None, window: int = 0) -> bytes:
    """The client's preface; `window` bytes are added to the connection's receive window."""
    more = frames.window_update(0, window) if window else b""
    return frames.PREFACE + frames.settings(settings or {}) + more


# -- sockets


class Attack:
    """One run of an attack: the clock, and what is counted. `sent` are the units that the attack's rate is of."""

    def __init__(self, address: Address, seconds: float) -> None:
        self.address = address
        self.sent = 0
        self.connections = 0
        self.spread = False  # connections come from addresses all over 127.0.0.0/8
        self.endings: Counter[str] = Counter()
        self._until = time.monotonic() + seconds
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        self.context.set_alpn_protocols(["h2"])

    def alive(self) -> bool:
        return time.monotonic() < self._until

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, min(seconds, self._until - time.monotonic())))

    def plain(self, receive_buffer: int = 0) -> socket.socket | None:
        """A TCP connection, or None (counted) where the target takes none."""
        family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(HANDSHAKE_SECONDS)
        try:
            if self.spread and family == socket.AF_INET:
                sock.bind((f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}", 0))
            sock.connect(self.address)
        except OSError:
            self._refused("no TCP connection", sock)
            return None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections += 1
        return sock

    def connect(
        self, start: bytes, receive_buffer: int = 0, session: ssl.SSLSession | None = None
    ) -> "Link | None":
        """A TLS connection that has sent `start`, or None (counted) where the handshake fails."""
        sock = self.plain(receive_buffer)
        if sock is None:
            return None
        try:
            tls = self.context.wrap_socket(sock, server_hostname="localhost", session=session)
            tls.sendall(start)
        except OSError:
            self._refused("refused in the handshake", sock)
            return None
        tls.setblocking(False)
        return Link(self, tls)

    def _refused(self, ending: str, sock: socket.socket) -> None:
        """Counted; the pause is there because a loop that is refused at once would only burn the attacker's CPU."""
        if self.alive():
            self.endings[ending] += 1
        sock.close()
        self.sleep(0.002)


class Link:
    """One attacking connection; `open` until the target has closed it."""

    def __init__(self, attack: Attack, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self.open = True
        self.received: Callable[[bytes], None] | None = None  # for attacks that need more than GOAWAY
        self._attack = attack
        self._owes_ack = False
        self._heard = False
        self._goaway = ""
        self._skip = 0  # bytes left of a frame that is of no interest
        self._partial = b""
        self._how = ""
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN | select.POLLOUT)
        self._poll_out = select.poll()
        self._poll_out.register(sock, select.POLLOUT)

    def send(self, data: bytes, read: bool = True, whole: bool = True) -> bool:
        """Send all of it and, if `read`, take what has come; False when the connection or the time is over.

        `whole`: an ACK of the target's SETTINGS may go before the data, which is inside no frame or header block.
        """
        if self._owes_ack and whole:
            # Between whole frames, and not before the target's SETTINGS: some refuse an ACK that comes first.
            self._owes_ack = False
            data = frames.SETTINGS_ACK + data
        view = memoryview(data)
        while view and self.open:
            try:
                view = view[self.sock.send(view) :]
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if not self._attack.alive():
                    return False
                (self._poll if read else self._poll_out).poll(STEP_SECONDS * 1000)
                if read:
                    self.drain()
            except OSError as error:
                self.drain()  # GOAWAY may have come before the reset
                self._end("closed" if isinstance(error, ssl.SSLError) else "TCP reset")
        if read:
            self.drain()
        return self.open and self._attack.alive()

    def drain(self) -> bool:
        """Take what has come without waiting; whether the connection is still open."""
        while self.open:
            try:
                data = self.sock.recv(65_536)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                self._end("closed" if isinstance(error, ssl.SSLError) else "TCP reset")
                break
            if not data:
                self._end("closed")
                break
            self._look(data)
        return self.open

    def wait(self) -> bool:
        """Wait for input and take it; False when the connection or the time is over."""
        readable = select.poll()
        readable.register(self.sock, select.POLLIN)
        if not self.sock.pending():
            readable.poll(STEP_SECONDS * 1000)
        return self.drain() and self._attack.alive()

    def close(self) -> None:
        """Count how it ended; one that the target has not closed counts as still open."""
        how = self._how if not self.open else "still open"
        self._attack.endings[f"GOAWAY {self._goaway}, {how}" if self._goaway else how] += 1
        self.open = False
        self.sock.close()

    def _look(self, data: bytes) -> None:
        if not self._heard:
            self._heard = self._owes_ack = True
        if self.received is not None:
            self.received(data)
        data = self._partial + data
        self._partial = b""
        unpack = frames.FRAME_HEADER.unpack_from
        pos, end = self._skip, len(data)
        while end - pos >= 9:
            high, low, kind, _, _ = unpack(data, pos)
            stop = pos + 9 + (high << 8 | low)
            if kind == frames.GOAWAY:
                if end - pos < _GOAWAY_BYTES:
                    break
                code = frames.uint32(data, pos + 13)
                self._goaway = _CODES[code] if code < len(_CODES) else hex(code)
            pos = stop
        self._skip = max(0, pos - end)
        self._partial = data[pos:]

    def _end(self, how: str) -> None:
        self.open = False
        self._how = self._how or how


class Windows:
    """What the target allows on one connection, read from what it sends: for attacks that upload bodies."""

    def __init__(self, link: Link) -> None:
        self.initial = frames.DEFAULT_WINDOW
        self.connection = frames.DEFAULT_WINDOW
        self.max_streams = 100  # where the target announces none
        self.streams: dict[int, int] = {}
        self.settled = False
        self._partial = b""
        link.received = self._receive

    def of(self, stream_id: int) -> int:
        return min(self.connection, self.streams.get(stream_id, 0) + self.initial)

    def spend(self, stream_id: int, size: int) -> None:
        self.connection -= size
        self.streams[stream_id] = self.streams.get(stream_id, 0) - size

    def _receive(self, data: bytes) -> None:
        data = self._partial + data
        pos = 0
        while len(data) - pos >= 9:
            high, low, kind, flags, stream_id = frames.FRAME_HEADER.unpack_from(data, pos)
            stop = pos + 9 + (high << 8 | low)
            if stop > len(data):
                break
            if kind == frames.WINDOW_UPDATE:
                self._update(stream_id, frames.uint31(data, pos + 9))
            elif kind == frames.SETTINGS and not flags & frames.ACK:
                self._settings(data[pos + 9 : stop])
            pos = stop
        self._partial = data[pos:]

    def _update(self, stream_id: int, increment: int) -> None:
        if stream_id:
            self.streams[stream_id] = self.streams.get(stream_id, 0) + increment
        else:
            self.connection += increment

    def _settings(self, payload: bytes) -> None:
        self.settled = True
        for key, value in frames.parse_settings(payload):
            if key == 3:
                self.max_streams = min(value, 10_000)
            elif key == 4:
                self.initial = value


# -- ways to attack that several attacks share


def flood(
    attack: Attack,
    chunk: Callable[[int], bytes],
    units: int,
    start: bytes | None = None,
    read: bool = True,
    whole: bool = True,
) -> None:
    """Send chunk(0), chunk(1), … on a connection, as fast as it takes them; a new one as soon as it is closed.

    `units` of the attack's rate are in each chunk. Chunks are kept: a new connection begins with the same bytes.
    """
    kept: list[bytes] = []
    while attack.alive():
        link = attack.connect(opening() if start is None else start)
        if link is None:
            continue
        for number in itertools.count():
            if number < len(kept):
                data = kept[number]
            else:
                data = chunk(number)
                if number < _KEPT_CHUNKS:
                    kept.append(data)
            if not link.send(data, read, whole):
                break
            attack.sent += units
        link.close()


def ids(number: int, streams: int) -> Iterable[int]:
    """The stream identifiers of chunk `number`, where each chunk has `streams` of them; stream 1 is left free."""
    first = 3 + 2 * streams * number
    return range(first, first + 2 * streams, 2)


def hold(
    attack: Attack, count: int, opened: Callable[[], "Link | None"], turn: Callable[[Sequence[Link]], None], pace: float
) -> None:
    """Keep `count` connections open, replacing those that are closed, and let `turn` act on all every `pace` s."""
    links: list[Link] = []
    due = time.monotonic()
    while attack.alive():
        if len(links) < count and (link := opened()) is not None:
            links.append(link)
        if len(links) < count and time.monotonic() < due:
            continue
        attack.sleep(due - time.monotonic())
        due = time.monotonic() + pace
        turn(links)
        for link in [link for link in links if not link.drain()]:
            link.close()
            links.remove(link)
    for link in links:
        link.drain()
        link.close()


def close_quietly(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.close()
