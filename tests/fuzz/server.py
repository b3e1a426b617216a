"""Fuzz target: the server role, given any bytes for a client's.

Invariant: no exception leaves `receive`; a connection error puts one GOAWAY into the output, as the last of it, and
nothing is said afterwards; what is sent is at most three times what came, and the greeting and a GOAWAY; however the
bytes are cut into reads, the same is told and the same is sent; RST_STREAM is never sent for an idle stream; all of
the output is frames that hyperframe parses, and `h2`, told of the same requests, takes what a layer above sends; what
is told of a message is what came, and what goes on to another connection is what was told (see `forwarding`).
"""

from __future__ import annotations

from tests.fuzz.invariants import check
from tests.fuzz.roles import FuzzServer


def target(data: bytes) -> None:
    check(FuzzServer, data, is_server=True)
