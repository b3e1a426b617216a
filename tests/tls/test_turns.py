"""Turns of the loop are shared by time: sizes of reads, and pauses of who has had too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.tls.turns import (
    CHEAP_SECONDS,
    DEAR_SECONDS,
    MOST_SECONDS,
    SIZES,
    WINDOW_SECONDS,
    Turns,
)

MS = 0.001


class World:
    """One connection's turns among others: `read` works on one of its reads, `others` on some of theirs."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 10
        self.worked = 5.0
        self.turns = Turns(self.reads)

    def read(self, spent: float, full: bool = True) -> float:
        self.now += spent
        self.reads += 1
        self.worked += spent
        return self.turns.note(spent, self.now, full, self.reads, self.worked)

    def others(self, reads: int = 1, worked: float = 0.0) -> None:
        self.reads += reads
        self.worked += worked


def shrunk() -> World:
    world = World()
    for _ in SIZES:
        world.read(2 * DEAR_SECONDS)
    return world


def test_reads_grow_while_they_are_full_and_cheap() -> None:
    world = shrunk()
    sizes = [SIZES[world.turns.size]]
    for _ in range(4):
        world.read(CHEAP_SECONDS / 2)
        sizes.append(SIZES[world.turns.size])
    assert sizes == [2_048, 8_192, 32_768, 131_072, 131_072]


def test_small_reads_say_nothing_about_larger_ones() -> None:
    world = shrunk()
    for _ in range(5):
        world.read(CHEAP_SECONDS / 2, full=False)
    assert SIZES[world.turns.size] == 2_048


def test_reads_shrink_while_they_are_dear() -> None:
    world = World()
    for size in (32_768, 8_192, 2_048, 2_048):
        world.read(2 * DEAR_SECONDS)
        assert SIZES[world.turns.size] == size
    world.read(DEAR_SECONDS * 0.9)
    assert SIZES[world.turns.size] == 2_048
    world.read(CHEAP_SECONDS / 2)
    assert SIZES[world.turns.size] == 8_192


def test_who_is_alone_never_pauses() -> None:
    world = World()
    assert {world.read(spent * MS) for spent in range(1, 50)} == {0.0}


def test_the_first_dear_read_may_be_another_programs_doing() -> None:
    world = World()
    world.others()
    assert world.read(10 * MS) == 0.0
    assert world.turns.suspect
    world.others()
    assert world.read(0.1 * MS) == 0.0
    assert not world.turns.suspect


def test_the_second_is_paused_for() -> None:
    world = World()
    world.others()
    world.read(10 * MS)
    world.others()
    assert world.read(10 * MS) == pytest.approx(10 * MS)


def test_many_cheap_reads_add_up() -> None:
    world = World()
    pauses = []
    for _ in range(10):
        world.others()
        pauses.append(world.read(0.6 * MS))
    assert [round(pause / MS, 3) for pause in pauses] == [0, 0, 0, 0, 3, 0, 0, 0, 0, 3]


@pytest.mark.parametrize(("others", "pauses"), [(0.3, True), (1.0, False), (2.0, False)])
def test_who_works_beside_others_that_need_as_much_does_not_pause(others: float, pauses: bool) -> None:
    world = World()
    waited = 0.0
    for _ in range(20):
        world.others(worked=others * MS)
        world.now += others * MS
        waited += world.read(0.9 * MS)
    assert (waited > 0) is pauses


def test_work_that_is_spread_over_time_does_not() -> None:
    world = World()
    for _ in range(100):
        world.others()
        assert world.read(0.6 * MS) == 0.0
        world.now += WINDOW_SECONDS / 3


def test_others_that_had_work_before_do_not_count() -> None:
    world = World()
    world.others()
    world.read(MOST_SECONDS * 0.9)
    world.now += 2 * WINDOW_SECONDS
    for _ in range(10):
        assert world.read(MOST_SECONDS / 2) == 0.0


def test_others_are_looked_at_after_two_full_reads_or_one_small_one() -> None:
    world = World()
    assert not world.turns.ends_turn(full=True, times=1)
    assert world.turns.ends_turn(full=True, times=2)
    world = shrunk()
    assert world.turns.ends_turn(full=True, times=1)
    assert not world.turns.ends_turn(full=False, times=0)


@given(st.lists(st.tuples(st.floats(0.00001, 0.1), st.booleans(), st.booleans()), max_size=50))
def test_nobody_pauses_for_longer_than_it_worked(reads: list[tuple[float, bool, bool]]) -> None:
    world = World()
    worked = 0.0
    for spent, others, full in reads:
        if others:
            world.others(worked=0.001)
        pause = world.read(spent, full)
        worked += spent
        assert pause <= worked + 1e-9
        if pause:
            worked = 0.0
            world.now += pause
        assert 0 <= world.turns.size < len(SIZES)
