"""Promise: what holds up the event loop is seen, as a distribution and as the most, and a server that idles sleeps."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from proxy.backend import looplag
from proxy.backend.looplag import BOUNDS, LoopLag
from tests import peers
from tests.support.processes import LIVENESS


async def samples(lag: LoopLag, count: int) -> None:
    async with asyncio.timeout(LIVENESS):
        while sum(lag.counts) < count:
            await asyncio.sleep(0.01)


async def test_a_callback_that_blocks_is_seen() -> None:
    lag = LoopLag()
    lag.start()
    await samples(lag, 1)
    time.sleep(0.3)
    await samples(lag, sum(lag.counts) + 1)
    lag.stop()
    # The tick after the one before came 20 ms later at most.
    assert lag.most >= 250_000_000
    assert sum(lag.counts[BOUNDS.index(0.2) + 1 :]) >= 1
    assert lag.total >= lag.most


async def test_ticks_that_did_not_come_count_as_late_ones() -> None:
    lag = LoopLag()
    lag.start()
    time.sleep(0.32)
    await samples(lag, 2)
    lag.stop()
    # Due after 20, 40, ... ms, all of them at 320: some 15 samples, of which at least these were later than 100 ms.
    assert sum(lag.counts[BOUNDS.index(0.1) + 1 :]) >= 10


async def test_nothing_is_measured_after_the_end() -> None:
    lag = LoopLag()
    lag.start()
    await samples(lag, 1)
    lag.stop()
    before = list(lag.counts)
    await asyncio.sleep(0.1)
    assert lag.counts == before


async def test_an_idle_process_is_woken_up_less_often_and_a_busy_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lag = LoopLag()
    lag.start()
    fine = lag.tick
    monkeypatch.setattr(looplag, "_IDLE_AFTER", 1)
    monkeypatch.setattr(looplag, "_IDLE_SHARE", 0)  # idle, whatever else runs in this process
    await samples(lag, 3)
    assert lag.tick == 10 * fine
    monkeypatch.setattr(looplag, "_IDLE_SHARE", 10**9)  # busy, however little it does
    await samples(lag, sum(lag.counts) + 1)
    lag.stop()
    assert lag.tick == fine


IDLE = """
import asyncio
from proxy.backend.looplag import LoopLag

async def main():
    lag = LoopLag()
    lag.start()
    fine = lag.tick
    while lag.tick == fine:
        await asyncio.sleep(0.5)

asyncio.run(main())
"""


def test_a_process_that_uses_no_processor_time_is_idle_after_a_while() -> None:
    # In a process of its own: in this one, other tests' threads may work.
    subprocess.run([sys.executable, "-c", IDLE], check=True, timeout=LIVENESS, cwd=peers.ROOT)


async def test_the_most_is_kept_for_all_who_ask_and_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looplag, "_WINDOW", 300_000_000)
    lag = LoopLag()
    lag.start()
    await samples(lag, 1)
    time.sleep(1)
    await samples(lag, sum(lag.counts) + 1)
    assert lag.most == lag.most >= 900_000_000
    async with asyncio.timeout(LIVENESS):
        while lag.most >= 900_000_000:
            await asyncio.sleep(0.05)
    lag.stop()


def test_the_most_outlives_the_window_in_which_it_was() -> None:
    lag = LoopLag()
    lag._most = 5
    lag._turn_window(lag._window_ends)
    assert lag.most == 5
    lag._turn_window(lag._window_ends)
    assert lag.most == 0
