"""The TLS transport of one client connection: OpenSSL between two memory buffers.

asyncio's own TLS protocol is not used, because it closes a failed handshake without sending the alert that tells the
client why, reports neither the reason nor the bytes of plaintext sent to the port, and keeps a read buffer for each
connection. This one reads into one buffer of the process, so that an idle connection holds little but OpenSSL's state.

It feeds what was decrypted to a Session and knows nothing of HTTP/2.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import monotonic, thread_time
from typing import cast

from proxy import transports
from proxy.http2 import Buffer
from proxy.tls import reasons
from proxy.tls.addresses import network
from proxy.tls.protocols import Host, Session
from proxy.tls.reasons import Reason
from proxy.tls.turns import SIZES, Turns

_READ_BYTES = SIZES[-1]
_MEASURED_BYTES = 512  # what is shorter can't take long
_VIEW_FROM = 16_384
_EMPTY_RECORDS = 100  # in the life of a connection: RFC 8446 section 5.5 wants a new key after 2^24 records
_RECORD_BYTES = 16_640  # the longest TLS record with its overhead
_PLAIN_BYTES = 16_384  # the most that one record carries
_WRITE_HIGH = 131_072
# A connection that has sent so often counts as settled, however young it is.
_SETTLED_READS = 100
_HELLO_BYTES = reasons.MAX_HELLO + 5
_LINGER_SECONDS = 1.0
_LINGER_TIMES = 30
_UNREAD_LIMIT = 4 * 1024 * 1024

# One buffer for all connections: the event loop fills it and calls buffer_updated before it asks for it again.
_read_buffer = memoryview(bytearray(_READ_BYTES))
_hello_buffer = _read_buffer[:_HELLO_BYTES]
_buffers = [_read_buffer[:size] for size in SIZES]
# What was decrypted of one read and of the record that it completed.
_plain_buffer = memoryview(bytearray(_READ_BYTES + _RECORD_BYTES))


class Shell(asyncio.BufferedProtocol):
    """See the module. `since` is when the connection was accepted, in the loop's time."""

    __slots__ = (
        "_buffer",
        "_closing",
        "_cut",
        "_empty_records",
        "_full_reads",
        "_got_data",
        "_hold",
        "_host",
        "_incoming",
        "_linger",
        "_outgoing",
        "_queued",
        "_read",
        "_start",
        "_tls",
        "_transport",
        "_turns",
        "_young",
        "idle_mark",
        "network",
        "peer_name",
        "session",
        "since",
    )

    def __init__(self, host: Host) -> None:
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._tls: ssl.SSLObject | None = None
        self._start = b""  # what has come for the next step of the handshake
        self._queued = False  # for that step
        self._young = _SETTLED_READS
        self._closing = False
        self._got_data = False
        self._linger: asyncio.TimerHandle | None = None
        self._turns: Turns | None = None
        self._buffer = _buffers[-1]
        self._full_reads = 0  # one after another
        self._empty_records = 0
        self.session: Session | None = None
        self._hold = 0.0
        self.peer_name = "?"
        self.network = ""  # the client's address, as far as clients are told apart by it
        self.since = 0.0
        self.idle_mark = 0  # for the listener: the last stream seen when it looked for idle connections

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        peer = transport.get_extra_info("peername")
        if peer:
            self.peer_name = f"{peer[0]}:{peer[1]}"
            self.network = network(peer[0])
        self._host.opened(self)

    def settle(self) -> None:
        """The connection has been there for a while: what it sends is work that handshakes make room for."""
        self._young = 0

    def get_buffer(self, sizehint: int) -> memoryview:
        return _hello_buffer if self.session is None else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            return
        host = self._host
        host.counters.downstream_received += nbytes
        if self._young:
            self._young -= 1
            host.unsettled(nbytes)
        if self.session is not None:
            began = host.begin()
            host.reads += 1
            if nbytes >= _MEASURED_BYTES:
                self._take_turn(self.session, nbytes, began)
            else:
                self._decrypt(self.session, _read_buffer[:nbytes])
                host.flush_soon()
        elif self._hold:
            self._held_back(bytes(_read_buffer[:nbytes]))
        else:
            self._begin(bytes(_read_buffer[:nbytes]))

    def _take_turn(self, session: Session, nbytes: int, began: float) -> None:
        """Work on a read, and see that it doesn't take the time of others."""
        host = self._host
        turns = self._turns
        if turns is None:
            turns = self._turns = Turns(host.reads - 1)
        exact = turns.suspect
        if exact:
            began = thread_time()
        full = nbytes == len(self._buffer)
        self._decrypt(session, _read_buffer[:nbytes])
        host.flush_soon()
        now = monotonic()
        spent = (thread_time() if exact else now) - began
        host.worked += spent
        pause = turns.note(spent, now, full, host.reads, host.worked)
        self._buffer = _buffers[turns.size]
        self._full_reads = self._full_reads + 1 if full else 0
        transport = self._transport
        if transport is None or self._closing:
            return
        if pause or turns.ends_turn(full, self._full_reads):
            self._full_reads = 0
            transports.let_others_read(transport, pause)

    def eof_received(self) -> None:
        """Closing a TCP connection without close_notify may cut a message short, but HTTP/2 frames say so."""
        if (self._tls is not None or self._start) and self.session is None and not self._closing:
            self._fail(reasons.CLOSED_BY_CLIENT)
        elif self.session is not None and not self._got_data and not self._closing:
            self._host.failed(self, reasons.NO_PREFACE)
            self._got_data = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._linger is not None:
            self._linger.cancel()
        if not self._closing:
            self._report_early_end()
        self._closing = True
        self._let_go_of_all()
        self._host.flush()
        self._host.closed(self)

    def _let_go_of_all(self) -> None:
        """What the connection holds, as soon as it ends: it is known for longer, to timers and while it lingers.

        The caller flushes.
        """
        session, self.session = self.session, None
        if session is not None:
            self._host.begin()
            session.lost()
            del self._read
        if self._tls is not None:
            self._tls = None
            del self._incoming, self._outgoing
        self._start = self._cut = b""

    def pause_writing(self) -> None:
        if self.session is not None:
            self.session.paused = True

    def resume_writing(self) -> None:
        if self.session is not None:
            self._host.begin()
            self.session.resume()
            self._host.flush()

    # -- the beginning

    def _begin(self, data: bytes) -> None:
        """Bytes of a handshake, or something that is no TLS at all. OpenSSL gets them when it is this one's turn."""
        self._start += data
        if self._queued:
            # Honest clients wait for an answer now. Not to read from the others leaves their end unnoticed till then.
            if self._transport is not None:
                self._transport.pause_reading()
        elif self._tls is not None or self._is_hello():
            self._queued = True
            self._host.handshakes.want(self)

    def _is_hello(self) -> bool:
        """The first record is whole. OpenSSL's state for a connection is large, a part of a ClientHello is not."""
        reason = reasons.of_start(self._start)
        if reason is None:
            return reasons.is_whole_hello(self._start)
        if self._transport is not None and (answer := reasons.ANSWERS.get(reason[0])):
            self._transport.write(answer)
        self._fail(reason)
        return False

    def step(self) -> None:
        """The next step of the handshake. The host says when, once for each time that it was asked."""
        self._queued = False
        transport = self._transport
        if self._closing or transport is None:
            return
        if self._tls is None:
            self._incoming = ssl.MemoryBIO()
            self._outgoing = ssl.MemoryBIO()
            self._tls = self._host.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._incoming.write(self._start)
        self._start = b""
        if not transport.is_reading():
            transport.resume_reading()
        self._handshake()

    def _handshake(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_outgoing()
        except ssl.SSLError as error:
            self._send_outgoing()  # the alert
            self._fail(reasons.of_error(error))
        else:
            self._established()

    def _established(self) -> None:
        assert self._tls is not None
        result = self._host.established(self, self._tls)
        if isinstance(result, tuple):
            self._say_close()
            self._fail(result)
            return
        # Given a buffer it returns how much it has put there.
        self._read = cast(Callable[[int, memoryview], int], self._tls.read)
        self.session = result
        self._host.handshakes.done(self)
        self._host.begin()
        self._cut = b""
        if self._incoming.pending:
            self._decrypt(result, self._incoming.read())  # what came right behind the handshake
        self._host.flush()
        if self._tls is not None:
            self._send_outgoing()  # the end of the handshake, where the session had nothing to say that took it along

    # -- data

    def _decrypt(self, session: Session, data: Buffer) -> None:
        """Hand all that can be decrypted to the session in one piece.

        OpenSSL gets one whole record at a time (RFC 8446 section 5.1: five bytes of header, the length in the last
        two) and the rest of a cut one waits here: a memory BIO keeps the size that it has once had, for as long as the
        connection lives, and asking it for a record that isn't whole costs an exception.
        """
        if self._cut:
            data = self._cut + data
            self._cut = b""
        pos, end, size = 0, len(data), 0
        alive = True
        feed, read = self._incoming.write, self._read
        while alive and end - pos >= 5:
            stop = pos + 5 + (data[pos + 3] << 8 | data[pos + 4])
            if stop > end and stop - pos <= _RECORD_BYTES:
                break
            feed(data[pos:stop])
            try:
                got = read(_RECORD_BYTES, _plain_buffer[size:] if size else _plain_buffer)
                size += got
                alive = got > 0  # it isn't at close_notify
            except ssl.SSLWantReadError:
                # A record without data for us, such as a key update, for which keys are derived.
                self._empty_records += 1
                if self._empty_records > _EMPTY_RECORDS:
                    self._host.empty_records(self, _EMPTY_RECORDS)
                    self._closing = True
                    self.abort()
                    return
            except ssl.SSLError as error:
                alive = False  # this is no TLS; an alert goes out
                if not self._got_data:
                    self._got_data = True
                    self._host.failed(self, reasons.of_error(error))
            pos = stop
        if pos < end:
            self._cut = bytes(data[pos:])
        if size:
            if not self._got_data:
                self._got_data = True
                self._host.proved(self)
            # A view holds until the flush behind this, which is all that the session asks for.
            plain = _plain_buffer[:size]
            if size < _VIEW_FROM:
                session.receive(bytes(plain))
            else:
                try:
                    session.receive(plain)
                finally:
                    # Whatever happens: output that is left would be read from the buffer when that has other data.
                    self._host.flush()
        if not alive:
            if not self._got_data:
                self._got_data = True
                self._host.failed(self, reasons.NO_PREFACE)
            self.close("the client ended TLS")

    def write(self, out: list[Buffer], size: int) -> None:
        """Encrypt and send; the pieces of one read leave in as few records as they fit into."""
        transport = self._transport
        if self._tls is None or self._closing or transport is None:
            return
        if self.session is not None and self.session.paused and transport.get_write_buffer_size() > _UNREAD_LIMIT:
            # DATA waits in the streams while the transport is full; these are answers and resets without end.
            self._host.unread(self, _UNREAD_LIMIT)
            self._closing = True
            transport.abort()
            return
        write = self._tls.write
        try:
            if size <= _PLAIN_BYTES:
                write(b"".join(out))
                record = self._outgoing.read()
                transport.write(record)
                self._host.counters.downstream_sent += len(record)
                return
            data = memoryview(b"".join(out))
            records = []
            sent = total = 0
            while sent < size:
                # A record at a time, for the sake of the BIO's size.
                sent += write(data[sent : sent + _PLAIN_BYTES])
                record = self._outgoing.read()
                total += len(record)
                records.append(record)
            transport.writelines(records)
            self._host.counters.downstream_sent += total
        except ssl.SSLError:
            # Nothing of ours makes OpenSSL refuse to encrypt; the connection is broken beyond repair.
            self._closing = True
            transport.abort()

    @property
    def unsent(self) -> int:
        """Bytes that the client's socket has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    @property
    def untaken(self) -> int:
        """Bytes that the client has not acknowledged."""
        return transports.untaken(self._transport) if self._transport is not None else 0

    def _send_outgoing(self) -> None:
        data = self._outgoing.read()
        if data and self._transport is not None:
            self._transport.write(data)
            self._host.counters.downstream_sent += len(data)

    # -- the end

    def _fail(self, reason: Reason) -> None:
        if not self._closing:
            self._host.failed(self, reason)
            self._finish_writing()

    def timed_out(self) -> None:
        """The handshake, or what must follow it, takes too long. A session that there is already ends by itself."""
        if self._closing:
            return
        if not self._got_data:
            self._got_data = True
            self._host.failed(self, reasons.TIMEOUT)
        if self.session is None:
            self._closing = True
            self.abort()

    def close(self, why: str) -> None:
        """Send close_notify, then end the connection."""
        if self._closing:
            return
        if self.session is not None:
            self._say_close()
        self._finish_writing()

    def _say_close(self) -> None:
        """close_notify (RFC 8446 section 6.1)."""
        assert self._tls is not None
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # SSLWantReadError: the client's own has not come, and nobody waits for it
        self._send_outgoing()

    def hold(self, seconds: float) -> None:
        """Let the handshake wait for so long once its first bytes have come."""
        self._hold = seconds

    def _held_back(self, data: bytes) -> None:
        self._start += data
        if self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._hold, self._let_go)

    def _let_go(self) -> None:
        self._hold = 0.0
        if self._transport is not None and not self._closing:
            self._transport.resume_reading()
            self._begin(b"")

    def abort(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def _finish_writing(self) -> None:
        """Close our side and let the client read what was sent: closing at once, with input unread, would make the
        kernel send a reset that destroys the alert or GOAWAY on its way."""
        self._closing = True
        self._let_go_of_all()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._host.ending(self)
        if not transport.is_reading():
            transport.resume_reading()  # or the client's end would go unnoticed
        if transport.can_write_eof():
            transport.write_eof()
        self._linger_on(transport, _LINGER_TIMES, transport.get_write_buffer_size() + 1)

    def _linger_on(self, transport: asyncio.Transport, times: int, before: int) -> None:
        """Wait on while the client still takes what was sent, and once more for it to close its side."""
        loop = asyncio.get_running_loop()
        unsent = transport.get_write_buffer_size()
        if unsent == 0:
            self._linger = loop.call_later(_LINGER_SECONDS, transport.abort)
        elif times and unsent < before:
            self._linger = loop.call_later(_LINGER_SECONDS, self._linger_on, transport, times - 1, unsent)
        else:
            transport.abort()

    def _report_early_end(self) -> None:
        if self.session is None and (self._tls is not None or self._start):
            self._host.failed(self, reasons.CLOSED_BY_CLIENT)
        elif self.session is not None and not self._got_data:
            self._host.failed(self, reasons.NO_PREFACE)
