"""Which requests run together, and when: dynamic batching, as Triton has it. No I/O; time is an argument.

All times are integers in nanoseconds, on whatever clock the caller reads. The caller asks for a batch whenever an
instance of the model is idle (`take`), or at the time that `due` says.

Rules:
- Every request that was added comes out once: in a batch, in `expire`, or not at all after `drop`.
- Requests join if their keys are equal: data types and shapes but for the first dimension. One that doesn't fit never
  holds up those that do; requests of one key and priority keep their order.
- Nothing waits longer than the delay for the sake of a larger batch while an instance is idle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

MOST_SHAPES = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How long a request may wait, and how many. 0 means no limit.

    delay: one whose time is up is put behind those of its own and higher levels that are in time, instead of being
    refused.
    override: a request may bring a shorter time of its own.
    """

    timeout: int = 0
    delay: bool = False
    override: bool = False
    most: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """max_rows: of a batch. delay: in ns, for the sake of a larger batch. preferred: sizes in rows that go at once.

    levels: the policies of the priorities 1, 2, ..., of which 1 is the highest; default_level: of a request without.
    joins: whether requests are joined at all.
    """

    max_rows: int = 1
    joins: bool = False
    delay: int = 0
    preferred: tuple[int, ...] = ()
    levels: tuple[QueuePolicy, ...] = (QueuePolicy(),)
    default_level: int = 1


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """A request that waits. until: when its time in the queue is up, None if never. late: it was, and it waits on."""

    item: T
    key: Hashable
    rows: int
    level: int
    arrived: int
    until: int | None = None
    late: bool = False
    waits: bool = True


class TooManyShapes(Exception):
    """Requests of so many shapes wait that looking through them takes too long."""


class QueueFull(Exception):
    """As many requests wait as the policy of this level allows."""

    def __init__(self, level: int, most: int) -> None:
        super().__init__(f"{most} requests wait already")
        self.level = level
        self.most = most


class _Group(Generic[T]):
    """The requests of one key: for each level a lane of those that are in time, and behind it one of those that are
    late."""

    __slots__ = ("joins", "lanes", "rows")

    def __init__(self, levels: int, joins: bool) -> None:
        self.lanes: list[OrderedDict[Entry[T], None]] = [OrderedDict() for _ in range(2 * levels)]
        self.rows = 0
        self.joins = joins

    def lane(self, entry: Entry[T]) -> OrderedDict[Entry[T], None]:
        return self.lanes[2 * (entry.level - 1) + entry.late]

    def add(self, entry: Entry[T]) -> None:
        self.lane(entry)[entry] = None
        self.rows += entry.rows

    def remove(self, entry: Entry[T]) -> None:
        del self.lane(entry)[entry]
        self.rows -= entry.rows

    def in_order(self) -> Iterator[Entry[T]]:
        for lane in self.lanes:
            yield from lane

    def turn(self) -> tuple[int, int]:
        """What is compared with other groups: the lane of the first request, and when it came."""
        for number, lane in enumerate(self.lanes):
            if lane:
                return number, next(iter(lane)).arrived
        raise AssertionError("a group is never empty")

    def oldest(self) -> int:
        return min(next(iter(lane)).arrived for lane in self.lanes if lane)


class Batcher(Generic[T]):
    """The queue of one model version."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._groups: dict[Hashable, _Group[T]] = {}
        self._counts = [0] * len(policy.levels)
        self._times: list[tuple[int, int, Entry[T]]] = []  # a heap: when time is up, the order of coming, whose
        self._numbers = 0
        self._sizes = frozenset((*policy.preferred, policy.max_rows))

    def __len__(self) -> int:
        """How many wait."""
        return sum(self._counts)

    def add(self, item: T, key: Hashable, rows: int, now: int, priority: int = 0, timeout: int = 0) -> Entry[T]:
        """A request comes, with as many rows as the policy allows, or fewer. Raises QueueFull and TooManyShapes.

        priority: 0, or one that there isn't, is the default level. timeout: the request's own, in ns, 0 if it has none.
        """
        levels = self.policy.levels
        level = priority if 1 <= priority <= len(levels) else self.policy.default_level
        rules = levels[level - 1]
        if rules.most and self._counts[level - 1] >= rules.most:
            raise QueueFull(level, rules.most)
        limit = rules.timeout
        if rules.override and timeout and (not limit or timeout < limit):
            limit = timeout
        if not self.policy.joins:
            key = None
        entry = Entry(item, key, rows, level, now, now + limit if limit else None)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= MOST_SHAPES:
                raise TooManyShapes
            group = self._groups[key] = _Group(len(levels), key is not None)
        group.add(entry)
        self._counts[level - 1] += 1
        if entry.until is not None:
            self._numbers += 1
            heappush(self._times, (entry.until, self._numbers, entry))
        return entry

    def drop(self, entry: Entry[T]) -> bool:
        """Nobody waits for it any more -> whether it still was here."""
        if not entry.waits:
            return False
        self._remove(entry)
        return True

    def clear(self) -> list[Entry[T]]:
        """All that wait, which then do so no more."""
        entries = [entry for group in self._groups.values() for entry in group.in_order()]
        for entry in entries:
            self._remove(entry)
        return entries

    def expire(self, now: int) -> list[Entry[T]]:
        """Those whose time is up and who are to be refused; others become late."""
        refused = []
        while self._times and self._times[0][0] <= now:
            entry = heappop(self._times)[2]
            if not entry.waits:
                continue
            if self.policy.levels[entry.level - 1].delay:
                group = self._groups[entry.key]
                group.remove(entry)
                entry.late = True
                group.add(entry)
            else:
                self._remove(entry)
                refused.append(entry)
        return refused

    def take(self, now: int) -> list[Entry[T]]:
        """The next batch for an idle instance, or nothing while waiting may make it larger. Call `expire` first."""
        ready = [group for group in self._groups.values() if self._ready_at(group) <= now]
        if not ready:
            return []
        batch = self._batch(min(ready, key=_Group.turn))
        for entry in batch:
            self._remove(entry)
        return batch

    def due(self, now: int, idle: bool) -> int | None:
        """When `expire`, or `take` if an instance is idle, may have something that they haven't now."""
        times = self._times
        while times and not times[0][2].waits:
            heappop(times)
        found = [times[0][0]] if times else []
        if idle:
            found += [self._ready_at(group) for group in self._groups.values()]
        return max(min(found), now) if found else None

    def _remove(self, entry: Entry[T]) -> None:
        entry.waits = False
        group = self._groups[entry.key]
        group.remove(entry)
        if not group.rows:
            del self._groups[entry.key]
        self._counts[entry.level - 1] -= 1
        if len(self._times) > 2 * len(self) + 64:
            # Those that are gone must not fill the heap while one that waits long stands at its head.
            self._times = [time for time in self._times if time[2].waits]
            heapify(self._times)

    def _ready_at(self, group: _Group[T]) -> int:
        policy = self.policy
        if not group.joins or not policy.delay or group.rows >= policy.max_rows:
            return 0
        if policy.preferred and self._preferred(group):
            return 0
        return group.oldest() + policy.delay

    def _preferred(self, group: _Group[T]) -> int:
        """How many requests make the largest batch of a preferred size, 0 if none do."""
        rows = best = 0
        for count, entry in enumerate(group.in_order(), 1):
            rows += entry.rows
            if rows > self.policy.max_rows:
                break
            if rows in self._sizes:
                best = count
        return best

    def _batch(self, group: _Group[T]) -> list[Entry[T]]:
        policy = self.policy
        if not group.joins:
            return [next(group.in_order())]
        count = self._preferred(group) if policy.preferred else 0
        batch: list[Entry[T]] = []
        rows = 0
        for entry in group.in_order():
            rows += entry.rows
            if batch and (rows > policy.max_rows or len(batch) == count):
                break
            batch.append(entry)
        return batch


class InOrder(Generic[T]):
    """Lets what has ended go only in the order in which it came."""

    def __init__(self) -> None:
        self._open: OrderedDict[T, Any] = OrderedDict()

    def add(self, item: T) -> None:
        self._open[item] = _OPEN

    def end(self, item: T, outcome: Any) -> list[tuple[T, Any]]:
        """It has ended so -> what may go now, itself among it or not. One that has gone already is not waited for."""
        if item in self._open:
            self._open[item] = outcome
        gone = []
        while self._open and (first := next(iter(self._open.items())))[1] is not _OPEN:
            gone.append(first)
            del self._open[first[0]]
        return gone


_OPEN = object()
