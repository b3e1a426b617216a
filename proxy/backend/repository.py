"""The model repository: directories -> models that are ready, or not and why; loaded, reloaded and unloaded.

The layout is that of Triton: `<repository>/<model>/config.pbtxt` and `<repository>/<model>/<version>/<file>`. A model
that can't be loaded never keeps others from being served, and a load that fails leaves what is served as it is.

Everything here is for the event loop but `close`; files and models are touched in threads (loading.py). Versions are
made ready first, then put in place in one turn of the loop, and those that they replace run what they have accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

from proxy.backend.cache import ResponseCache
from proxy.backend.control import Control, check_files, check_name, remove_leftovers
from proxy.backend.errors import Code, InferenceError, LoadError, description, invalid
from proxy.backend.loaded import Loaded
from proxy.backend.loading import VERSION, Made, Order, list_models, make, scan
from proxy.backend.state import (
    Generation,
    IndexEntry,
    Model,
    State,
    Version,
    entries,
    not_ready,
    unknown,
    version_not_ready,
)
from proxy.backend.threads import start
from proxy.spawn import spawn

__all__ = ["Control", "IndexEntry", "Loaded", "Model", "Repository", "State", "Version"]

_log = logging.getLogger("tensorgate.backend")
_LOADERS = 2  # models loaded at a time: each may take much memory while it is being loaded
_PATIENCE = 60.0  # seconds that a load keeps others waiting: one that hangs would do so for ever
_MOST_UNLISTED = 256  # models that are in no directory, each of a name that a client chose
_DEFAULT = Control()
# Triton's words, in mode none, too.
_FIXED = (
    "explicit model load / unload is not allowed if polling is enabled, nor without; start the server with "
    "--model-control-mode explicit"
)


class _Place:
    """One of the places for loads, which was taken: given back by `leave`, or by itself after _PATIENCE, and once."""

    def __init__(self, room: asyncio.Semaphore, name: str) -> None:
        self._room = room
        self._name = name
        self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(_PATIENCE, self._overdue)

    def leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._room.release()

    def _overdue(self) -> None:
        _log.warning("model %s has been loading for %g s; others no longer wait for it", self._name, _PATIENCE)
        self.leave()


class Repository:
    """The models of a directory. `load` fills it; see `Control` for what changes it later.

    most_bytes_per_model: of the requests that each version of a model holds.
    """

    def __init__(
        self,
        path: Path,
        control: Control = _DEFAULT,
        most_bytes_per_model: int = 2**63,
        cache: ResponseCache | None = None,
    ) -> None:
        self.path = path
        self.control = control
        self.models: dict[str, Model] = {}
        self.loaded = False
        self._most_bytes = most_bytes_per_model
        self._cache = cache or ResponseCache()
        self._listed: frozenset[str] = frozenset()
        self._listing = asyncio.Lock()
        self._room = asyncio.Semaphore(_LOADERS)
        self._retiring: set[Generation] = set()
        self._closed = False

    # -- what a request asks

    def find(self, name: str, version: str) -> Loaded:
        """The version that a request means; the highest that is ready if `version` is empty. Raises InferenceError.

        To be used in the same turn of the loop: later it may have been unloaded.
        """
        model = self.models.get(name)
        if model is None:
            raise unknown(name) if self.loaded else _too_early(name)
        if not version:
            if model.latest is None:
                raise not_ready(model)
            return model.latest
        found = model.versions.get(_number(version))
        if found is None:
            if not model.versions:
                raise not_ready(model)
            raise InferenceError(Code.NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found")
        if found.loaded is None:
            raise version_not_ready(model, found)
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

    def index(self, ready_only: bool) -> list[IndexEntry]:
        """Every version by name and number; the directory as it was last read: see `refresh`."""
        names = [name for name in {*self._listed, *self.models} if name.isprintable()]
        return [entry for name in sorted(names) for entry in entries(name, self.models.get(name), ready_only)]

    async def refresh(self) -> None:
        """Read which models there are, for `index`; keeps what was known when the directory can't be read."""
        try:
            async with self._listing:
                self._listed = frozenset(await start(partial(list_models, self.path), "list"))
        except LoadError as error:
            _log.error("%s", error)

    # -- the start, and what changes by itself

    async def load(self) -> None:
        """Load what is to be served from the start. Raises LoadError if the directory can't be read."""
        await start(remove_leftovers, "leftovers")
        if self.control.mode == "explicit":
            await self._load_startup()
        else:
            await asyncio.gather(*await self._look())
            if not self.models:
                _log.warning("model repository %s holds no models", self.path)
        self.loaded = True

    async def _load_startup(self) -> None:
        listed = await start(partial(list_models, self.path), "list")
        self._listed = frozenset(listed)
        names = sorted(listed) if "*" in self.control.startup else list(dict.fromkeys(self.control.startup))
        known = [name for name in names if name in listed]
        for name in names:
            if name not in listed:
                _log.error("model %s is not ready: it is not in the model repository %s", name, self.path)
        for name in known:
            # Before the first is loaded: whoever asks early hears "loading", not "unknown".
            self.models.setdefault(name, Model(name)).loading = True
        await asyncio.gather(*[spawn(self._load_listed(name, listed[name], b""), "load") for name in known])

    async def watch(self) -> None:
        """In mode poll: look for what was added, removed or changed, for ever. One that hangs holds up no other."""
        if self.control.mode != "poll":
            return
        said = ""
        while True:
            await asyncio.sleep(self.control.poll_seconds)
            try:
                await self._look()
                said = ""
            except Exception as error:  # noqa: BLE001  (no memory, no thread: perhaps later)
                text = str(error) if isinstance(error, LoadError) else description(error)
                if said != text:
                    said = text
                    _log.error("%s; what is loaded stays", text)

    async def poll(self) -> None:
        """One look of `watch`, and what comes of it. Raises LoadError if the directory can't be read."""
        await asyncio.gather(*await self._look())

    async def _look(self) -> list[asyncio.Task[None]]:
        """Begin to load what is new or changed since it was last loaded, well or not, and to unload what is gone."""
        found = await start(partial(scan, self.path), "scan")
        self._listed = frozenset(found)
        begun: list[asyncio.Task[None]] = []
        for name, mark in found.items():
            model = self.models.setdefault(name, Model(name))
            if model.seen != mark and not model.loading and not model.lock.locked():
                model.loading = True
                begun.append(spawn(self._load_listed(name, self.path / name, mark), "load"))
        for name, model in list(self.models.items()):
            if name not in found and not model.loading and not model.lock.locked():
                self._unload(model)
                self._forget(model)
        return begun

    async def _load_listed(self, name: str, directory: Path, mark: bytes) -> None:
        model = await self._hold(name)
        try:
            place = await self._place(name)
            try:
                await self._load(model, self._order(name, directory, mark=mark))
            finally:
                place.leave()
        finally:
            model.lock.release()

    def _forget(self, model: Model) -> None:
        """In mode poll: leave nothing of a model whose directory is gone, once nothing of it runs."""
        gone = model.name not in self._listed and self.models.get(model.name) is model
        if self.control.mode == "poll" and gone and model.idle:
            del self.models[model.name]

    # -- what clients ask for

    async def load_model(
        self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Load or reload a model; does nothing for one that serves what its files say. Raises InferenceError.

        config: a ModelConfig in JSON, in place of config.pbtxt. files: by path, as `1/model.onnx`: the model is made of
        them alone, and need not be in the repository. A caller that is cancelled doesn't stop a load that has begun.
        """
        self.check_explicit()
        directory = None
        try:
            if files:
                if config is None:
                    raise LoadError("files are taken with a config only")
                check_files(files)
            async with self._listing:
                listed = await start(partial(list_models, self.path), "list")
            self._listed = frozenset(listed)
            if files and name not in listed:
                check_name(name)
            elif not files:
                directory = listed.get(name)
                if directory is None:
                    raise LoadError("")
        except LoadError as error:
            raise _not_polled(name, str(error)) from None
        self._check_room(name)
        fault = await self._shielded(name, self._order(name, directory, config, files or None))
        if fault is not None:
            raise fault

    async def unload_model(self, name: str) -> None:
        """Answer no more requests to a model; those that it has are run. Raises InferenceError. Doesn't wait for that.

        A model that isn't loaded, or isn't known, is unloaded already.
        """
        self.check_explicit()
        if name not in self.models:
            return
        model = await self._hold(name)
        try:
            self._unload(model)
        finally:
            self._let_go(model)

    def _order(
        self,
        name: str,
        directory: Path | None,
        config: str | None = None,
        files: Mapping[str, bytes] | None = None,
        mark: bytes = b"",
    ) -> Order:
        return Order(name, directory, config, files, mark, most_bytes=self._most_bytes, cache=self._cache)

    def check_explicit(self) -> None:
        """Raises InferenceError unless clients may load and unload."""
        if self.control.mode != "explicit":
            raise InferenceError(Code.UNAVAILABLE, _FIXED)

    def _check_room(self, name: str) -> None:
        if name in self._listed or name in self.models:
            return
        unlisted = [model for one, model in self.models.items() if one not in self._listed]
        if len(unlisted) < _MOST_UNLISTED:
            return
        idle = [model for model in unlisted if model.generation is None and not model.lock.locked()]
        if not idle:
            raise InferenceError(
                Code.RESOURCE_EXHAUSTED,
                f"failed to load '{name}': {_MOST_UNLISTED} models that are not in the repository are loaded already, "
                "which is the limit; unload one of them",
            )
        del self.models[idle[0].name]

    async def _hold(self, name: str) -> Model:
        """The model of that name, with its lock held; an empty one if it is new."""
        while True:
            model = self.models.setdefault(name, Model(name))
            await model.lock.acquire()
            if self.models.get(name) is model:
                return model
            model.lock.release()  # removed meanwhile

    async def _shielded(self, name: str, order: Order) -> InferenceError | None:
        """Load a model; once that has begun it goes on, though its caller is cancelled."""
        model = await self._hold(name)
        try:
            # Here a caller can still leave, and what it sent is let go with it.
            place = await self._place(name)
        except BaseException:
            model.lock.release()
            raise
        return await asyncio.shield(spawn(self._load_held(model, order, place), "load"))

    async def _place(self, name: str) -> _Place:
        await self._room.acquire()
        return _Place(self._room, name)

    async def _load_held(self, model: Model, order: Order, place: _Place) -> InferenceError | None:
        try:
            return await self._load(model, order)
        finally:
            place.leave()
            self._let_go(model)

    def _let_go(self, model: Model) -> None:
        """Release its lock, and forget a name of which nothing is left to tell."""
        if not model.versions and not model.reason and model.name not in self._listed:
            self.models.pop(model.name, None)
        model.lock.release()

    # -- with a model's lock held

    async def _load(self, model: Model, order: Order) -> InferenceError | None:
        """-> why it failed."""
        model.loading = True
        served = model.served if model.generation is not None and self.control.mode == "explicit" else None
        try:
            made = await start(partial(make, replace(order, unless=served)), "load")
        finally:
            model.loading = False
        if self._closed:
            await start(made.discard, "discard")
            return InferenceError(Code.UNAVAILABLE, "server is shutting down")
        if made.unchanged:
            model.reason = ""  # of a load that was refused: what serves is the newest
            return None
        if made.reason or made.faults:
            return self._failed(model, made)
        versions = [Version(number, State.READY, loaded=loaded) for number, loaded in sorted(made.versions.items())]
        generation = Generation(versions, [one.scheduler for one in made.versions.values()], made.folder)
        before = model.put(generation, made.mark)
        _log.info("model %s is ready: version %s", model.name, ", ".join(str(one.number) for one in versions))
        if before is not None:
            self._retire(model, before)
        return None

    def _failed(self, model: Model, made: Made) -> InferenceError:
        name = model.name
        if made.faults:
            texts = [f"version {number} is at UNAVAILABLE state: {why};" for number, why in sorted(made.faults.items())]
            fault = invalid(f"load failed for model '{name}': {' '.join(texts)}")
        elif made.polled:
            fault = invalid(
                f"load failed for model '{name}': at least one version must be available under the version policy of "
                f"model '{name}': {made.reason}"
            )
        else:
            fault = _not_polled(name, made.reason)
        serving = [str(version.number) for version in model.ready()]
        model.fail(str(fault) if serving else made.reason, made.faults, made.others, made.mark)
        if serving:
            _log.error("model %s could not be reloaded; version %s stays as it is", name, ", ".join(serving))
        return fault

    def _unload(self, model: Model) -> None:
        taken = model.take()
        if taken is not None:
            _log.info("model %s is being unloaded", model.name)
            self._retire(model, taken)

    def _retire(self, model: Model, generation: Generation) -> None:
        generation.retire()
        for scheduler in generation.schedulers:
            self._cache.forget(scheduler.number)
        self._retiring.add(generation)
        loop = asyncio.get_running_loop()

        def finish() -> None:
            generation.finish()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(self._retired, model, generation)

        Thread(target=finish, name="unload", daemon=True).start()

    def _retired(self, model: Model, generation: Generation) -> None:
        generation.ended()
        self._retiring.discard(generation)
        self._forget(model)

    # -- the end

    def close(self, timeout: float) -> None:
        """Finalize all models; waits for those that run, at most so many seconds in all. Blocks. From any thread."""
        self._closed = True
        until = time.monotonic() + timeout
        served = [model.generation for model in list(self.models.values()) if model.generation is not None]
        generations = served + list(self._retiring)
        schedulers = [scheduler for generation in generations for scheduler in generation.schedulers]
        for scheduler in schedulers:
            scheduler.close()
        for scheduler in schedulers:
            scheduler.join(max(until - time.monotonic(), 0))
        for generation in generations:
            generation.remove()


def _too_early(name: str) -> InferenceError:
    return InferenceError(Code.UNAVAILABLE, f"model '{name}' may be there: the repository is being loaded")


def _number(version: str) -> int:
    if version == "0":
        return 0  # no model has it: not found, as in Triton
    if not VERSION.fullmatch(version):
        raise invalid(f"model version is '{version}'; it must be a number above 0, or empty for the latest")
    return int(version)


def _not_polled(name: str, why: str) -> InferenceError:
    text = f"failed to load '{name}', failed to poll from model repository"
    return InferenceError(Code.INTERNAL, f"{text}: {why}" if why else text)
