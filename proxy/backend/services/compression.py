"""gzip and deflate (the zlib format), within bounds: a few MB of either can stand for terabytes.

What grows is counted step by step, and what takes long is done in a thread, where others have their turn after each
step. Knows no protocol.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from proxy.backend.tensors import Buffer
from proxy.backend.threads import in_thread

LARGEST_INFLATED = 256 * 2**20  # bytes
WINDOW_BITS = {"gzip": 31, "deflate": 15}
LONG = 16 * 2**10  # bytes; from here on it is not the event loop that inflates or deflates them
_STEP = 2**20  # bytes inflated in one go, or deflated; more than this is never held without being counted
# Bytes handed to zlib in one go: what it leaves of them it copies, each time, with the interpreter's lock.
_PIECE = 256 * 2**10
_LEVEL = 1  # what more saves in bytes costs the models' time


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
        at = grown = 0
        rest: Buffer = b""
        inflater, view = self._inflater, memoryview(data)
        try:
            while not inflater.eof:
                if not rest:
                    rest = view[at : at + _PIECE]
                    at += len(rest)
                # The first step is one that the event loop can afford: little data may become a thousand times as much.
                if len(data) < LONG and not grown:
                    part = inflater.decompress(rest, LONG)
                else:
                    part = await in_thread(lambda piece=rest: inflater.decompress(piece, _STEP))  # type: ignore[misc]
                rest = inflater.unconsumed_tail
                grown += len(part)
                if grown > most:
                    raise TooLong
                hold(len(part))
                into += part
                if not part and not rest and at == len(data) and not inflater.eof:
                    raise NotCompressed("it is cut off")
        except zlib.error as error:
            raise NotCompressed(str(error)) from None
        return len(inflater.unused_data) + len(data) - at


async def deflate(pieces: Sequence[Buffer], encoding: str, hold: Callable[[int], None]) -> list[Buffer]:
    """The same bytes, compressed; counted by `hold` as they are made. Raises what it raises."""
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, WINDOW_BITS[encoding])
    if sum(map(len, pieces)) < LONG:
        made: list[Buffer] = [deflater.compress(piece) for piece in pieces]
    else:
        made = []
        for step in _steps(pieces):
            made.append(await in_thread(lambda step=step: b"".join(map(deflater.compress, step))))  # type: ignore[misc]
            hold(len(made[-1]))
    made.append(deflater.flush())
    return made


def _steps(pieces: Sequence[Buffer]) -> list[list[Buffer]]:
    """The same bytes in lists of about _STEP bytes each, in pieces of at most as many."""
    steps: list[list[Buffer]] = [[]]
    size = 0
    for piece in pieces:
        for at in range(0, len(piece), _STEP):
            part = memoryview(piece)[at : at + _STEP]
            if size and size + len(part) > _STEP:
                steps.append([])
                size = 0
            steps[-1].append(part)
            size += len(part)
    return steps
