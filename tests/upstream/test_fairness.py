"""Room and places to wait are shared by address first, by connection then."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.fairness import SHARE, Account, Accounts, Line, may_have, party


class Connection:
    def __init__(self, accounts: Accounts, address: str) -> None:
        self.account: Account = accounts.join(address)
        self.carried = 0

    def carry(self, calls: int) -> None:
        self.carried += calls
        self.account.carried += calls


@dataclass(frozen=True)
class Waiting:
    owner: Connection
    number: int


def greedy(connections: list[Connection], places: int) -> int:
    """Every one takes what it may, again and again -> what is left."""
    room = places - sum(conn.carried for conn in connections)
    moving = True
    while moving and room:
        moving = False
        for conn in connections:
            if room and may_have(conn, room):
                conn.carry(1)
                room -= 1
                moving = True
    return room


# -- room


def test_one_connection_alone_gets_eight_of_nine() -> None:
    conn = Connection(Accounts(), "a")
    assert greedy([conn], 90) == 10


def test_connections_of_one_address_share_alike_when_nobody_else_is_there() -> None:
    accounts = Accounts()
    conns = [Connection(accounts, "a") for _ in range(10)]
    assert greedy(conns, 810) == 10
    assert {conn.carried for conn in conns} == {80}


@pytest.mark.parametrize("connections", [1, 10, 300])
def test_an_address_gets_no_more_for_having_more_connections(connections: int) -> None:
    accounts = Accounts()
    other = Connection(accounts, "b")
    left = greedy([Connection(accounts, "a") for _ in range(connections)], 900)
    assert left >= 100
    assert may_have(other, left)
    other.carry(1)
    assert may_have(other, left - 1)


def test_within_an_address_there_is_some_left_for_its_next_connection() -> None:
    accounts = Accounts()
    Connection(accounts, "b")
    left = greedy([Connection(accounts, "a") for _ in range(5)], 900)
    assert may_have(Connection(accounts, "a"), left)


def test_an_address_that_is_alone_again_gets_all() -> None:
    accounts = Accounts()
    leaves = Connection(accounts, "b")
    conns = [Connection(accounts, "a") for _ in range(20)]
    assert greedy(conns, 900) >= 100
    assert party(conns[0]) is conns[0].account
    accounts.leave(leaves.account)
    assert len(accounts) == 1
    assert greedy(conns, 900) < 10
    assert party(conns[0]) is conns[0]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), min_size=1, max_size=30), st.integers(1, 300))
def test_what_is_certain_is_allowed(connections: list[tuple[str, int]], room: int) -> None:
    """The pool's short cut: an address that has less than seven times the room may have more, whichever connection."""
    accounts = Accounts()
    conns = [Connection(accounts, address) for address, _ in connections]
    for conn, (_, carried) in zip(conns, connections, strict=True):
        conn.carry(carried)
    for conn in conns:
        if conn.account.carried < room * (SHARE - 1):
            assert may_have(conn, room)


# -- places to wait


def line_of(calls: dict[Connection, int]) -> Line[Waiting]:
    line: Line[Waiting] = Line()
    for conn, number in calls.items():
        for index in range(number):
            line.add(Waiting(conn, index))
    return line


def take(line: Line[Waiting]) -> Waiting | None:
    call = line.next(lambda owner: True)
    if call is not None:
        line.remove(call)
    return call


def test_addresses_take_turns_and_their_connections_in_them() -> None:
    accounts = Accounts()
    many = [Connection(accounts, "a") for _ in range(3)]
    one = Connection(accounts, "b")
    line = line_of({**dict.fromkeys(many, 2), one: 3})
    order = [call.owner for call in iter(lambda: take(line), None)]
    assert order == [many[0], one, many[1], one, many[2], one, many[0], many[1], many[2]]
    assert not line
    assert line.parties() == {}


def test_who_may_not_have_room_is_passed_over() -> None:
    accounts = Accounts()
    first, second = Connection(accounts, "a"), Connection(accounts, "b")
    line = line_of({first: 1, second: 1})
    call = line.next(lambda owner: owner is second)
    assert call == Waiting(second, 0)
    assert line.next(lambda owner: False) is None


def test_an_address_has_as_many_places_as_it_leaves() -> None:
    accounts = Accounts()
    other = Connection(accounts, "b")
    line: Line[Waiting] = Line()
    waiting = 0
    for number in count():
        conn = Connection(accounts, "a")  # each call on a connection of its own
        if not line.has_place(conn, 100 - waiting):
            break
        line.add(Waiting(conn, number))
        waiting += 1
    assert waiting == 50
    assert line.has_place(other, 100 - waiting)


def test_the_longest_connection_of_the_longest_address_makes_place() -> None:
    accounts = Accounts()
    long, short, other = (Connection(accounts, address) for address in "aab")
    line = line_of({long: 5, short: 2, other: 3})
    assert line.who_makes_place(other) == Waiting(long, 4)
    assert line.who_makes_place(Connection(accounts, "c")) == Waiting(long, 4)
    assert line.who_makes_place(short) == Waiting(long, 4)
    assert line.who_makes_place(long) is None


def test_nobody_makes_place_for_who_would_have_as_many() -> None:
    accounts = Accounts()
    first, second = Connection(accounts, "a"), Connection(accounts, "b")
    line = line_of({first: 3, second: 2})
    assert line.who_makes_place(second) is None
    assert line_of({}).who_makes_place(first) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60))
def test_what_waits_is_counted(steps: list[tuple[int, bool]]) -> None:
    accounts = Accounts()
    conns = [Connection(accounts, "ab"[index % 2]) for index in range(6)]
    line: Line[Waiting] = Line()
    waiting: list[Waiting] = []
    for number, (index, comes) in enumerate(steps):
        if comes:
            waiting.append(Waiting(conns[index], number))
            line.add(waiting[-1])
        elif waiting:
            line.remove(waiting.pop(index % len(waiting)))
        assert bool(line) == bool(waiting)
        of_a = len([call for call in waiting if call.owner.account is conns[0].account])
        assert line.parties().get(conns[0].account, 0) == of_a
