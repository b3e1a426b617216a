"""The public port: accepts connections within their limits, gives each a TLS shell and, once its handshake is done,
a session; sees to it that handshakes end in time, that idle connections are closed, and that those which have ended
don't keep their files for long.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from proxy import identity
from proxy.config.model import Limits, Settings
from proxy.http2 import ConnectionFault, ErrorCode
from proxy.identity import Identity
from proxy.memory import return_free_memory
from proxy.relay.downstream import Downstream
from proxy.relay.relay import Relay
from proxy.spawn import spawn
from proxy.telemetry.log import throttled
from proxy.telemetry.metrics import EMPTY_RECORDS, STALLED_HANDSHAKE, UNREAD_OUTPUT, Counters
from proxy.tls import reasons
from proxy.tls.handshakes import Handshakes
from proxy.tls.protocols import Session
from proxy.tls.reasons import Reason
from proxy.tls.shell import Shell

_BACKLOG = 1024
_SWEEP_SECONDS = 1.0
_SLOW_START_SECONDS = 0.25
# From then on, or from its 100th read on, what a connection sends is work that handshakes make room for. What a new one
# sends is not: clients that come and go, or many that come at once, would hold each other up.
_SETTLED_SECONDS = 5.0
# While others have work, accepting pauses after so many connections: those that are refused, or say nothing sensible,
# cost a tenth of a millisecond each, and may come by the ten thousand a second.
_ACCEPTED_AT_ONCE, _PAUSE_SECONDS = 10, 0.01
# Connections that have ended, and whose clients may still read why: each keeps a file open, for 30 s at most.
_MOST_LINGERING = 256
# What isn't clients' connections: those to the upstream, the admin port's, the log, libraries.
_OTHER_FILES = 128
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
        self.begin: Callable[[], float] = relay.begin
        self.reads = 0
        self.worked = 0.0
        self.flush: Callable[[], None] = relay.flush
        self.flush_soon: Callable[[], None] = relay.flush_soon
        self.handshakes = Handshakes(self._work, self._give_up)
        self.port = 0
        self._settings = settings
        self.counters = counters
        self._most = settings.limits.connections
        self._shells: dict[Shell, None] = {}
        self._networks: dict[str, int] = {}  # -> how many of the shells come from there
        self._handshaking: dict[Shell, None] = {}  # or without HTTP/2's preface, in the order of their beginning
        self._unsettled: deque[Shell] = deque()  # with a session, in the order of their handshakes' ends
        self._unsettled_received = 0  # bytes
        self._lingering: dict[Shell, None] = {}
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._paused: asyncio.TimerHandle | None = None
        self._accepted = 0  # since the last pause
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
        self._most = _most_connections(self._settings.limits)
        await self._accept()
        self._sweep()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            # A copy: what waits to be accepted outlives the server that a pause ends.
            server = await loop.create_server(partial(Shell, self), sock=sock.dup(), backlog=_BACKLOG)
            self._servers.append(server)

    def _pause_accepting(self) -> None:
        self._accepted = 0
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._paused = asyncio.get_running_loop().call_later(_PAUSE_SECONDS, self._end_pause)

    def _end_pause(self) -> None:
        self._paused = None
        spawn(self._resume_accepting(), "accepting")

    async def _resume_accepting(self) -> None:
        try:
            await self._accept()
        except OSError:  # no file is left for the copy of a socket
            self._pause_accepting()

    def stop_accepting(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []
        for server in self._servers:
            server.close()
        for timer in (self._sweeper, self._paused):
            if timer is not None:
                timer.cancel()

    def sessions(self) -> list[Downstream]:
        return [shell.session for shell in self._shells if isinstance(shell.session, Downstream)]

    @property
    def connections_open(self) -> int:
        return len(self._shells)

    def streams_open(self) -> int:
        return sum(len(session.streams) for session in self.sessions())

    def busy(self) -> int:
        """Connections with calls under way, or with answers that their client has not taken yet."""
        return sum(self._is_busy(shell) for shell in self._shells)

    def _is_busy(self, shell: Shell) -> bool:
        session = shell.session
        return (isinstance(session, Downstream) and bool(session.streams)) or shell.unsent > 0

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
            if not self._is_busy(shell):
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
        self.counters.connections_total += 1
        refused = self._is_refused(shell)
        self._shells[shell] = None
        self._networks[shell.network] = self._networks.get(shell.network, 0) + 1
        self._accepted += 1
        if self._accepted >= _ACCEPTED_AT_ONCE:
            self._accepted = 0
            if self._paused is None and self._servers and self.handshakes.others_busy():
                self._pause_accepting()
        if refused:
            shell.abort()
            return
        shell.since = asyncio.get_running_loop().time()
        self._handshaking[shell] = None
        if self.relay.has_misbehaved(shell.peer_name):
            # Whoever was just cut off for abuse and comes again at once would have us do handshakes without end.
            shell.hold(_SLOW_START_SECONDS)

    def _is_refused(self, shell: Shell) -> bool:
        """Whether a limit keeps a new connection out, which is counted and logged."""
        limits = self._settings.limits
        there, from_there = len(self._shells), self._networks.get(shell.network, 0)
        if there >= self._most:
            limit = "connections" if self._most == limits.connections else "open_files"
        elif 0 < limits.connections_per_address <= from_there:
            limit = "connections_per_address"
        else:
            return False
        self.counters.connections_refused[limit] += 1
        throttled(
            logging.WARNING,
            "refused connections",
            "%s: refused, %d connections are open, %d of them from there (%s)",
            shell.peer_name,
            there,
            from_there,
            "ulimit -n" if limit == "open_files" else f"limits.{limit}",
        )
        return True

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
        self._unsettled.append(shell)
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
        self.counters.abuse[UNREAD_OUTPUT] += 1
        throttled(logging.WARNING, "unread output", "%s: closed: it left %d bytes unread", shell.peer_name, limit)

    def empty_records(self, shell: Shell, limit: int) -> None:
        self.counters.abuse[EMPTY_RECORDS] += 1
        self.relay.remember_abuse(shell.peer_name)
        throttled(logging.WARNING, "empty records", "%s: closed: %d TLS records without data", shell.peer_name, limit)

    def unsettled(self, received: int) -> None:
        self._unsettled_received += received

    def ending(self, shell: Shell) -> None:
        """It waits for its client to read the last words. Those that have waited longest make room."""
        self.handshakes.done(shell)
        self._lingering[shell] = None
        if len(self._lingering) > _MOST_LINGERING:
            oldest = next(iter(self._lingering))
            del self._lingering[oldest]
            oldest.abort()

    def closed(self, shell: Shell) -> None:
        self.handshakes.done(shell)
        self._shells.pop(shell, None)
        self._handshaking.pop(shell, None)
        self._lingering.pop(shell, None)
        self._idle_since.pop(shell, None)
        left = self._networks[shell.network] - 1
        if left:
            self._networks[shell.network] = left
        else:
            del self._networks[shell.network]

    # -- handshakes and the work of others

    def _work(self) -> int:
        """A number that grows with what settled connections send."""
        now = asyncio.get_running_loop().time()
        unsettled = self._unsettled
        while unsettled and now - unsettled[0].since >= _SETTLED_SECONDS:
            unsettled.popleft().settle()
        return self.counters.downstream_received - self._unsettled_received

    def _give_up(self, shell: Shell) -> None:
        """Its client leaves a handshake unfinished while others wait to begin theirs."""
        self.counters.abuse[STALLED_HANDSHAKE] += 1
        shell.timed_out()

    # -- time

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._sweeper = loop.call_later(_SWEEP_SECONDS, self._sweep)  # first, so that no error ends the sweeping
        self.relay.refill()
        self.handshakes.forget()
        self._work()  # also where nobody shakes hands
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


def _most_connections(limits: Limits) -> int:
    """limits.connections, or as many as the process may have open files, less those that it needs itself.

    With all of them taken, the gate could neither reach its upstream again nor show its metrics.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return limits.connections
    return min(limits.connections, max(files - _OTHER_FILES, files // 2))


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
