"""Which models are served, and who decides: the repository alone, whoever changes its files, or clients.

And what a client's files come to: a private folder. Everything about them is the client's to choose, so all of it is
checked before a file is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proxy.backend.errors import LoadError

_MOST_FILES = 1024
_MOST_BYTES = 2**32  # of all files together
_MOST_PARTS = 8
_LONGEST_PART = 255
_LONGEST_NAME = 255
_INNER = "override"
_PREFIX = "tensorgate-files-"


@dataclass(frozen=True, slots=True)
class Control:
    """As Triton's --model-control-mode. none: what is there at the start. poll: what is there, looked at again every
    `poll_seconds`. explicit: `startup` ("*" for all that is there), then what clients load and unload."""

    mode: Literal["none", "poll", "explicit"] = "none"
    poll_seconds: float = 15.0
    startup: Sequence[str] = ()


def check_name(name: str) -> None:
    """Of a model that isn't in the repository: it comes into logs, metrics and answers. Raises LoadError."""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable() or "/" in name or name[0] == ".":
        raise LoadError(f"a model's name is 1 to {_LONGEST_NAME} printable characters without /, not beginning with .")


def check_files(files: Mapping[str, bytes]) -> None:
    """Raises LoadError."""
    if len(files) > _MOST_FILES:
        raise LoadError(f"{len(files)} files; at most {_MOST_FILES} are taken")
    size = sum(len(content) for content in files.values())
    if size > _MOST_BYTES:
        raise LoadError(f"files of {size} bytes; at most {_MOST_BYTES} are taken")
    for path in files:
        _check_path(path)


def _check_path(path: str) -> None:
    parts = path.split("/")
    if len(parts) > _MOST_PARTS:
        raise LoadError(f"file:{path[:100]}: {len(parts)} folders deep; at most {_MOST_PARTS} are taken")
    for part in parts:
        fits = part not in ("", ".", "..") and part.isprintable() and "\\" not in part
        if not fits or len(part.encode()) > _LONGEST_PART:
            shown = path if path.isprintable() else repr(path)
            raise LoadError(f"file:{shown[:100]}: must be a relative path of plain names, as in file:1/model.onnx")


class PrivateFolder:
    """A new folder for temporary files, locked for as long as this process lives: see `remove_leftovers`."""

    def __init__(self) -> None:
        """Raises OSError."""
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # mode 0700
            # Before it is locked, a process that starts may take it for a leftover.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                self._unlock = weakref.finalize(self, os.close, _lock(self.path))
                return

    def remove(self) -> None:
        """More than once does no harm. Blocks; from any thread."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()


def remove_leftovers() -> None:
    """Remove the folders of this user's processes that were killed: they are not locked. Blocks; raises nothing."""
    try:
        found = list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"))
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):
            lock = _lock(path)
            if os.fstat(lock).st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    """-> a file descriptor that holds the folder's lock until it is closed.

    Raises OSError: BlockingIOError if another one holds it, FileNotFoundError if that one has removed the folder.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()
    except OSError:
        os.close(lock)
        raise
    return lock


def write_files(files: Mapping[str, bytes]) -> tuple[PrivateFolder, Path]:
    """Write files that `check_files` let pass -> (a new private folder, the model's directory in it).

    Raises LoadError, and leaves nothing behind then. Blocks.
    """
    try:
        folder = PrivateFolder()
    except OSError as error:
        raise LoadError(f"files cannot be written: {error.strerror}") from None
    try:
        directory = folder.path / _INNER
        directory.mkdir()
        for path, content in files.items():
            file = directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as opened:
                opened.write(content)
    except OSError as error:
        folder.remove()
        raise LoadError(f"files cannot be written: {error.strerror}") from None
    return folder, directory
