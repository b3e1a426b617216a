"""How many bytes of messages the backend holds at a time, whatever clients send: what goes beyond fails, alone.

Without it a few clients with large tensors, or with many small ones in front of a slow model, fill the machine's
memory, and the kernel ends the process with everybody's calls.
"""

from __future__ import annotations

import os
from pathlib import Path

from proxy.backend.errors import Code, InferenceError

_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# The rest is for what messages become: arrays (an element of BYTES takes 40 bytes and more) and the model's own.
_SHARE = 4


class Budget:
    """Bytes held for calls, at most `limit`. For one thread, that of the event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Raises InferenceError, and takes nothing, when it would be more than the limit."""
        if self.held + size > self.limit:
            raise InferenceError(
                Code.RESOURCE_EXHAUSTED,
                f"the server holds {self.held} bytes of messages; {size} more would exceed its limit of {self.limit} "
                f"(--memory-limit-bytes, by default 1/{_SHARE} of its memory); send less at a time, or try again later",
            )
        self.held += size

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self.held -= size


def default_limit() -> int:
    """Bytes: a share of this machine's memory, or of its container's when that is less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CONTAINER:
        try:
            sizes.append(int(Path(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # not in such a container; or "max"
            pass
    return min(sizes) // _SHARE
