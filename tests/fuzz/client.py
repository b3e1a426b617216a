"""Fuzz target: the client role with requests under way, given any bytes for a server's.

Invariant: no exception leaves `receive`; a connection error puts one GOAWAY into the output, as the last of it, and
nothing is said afterwards; what is sent is at most three times what came, and the greeting and a GOAWAY; however the
bytes are cut into reads, the same is told and the same is sent; RST_STREAM is sent only for streams that were opened;
all of the output is frames that hyperframe parses, and an `h2` server takes what a layer above sends.
"""

from __future__ import annotations

from tests.fuzz.invariants import check
from tests.http2.wire import REQUEST, Client, block


def make(small: bool) -> Client:
    """Streams 1, 3 and 5 are open; the request on 3 has ended."""
    conn = Client(max_streams=4, header_list=512) if small else Client(max_streams=20)
    for number in range(3):
        conn.open_stream(block(REQUEST), end=number == 1)
    return conn


def target(data: bytes) -> None:
    check(make, data, is_server=False)
