"""The backend's process: bind, load the models, listen, serve, and end in good order.

The address is taken before the models are loaded, so that it is known at once whether it can be had; connections are
taken only afterwards, as Triton does: who gets a connection gets answers, and a gate in front is ready once it has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import sys
import threading
from pathlib import Path

import uvloop

from proxy.backend.budget import Budget, default_limit
from proxy.backend.errors import LoadError
from proxy.backend.repository import Repository
from proxy.backend.services import health, inference
from proxy.backend.services.call import Call
from proxy.backend.services.http2 import Connections, ServerProtocol
from proxy.config.model import Address
from proxy.spawn import spawn

_log = logging.getLogger("tensorgate.backend")
_GRACE = 20.0  # seconds for requests that are running when the end is asked for
_FINALIZE = 5.0  # seconds for the models' finalize
_BACKLOG = 1024


def is_private(address: Address) -> bool:
    """Whether nothing outside this machine can connect: a unix socket or a loopback address.

    The backend has neither encryption nor access rules, which are the gate's part.
    """
    return address.is_loopback


class Backend:
    """The embedded backend inside a running event loop: `start`, `load`, `stop`.

    `most_bytes` bounds the messages that are held at a time, in both directions and for all clients.
    """

    def __init__(self, repository: Path, most_bytes: int | None = None) -> None:
        self.repository = Repository(repository)
        self._inference = inference.InferenceService(self.repository)
        self._health = health.HealthService([inference.SERVICE])
        self.budget = Budget(default_limit() if most_bytes is None else most_bytes)
        self._connections = Connections({**self._inference.methods(), **self._health.methods()}, self.budget)
        self._server: asyncio.Server | None = None
        self._socket_file: _SocketFile | None = None

    async def start(self, listen: Address, accept: bool = True) -> Address:
        """Bind, and listen if `accept`; returns the address with its real port. Raises OSError."""
        loop = asyncio.get_running_loop()
        if listen.is_unix:
            self._socket_file = _SocketFile(Path(listen.path))
            sock = self._socket_file.bind()
            self._server = await loop.create_unix_server(
                self._protocol, sock=sock, backlog=_BACKLOG, start_serving=accept
            )
            return listen
        self._server = await loop.create_server(
            self._protocol, listen.host or None, listen.port, backlog=_BACKLOG, start_serving=accept
        )
        return Address(listen.host, self._server.sockets[0].getsockname()[1], "")

    async def accept(self) -> None:
        """Take connections from now on."""
        if self._server is not None:
            await self._server.start_serving()

    async def load(self) -> None:
        """Load the models; from then on the server is ready. Raises LoadError if there is no repository."""
        await self.repository.load()
        self._health.set_serving(not self._inference.stopping)

    async def stop(self, grace: float = _GRACE) -> None:
        """Take no new connections, let calls that run end within so many seconds, finalize the models."""
        self._inference.stopping = True
        self._health.close()
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections.open):
            connection.go_away()
        if not await self._connections.idle(grace):
            _log.warning("%d calls were still running after %g s; they are cut off", len(self.running()), grace)
        for connection in list(self._connections.open):
            connection.close()
        if self._socket_file is not None:
            self._socket_file.remove()
        await asyncio.to_thread(self.repository.close, _FINALIZE)

    def running(self) -> list[Call]:
        """The calls that have not ended yet."""
        return list(self._connections.calls)

    def _protocol(self) -> ServerProtocol:
        return ServerProtocol(self._connections)


class _SocketFile:
    """A unix socket's file: for this user only, and gone when the server is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: tuple[int, int] | None = None

    def bind(self) -> socket.socket:
        self._remove_stale()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mask, not a chmod afterwards: in between anyone could connect.
        before = os.umask(0o177)
        try:
            sock.bind(str(self._path))
        except OSError:
            sock.close()
            raise
        finally:
            os.umask(before)
        found = self._path.stat()
        self._made = (found.st_dev, found.st_ino)
        return sock

    def _remove_stale(self) -> None:
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise OSError(f"{self._path} exists and is no socket; remove it or listen elsewhere")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a process that hangs accepts nobody
            error = probe.connect_ex(str(self._path))
        if error in (0, errno.EAGAIN):
            raise OSError(f"another process listens on unix:{self._path}; end it or listen elsewhere")
        if error not in (errno.ECONNREFUSED, errno.ENOENT):
            # Somebody else's, say: only what certainly has no listener is removed.
            raise OSError(error, f"cannot tell whether another process listens there ({os.strerror(error)})")
        self._path.unlink(missing_ok=True)

    def remove(self) -> None:
        # Only our own: another server may have taken the path over since.
        with contextlib.suppress(OSError):
            found = self._path.lstat()
            if (found.st_dev, found.st_ino) == self._made:
                self._path.unlink()


def run(repository: Path, listen: Address, *, exit_on_stdin_eof: bool, log_level: str) -> int:
    """Serve a model repository until SIGTERM or SIGINT, or until standard input ends if that is asked for.

    Returns the exit code of the process: 0, or 1 if it couldn't listen or read the repository (the log says why).
    A second signal ends at once. `log_level` is one of debug, info, warning, error.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        os.fstat(0)
    except OSError:
        # Closed: the event loop's own files would get the number 0, and be taken for standard input.
        os.open(os.devnull, os.O_RDONLY)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(repository, listen, exit_on_stdin_eof))


async def _serve(repository: Path, listen: Address, exit_on_stdin_eof: bool) -> int:
    end = _end_requested(exit_on_stdin_eof)
    backend = Backend(repository)
    try:
        address = await backend.start(listen, accept=False)
    except OSError as error:
        _log.error("backend cannot listen on %s: %s", listen, error.strerror or error)
        return 1
    _log.info("backend loads the models of %s", repository)
    loading = spawn(_load(backend, address), "load")
    ended = spawn(end.wait(), "end")
    await asyncio.wait([loading, ended], return_when=asyncio.FIRST_COMPLETED)
    failed = loading.done() and not loading.result()
    if not failed:
        await ended
    loading.cancel()
    _log.info("backend stops")
    await backend.stop()
    return 1 if failed else 0


async def _load(backend: Backend, address: Address) -> bool:
    try:
        await backend.load()
    except LoadError as error:
        _log.error("%s", error)
        return False
    await backend.accept()
    _log.info("backend listens: grpc on %s", address)
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
