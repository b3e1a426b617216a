"""The public port: accepts connections within limits.connections, gives each a TLS shell and, once its handshake
is done, a session; sees to it that handshakes end in time and that idle connections are closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial

from proxy import identity
from proxy.config.model import Settings
from proxy.http2 import ConnectionFault, ErrorCode
from proxy.identity import Identity
from proxy.memory import return_free_memory
from proxy.relay.downstream import Downstream
from proxy.relay.relay import Relay
from proxy.telemetry.log import throttled
from proxy.telemetry.metrics import Counters
from proxy.tls import reasons
from proxy.tls.reasons import Reason
from proxy.tls.shell import Session, Shell

_BACKLOG = 1024
_SWEEP_SECONDS = 1.0
_SLOW_START_SECONDS = 0.25
# How often memory that was freed is returned to the system, if there may be any: it takes a millisecond or a few.
_RETURN_SECONDS = 3.0
_NOT_SENT_BYTES = 131_072
_MUCH_CARRIED = 16_777_216


class Listener:
    """The gRPC port. Also what all its TLS shells share (tls.shell.Host)."""

    def __init__(
        self,
        settings: Settings,
        context: ssl.SSLContext,
        relay: Relay,
        counters: Counters,
        certificate_expiry: Callable[[], float],
    ) -> None:
        """certificate_expiry: () -> when the server certificate in use expires, in seconds since 1970."""
        self.context = context
        self._certificate_expiry = certificate_expiry
        self.relay = relay
        self.begin: Callable[[], None] = relay.begin
        self.flush: Callable[[], None] = relay.flush
        self.port = 0
        self._settings = settings
        self.counters = counters
        self._shells: dict[Shell, None] = {}
        self._handshaking: dict[Shell, None] = {}  # in the order of their beginning
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []  # bound, not accepting yet
        self._sweeper: asyncio.TimerHandle | None = None
        self._idle_since: dict[Shell, float] = {}
        self._returned = (0, 0, 0.0)  # connections closed, bytes carried and the time, when memory was returned

    # -- life

    def bind(self) -> None:
        """Take the port. OSError where the address can't be had."""
        self._sockets = bind(self._settings.host, self._settings.grpc_port)
        self.port = self._sockets[0].getsockname()[1]

    async def start(self) -> None:
        """Accept connections."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            sock.listen(_BACKLOG)
            server = await loop.create_server(partial(Shell, self), sock=sock, backlog=_BACKLOG)
            self._servers.append(server)
        self._sockets = []
        self._sweep()

    def stop_accepting(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []
        for server in self._servers:
            server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()

    def sessions(self) -> list[Downstream]:
        return [shell.session for shell in self._shells if isinstance(shell.session, Downstream)]

    @property
    def connections_open(self) -> int:
        return len(self._shells)

    def streams_open(self) -> int:
        return sum(len(session.streams) for session in self.sessions())

    def busy(self) -> int:
        """Connections with calls under way, or with answers that their client has not taken yet."""
        count = 0
        for shell in self._shells:
            session = shell.session
            if isinstance(session, Downstream) and (session.streams or shell.unsent):
                count += 1
        return count

    def drain(self) -> None:
        """Tell every client that the end is near; what they have begun or are about to is still served."""
        for session in self.sessions():
            session.drain()
        self.flush()

    def refuse_new(self) -> None:
        """Take no further calls, and close the connections that have none."""
        for shell in list(self._shells):
            session = shell.session
            if isinstance(session, Downstream):
                session.refuse_new()
        self.flush()
        self.close_idle()

    def close_idle(self) -> None:
        """Close connections without a call."""
        for shell in list(self._shells):
            session = shell.session
            if not isinstance(session, Downstream) or not (session.streams or shell.unsent):
                shell.close("shutting down")

    def close_all(self) -> None:
        """End what still runs: calls are answered, connections closed."""
        self.relay.begin()
        for shell in list(self._shells):
            if isinstance(shell.session, Downstream):
                shell.session.end_calls("the gate is shutting down")
        self.flush()
        for shell in list(self._shells):
            shell.close("shutting down")
        self.flush()

    def abort(self) -> None:
        for shell in list(self._shells):
            shell.abort()

    # -- tls.shell.Host

    def opened(self, shell: Shell) -> None:
        counters = self.counters
        counters.connections_total += 1
        if len(self._shells) >= self._settings.limits.connections:
            counters.connections_refused += 1
            throttled(
                logging.WARNING,
                "refused connections",
                "%s: refused, %d connections are open (limits.connections)",
                shell.peer_name,
                len(self._shells),
            )
            self._shells[shell] = None
            shell.abort()
            return
        shell.since = asyncio.get_running_loop().time()
        self._shells[shell] = None
        self._handshaking[shell] = None
        if self.relay.has_misbehaved(shell.peer_name):
            # Whoever was just cut off for abuse and comes again at once would have us do handshakes without end.
            shell.hold(_SLOW_START_SECONDS)

    def established(self, shell: Shell, tls: ssl.SSLObject) -> Session | Reason:
        if tls.selected_alpn_protocol() != "h2":
            return reasons.NO_ALPN
        client: Identity | None = None
        certificate = tls.getpeercert(binary_form=True)
        if certificate is not None:
            try:
                client = identity.from_certificate(certificate)
            except ValueError:
                return reasons.BAD_IDENTITY
        return Downstream(self.relay, shell, shell.peer_name, client)

    def proved(self, shell: Shell) -> None:
        """The first bytes have come behind the handshake: the client accepts our certificate and host name."""
        self.counters.handshakes["ok"] += 1

    def failed(self, shell: Shell, reason: Reason) -> None:
        if reason is reasons.CLOSED_BY_CLIENT and time.time() > self._certificate_expiry():
            reason = reasons.EXPIRED  # gRPC clients send no alert; but this they can't have liked
        label, words = reason
        self.counters.handshakes[label] += 1
        throttled(logging.WARNING, "failed handshakes", "%s: TLS: %s [%s]", shell.peer_name, words, label)

    def unread(self, shell: Shell, limit: int) -> None:
        throttled(logging.WARNING, "unread output", "%s: closed: it left %d bytes unread", shell.peer_name, limit)

    def closed(self, shell: Shell) -> None:
        self._shells.pop(shell, None)
        self._handshaking.pop(shell, None)
        self._idle_since.pop(shell, None)

    # -- time

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._sweeper = loop.call_later(_SWEEP_SECONDS, self._sweep)  # first, so that no error ends the sweeping
        self.relay.refill()
        for shell in list(self._handshaking):
            session = shell.session
            if isinstance(session, Downstream) and session.opened:
                del self._handshaking[shell]
            elif now - shell.since >= self._settings.timeouts.handshake:
                del self._handshaking[shell]
                self._end_late_handshake(shell)
        if self._settings.timeouts.idle:
            self._close_idle_ones(now)
        self._return_memory(now)

    def _return_memory(self, now: float) -> None:
        """Give the system back what a burst has left behind: the C library keeps it otherwise."""
        counters = self.counters
        closed, carried, since = self._returned
        closed_now = counters.connections_total - len(self._shells)
        carried_now = counters.downstream_received + counters.downstream_sent
        if now - since >= _RETURN_SECONDS and (closed_now > closed or carried_now - carried >= _MUCH_CARRIED):
            return_free_memory()
            self._returned = closed_now, carried_now, now

    def _end_late_handshake(self, shell: Shell) -> None:
        """TLS isn't finished in time, or HTTP/2's preface and SETTINGS, which trickle in or don't come at all."""
        shell.timed_out()
        session = shell.session
        if isinstance(session, Downstream):
            self.begin()
            session.fail(ConnectionFault(ErrorCode.SETTINGS_TIMEOUT, "no HTTP/2 preface within timeouts.handshake"))
            self.flush()

    def _close_idle_ones(self, now: float) -> None:
        """Connections that have had no call for timeouts.idle seconds get GOAWAY and are closed."""
        for shell in list(self._shells):
            session = shell.session
            if not isinstance(session, Downstream):
                continue
            seen = (session.last_remote_id, bool(session.streams or shell.unsent))
            if seen[1] or shell not in self._idle_since or shell.idle_mark != seen[0]:
                shell.idle_mark = seen[0]
                self._idle_since[shell] = now
            elif now - self._idle_since[shell] >= self._settings.timeouts.idle:
                session.refuse_new()
                self.flush()
                shell.close("idle")


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on a host's addresses, or on all of IPv4 and IPv6 where host is empty.

    With port 0 all of them get the same free port. OSError names the address that can't be had.
    """
    flags = socket.AI_PASSIVE
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = _bind_one(family, kind, protocol, (address[0], port, *address[2:]), optional=not host)
            if sock is not None:
                sockets.append(sock)
                port = sock.getsockname()[1]
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    if not sockets:
        raise OSError(f"no address to listen on for host {host!r}")
    return sockets


def _bind_one(
    family: int, kind: int, protocol: int, address: tuple[object, ...], optional: bool
) -> socket.socket | None:
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError:
        if optional:
            return None  # a kernel without IPv6
        raise
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these: a client whose host has vanished must not be kept for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20)
        # The kernel would take megabytes for a client that reads nothing, and that would pass for having been read.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOT_SENT_BYTES)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"can't listen on {address[0]} port {address[1]}: {error.strerror}") from None
    return sock
