"""The backend's metrics page, for Prometheus: plain HTTP on an address of its own.

May not change anything: whoever reaches this port only reads. There is neither encryption nor a password, so it is no
page for a public address.
"""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest

from proxy.backend.budget import Budget
from proxy.backend.exposition import Exposition, Machine
from proxy.backend.httpconnections import Connection, Refusal
from proxy.backend.looplag import LoopLag
from proxy.backend.repository import Repository
from proxy.config.model import Address
from proxy.spawn import spawn
from proxy.web import web

# Not OpenMetrics, whatever the client would like best: there, a counter's name has to end in "_total".
_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_WHERE = "The metrics of this inference backend are at /metrics.\n"
_MOST_CONNECTIONS = 64  # each may hold a page that its client doesn't read, and a file that calls need, too
_PATIENCE = 10.0  # seconds in which a client has to send a request, or to take a page
_KEEP_ALIVE = 120.0  # seconds; longer than between two scrapes


class MetricsServer:
    """Serves `GET /metrics` from `start` to `stop`. The LoopLag is the caller's to start and stop."""

    def __init__(self, repository: Repository, budget: Budget, lag: LoopLag, patience: float = _PATIENCE) -> None:
        self._exposition = Exposition(repository, budget, lag)
        self._machine = Machine()
        self._patience = patience
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._page: asyncio.Task[bytes] | None = None

    async def start(self, listen: Address) -> Address:
        """Bind and serve; returns the address with its real port. Raises OSError."""
        if listen.is_unix:
            raise OSError(f"metrics cannot be served on {listen}: Prometheus reads from HOST:PORT only")
        app = web.Application()
        app.router.add_get("/metrics", self._send_metrics, allow_head=False)
        app.router.add_get("/", self._root, allow_head=False)
        runner = self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, listen.host or None, listen.port)
        return Address(listen.host, self._server.sockets[0].getsockname()[1], "")

    async def stop(self) -> None:
        """Give the address back; answers that are under way get a second."""
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def _protocol(self) -> asyncio.Protocol:
        server = self._runner.server if self._runner is not None else None
        if server is None or len(server.connections) >= _MOST_CONNECTIONS:
            return Refusal()
        loop = asyncio.get_running_loop()
        return Connection(server, self._patience, loop=loop, keepalive_timeout=_KEEP_ALIVE)

    async def _metrics(self, request: web.Request) -> web.Response:
        # Those who ask at the same time get the same page: neither its cost nor its bytes are a client's to multiply.
        if self._page is None or self._page.done():
            self._page = spawn(self._write(), "metrics page")
        return web.Response(body=await asyncio.shield(self._page), headers={"Content-Type": _TYPE})

    async def _send_metrics(self, request: web.Request) -> web.Response:
        response = await self._metrics(request)
        try:
            async with asyncio.timeout(self._patience):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _root(self, request: web.Request) -> web.Response:
        return web.Response(text=_WHERE)

    async def _write(self) -> bytes:
        parts = await self._exposition.write()
        parts.append(await asyncio.to_thread(self._read_files))
        return b"".join(parts)

    def _read_files(self) -> bytes:
        # In a thread: listing the open files of a server with thousands takes milliseconds, in the kernel.
        return self._machine.write() + generate_latest(self._process)
