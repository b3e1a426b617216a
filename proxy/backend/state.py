"""What is known of each model: its versions, their states, what is served and what is going. For the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from proxy.backend.control import PrivateFolder
from proxy.backend.errors import Code, InferenceError
from proxy.backend.loaded import Loaded
from proxy.backend.scheduler import Scheduler

UNLOADED = "unloaded"
_MOST_GONE = 64  # versions that are listed though nothing of them is left: a client may name any number of others
_FOREVER = 1e9


class State(Enum):
    """The names are those of the index, the values what an error says."""

    LOADING = "is being loaded"
    READY = "is ready"
    UNLOADING = "is being unloaded"
    UNAVAILABLE = "is not ready"


@dataclass(slots=True, eq=False)
class Version:
    """A version of a model. `reason` says why it is unavailable; `loaded` is there while it is ready."""

    number: int
    state: State = State.LOADING
    reason: str = ""
    loaded: Loaded | None = None

    @property
    def fault(self) -> str:
        """Why it could not be loaded."""
        return self.reason if self.reason != UNLOADED else ""


@dataclass(slots=True, eq=False)
class Generation:
    """What one load made. `folder` holds the files that a client sent, None where they are the repository's."""

    versions: list[Version]
    schedulers: list[Scheduler]
    folder: PrivateFolder | None

    def retire(self) -> None:
        """Take no further requests; those that came are answered."""
        for version in self.versions:
            version.state = State.UNLOADING
            version.loaded = None
        for scheduler in self.schedulers:
            scheduler.retire()

    def finish(self) -> None:
        """Wait for the threads, however long they take, and remove the files. Blocks."""
        for scheduler in self.schedulers:
            scheduler.join(_FOREVER)
        self.remove()

    def remove(self) -> None:
        if self.folder is not None:
            self.folder.remove()

    def ended(self) -> None:
        for version in self.versions:
            version.state = State.UNAVAILABLE
            version.reason = UNLOADED


@dataclass(slots=True, eq=False)
class Model:
    """A model by its name. `reason` says why there are no versions, or why those that serve are not the newest.

    lock: held while it is loaded or unloaded. seen: what its directory looked like when it was last loaded, well or
    not; served: when what serves now was.
    """

    name: str
    reason: str = ""
    versions: dict[int, Version] = field(default_factory=dict)
    latest: Loaded | None = None
    loading: bool = False
    generation: Generation | None = None
    seen: bytes = b""
    served: bytes = b""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def ready(self) -> list[Version]:
        return [version for _, version in sorted(self.versions.items()) if version.state is State.READY]

    def put(self, generation: Generation, mark: bytes) -> Generation | None:
        """Serve this from now on -> what served before."""
        before, self.generation = self.generation, generation
        gone = dict(self._gone(generation))
        self.versions = gone | {version.number: version for version in generation.versions}
        self.latest = max(generation.versions, key=lambda version: version.number).loaded
        self.reason = ""
        self.seen = self.served = mark
        return before

    def _gone(self, generation: Generation) -> Iterator[tuple[int, Version]]:
        served = {version.number for version in generation.versions}
        gone = [(number, version) for number, version in self.versions.items() if number not in served]
        yield from gone[-_MOST_GONE:]

    def fail(self, reason: str, faults: dict[int, str], others: list[int], mark: bytes) -> None:
        """A load failed: `reason` for the whole, `faults` by version; `others` were all right. What serves stays."""
        self.seen = mark
        self.reason = reason if self.generation or not faults else ""
        for number, fault in [*((one, UNLOADED) for one in others), *faults.items()]:
            known = self.versions.get(number)
            if known is None or known.state is not State.READY:
                self.versions[number] = Version(number, State.UNAVAILABLE, fault)
        while len(self.versions) > 2 * _MOST_GONE and (gone := self._oldest_gone()) is not None:
            del self.versions[gone]

    def _oldest_gone(self) -> int | None:
        return next((number for number, one in self.versions.items() if one.state is State.UNAVAILABLE), None)

    def take(self) -> Generation | None:
        """Serve nothing any more -> what served."""
        taken, self.generation = self.generation, None
        self.latest = None
        self.seen = self.served = b""
        if taken is not None:
            self.reason = ""
            # Versions of loads that failed meanwhile go with what they were to replace.
            self.versions = {number: one for number, one in self.versions.items() if not one.fault}
        return taken

    @property
    def idle(self) -> bool:
        """Whether nothing of it is served, being loaded or unloaded."""
        going = any(version.state is State.UNLOADING for version in self.versions.values())
        return self.generation is None and not going and not self.loading and not self.lock.locked()


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A line of the repository's index, as Triton has it: all but the name may be empty."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


def entries(name: str, model: Model | None, ready_only: bool) -> list[IndexEntry]:
    """The index's lines for a model; `model` is None for one that was never loaded."""
    if model is not None and model.versions:
        return [
            _entry(model, version)
            for _, version in sorted(model.versions.items())
            if not ready_only or version.state is State.READY
        ]
    if ready_only:
        return []
    if model is not None and model.loading:
        return [IndexEntry(name, state=State.LOADING.name)]
    if model is not None and model.reason:
        return [IndexEntry(name, state=State.UNAVAILABLE.name, reason=model.reason)]
    return [IndexEntry(name)]


def _entry(model: Model, version: Version) -> IndexEntry:
    reason = version.reason or (model.reason if version.state is State.READY else "")
    return IndexEntry(model.name, str(version.number), version.state.name, reason)


def unknown(name: str) -> InferenceError:
    return InferenceError(Code.NOT_FOUND, f"Request for unknown model: '{name}' is not found")


def not_ready(model: Model) -> InferenceError:
    """No version of it is ready."""
    if model.loading:
        return InferenceError(Code.UNAVAILABLE, f"model '{model.name}' {State.LOADING.value}")
    if model.reason:
        return InferenceError(Code.UNAVAILABLE, f"model '{model.name}' is not ready: {model.reason}")
    broken = [one for _, one in sorted(model.versions.items()) if one.fault]
    if broken:
        return version_not_ready(model, broken[-1])
    if not model.versions:
        return unknown(model.name)
    return InferenceError(Code.NOT_FOUND, f"Request for unknown model: '{model.name}' has no available versions")


def version_not_ready(model: Model, version: Version) -> InferenceError:
    if not version.fault:
        text = f"Request for unknown model: '{model.name}' version {version.number} is not at ready state"
        return InferenceError(Code.UNAVAILABLE, text)
    return InferenceError(
        Code.UNAVAILABLE, f"model '{model.name}' version {version.number} {version.state.value}: {version.fault}"
    )
