"""Changes an input frame by frame, so that what is changed is seldom lost to a frame length that no longer fits."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import hpack

from tests.fuzz.invariants import split
from tests.http2 import wire
from tests.http2.wire import CONTINUATION, END_HEADERS, END_STREAM, HEADERS, REQUEST, RESPONSE, TRAILERS, frame

Mutate = Callable[[bytes, int], bytes]

_BLOCKS = [hpack.Encoder().encode(fields) for fields in (REQUEST, RESPONSE, TRAILERS)]
_STREAMS = (0, 1, 1, 3, 5, 7, 2, 2**31 - 1)
_NUMBERS = (0, 1, 5, 16_384, 65_535, 2**31 - 1, 2**32 - 1)
_FLAGS = (0, 1, 4, 5, 8, 9, 0x20, 0x2D)


def new_frame(random: Random) -> bytes:
    """A frame of which there is always some use."""
    stream, number = random.choice(_STREAMS), random.choice(_NUMBERS)
    flags = random.choice((0, END_STREAM)) | END_HEADERS
    return random.choice(
        [
            frame(HEADERS, flags, stream, random.choice(_BLOCKS)),
            frame(HEADERS, 0, stream, random.choice(_BLOCKS)[: random.randint(0, 20)]),
            frame(CONTINUATION, random.choice((0, END_HEADERS)), stream, random.choice(_BLOCKS)),
            wire.data(stream, bytes(random.choice((0, 1, 50, 9000))), end=random.random() < 0.3),
            wire.padded_data(stream, bytes(random.randint(0, 9)), random.randint(0, 255)),
            wire.settings((random.randint(0, 9), number)),
            wire.window_update(stream, number),
            wire.rst_stream(stream, random.randint(0, 20)),
            wire.goaway(stream, random.randint(0, 20)),
            wire.ping(),
            frame(random.randint(0, 11), random.choice(_FLAGS), stream, number.to_bytes(4, "big") + b"\x10"),
        ]
    )


def _changed(item: bytes, random: Random, mutate: Mutate) -> bytes:
    """One frame with another payload, type, flags or stream, and the length that fits."""
    kind, flags, stream, payload = item[3], item[4], int.from_bytes(item[5:9], "big"), item[9:]
    what = random.randrange(5)
    if what == 0:
        flags ^= random.choice((1, 4, 8, 0x20))
    elif what == 1:
        stream = random.choice(_STREAMS)
    elif what == 2:
        kind = random.randint(0, 11)
    else:
        payload = mutate(payload, len(payload) + 16)
    return frame(kind, flags, stream, payload)


def mutation(data: bytes, max_size: int, seed: int, mutate: Mutate) -> bytes:
    """atheris's custom mutator; `mutate(data, size)` is libFuzzer's own."""
    random = Random(seed)
    if len(data) < 3 or random.random() < 0.2:
        return mutate(data, max_size)
    head, items = bytearray(data[:2]), split(data[2:])
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(items) + 1)
        what = random.randrange(6)
        if what == 0:
            items.insert(at, new_frame(random))
        elif what == 1 and len(items) > 1:
            del items[at % len(items)]
        elif what == 2 and items:
            items.insert(at, random.choice(items))
        elif what == 3:
            head[random.randrange(2)] = random.randrange(256)
        elif items and len(items[at % len(items)]) >= 9:
            items[at % len(items)] = _changed(items[at % len(items)], random, mutate)
    return (bytes(head) + b"".join(items))[:max_size]
