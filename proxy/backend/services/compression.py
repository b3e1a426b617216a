"""gzip and deflate (the zlib format), inflated within bounds: a few MB of either can stand for terabytes.

What grows is counted step by step, and what takes long is done in a thread. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable

from proxy.backend.tensors import Buffer

LARGEST_INFLATED = 256 * 2**20  # bytes
WINDOW_BITS = {"gzip": 31, "deflate": 15}
LONG = 16 * 2**10  # bytes; from here on it is not the event loop that inflates or deflates them
_STEP = 2**20  # bytes inflated in one go; more than this is never held without being counted


class TooLong(Exception):
    """It is longer than it may be."""


class NotCompressed(Exception):
    """It isn't what it says; `str` says why."""


class Inflater:
    """One piece of compressed data. `encoding` is one of WINDOW_BITS."""

    def __init__(self, encoding: str) -> None:
        self._inflater = zlib.decompressobj(WINDOW_BITS[encoding])

    async def inflate(self, data: Buffer, into: bytearray, most: int, hold: Callable[[int], None]) -> int:
        """Append what `data` holds, at most so many bytes, counted by `hold` as it grows -> how many bytes of `data`
        come behind its end. Raises TooLong, NotCompressed and what `hold` raises."""
        rest, grown, inflater = data, 0, self._inflater
        try:
            while not inflater.eof:
                # The first step is one that the event loop can afford: little data may become a thousand times as much.
                if len(data) < LONG and not grown:
                    part = inflater.decompress(rest, LONG)
                else:
                    part = await asyncio.to_thread(inflater.decompress, rest, _STEP)
                rest = inflater.unconsumed_tail
                grown += len(part)
                if grown > most:
                    raise TooLong
                hold(len(part))
                into += part
                if not part and not rest and not inflater.eof:
                    raise NotCompressed("it is cut off")
        except zlib.error as error:
            raise NotCompressed(str(error)) from None
        return len(inflater.unused_data)
