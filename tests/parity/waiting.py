"""Waiting in an event loop for what a server does a moment after it has answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from tests.support.processes import LIVENESS


async def eventually(probe: Callable[[], Awaitable[object]]) -> None:
    """Call `probe` until it returns something true."""
    end = time.monotonic() + LIVENESS
    while not await probe():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.02)
