"""The admin pages: /metrics for Prometheus, /livez and /readyz for orchestrators. Plain HTTP, loopback by default.

May not change anything: whoever reaches this port only reads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from proxy.config.model import Address
from proxy.web import web


class Admin:
    """not_ready: () -> why the gate isn't ready, or ""."""

    def __init__(self, address: Address, registry: CollectorRegistry, not_ready: Callable[[], str]) -> None:
        self._address = address
        self._registry = registry
        self._not_ready = not_ready
        self._runner: web.AppRunner | None = None
        self.bound = str(address)

    async def start(self) -> None:
        """Bind and serve. OSError where the address can't be had."""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        site: web.BaseSite
        if self._address.path:
            _remove_stale(self._address.path)
            site = web.UnixSite(self._runner, self._address.path)
        else:
            site = web.TCPSite(self._runner, self._address.host, self._address.port)
        await site.start()
        if not self._address.path:
            self.bound = str(Address(host=self._address.host, port=self._runner.addresses[0][1]))

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _livez(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        why = self._not_ready()
        return web.Response(status=503, text=why + "\n") if why else web.Response(text="ok\n")


def _remove_stale(path: str) -> None:
    """Remove a socket file, whose owner is gone: its port was tried before anything was started."""
    file = Path(path)
    if file.is_socket():
        file.unlink()
