"""Fuzz target: the server role, given any bytes for a client's.

Invariant: no exception leaves `receive`; a connection error puts one GOAWAY into the output, as the last of it, and
nothing is said afterwards; what is sent is at most three times what came, and the greeting and a GOAWAY; however the
bytes are cut into reads, the same is told and the same is sent; RST_STREAM is never sent for an idle stream; all of
the output is frames that hyperframe parses, and `h2`, told of the same requests, takes what a layer above sends.
"""

from __future__ import annotations

from tests.fuzz.invariants import check
from tests.http2.wire import Server


def make(small: bool) -> Server:
    return Server(max_streams=2, header_list=512) if small else Server(max_streams=20)


def target(data: bytes) -> None:
    check(make, data, is_server=True)
