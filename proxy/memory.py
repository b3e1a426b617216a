"""Memory that was freed, back to the system.

glibc keeps what is freed below a block that is still in use, and that is nearly all of it: after 2,000 connections at
once the gate would stay at 130 MB. `malloc_trim` hands free pages back wherever they are: 80 MB in 10 ms, a part of a
millisecond where there is little to hand back. What Python itself holds for small objects stays, some 10 MB of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


def return_free_memory() -> None:
    """Give free pages back. Nothing happens where the C library has no malloc_trim, such as musl.

    Blocks for some milliseconds after a burst, so it belongs between bursts; what is needed again costs page faults.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        import ctypes  # 0.6 MB, so only once there was a burst

        trim = ctypes.CDLL(None).malloc_trim
    except (ImportError, OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
