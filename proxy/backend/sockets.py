"""The file of a unix socket: for this user only, taken from nobody who still listens, gone when the server is."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path


class SocketFile:
    """`bind` makes it, `remove` removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: tuple[int, int] | None = None

    def bind(self) -> socket.socket:
        """A socket that is bound and doesn't listen yet. Raises OSError."""
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
