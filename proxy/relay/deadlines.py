"""Deadlines of calls on a wheel of 20 ms slots: adding and removing one costs a set operation, not a timer.

Reads no clock: `now` is an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

SLOT_SECONDS = 0.02


class Timed(Protocol):
    """What can have a deadline; `deadline_slot` is the wheel's own and -1 for none."""

    deadline_slot: int


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """A call is due at the end of the slot that its deadline falls into: never early, at most 20 ms late."""

    def __init__(self) -> None:
        self._slots: dict[int, set[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._slots)

    def add(self, item: T, when: float) -> None:
        slot = int(when / SLOT_SECONDS) + 1
        item.deadline_slot = slot
        items = self._slots.get(slot)
        if items is None:
            self._slots[slot] = {item}
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
        for slot in [slot for slot in self._slots if slot <= current]:
            due.extend(self._slots.pop(slot))
        for item in due:
            item.deadline_slot = -1
        return due
