"""Responses kept for requests that come again: `response_cache { enable: true }`, as Triton's local cache.

For models whose answers depend on nothing but their inputs. Bounded in bytes for all models together; what was used
least recently goes first. For one thread, that of the event loop.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.execution import Output
from proxy.backend.threads import in_thread

DEFAULT_LIMIT = 64 * 2**20  # bytes
_OVERHEAD = 512  # bytes of an entry besides its tensors
_LONG_TO_HASH = 256 * 1024  # bytes; from here on it isn't the event loop that hashes them
_MOST_VALUES = 65_536  # of a tensor that isn't raw; to write more of them down costs more than it may save

Key = tuple[int, bytes]


class ResponseCache:
    """At most `limit` bytes of responses. An `owner` is a number of a loaded model version, never used again."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._kept: OrderedDict[Key, tuple[Sequence[Output], int]] = OrderedDict()
        self.size = 0

    def get(self, key: Key) -> Sequence[Output] | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: Key, outputs: Sequence[Output]) -> None:
        """Keep a response, unless it is larger than all that may be kept."""
        size = _OVERHEAD + sum(len(output.data) for output in outputs)
        if size > self._limit or key in self._kept:
            return
        # Copies: a response may be a view of what was made for a whole batch, and keep all of it.
        own = [Output(output.name, output.datatype, output.shape, bytes(output.data)) for output in outputs]
        self._kept[key] = own, size
        self.size += size
        while self.size > self._limit:
            _, (_, freed) = self._kept.popitem(last=False)
            self.size -= freed

    def forget(self, owner: int) -> None:
        """A model version is gone, and its responses with it."""
        for key in [key for key in self._kept if key[0] == owner]:
            self.size -= self._kept.pop(key)[1]


async def key_of(owner: int, request: Request) -> Key | None:
    """What tells requests of one model version apart; None for one that is not worth to be kept."""
    if any(tensor.raw is None and len(tensor.values or ()) > _MOST_VALUES for tensor in request.inputs):
        return None
    if sum(tensor.size for tensor in request.inputs) < _LONG_TO_HASH:
        return owner, _digest(request)
    return owner, await in_thread(lambda: _digest(request))


def _digest(request: Request) -> bytes:
    made = hashlib.blake2b(digest_size=32)
    made.update(repr(sorted(request.outputs.items())).encode())
    for tensor in sorted(request.inputs, key=lambda tensor: tensor.name):
        contents = _contents(tensor)
        # With its length in front: no contents can pass for a tensor's description.
        made.update(repr((tensor.name, tensor.datatype, tensor.shape, tensor.raw is None, len(contents))).encode())
        made.update(contents)
    return made.digest()


def _contents(tensor: InputTensor) -> bytes | memoryview:
    return tensor.raw if tensor.raw is not None else repr(list(tensor.values or ())).encode()
