"""Promises: handshakes never take more of the time than their share while others work, and nobody keeps others out."""

from __future__ import annotations

import pytest

from proxy.tls import pacing
from proxy.tls.pacing import ADDRESS_PRICE, BUSY_SECONDS, MIDWAY, PATIENCE, PRICE, SLACK, Pacer

STEP = 0.0005


class Gate:
    """A pacer, the handshakes that it has given up, and others that work all the time, if at all."""

    def __init__(self, busy: bool) -> None:
        self.given_up: list[str] = []
        self.pacer: Pacer[str] = Pacer(self.given_up.append)
        self.now = 100.0
        self.busy = busy
        self._work = 0

    def add(self, *names: str) -> None:
        """Names are of the form ADDRESS/NUMBER."""
        for name in names:
            self.pacer.add(name, name.partition("/")[0], self.now)

    def take(self) -> str | None:
        if self.busy:
            self._work += 1
        self.pacer.note_work(self._work, self.now)
        return self.pacer.take(self.now)

    def step(self, seconds: float = STEP) -> str | None:
        """Who has a step next, which takes so long."""
        name = self.take()
        if name is not None:
            self.now += seconds
            self.pacer.spent(name.partition("/")[0], seconds, self.now)
        return name

    def run(self, seconds: float) -> list[str]:
        """All that have a step in the next time, as early as they may; it is their last."""
        end, taken = self.now + seconds, []
        while self.now < end and self.pacer:
            name = self.step()
            if name is None:
                due = self.pacer.due(self.now)
                assert due > self.now, "nobody may go on, and it is said that somebody may"
                self.now = due
            else:
                taken.append(name)
                self.pacer.done(name)
        return taken


def names(address: str, count: int) -> list[str]:
    return [f"{address}/{number}" for number in range(count)]


# -- the share of the time


def test_without_other_work_nobody_waits() -> None:
    gate = Gate(busy=False)
    many = names("a", 100) + names("b", 3)
    gate.add(*many)
    began = gate.now
    taken = [gate.step() for _ in many]
    assert sorted(map(str, taken)) == sorted(many)
    assert gate.now == pytest.approx(began + 103 * STEP)
    assert not gate.pacer


@pytest.mark.parametrize(("addresses", "price"), [(1, ADDRESS_PRICE), (2, PRICE), (100, PRICE)])
def test_with_other_work_handshakes_have_their_share(addresses: int, price: float) -> None:
    gate = Gate(busy=True)
    for address in range(addresses):
        gate.add(*names(str(address), 5000))
    share = len(gate.run(10.0)) * STEP / 10
    assert share <= 1 / price + SLACK / 10
    assert share >= 0.9 / (price + 1)


def test_handshakes_in_a_thousand_steps_have_no_more() -> None:
    gate = Gate(busy=True)
    gate.add(*names("a", 3))
    steps, end = 0, gate.now + 10.0
    while gate.now < end:
        name = gate.step()
        if name is None:
            gate.now = gate.pacer.due(gate.now)
        else:
            steps += 1
            gate.add(name)  # the next piece of its message is there already
    assert 0.9 / (ADDRESS_PRICE + 1) <= steps * STEP / 10 <= 1 / ADDRESS_PRICE + SLACK / 10


def test_a_few_handshakes_never_wait() -> None:
    gate = Gate(busy=True)
    gate.add("a/1", "a/2")
    assert [gate.step(), gate.step()] == ["a/1", "a/2"]


def test_the_pauses_end_with_the_work() -> None:
    gate = Gate(busy=True)
    gate.add(*names("a", 500))
    while gate.step() is not None:
        pass
    assert gate.pacer
    gate.busy = False
    gate.now += BUSY_SECONDS
    assert gate.step() is not None
    assert gate.step() is not None


def test_what_was_done_in_idle_time_is_not_paid_for() -> None:
    gate = Gate(busy=False)
    gate.add(*names("a", 200))
    for _ in range(100):
        gate.step()
    gate.busy = True
    assert gate.step() is not None


# -- who is next


@pytest.mark.parametrize("busy", [True, False])
def test_a_flood_from_one_address_does_not_keep_another_out(busy: bool) -> None:
    gate = Gate(busy)
    gate.add(*names("flood", 1000))
    taken = gate.run(0.3)
    gate.add("good/1")
    taken = gate.run(0.2)
    assert taken.index("good/1") <= 1


def test_of_one_address_the_first_comes_first() -> None:
    gate = Gate(busy=False)
    gate.add(*names("a", 5))
    assert [gate.step() for _ in range(5)] == names("a", 5)


def test_addresses_take_turns() -> None:
    gate = Gate(busy=True)
    gate.add(*names("a", 500), *names("b", 500))
    taken = gate.run(1.0)
    a, b = (sum(name.startswith(address) for name in taken) for address in "ab")
    assert abs(a - b) <= 1


def test_going_on_and_starting_take_turns() -> None:
    """Neither does a flood of first messages keep begun handshakes from their end, nor the reverse."""
    gate = Gate(busy=False)
    gate.add(*names("a", 6))
    begun = [str(gate.step()) for _ in range(3)]
    gate.add(*begun)
    assert [gate.step() for _ in range(6)] == ["a/0", "a/3", "a/1", "a/4", "a/2", "a/5"]


def test_one_that_is_gone_while_it_waits_is_passed_over() -> None:
    gate = Gate(busy=False)
    gate.add("a/1", "a/2", "b/1")
    gate.pacer.done("a/1")
    gate.pacer.done("b/1")
    assert gate.step() == "a/2"
    gate.add("a/2")
    gate.pacer.done("a/2")
    assert gate.step() is None
    assert not gate.pacer


# -- handshakes whose client doesn't answer


def full_gate() -> Gate:
    gate = Gate(busy=False)
    gate.add(*names("stalls", MIDWAY))
    for _ in range(MIDWAY):
        assert gate.step(0.0) is not None
    return gate


def test_when_all_places_are_taken_the_next_waits_until_one_is_free() -> None:
    gate = full_gate()
    gate.add("new/1")
    assert gate.step() is None
    gate.pacer.done("stalls/5")
    assert gate.step() == "new/1"
    assert gate.given_up == []


def test_when_all_places_are_taken_the_oldest_has_its_time() -> None:
    gate = full_gate()
    gate.add("new/1", "new/2")
    assert gate.pacer.due(gate.now) == gate.now + PATIENCE
    gate.now += PATIENCE
    assert [gate.step(), gate.step()] == ["new/1", "new/2"]
    assert gate.given_up == ["stalls/0", "stalls/1"]


def test_nobody_is_given_up_whose_client_has_answered() -> None:
    gate = full_gate()
    gate.add("stalls/0", "stalls/1", "new/1")
    gate.now += PATIENCE
    assert [gate.step(), gate.step()] == ["stalls/0", "new/1"]
    assert gate.given_up == ["stalls/0"], "it had its time"
    assert gate.step() == "stalls/1"


def test_nobody_is_given_up_while_nobody_waits() -> None:
    gate = full_gate()
    gate.now += 100 * PATIENCE
    assert gate.step() is None
    assert gate.given_up == []


def test_a_flood_of_stalled_handshakes_does_not_keep_another_address_out() -> None:
    gate = full_gate()
    gate.add(*names("more", 1000))
    gate.now += PATIENCE
    gate.step()
    gate.add("good/1")
    assert "good/1" in (gate.step(), gate.step())


# -- memory


def test_addresses_are_forgotten() -> None:
    gate = Gate(busy=True)
    gate.add(*(f"{number}/1" for number in range(1000)), "waits/1")
    while (name := gate.take()) != "waits/1":
        if name is None:
            gate.now = gate.pacer.due(gate.now)
        else:
            gate.pacer.done(name)
    gate.pacer.spent("waits", 1.0, gate.now)
    gate.pacer.forget(gate.now)
    assert list(gate.pacer._paid_by) == ["waits"]
    gate.pacer.forget(gate.now + ADDRESS_PRICE)
    assert not gate.pacer._paid_by
    assert not gate.pacer._starting._queues


def test_one_address_has_less_than_all_have() -> None:
    assert pacing.ADDRESS_PRICE > pacing.PRICE
