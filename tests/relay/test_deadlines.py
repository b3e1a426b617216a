"""Deadlines on the wheel, by a clock that the test sets."""

from __future__ import annotations

import pytest

from proxy.relay.deadlines import SLOT_SECONDS, Deadlines


class Item:
    def __init__(self) -> None:
        self.deadline_slot = -1


@pytest.fixture
def wheel() -> Deadlines[Item]:
    return Deadlines()


@pytest.mark.parametrize("when", [0.0, 0.001, 0.02, 0.58, 1.0, 12.345, 3600.0, 1e6])
@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.02, 0.1, 60.0])
def test_due_not_early_and_at_most_one_slot_late(wheel: Deadlines[Item], when: float, seconds: float) -> None:
    item = Item()
    wheel.add(item, when + seconds)
    assert wheel.due(when + seconds - 0.0001) == []
    assert wheel.due(when + seconds + SLOT_SECONDS + 0.0001) == [item]
    assert item.deadline_slot == -1
    assert not wheel


def test_due_once(wheel: Deadlines[Item]) -> None:
    wheel.add(Item(), 1.0)
    assert len(wheel.due(2.0)) == 1
    assert wheel.due(2.0) == wheel.due(3.0) == []


def test_due_in_order_of_slots_and_all_of_them_after_a_pause(wheel: Deadlines[Item]) -> None:
    items = [Item() for _ in range(5)]
    for item, when in zip(items, (3.0, 1.0, 2.0, 1.001, 9.0), strict=True):
        wheel.add(item, when)
    due = wheel.due(4.0)
    assert set(due[:2]) == {items[1], items[3]}
    assert due[2:] == [items[2], items[0]]
    assert wheel
    assert wheel.due(10.0) == [items[4]]


def test_removed_items_are_not_due(wheel: Deadlines[Item]) -> None:
    stays, goes = Item(), Item()
    for item in (stays, goes):
        wheel.add(item, 1.0)
    wheel.remove(goes)
    assert goes.deadline_slot == -1
    assert wheel.due(2.0) == [stays]


def test_an_empty_wheel_needs_no_timer(wheel: Deadlines[Item]) -> None:
    assert not wheel
    item = Item()
    wheel.add(item, 1.0)
    assert wheel
    wheel.remove(item)
    assert not wheel


def test_removing_what_is_not_on_the_wheel_does_nothing(wheel: Deadlines[Item]) -> None:
    item, other = Item(), Item()
    wheel.add(item, 1.0)
    wheel.remove(other)
    wheel.remove(other)
    assert wheel.due(2.0) == [item]
    wheel.remove(item)
    other.deadline_slot = 12345  # as of another wheel
    wheel.remove(other)
    assert other.deadline_slot == -1


def test_an_item_can_be_added_again(wheel: Deadlines[Item]) -> None:
    item = Item()
    wheel.add(item, 1.0)
    wheel.remove(item)
    wheel.add(item, 5.0)
    assert wheel.due(2.0) == []
    assert wheel.due(6.0) == [item]
    wheel.add(item, 7.0)
    assert wheel.due(8.0) == [item]


def test_a_slot_can_be_emptied_and_used_again(wheel: Deadlines[Item]) -> None:
    for _ in range(10):
        item = Item()
        wheel.add(item, 1.0)
        wheel.remove(item)
    wheel.add(item, 1.0)
    assert wheel.due(2.0) == [item]
    assert wheel.due(2.0) == []


def test_many_deadlines_that_are_never_reached_leave_the_others_in_order(wheel: Deadlines[Item]) -> None:
    """Almost every call ends before its deadline: each leaves a slot behind, and those must not pile up."""
    kept = [Item() for _ in range(10)]
    for number, item in enumerate(kept):
        wheel.add(item, 500.0 - number)
    for number in range(5000):
        item = Item()
        wheel.add(item, 10.0 + number * SLOT_SECONDS)
        wheel.remove(item)
    assert wheel.due(400.0) == []
    assert wheel.due(600.0) == kept[::-1]
    assert not wheel
