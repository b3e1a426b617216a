"""Addresses taken before they are served: unix sockets' files, and TCP sockets that don't listen yet.

A unix socket's file is for this user only, taken from nobody who still has it, and gone when the server is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from pathlib import Path


class SocketFile:
    """`bind` makes it, `remove` removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: tuple[int, int] | None = None
        self._lock: int | None = None

    def bind(self) -> socket.socket:
        """A socket that is bound and doesn't listen yet. Raises OSError."""
        self._lock = _locked(self._path)
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
        if self._lock is not None:
            with contextlib.suppress(OSError):
                _lock_of(self._path).unlink()  # before it is let go: see `_locked`
            os.close(self._lock)
            self._lock = None


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _locked(path: Path) -> int:
    """A lock on a unix socket's path -> its file descriptor. Raises OSError.

    A socket that is bound and doesn't listen yet, because models are being loaded, looks like one that was left behind.
    """
    place = _lock_of(path)
    while True:
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(place)):  # and not removed by its last owner just now
                    return lock
        except BlockingIOError:
            os.close(lock)
            what = f"another process listens on unix:{path}, or is about to; end it or listen elsewhere"
            raise OSError(what) from None
        os.close(lock)


def listen(server: asyncio.Server, backlog: int) -> None:
    """Begin to listen on the sockets of a server that was made without. Raises OSError.

    Two processes may bind one address while neither listens (SO_REUSEADDR, without which a restart would have to wait
    for the connections of the last run), and the event loop's own call doesn't tell when it comes too late.
    """
    for sock in server.sockets:
        with socket.socket(fileno=os.dup(sock.fileno())) as own:
            own.listen(backlog)
