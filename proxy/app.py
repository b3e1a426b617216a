"""The composition root: makes the parts, joins them, runs them, and ends them in order. Decides nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import resource
import signal
import ssl
import sys
from collections.abc import Callable
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from proxy import __version__, identity
from proxy.admin import Admin
from proxy.config.apart import Checked
from proxy.listener import Listener
from proxy.relay.relay import Relay
from proxy.relay.upstream import Upstream
from proxy.spawn import spawn
from proxy.telemetry import log as log_setup
from proxy.telemetry.metrics import Counters, GateCollector
from proxy.tls.context import server_context
from proxy.upstream.embedded import EmbeddedBackend
from proxy.upstream.link import Link
from proxy.upstream.pool import Pool

_log = logging.getLogger("tensorgate")

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 78

_OTHER_FILES = 128  # upstream connections, listening sockets, the log, libraries
_POLL_SECONDS = 0.05
_LAST_WORDS_SECONDS = 1.5


class Gate:
    """A running gate."""

    def __init__(self, checked: Checked, context: ssl.SSLContext) -> None:
        self.settings = settings = checked.settings
        self.counters = Counters()
        self.relay = Relay(self.counters, settings.limits, settings.log.access, settings.timeouts)
        self.expiries = checked.expiries
        self.listener = Listener(
            settings, context, self.relay, self.counters, lambda: self.expiries.get("server", math.inf)
        )
        self.backend: EmbeddedBackend | None = None
        self.pool: Pool | None = None
        self.draining = False
        registry = CollectorRegistry()
        registry.register(
            GateCollector(
                self.counters,
                self.listener.streams_open,
                lambda: self.listener.connections_open,
                self._upstreams,
                lambda: self.expiries,
            )
        )
        self.admin = Admin(settings.admin.address, registry, self.not_ready)

    async def start(self) -> None:
        """Start everything; OSError where an address can't be had. `stop` must be called in any case."""
        settings = self.settings
        # The ports first: a gate that can't have them must not have started anything.
        self.listener.bind()
        await self.admin.start()
        if settings.model_repository_path is not None:
            self.backend = EmbeddedBackend(settings.model_repository_path, settings.backend, settings.log.level)
            await self.backend.start()
            address = self.backend.address
        else:
            assert settings.upstream is not None
            address = settings.upstream.grpc
        limits = settings.limits
        self.pool = self.relay.pool = Pool(
            address,
            self._new_link,
            self.relay.begin,
            self.relay.flush,
            max_connections=limits.upstream_connections,
            max_waiting=limits.pending_requests,
            connect_timeout=settings.timeouts.connect,
            starting=self.backend is not None,
        )
        self.pool.start()
        await self.listener.start()

    async def stop(self, hurry: bool) -> None:
        """End everything that was started; hurry: without waiting for the embedded backend to finish its work."""
        self.listener.stop_accepting()
        if self.pool is not None:
            self.relay.begin()
            self.pool.close()
            self.relay.flush()
        self.listener.close_all()
        await self.until(lambda: self.listener.connections_open == 0, _LAST_WORDS_SECONDS)
        self.listener.abort()
        await self.admin.stop()
        if self.backend is not None:
            await self.backend.stop(hurry)

    async def drain(self, delay: float) -> None:
        """Say that the end is near, keep serving for `delay` seconds, then let calls finish, within drain.timeout."""
        self.draining = True
        _log.info("draining: %d calls under way", self.listener.streams_open())
        self.listener.drain()
        await asyncio.sleep(delay)
        self.listener.stop_accepting()
        self.listener.refuse_new()
        finished = await self.until(lambda: self.listener.busy() == 0, self.settings.drain.timeout)
        if not finished:
            _log.warning(
                "cut off after %g s (drain.timeout): %d connections with calls or unread answers",
                self.settings.drain.timeout,
                self.listener.busy(),
            )

    def not_ready(self) -> str:
        """Why no calls should be sent here, or ""."""
        if self.draining:
            return "draining"
        if self.pool is None or not self.pool.ready:
            return f"upstream {self.pool.address}: {self.pool.last_error}" if self.pool else "starting"
        return ""

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Poll a condition; False when it didn't come true in time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not condition():
            if loop.time() >= end:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def _new_link(self, pool: Pool) -> Link:
        relay = self.relay
        return Link(lambda: Upstream(relay, pool), self.counters, relay.begin, relay.flush_read, pool.lost)

    def _upstreams(self) -> list[tuple[str, int, int]]:
        pool = self.pool
        return [] if pool is None else [(str(pool.address), len(pool.links), pool.connecting)]


async def _run(checked: Checked, context: ssl.SSLContext) -> int:
    loop = asyncio.get_running_loop()
    stop: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.put_nowait, number)
    loop.add_signal_handler(signal.SIGHUP, _log.warning, "HUP: certificates are read at the start only; restart")
    loop.set_exception_handler(_unexpected)
    gate = Gate(checked, context)
    hurry = False
    try:
        await gate.start()
        await _announce(gate, checked.warnings, stop)
        number = await stop.get()
        # Ctrl-C is a person who waits; TERM an orchestrator, which needs the delay to send its clients elsewhere.
        drain = spawn(gate.drain(gate.settings.drain.delay if number is signal.SIGTERM else 0), "drain")
        second = spawn(stop.get(), "second signal")
        await asyncio.wait((drain, second), return_when=asyncio.FIRST_COMPLETED)
        hurry = not drain.done()
        second.cancel()
        drain.cancel()
        return EXIT_OK
    except OSError as error:
        _log.error("%s", error)
        return EXIT_FAILURE
    finally:
        await gate.stop(hurry)
        _log.info("ended")


def _unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An error that nobody handled. Throttled: if a client can provoke it, it must not fill the disk as well."""
    error = context.get("exception")
    log_setup.throttled(logging.ERROR, "internal errors", "internal error: %s", context.get("message"), error=error)


async def _announce(gate: Gate, warnings: list[str], stop: asyncio.Queue[signal.Signals]) -> None:
    """Say what is served. With the embedded backend, once it answers: a line that says ready must be true."""
    settings = gate.settings
    for warning in warnings:
        _log.warning("%s", warning)
    if settings.tls.client_auth == "none":
        _log.warning("tls.client_auth is none: whoever reaches the port may call every model")
    if gate.backend is not None:
        await gate.until(lambda: not gate.not_ready() or not stop.empty(), math.inf)
    if not stop.empty():
        return
    gc.collect()
    gc.freeze()  # what was made at the start stays: the collector needn't look at it again
    host = settings.host or "*"
    name = f"[{host}]" if ":" in host else host
    _log.info(
        "tensorgate %s ready: grpc on %s:%d, admin on %s, upstream %s",
        __version__,
        name,
        gate.listener.port,
        gate.admin.bound,
        gate.pool.address if gate.pool else "none",
    )


def _raise_file_limit(connections: int) -> None:
    """Every connection is a file descriptor, and shells start programs with 1,024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < wanted:
        _log.warning(
            "limits.connections is %d, but only %d files may be open; raise that (ulimit -n) or lower the limit",
            connections,
            soft,
        )


def serve(checked: Checked) -> int:
    """Run a gate until it is told to end; the exit code."""
    settings = checked.settings
    try:
        context = server_context(settings.tls)
    except (OSError, ValueError) as error:
        print(f"tls: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_CONFIG
    lines = log_setup.start(settings.log.level, settings.log.format)
    _raise_file_limit(settings.limits.connections)
    if settings.tls.client_auth != "none":
        identity.prepare()
    try:
        return uvloop.run(_run(checked, context))
    finally:
        lines.stop()
