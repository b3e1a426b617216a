"""The connections under test: both roles, as the first byte of an input wants them."""

from __future__ import annotations

from proxy.http2 import ClientConnection, ServerConnection, Stream
from tests.http2.wire import REQUEST, WINDOW, Client, Server, block

# Byte 0 of an input: the layer above acts between reads; the peer's preface is put before; two streams and header
# lists of 512 bytes; also read byte by byte; what comes goes on to another connection; windows of streams begin small.
ACTIVE, GREETED, SMALL, BYTEWISE, FORWARDS, NARROW = 1, 2, 4, 8, 16, 32

_FIRST_WINDOW = 100


class FuzzServer(Server):
    def __init__(self, flags: int) -> None:
        self.events = []
        streams, header_list = (2, 512) if flags & SMALL else (20, 65_536)
        ServerConnection.__init__(self, [], WINDOW, streams, header_list, _FIRST_WINDOW if flags & NARROW else None)

    def new_stream(self, stream_id: int) -> Stream:
        return Stream(self, stream_id, self.first_window, self.peer.initial_window)


class FuzzClient(Client):
    """Streams 1, 3 and 5 are open; the request on 3 has ended."""

    def __init__(self, flags: int) -> None:
        self.events = []
        streams, header_list = (4, 512) if flags & SMALL else (20, 65_536)
        ClientConnection.__init__(self, [], WINDOW, streams, header_list, _FIRST_WINDOW if flags & NARROW else None)
        for number in range(3):
            self.open_stream(block(REQUEST), end=number == 1)
