"""Deadlines of calls on a wheel of 20 ms slots: adding and removing one costs a set operation, not a timer.

Reads no clock: `now` is an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar

SLOT_SECONDS = 0.02
_SLACK = 1024


class Timed(Protocol):
    """What can have a deadline; `deadline_slot` is the wheel's own and -1 for none."""

    deadline_slot: int


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """A call is due at the end of the slot that its deadline falls into: never early, at most 20 ms late."""

    def __init__(self) -> None:
        self._slots: dict[int, set[T]] = {}
        self._order: list[int] = []  # a heap of slots; those that were emptied stay until they are due or too many

    def __bool__(self) -> bool:
        return bool(self._slots)

    def add(self, item: T, when: float) -> None:
        slot = int(when / SLOT_SECONDS) + 1
        item.deadline_slot = slot
        items = self._slots.get(slot)
        if items is None:
            self._slots[slot] = {item}
            if len(self._order) > 2 * len(self._slots) + _SLACK:
                self._order = sorted(self._slots)
            else:
                heappush(self._order, slot)
        else:
            items.add(item)

    def remove(self, item: T) -> None:
        """Does nothing for an item that isn't on the wheel."""
        slot = item.deadline_slot
        if slot >= 0 and (items := self._slots.get(slot)) is not None:
            items.discard(item)
            if not items:
                del self._slots[slot]
        item.deadline_slot = -1

    def due(self, now: float) -> list[T]:
        """Take all items whose slot has passed off the wheel."""
        current = int(now / SLOT_SECONDS)
        due: list[T] = []
        order = self._order
        while order and order[0] <= current:
            due.extend(self._slots.pop(heappop(order), ()))
        for item in due:
            item.deadline_slot = -1
        return due
