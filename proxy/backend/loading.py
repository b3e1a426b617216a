"""Models made from files: what takes long and blocks, in a thread of its own. Knows nothing of what is served."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from proxy.backend import config as configuration
from proxy.backend import derive
from proxy.backend.cache import ResponseCache
from proxy.backend.control import PrivateFolder, write_files
from proxy.backend.errors import LoadError, description
from proxy.backend.loaded import Loaded
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.runtimes import Runtime, open_runtime
from proxy.backend.scheduler import Scheduler
from proxy.backend.warmup import Warmed

PRIVATE = b"private"  # the mark of what a client sent: no directory's
VERSION = re.compile(r"[1-9][0-9]{0,17}")
_log = logging.getLogger("tensorgate.backend")
_MOST_DEEP = 8
_MOST_ENTRIES = 20_000
_MOST_REASON = 2000  # characters: a model's exception may say anything
_MOST_TOLD = 256

T = TypeVar("T")


def list_models(path: Path) -> dict[str, Path]:
    """The models' directories by name. Raises LoadError."""
    try:
        found = sorted(entry for entry in path.iterdir() if entry.name[0] != "." and _is_folder(entry))
    except OSError as error:
        raise LoadError(f"model repository {path} cannot be read: {error.strerror}") from None
    return {entry.name: entry for entry in found}


def _is_folder(path: Path) -> bool:
    """False, too, where it can't be found out, as with a link to too long a name: others are none the worse for it."""
    try:
        return path.is_dir()
    except OSError as error:
        _leave_out(path, error.strerror)
        return False


@lru_cache(_MOST_TOLD)
def _leave_out(path: Path, why: str) -> None:
    """Say it once: clients can have a directory read as often as they like."""
    _log.warning("%s is left out: it cannot be read: %s", path, why)


def scan(path: Path) -> dict[str, bytes]:
    """The models' marks by name: see `mark`. Raises LoadError."""
    return {name: mark(directory) for name, directory in list_models(path).items()}


def mark(directory: Path) -> bytes:
    """Stands for the names, sizes and times of everything in a model's directory: it changes when they do.

    What Python and hidden files add is left out: importing a model, or copying one, is no change.
    """
    found = hashlib.blake2b(digest_size=16)
    for number, line in enumerate(_lines(str(directory), "", 0)):
        if number >= _MOST_ENTRIES:
            break
        found.update(line)
    return found.digest()


def _lines(folder: str, below: str, depth: int) -> Iterator[bytes]:
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError:
        return  # gone meanwhile, or not for us: loading it will say so
    for entry in entries:
        if entry.name[0] == "." or entry.name == "__pycache__":
            continue
        path = f"{below}/{entry.name}"
        try:
            found = entry.stat()  # of what a link leads to
            is_folder = entry.is_dir()
        except OSError:
            yield os.fsencode(f"{path}\0\n")
            continue
        if is_folder and depth < _MOST_DEEP:
            yield os.fsencode(f"{path}/\n")
            yield from _lines(entry.path, path, depth + 1)
        else:
            yield os.fsencode(f"{path}\0{found.st_size} {found.st_mtime_ns} {found.st_ino}\n")


@dataclass(frozen=True, slots=True)
class Order:
    """What to load: a model's directory in the repository, or a client's files.

    config: JSON that takes the place of config.pbtxt. mark: the directory's, b"" if nobody has looked yet. unless: the
    mark with which there is nothing to do.
    """

    name: str
    directory: Path | None
    config: str | None = None
    files: Mapping[str, bytes] | None = None
    mark: bytes = b""
    unless: bytes | None = None
    most_bytes: int = 2**63
    cache: ResponseCache | None = None


@dataclass(slots=True)
class Made:
    """What came of it: `versions`, or else why not. `reason` is for the whole, `faults` are by version.

    polled: whether directory and configuration could be read at all. others: versions that would have been all right.
    """

    mark: bytes = b""
    unchanged: bool = False
    polled: bool = False
    versions: dict[int, Loaded] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    others: list[int] = field(default_factory=list)
    reason: str = ""
    folder: PrivateFolder | None = None

    def discard(self) -> None:
        """Nobody wants it: end what it started. Blocks for as long as removing files takes."""
        self.others = sorted(self.versions)
        for loaded in self.versions.values():
            loaded.scheduler.close()
        self.versions = {}
        if self.folder is not None:
            self.folder.remove()
            self.folder = None


def make(order: Order) -> Made:
    """Load a model. Blocks; raises nothing."""
    made = Made()
    try:
        _make(order, made)
    except Exception as error:  # noqa: BLE001  (one model's trouble must stay its own)
        made.reason = _reason(error)
        _log.error("model %s is not ready: %s", order.name, made.reason)
    if made.reason or made.faults:
        made.discard()
    return made


def _make(order: Order, made: Made) -> None:
    directory = order.directory
    if directory is None:
        made.mark = PRIVATE
        made.folder, directory = write_files(order.files or {})
    else:
        # Before anything is read: what changes from now on is seen as a change.
        made.mark = order.mark or mark(directory)
        if made.mark == order.unless and order.config is None:
            made.unchanged = True
            return
    if order.config is None:
        config = configuration.read_config(directory, order.name)
    else:
        config = configuration.parse_override(order.config, order.name)
    available = _versions(directory)
    made.polled = True
    if not available:
        raise LoadError(f"{order.name} holds no version directory; put the model's file into {order.name}/1")
    for index, number in enumerate(derive.choose_versions(config, available)):
        _make_version(number, directory, config, order, made, say=index == 0)


def _versions(directory: Path) -> list[int]:
    try:
        folders = [entry.name for entry in directory.iterdir() if VERSION.fullmatch(entry.name) and _is_folder(entry)]
    except OSError as error:
        raise LoadError(f"{directory.name} cannot be read: {error.strerror}") from None
    return [int(name) for name in folders]


def _make_version(number: int, directory: Path, base: pb.ModelConfig, order: Order, made: Made, say: bool) -> None:
    began = time.monotonic()
    try:
        loaded = _start(number, directory / str(number), base, order, say)
    except LoadError as error:
        made.faults[number] = _reason(error)
        _log.error("model %s version %s is not ready: %s", base.name, number, made.faults[number])
        return
    except BaseException as error:  # noqa: BLE001  (one model's trouble must stay its own)
        made.faults[number] = _reason(error)
        _log.exception("model %s version %s is not ready: %s", base.name, number, made.faults[number])
        return
    made.versions[number] = loaded
    _log.info("model %s version %s is loaded (%.1f s)", base.name, number, time.monotonic() - began)


def _start(number: int, directory: Path, base: pb.ModelConfig, order: Order, say: bool) -> Loaded:
    config = pb.ModelConfig()
    config.CopyFrom(base)
    backend, file = derive.choose_backend(config, directory)
    config.backend = backend
    if say:
        for name in configuration.ineffective(config):
            _log.warning("model %s: %s is set and has no effect here", config.name, name)
    runtime: Runtime = open_runtime(backend, directory / file, config)
    runtime.describe(config)
    derive.place(config, runtime.choose)
    spec = derive.build_spec(config, number, directory)
    policy, ordered = derive.batching(config)
    derive.complete(config, backend, file)
    if config.model_warmup:
        runtime = Warmed(runtime, config, spec)
    scheduler = Scheduler(spec, runtime, derive.devices(config), policy, ordered, order.most_bytes)
    scheduler.start()
    cached = config.response_cache.enable and not spec.decoupled
    return Loaded(spec, config, scheduler, runtime.shared_outputs, order.cache if cached else None)


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, (LoadError, OSError)) else description(error)
    # A client's configuration is in it: it comes into logs, the index and other clients' answers.
    shown = text[: _MOST_REASON + 1]
    text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)
    return text if len(text) <= _MOST_REASON else f"{text[:_MOST_REASON]}..."
