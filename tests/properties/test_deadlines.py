"""Whatever is added, removed and asked for: an item is due once, never early, and at most one slot late."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.relay.deadlines import SLOT_SECONDS, Deadlines
from tests.properties.quick import quick


class Item:
    def __init__(self, when: float) -> None:
        self.when = when
        self.deadline_slot = -1


seconds = st.floats(0, 5) | st.floats(0, 1e7) | st.integers(0, 200).map(lambda slots: slots * SLOT_SECONDS)


@quick
@given(st.lists(st.tuples(st.sampled_from(["add", "add", "remove", "wait"]), seconds), max_size=60))
def test_deadlines(steps: list[tuple[str, float]]) -> None:
    wheel: Deadlines[Item] = Deadlines()
    pending: list[Item] = []
    now = 0.0
    for what, number in steps:
        if what == "add":
            item = Item(now + number)
            wheel.add(item, item.when)
            pending.append(item)
        elif what == "remove" and pending:
            item = pending.pop(int(number) % len(pending))
            wheel.remove(item)
        elif what == "wait":
            now += number
            due = wheel.due(now)
            assert len(set(due)) == len(due)
            for item in due:
                assert item.when <= now
                assert item.deadline_slot == -1
                pending.remove(item)
            # The slack is what a float of this size can't tell apart.
            assert all(item.when > now - SLOT_SECONDS * 1.001 - now * 1e-12 for item in pending)
        assert bool(wheel) == bool(pending)
