"""Content-Encoding and Accept-Encoding: gzip and deflate (the zlib format, as Triton has it), both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxy.backend.errors import invalid
from proxy.backend.services.compression import LARGEST_INFLATED, WINDOW_BITS, Inflater, NotCompressed, TooLong
from proxy.backend.services.rest.faults import HttpError, too_large
from proxy.backend.tensors import Buffer


def check_encoding(encoding: str) -> None:
    """Raises InferenceError for what can't be inflated."""
    if encoding and encoding not in WINDOW_BITS and encoding != "identity":
        raise HttpError(
            501,
            f"Content-Encoding '{encoding:.40}' is not supported; use gzip, deflate or none",
            {"Accept-Encoding": "gzip, deflate"},
        )


async def inflate(body: Buffer, encoding: str, into: bytearray, hold: Callable[[int], None]) -> None:
    """Append what `body` holds to `into`, counted by `hold` as it grows. Raises InferenceError."""
    try:
        behind = await Inflater(encoding).inflate(body, into, LARGEST_INFLATED, hold)
    except TooLong:
        raise too_large(f"request body is larger than {LARGEST_INFLATED} bytes when decompressed") from None
    except NotCompressed as fault:
        raise invalid(f"request body cannot be decompressed as {encoding}: {fault}") from None
    if behind:
        # Further members, which gzip allows: nobody's HTTP client sends them, and they hide what a body holds.
        raise invalid(f"request body has {behind} bytes after the end of its {encoding} data; send it as one member")


def accepted(header: str) -> str:
    """The compression that a client prefers by its Accept-Encoding; "" for none."""
    best, weight = "", 0.0
    for entry in header.split(",")[:16]:
        coding, *parameters = (part.strip() for part in entry.split(";"))
        if coding not in WINDOW_BITS:
            continue
        quality = _quality(parameters)
        if quality > weight:
            best, weight = coding, quality
    return best


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0
