"""The backend's process: bind, load the models, listen, serve, and end in good order.

The addresses are taken before the models are loaded, so that it is known at once whether they can be had; connections
are taken only afterwards, as Triton does: who gets a connection gets answers, and a gate in front is ready once it has
one. Only the metrics are there from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from proxy.backend.budget import Budget, default_limit
from proxy.backend.control import Control
from proxy.backend.errors import LoadError
from proxy.backend.looplag import LoopLag
from proxy.backend.metrics import MetricsServer
from proxy.backend.repository import Repository
from proxy.backend.services import health, inference
from proxy.backend.services.call import Call
from proxy.backend.services.http2 import Connections, ServerProtocol
from proxy.backend.services.rest import RestService
from proxy.backend.sockets import SocketFile, listen
from proxy.config.model import Address
from proxy.spawn import spawn
from proxy.telemetry import log

_log = logging.getLogger("tensorgate.backend")
_GRACE = 20.0  # seconds for requests that are running when the end is asked for
_FINALIZE = 5.0  # seconds for the models' finalize
_BACKLOG = 1024
# Seconds after which a model's thread that runs Python gives way to the event loop: a tenth of Python's own.
_SWITCH = 0.0005


@dataclass(frozen=True, slots=True)
class Options:
    """What to serve and where. most_bytes: of messages and tensors held for all, None for a share of the memory."""

    repository: Path
    grpc: Address
    http: Address | None = None
    metrics: Address | None = None
    control: Control = field(default_factory=Control)
    most_bytes: int | None = None
    exit_on_stdin_eof: bool = False
    log_level: str = "info"


class Backend:
    """The embedded backend inside a running event loop: `start`, `load`, `stop`."""

    def __init__(self, repository: Path, most_bytes: int | None = None, control: Control | None = None) -> None:
        self.budget = Budget(default_limit() if most_bytes is None else most_bytes)
        # Half for each: a model that hangs must not take the room of all others.
        self.repository = Repository(repository, control or Control(), self.budget.limit // 2)
        self._inference = inference.InferenceService(self.repository)
        self._health = health.HealthService([inference.SERVICE])
        self._connections = Connections({**self._inference.methods(), **self._health.methods()}, self.budget)
        self._rest = RestService(self.repository, lambda: self._inference.ready, self.budget)
        self._lag = LoopLag()
        self._metrics = MetricsServer(self.repository, self.budget, self._lag)
        self._servers: list[asyncio.Server] = []
        self._files: list[SocketFile] = []
        self._watch: asyncio.Task[None] | None = None

    async def start(self, address: Address, accept: bool = True) -> Address:
        """Bind for gRPC, and listen if `accept`; returns the address with its real port. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._lag.start()
        if address.is_unix:
            sock = self._bind(address)
            server = await loop.create_unix_server(self._protocol, sock=sock, backlog=_BACKLOG, start_serving=accept)
            self._servers.append(server)
            return address
        server = await loop.create_server(
            self._protocol, address.host or None, address.port, backlog=_BACKLOG, start_serving=accept
        )
        self._servers.append(server)
        return Address(address.host, server.sockets[0].getsockname()[1], "")

    async def start_http(self, address: Address, accept: bool = True) -> Address:
        """The same for REST."""
        return await self._rest.start(address, accept, self._bind(address) if address.is_unix else None)

    async def start_metrics(self, address: Address) -> Address:
        """The same for the metrics page, which is there at once."""
        return await self._metrics.start(address)

    async def accept(self) -> None:
        """Take connections from now on. Raises OSError when another process has begun to, meanwhile."""
        for server in self._servers:
            listen(server, _BACKLOG)
            await server.start_serving()
        await self._rest.accept()

    async def load(self) -> None:
        """Load the models; from then on the server is ready. Raises LoadError if there is no repository."""
        await self.repository.load()
        self._health.set_serving(not self._inference.stopping)
        self._watch = spawn(self.repository.watch(), "watch the repository")

    async def stop(self, grace: float = _GRACE) -> None:
        """Take no new connections, let calls that run end within so many seconds, finalize the models."""
        self._inference.stopping = True
        self._health.close()
        if self._watch is not None:
            self._watch.cancel()
        for server in self._servers:
            server.close()
        for connection in list(self._connections.open):
            connection.go_away()
        until = time.monotonic() + grace
        await asyncio.gather(self._rest.stop(grace), self._finish(grace))
        # The last answers may still be on their way to a client that reads slowly.
        left = max(until - time.monotonic(), 1.0)
        for connection in list(self._connections.open):
            connection.close(left)
        await self._connections.closed(left)
        for file in self._files:
            file.remove()
        await self._metrics.stop()
        self._lag.stop()
        await asyncio.to_thread(self.repository.close, _FINALIZE)

    def running(self) -> list[Call]:
        """The calls that have not ended yet."""
        return list(self._connections.calls)

    async def _finish(self, grace: float) -> None:
        if not await self._connections.idle(grace):
            _log.warning("%d calls were still running after %g s; they are cut off", len(self.running()), grace)

    def _bind(self, address: Address) -> socket.socket:
        file = SocketFile(Path(address.path))
        self._files.append(file)
        return file.bind()

    def _protocol(self) -> ServerProtocol:
        return ServerProtocol(self._connections)


def run(options: Options) -> int:
    """Serve a model repository until SIGTERM or SIGINT, or until standard input ends if that is asked for.

    Returns the exit code of the process: 0, or 1 if it couldn't listen or read the repository (the log says why).
    A second signal ends at once.
    """
    try:
        os.fstat(0)
    except OSError:
        # Closed: the event loop's own files would get the number 0, and be taken for standard input.
        os.open(os.devnull, os.O_RDONLY)
    sys.setswitchinterval(_SWITCH)
    # Not sys.stderr, which a model may close.
    lines = log.start(options.log_level, "text", open(2, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
    logging.getLogger().setLevel(options.log_level.upper())  # models have something to say, too
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(options))
    finally:
        lines.stop()


async def _serve(options: Options) -> int:
    end = _end_requested(options.exit_on_stdin_eof)
    backend = Backend(options.repository, options.most_bytes, options.control)
    bound = await _bind(backend, options)
    if bound is None:
        await backend.stop()
        return 1
    _log.info("backend loads the models of %s", options.repository)
    loading = spawn(_load(backend, bound), "load")
    ended = spawn(end.wait(), "end")
    await asyncio.wait([loading, ended], return_when=asyncio.FIRST_COMPLETED)
    failed = loading.done() and not loading.result()
    if not failed:
        await ended
    loading.cancel()
    _log.info("backend stops")
    await backend.stop()
    return 1 if failed else 0


async def _bind(backend: Backend, options: Options) -> dict[str, Address] | None:
    """Protocol -> the address where it will be served; None, with a line in the log, if one can't be had."""
    bound: dict[str, Address] = {}
    at = options.grpc
    try:
        bound["grpc"] = await backend.start(at, accept=False)
        if options.http is not None:
            at = options.http
            bound["http"] = await backend.start_http(at, accept=False)
        if options.metrics is not None:
            at = options.metrics
            bound["metrics"] = await backend.start_metrics(at)
    except OSError as error:
        _log.error("backend cannot listen on %s: %s", at, error.strerror or error)
        return None
    return bound


async def _load(backend: Backend, bound: dict[str, Address]) -> bool:
    try:
        await backend.load()
    except LoadError as error:
        _log.error("%s", error)
        return False
    try:
        await backend.accept()
    except OSError as error:
        _log.error("backend cannot listen on %s: %s", " and ".join(map(str, bound.values())), error.strerror or error)
        return False
    for protocol, address in bound.items():
        _log.info("backend listens: %s on %s", protocol, address)
    models = backend.repository.models.values()
    ready = sum(1 for model in models if model.latest is not None)
    _log.info("backend is ready: %d of %d models", ready, len(models))
    return True


def _end_requested(exit_on_stdin_eof: bool) -> asyncio.Event:
    """An event that is set by a signal, or by the end of standard input."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()

    def asked(number: int) -> None:
        if end.is_set():
            os._exit(128 + number)
        end.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)
    if exit_on_stdin_eof:
        threading.Thread(target=_await_eof, args=(loop, end), name="stdin", daemon=True).start()
    return end


def _await_eof(loop: asyncio.AbstractEventLoop, end: asyncio.Event) -> None:
    # A thread, because an event loop can't watch every kind of file: /dev/null and regular files are refused by epoll.
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass  # a terminal that hung up, say
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(end.set)
