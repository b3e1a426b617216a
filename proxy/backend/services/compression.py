"""gzip and deflate, bounded: a few MB of either can stand for terabytes. Knows no protocol."""

from __future__ import annotations

import zlib

from proxy.backend.errors import Code, InferenceError
from proxy.backend.tensors import Buffer

LARGEST_INFLATED = 256 * 2**20  # bytes
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


def inflate(data: Buffer, encoding: str, most: int) -> bytes:
    """The message that was compressed as `encoding` says. Raises InferenceError, also for more than `most` bytes."""
    if encoding == "identity":
        raise InferenceError(Code.INTERNAL, "message is marked as compressed, but grpc-encoding names no compression")
    bits = _WINDOW_BITS.get(encoding)
    if bits is None:
        raise InferenceError(
            Code.UNIMPLEMENTED, f"grpc-encoding '{encoding:.40}' is not supported; use gzip, deflate or none"
        )
    inflater = zlib.decompressobj(bits)
    try:
        plain = inflater.decompress(data, most)
    except zlib.error as error:
        raise InferenceError(Code.INTERNAL, f"message cannot be decompressed: {error}") from None
    if inflater.unconsumed_tail:
        raise InferenceError(
            Code.RESOURCE_EXHAUSTED, f"compressed message is larger than {most} bytes when decompressed"
        )
    if not inflater.eof:
        raise InferenceError(Code.INTERNAL, "message cannot be decompressed: it is cut off")
    return plain
