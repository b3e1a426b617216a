"""Which requests run together, and when: to the nanosecond, on a clock of our own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.backend.batching import (
    MOST_SHAPES,
    Batcher,
    Entry,
    InOrder,
    Policy,
    QueueFull,
    QueuePolicy,
    TooManyShapes,
)

US = 1_000


def policy(**changes: object) -> Policy:
    return Policy(**{"max_rows": 8, "joins": True, **changes})  # type: ignore[arg-type]


def added(batcher: Batcher[str], names: str, now: int = 0, rows: int = 1, key: str = "k", **more: int) -> None:
    for name in names:
        batcher.add(name, key, rows, now, **more)


def names(batch: Sequence[Entry[str]]) -> str:
    return "".join(entry.item for entry in batch)


# -- joining


def test_requests_that_wait_run_together() -> None:
    batcher: Batcher[str] = Batcher(policy())
    added(batcher, "abc")
    assert names(batcher.take(0)) == "abc"
    assert batcher.take(0) == []
    assert len(batcher) == 0


def test_a_batch_is_no_larger_than_the_model_takes() -> None:
    batcher: Batcher[str] = Batcher(policy(max_rows=4))
    added(batcher, "ab", rows=3)
    added(batcher, "c", rows=1)
    assert [names(batcher.take(0)) for _ in range(3)] == ["a", "bc", ""]


def test_without_joining_each_runs_alone() -> None:
    batcher: Batcher[str] = Batcher(Policy(max_rows=8))
    added(batcher, "abc")
    assert [names(batcher.take(0)) for _ in range(4)] == ["a", "b", "c", ""]


def test_requests_of_other_shapes_run_apart_and_hold_nobody_up() -> None:
    batcher: Batcher[str] = Batcher(policy(delay=100 * US))
    added(batcher, "a", 0, key="x")
    added(batcher, "bcdefghi", 10 * US, key="y")
    assert names(batcher.take(10 * US)) == "bcdefghi"  # full, though the other came first
    assert batcher.take(99 * US) == []
    assert names(batcher.take(100 * US)) == "a"


# -- delay


def test_a_batch_waits_for_the_delay_and_not_a_nanosecond_longer() -> None:
    batcher: Batcher[str] = Batcher(policy(delay=100 * US))
    added(batcher, "a", 7)
    added(batcher, "b", 50 * US)
    assert batcher.due(50 * US, idle=True) == 100 * US + 7
    assert batcher.take(100 * US + 6) == []
    assert names(batcher.take(100 * US + 7)) == "ab"


def test_a_full_batch_does_not_wait() -> None:
    batcher: Batcher[str] = Batcher(policy(delay=100 * US))
    added(batcher, "abcdefg")
    assert batcher.take(0) == []
    added(batcher, "h", 1)
    assert batcher.due(1, idle=True) == 1
    assert names(batcher.take(1)) == "abcdefgh"


def test_nothing_is_due_while_no_instance_is_idle() -> None:
    batcher: Batcher[str] = Batcher(policy(delay=100 * US))
    added(batcher, "a")
    assert batcher.due(0, idle=False) is None
    assert Batcher[str](policy()).due(0, idle=True) is None


# -- preferred sizes


@pytest.mark.parametrize(("waiting", "batch"), [("abc", ""), ("abcd", "abcd"), ("abcde", "abcd"), ("abcdef", "abcdef")])
def test_the_largest_preferred_size_that_can_be_had_goes_at_once(waiting: str, batch: str) -> None:
    batcher: Batcher[str] = Batcher(policy(preferred=(4, 6), delay=100 * US))
    added(batcher, waiting)
    assert names(batcher.take(0)) == batch


def test_the_size_that_the_model_takes_at_most_is_preferred_too() -> None:
    batcher: Batcher[str] = Batcher(policy(preferred=(4,), delay=100 * US))
    added(batcher, "abcdefgh")
    assert names(batcher.take(0)) == "abcdefgh"


def test_after_the_delay_what_is_there_goes() -> None:
    batcher: Batcher[str] = Batcher(policy(preferred=(4,), delay=100 * US))
    added(batcher, "abc")
    assert names(batcher.take(100 * US)) == "abc"


def test_requests_that_miss_a_preferred_size_wait_for_the_delay() -> None:
    batcher: Batcher[str] = Batcher(policy(preferred=(4,), delay=100 * US))
    added(batcher, "ab", rows=3)
    assert batcher.take(0) == []
    assert names(batcher.take(100 * US)) == "ab"


# -- priorities


def test_higher_priorities_go_first_and_fill_up_with_lower_ones() -> None:
    batcher: Batcher[str] = Batcher(policy(max_rows=3, levels=(QueuePolicy(),) * 3, default_level=2))
    added(batcher, "ab", priority=3)
    added(batcher, "cd")
    added(batcher, "e", priority=1)
    added(batcher, "f", priority=9)  # one that there isn't: the default
    assert [names(batcher.take(0)) for _ in range(2)] == ["ecd", "fab"]


def test_among_shapes_the_one_whose_first_has_the_highest_priority() -> None:
    batcher: Batcher[str] = Batcher(policy(levels=(QueuePolicy(),) * 2, default_level=2))
    added(batcher, "a", 0, key="x")
    added(batcher, "b", 1, key="y", priority=1)
    assert [names(batcher.take(1)) for _ in range(2)] == ["b", "a"]


# -- limits of a queue


def test_a_full_queue_refuses() -> None:
    batcher: Batcher[str] = Batcher(policy(levels=(QueuePolicy(most=2), QueuePolicy())))
    added(batcher, "ab", priority=1)
    with pytest.raises(QueueFull) as raised:
        added(batcher, "c", priority=1)
    assert (raised.value.level, raised.value.most) == (1, 2)
    added(batcher, "d", priority=2)
    assert len(batcher) == 3
    batcher.take(0)
    added(batcher, "e", priority=1)


def test_whose_time_is_up_is_refused() -> None:
    batcher: Batcher[str] = Batcher(policy(levels=(QueuePolicy(timeout=50 * US),)))
    added(batcher, "a", 0)
    added(batcher, "b", 10 * US)
    assert batcher.due(0, idle=False) == 50 * US
    assert batcher.expire(50 * US - 1) == []
    assert names(batcher.expire(50 * US)) == "a"
    assert names(batcher.take(50 * US)) == "b"
    assert batcher.expire(10**9) == []


def test_or_goes_on_behind_the_others() -> None:
    late = QueuePolicy(timeout=50 * US, delay=True)
    batcher: Batcher[str] = Batcher(policy(max_rows=2, levels=(late, late)))
    added(batcher, "ab", 0, priority=1)
    assert batcher.expire(60 * US) == []
    added(batcher, "cd", 60 * US, priority=1)
    added(batcher, "ef", 60 * US, priority=2)
    assert [names(batcher.take(60 * US)) for _ in range(3)] == ["cd", "ab", "ef"]


@pytest.mark.parametrize(
    ("default", "override", "own", "until"),
    [
        (50, True, 20, 20), (50, True, 70, 50), (50, False, 20, 50), (0, True, 20, 20), (0, False, 20, None),
        (50, True, 0, 50),
    ],
)
def test_a_request_may_shorten_its_time_where_it_is_allowed_to(
    default: int, override: bool, own: int, until: int | None
) -> None:
    batcher: Batcher[str] = Batcher(policy(levels=(QueuePolicy(timeout=default, override=override),)))
    assert batcher.add("a", "k", 1, 1000, timeout=own).until == (None if until is None else 1000 + until)


# -- those who leave


def test_who_has_left_is_not_run() -> None:
    batcher: Batcher[str] = Batcher(policy(delay=100 * US, levels=(QueuePolicy(timeout=500 * US),)))
    first = batcher.add("a", "k", 1, 0)
    added(batcher, "b", 20 * US)
    assert batcher.drop(first)
    assert not batcher.drop(first)
    assert batcher.due(20 * US, idle=True) == 120 * US
    assert names(batcher.take(120 * US)) == "b"
    assert batcher.expire(10**9) == []


def test_many_who_come_and_leave_leave_nothing() -> None:
    batcher: Batcher[int] = Batcher(policy(levels=(QueuePolicy(timeout=10**12),)))
    for number in range(10_000):
        batcher.drop(batcher.add(number, number, 1, number))
    assert (len(batcher), len(batcher._groups)) == (0, 0)
    assert len(batcher._times) < 100


def test_those_that_ran_leave_nothing_though_one_waits() -> None:
    batcher: Batcher[int] = Batcher(policy(joins=False, levels=(QueuePolicy(timeout=10**12),) * 2))
    batcher.add(-1, "k", 1, 0, priority=2)
    for number in range(10_000):
        batcher.add(number, "k", 1, number, priority=1)
        batcher.take(number)
    assert len(batcher) == 1
    assert len(batcher._times) < 100


def test_requests_of_too_many_shapes_are_refused() -> None:
    batcher: Batcher[int] = Batcher(policy())
    for number in range(MOST_SHAPES):
        batcher.add(number, number, 1, 0)
    with pytest.raises(TooManyShapes):
        batcher.add(-1, -1, 1, 0)
    batcher.add(-1, 0, 1, 0)
    assert len(batcher) == MOST_SHAPES + 1


def test_all_that_wait_can_be_sent_away() -> None:
    batcher: Batcher[str] = Batcher(policy())
    added(batcher, "ab", key="x")
    added(batcher, "c", key="y")
    assert names(batcher.clear()) == "abc"
    assert (len(batcher), batcher.take(0), batcher.due(0, idle=True)) == (0, [], None)


def test_one_that_runs_has_not_left() -> None:
    batcher: Batcher[str] = Batcher(policy())
    entry = batcher.add("a", "k", 1, 0)
    batcher.take(0)
    assert not batcher.drop(entry)


# -- in order


def test_what_ends_early_waits_for_those_before_it() -> None:
    line: InOrder[str] = InOrder()
    for name in "abc":
        line.add(name)
    assert line.end("b", 2) == []
    assert line.end("a", 1) == [("a", 1), ("b", 2)]
    assert line.end("c", 3) == [("c", 3)]
    assert line.end("c", 4) == []


@given(st.permutations(range(12)))
def test_everything_ends_once_and_in_order(order: list[int]) -> None:
    line: InOrder[int] = InOrder()
    for number in range(12):
        line.add(number)
    out = [item for number in order for item in line.end(number, str(number))]
    assert out == [(number, str(number)) for number in range(12)]


# -- whatever happens

POLICIES = st.builds(
    Policy,
    max_rows=st.integers(1, 8),
    joins=st.booleans(),
    delay=st.sampled_from([0, 5, 20]),
    preferred=st.sampled_from([(), (2,), (3, 5)]),
    levels=st.lists(
        st.builds(
            QueuePolicy,
            timeout=st.sampled_from([0, 3, 30]),
            delay=st.booleans(),
            override=st.booleans(),
            most=st.sampled_from([0, 3]),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 8), st.sampled_from("xy"), st.integers(0, 3), st.sampled_from([0, 2])),
        st.tuples(st.just("take")),
        st.tuples(st.just("drop"), st.integers(0, 50)),
        st.tuples(st.just("wait"), st.integers(1, 25)),
    ),
    max_size=80,
)


@given(POLICIES, STEPS)
def test_every_request_comes_out_once(rules: Policy, steps: list[tuple[object, ...]]) -> None:
    batcher: Batcher[int] = Batcher(rules)
    now = 0
    waiting: dict[int, Entry[int]] = {}
    ended: set[int] = set()

    def gone(entries: Sequence[Entry[int]]) -> None:
        for entry in entries:
            assert entry.item not in ended
            ended.add(entry.item)
            del waiting[entry.item]

    def take() -> None:
        gone(batcher.expire(now))
        batch = batcher.take(now)
        gone(batch)
        if not batch:
            # Nothing is held back for longer than the delay.
            assert all(now < entry.arrived + rules.delay for entry in waiting.values())
            return
        assert len({entry.key for entry in batch}) == 1
        assert sum(entry.rows for entry in batch) <= rules.max_rows or len(batch) == 1
        assert rules.joins or len(batch) == 1
        lanes = [(entry.level, entry.late) for entry in batch]
        assert lanes == sorted(lanes)
        for lane in set(lanes):
            arrivals = [entry.arrived for entry, own in zip(batch, lanes, strict=True) if own == lane]
            assert arrivals == sorted(arrivals)

    for number, step in enumerate(steps):
        match step:
            case ("add", int(rows), str(key), int(priority), int(timeout)):
                level = priority if 1 <= priority <= len(rules.levels) else 1
                most = rules.levels[level - 1].most
                full = bool(most) and len([one for one in waiting.values() if one.level == level]) >= most
                with pytest.raises(QueueFull) if full else nullcontext():
                    waiting[number] = batcher.add(number, key, min(rows, rules.max_rows), now, priority, timeout)
            case ("take",):
                take()
            case ("drop", int(which)) if waiting:
                gone([entry for entry in [list(waiting.values())[which % len(waiting)]] if batcher.drop(entry)])
            case ("wait", int(time)):
                now += time
        assert len(batcher) == len(waiting)
        due = batcher.due(now, idle=True)
        assert (due is None) == (not waiting)
    now += 10**6
    for _ in range(len(waiting) + 1):
        take()
    assert not waiting
    assert len(batcher) == 0
