"""RestService: listening, one request after the other on each connection, errors, the end."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

from proxy.backend.budget import Budget
from proxy.backend.errors import Code, InferenceError
from proxy.backend.httpconnections import Connection, Server
from proxy.backend.repository import Repository
from proxy.backend.services.rest.control import Control
from proxy.backend.services.rest.exchange import Exchange
from proxy.backend.services.rest.faults import HttpError
from proxy.backend.services.rest.generate import Generate
from proxy.backend.services.rest.infer import Infer
from proxy.backend.services.rest.routes import Route, Routes
from proxy.backend.sockets import listen as listen_on
from proxy.config.model import Address
from proxy.web import web

_log = logging.getLogger("tensorgate.backend")
_BACKLOG = 1024
_PATIENCE = 60.0  # seconds in which a client has to send, or to take, something
# Clients keep connections, and one that is closed just when it is used again fails a request: better too long.
_KEEP_ALIVE = 600.0
_LINGER = 2.0  # seconds for the rest of a body that is refused: a client that is cut off while it sends can't read why


class RestService:
    """HTTP/1.1 inside a running event loop. `ready` makes the server ready; `patience`: see Exchange."""

    def __init__(
        self, repository: Repository, ready: Callable[[], bool], budget: Budget, patience: float = _PATIENCE
    ) -> None:
        self._budget = budget
        self._patience = patience
        self._routes = _routes(repository, ready)
        self._http: Server | None = None
        self._listener: asyncio.Server | None = None
        self._running: dict[web.RequestHandler, asyncio.Task[object] | None] = {}
        self._stopping = False

    async def start(self, listen: Address, accept: bool = True, sock: socket.socket | None = None) -> Address:
        """Bind, and listen if `accept`; returns the address with its real port. Raises OSError.

        sock: for a unix socket, one that is bound to `listen` already.
        """
        loop = asyncio.get_running_loop()
        server = self._http = Server(self.handle)

        def connection() -> asyncio.Protocol:
            return _connection(server, self._patience)

        if listen.is_unix:
            self._listener = await loop.create_unix_server(
                connection, sock=sock, backlog=_BACKLOG, start_serving=accept
            )
            return listen
        self._listener = await loop.create_server(
            connection, listen.host or None, listen.port, backlog=_BACKLOG, start_serving=accept
        )
        return Address(listen.host, self._listener.sockets[0].getsockname()[1], "")

    async def accept(self) -> None:
        """Take connections from now on."""
        if self._listener is not None:
            listen_on(self._listener, _BACKLOG)
            await self._listener.start_serving()

    @property
    def running(self) -> int:
        """Requests that have not ended yet."""
        return len(self._running)

    async def stop(self, grace: float) -> None:
        """Take no new connections, let requests that run end within so many seconds, close everything."""
        self._stopping = True
        if self._http is None or self._listener is None:
            return
        self._listener.close()
        for connection in self._http.connections:
            if connection not in self._running:
                connection.force_close()
        until = time.monotonic() + grace
        while running := [task for task in self._running.values() if task is not None]:
            if (left := until - time.monotonic()) <= 0:
                _log.warning("%d HTTP requests were still running after %g s; they are cut off", len(running), grace)
                break
            await asyncio.wait(running, timeout=left)
        for task in list(self._running.values()):
            if task is not None:
                task.cancel()
        await self._http.shutdown(1.0)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The response to any request."""
        # aiohttp leaves what comes behind a request for an upgrade to the other protocol, which isn't spoken here.
        closing = self._stopping or "Upgrade" in request.headers
        exchange = Exchange(request, self._budget, self._patience, closing)
        connection = request.protocol
        self._running[connection] = asyncio.current_task()
        try:
            response = await self._answer(exchange)
            # Not left to aiohttp, which waits for ever for a client that takes nothing.
            return response if response.prepared else await exchange.finish(response)
        finally:
            exchange.release()
            del self._running[connection]

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        try:
            endpoint, model, version = self._routes.find(request.method, request.raw_path)
            _check_framing(exchange)
            return await endpoint(exchange, model, version)
        except InferenceError as error:
            return exchange.failure(error)
        except ConnectionError:
            raise  # the client is gone: there is nobody to tell
        except Exception:  # noqa: BLE001  (a fault of ours fails one request)
            _log.exception("%s %s failed", request.method, request.raw_path[:200])
            return exchange.failure(InferenceError(Code.INTERNAL, "internal error; see the log of the server"))


def _check_framing(exchange: Exchange) -> None:
    coding = exchange.header("Transfer-Encoding")
    if coding and coding.strip().lower() != "chunked":
        raise HttpError(501, f"Transfer-Encoding '{coding:.40}' is not supported; use chunked, and Content-Encoding")
    expected = exchange.header("Expect")
    if expected and expected.lower() != "100-continue":
        raise HttpError(417, f"Expect '{expected:.40}' is not supported; leave it out")


def _routes(repository: Repository, ready: Callable[[], bool]) -> Routes:
    control, infer, generate = Control(repository, ready), Infer(repository), Generate(repository)
    of_model: dict[str, Route] = {
        **control.of_model(),
        "infer": {"POST": infer},
        "generate": {"POST": generate.once},
        "generate_stream": {"POST": generate.stream},
    }
    return Routes(control.fixed(), of_model, control.of_repository())


class _Connection(Connection):
    """Whose own errors are JSON, too, and are no news to the log: any client can send what isn't HTTP."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionResetError("response cannot be completed")
        exchange = Exchange(request, Budget(0), 0.0, closing=True)
        text = " ".join(str(message or exc).split())[:200]
        return exchange.failure(HttpError(status, f"request is not valid HTTP: {text}"))


def _connection(server: Server, patience: float) -> asyncio.Protocol:
    return server.refusal() or _Connection(
        server,
        patience,
        loop=asyncio.get_running_loop(),
        keepalive_timeout=_KEEP_ALIVE,
        auto_decompress=False,  # without bounds that name themselves
        lingering_time=_LINGER,
    )
