"""Room on the upstream's connections when all of it is taken: who has too much gives some of what lies idle.

The number of calls upstream is bounded. A client that opens calls and leaves them idle, neither sending nor ending its
request, would keep the others out for ever. So while calls wait and there is no room, calls that have lain idle are
ended, of the client that has most, in favour of clients that have less than an equal share. A client within its share,
and a call that is under way, is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar

LOOK_SECONDS = 0.1  # how often to look while calls wait without room
IDLE_SECONDS = 1.0


class Held(Protocol):
    """A call that has room upstream; `owner` is its client's connection."""

    @property
    def owner(self) -> Any: ...

    def progress(self) -> object | None:
        """What changes whenever data comes for the call; None when its client can't be waited for any more."""
        ...


Call = TypeVar("Call", bound=Held)


class Room(Generic[Call]):
    """Decides which calls are ended. No I/O; call `look` every LOOK_SECONDS while calls wait, `rest` when none does."""

    def __init__(self) -> None:
        self._seen: dict[Call, tuple[object, float]] = {}  # -> (its progress, since when)

    def rest(self) -> None:
        """There is room again."""
        self._seen.clear()

    def look(
        self, held: Iterable[Call], waiting: Mapping[Any, int], now: float, party: Callable[[Any], Any]
    ) -> list[Call]:
        """The calls to be ended.

        held: those that have room upstream; waiting: client -> how many of its calls wait; party: owner -> client.
        """
        calls: dict[Any, list[Call]] = {client: [] for client in waiting}
        seen, self._seen = self._seen, {}
        for call in held:
            calls.setdefault(party(call.owner), []).append(call)
            progress = call.progress()
            if progress is not None:
                before = seen.get(call)
                since = before[1] if before is not None and before[0] == progress else now
                self._seen[call] = (progress, since)
        share = max(sum(map(len, calls.values())) // max(len(calls), 1), 1)
        wanted = sum([min(count, max(share - len(calls[client]), 0)) for client, count in waiting.items()])
        return self._idlest(calls, share, wanted, now) if wanted else []

    def _idlest(self, calls: dict[Any, list[Call]], share: int, wanted: int, now: float) -> list[Call]:
        """At most `wanted` idle calls, from those that have most, and of none more than what is over its share."""
        chosen: list[Call] = []
        for mine in sorted(calls.values(), key=len, reverse=True):
            over = min(len(mine) - share, wanted - len(chosen))
            if over <= 0:
                break
            idle = [call for call in mine if call in self._seen and now - self._seen[call][1] >= IDLE_SECONDS]
            chosen += idle[:over]
        return chosen
