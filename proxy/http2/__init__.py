"""The wire core: HTTP/2 (RFC 9113) and HPACK (RFC 7541), both roles, without any I/O.

Bytes go in through `Connection.receive`, bytes come out of `Connection.take_output`; what happened in between is
told by calling the `on_...` methods that a subclass overrides. Nothing here imports asyncio, ssl, socket or time,
and nothing else of this project: the relay is built on this package, never the reverse.

    errors      what can go wrong, with the RFC's error codes
    frames      frame types, flags and the bytes of the small frames
    huffman     RFC 7541 appendix B
    hpack       header compression: decoder and encoder
    headers     field validation (RFC 9113 section 8) and the memoised header blocks
    guards      how much of what a client may do
    settings    SETTINGS values and their validity
    stream      the record of one stream
    sender      the sending half: output, flow control towards the peer
    control     all frames but DATA and HEADERS; budgets; errors
    connection  the receiving half: parse loop, stream table, flow control from the peer
    roles       server and client
"""

from proxy.http2.connection import Connection
from proxy.http2.control import Control
from proxy.http2.errors import Abuse, ConnectionFault, ErrorCode, HpackFault, error_name
from proxy.http2.headers import HeaderBlock, Passing, RequestHead, ResponseHead, Trailers
from proxy.http2.roles import ClientConnection, ServerConnection
from proxy.http2.sender import Buffer, Sender
from proxy.http2.settings import Settings
from proxy.http2.stream import Backlog, Stream

__all__ = [
    "Abuse",
    "Backlog",
    "Buffer",
    "ClientConnection",
    "Connection",
    "ConnectionFault",
    "Control",
    "ErrorCode",
    "HeaderBlock",
    "HpackFault",
    "Passing",
    "RequestHead",
    "ResponseHead",
    "Sender",
    "ServerConnection",
    "Settings",
    "Stream",
    "Trailers",
    "error_name",
]
