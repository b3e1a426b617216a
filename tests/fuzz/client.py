"""Fuzz target: the client role with requests under way, given any bytes for a server's.

Invariant: no exception leaves `receive`; a connection error puts one GOAWAY into the output, as the last of it, and
nothing is said afterwards; what is sent is at most three times what came, and the greeting and a GOAWAY; however the
bytes are cut into reads, the same is told and the same is sent; RST_STREAM is sent only for streams that were opened;
all of the output is frames that hyperframe parses, and an `h2` server takes what a layer above sends; what is told of a
message is what came, and what goes on to another connection is what was told (see `forwarding`).
"""

from __future__ import annotations

from tests.fuzz.invariants import check
from tests.fuzz.roles import FuzzClient


def target(data: bytes) -> None:
    check(FuzzClient, data, is_server=False)
