"""The model repository: directories -> models that are ready, or not and why.

The layout is that of Triton: `<repository>/<model>/config.pbtxt` and `<repository>/<model>/<version>/<file>`. A model
that can't be loaded never keeps others from being served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from proxy.backend import config as configuration
from proxy.backend.errors import Code, InferenceError, LoadError, description, invalid
from proxy.backend.loaded import Loaded
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.runtimes import open_runtime
from proxy.backend.scheduler import Scheduler

_log = logging.getLogger("tensorgate.backend")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_LOADERS = 2  # models loaded at a time: each may take much memory while it is being loaded


class State(Enum):
    LOADING = "is being loaded"
    READY = "is ready"
    UNAVAILABLE = "is not ready"


@dataclass(slots=True)
class Version:
    """A version directory. `reason` says why it is unavailable."""

    number: int
    state: State = State.LOADING
    reason: str = ""
    loaded: Loaded | None = None


@dataclass(slots=True)
class Model:
    """A model directory. `reason` says why there are no versions."""

    name: str
    reason: str = ""
    versions: dict[int, Version] = field(default_factory=dict)
    latest: Loaded | None = None

    def ready(self) -> list[Version]:
        return [version for _, version in sorted(self.versions.items()) if version.state is State.READY]


class Repository:
    """The models of a directory. `load` fills it; everything else only looks things up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: dict[str, Model] = {}
        self.loaded = False

    async def load(self) -> None:
        """Load every model, outside the event loop. Raises LoadError if the directory can't be read."""
        try:
            directories = sorted(entry for entry in self.path.iterdir() if entry.is_dir() and entry.name[0] != ".")
        except OSError as error:
            raise LoadError(f"model repository {self.path} cannot be read: {error.strerror}") from None
        if not directories:
            _log.warning("model repository %s holds no models", self.path)
        # One Model per directory before the first is loaded: whoever asks early hears "loading", not "unknown".
        self.models = {directory.name: Model(directory.name) for directory in directories}
        waiting: SimpleQueue[Path] = SimpleQueue()
        for directory in directories:
            waiting.put(directory)
        await asyncio.gather(*(self._loader(waiting) for _ in range(_LOADERS)))
        self.loaded = True

    def _loader(self, waiting: SimpleQueue[Path]) -> asyncio.Future[None]:
        """Load what waits in a thread of its own; the future is done when nothing waits any more.

        Not a thread pool's: the interpreter would wait for it at the end, and a model's code may never return.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def work() -> None:
            with contextlib.suppress(Empty):
                while True:
                    directory = waiting.get_nowait()
                    _load_model(self.models[directory.name], directory)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(_settle, done)

        Thread(target=work, name="load", daemon=True).start()
        return done

    def find(self, name: str, version: str) -> Loaded:
        """The version that a request means; the highest that is ready if `version` is empty. Raises InferenceError."""
        model = self.models.get(name)
        if model is None:
            raise InferenceError(Code.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if not version:
            if model.latest is None:
                raise _not_ready(model)
            return model.latest
        found = model.versions.get(_number(version))
        if found is None:
            if not model.versions:
                raise _not_ready(model)
            raise InferenceError(Code.NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found")
        if found.loaded is None:
            raise _version_not_ready(model, found)
        return found.loaded

    def is_ready(self, name: str, version: str) -> bool:
        """Raises InferenceError for a version that is no number."""
        if version:
            _number(version)
        try:
            self.find(name, version)
        except InferenceError:
            return False
        return True

    def close(self, timeout: float) -> None:
        """Finalize all models; waits for those that run, at most so many seconds altogether. Blocks."""
        until = time.monotonic() + timeout
        schedulers = [version.loaded.scheduler for version in self._versions() if version.loaded]
        for scheduler in schedulers:
            scheduler.close()
        for scheduler in schedulers:
            scheduler.join(max(until - time.monotonic(), 0))

    def _versions(self) -> Iterable[Version]:
        for model in self.models.values():
            yield from model.versions.values()


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _number(version: str) -> int:
    if not _VERSION.fullmatch(version):
        raise invalid(f"model version is '{version}'; it must be a number above 0, or empty for the latest")
    return int(version)


def _not_ready(model: Model) -> InferenceError:
    if model.versions:
        return _version_not_ready(model, model.versions[max(model.versions)])
    text = f"is not ready: {model.reason}" if model.reason else State.LOADING.value
    return InferenceError(Code.UNAVAILABLE, f"model '{model.name}' {text}")


def _version_not_ready(model: Model, version: Version) -> InferenceError:
    reason = f": {version.reason}" if version.reason else ""
    return InferenceError(
        Code.UNAVAILABLE, f"model '{model.name}' version {version.number} {version.state.value}{reason}"
    )


def _load_model(model: Model, directory: Path) -> None:
    try:
        config = configuration.read_config(directory)
        entries = [entry for entry in directory.iterdir() if entry.is_dir()]
        available = [int(entry.name) for entry in entries if _VERSION.fullmatch(entry.name)]
        if not available:
            raise LoadError(f"{model.name} holds no version directory; put the model's file into {model.name}/1")
        chosen = configuration.choose_versions(config, available)
    except Exception as error:  # noqa: BLE001  (one model's trouble must stay its own)
        model.reason = str(error) if isinstance(error, (LoadError, OSError)) else description(error)
        _log.error("model %s is not ready: %s", model.name, model.reason)
        return
    if ignored := configuration.ineffective(config):
        _log.info("model %s: %s has no effect in this version", model.name, ", ".join(ignored))
    model.versions = {number: Version(number) for number in chosen}
    for number in chosen:
        _load_version(model, model.versions[number], directory / str(number), config)


def _load_version(model: Model, version: Version, directory: Path, base: pb.ModelConfig) -> None:
    began = time.monotonic()
    try:
        version.loaded = _start(version.number, directory, base)
    except LoadError as error:
        version.reason = str(error)
        version.state = State.UNAVAILABLE
        _log.error("model %s version %s is not ready: %s", model.name, version.number, error)
        return
    except BaseException as error:  # noqa: BLE001  (one model's trouble must stay its own)
        version.reason = description(error)
        version.state = State.UNAVAILABLE
        _log.exception("model %s version %s is not ready: %s", model.name, version.number, version.reason)
        return
    version.state = State.READY
    model.latest = version.loaded  # versions are loaded in ascending order
    _log.info("model %s version %s is ready (%.1f s)", model.name, version.number, time.monotonic() - began)


def _start(number: int, directory: Path, base: pb.ModelConfig) -> Loaded:
    config = pb.ModelConfig()
    config.CopyFrom(base)
    backend, file = configuration.choose_backend(config, directory)
    runtime = open_runtime(backend, directory / file, config)
    runtime.describe(config)
    configuration.complete(config, backend, file)
    spec = configuration.build_spec(config, number, directory)
    policy, ordered = configuration.batching(config)
    scheduler = Scheduler(spec, runtime, configuration.devices(config), policy, ordered)
    scheduler.start()
    return Loaded(spec, config, scheduler, runtime.shared_outputs)
