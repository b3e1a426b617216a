"""RFC 9113 section 5.1: what becomes of each type of frame in each state of a stream, in both roles."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.http2 import ErrorCode
from tests.http2.wire import (
    CONTINUATION,
    END_HEADERS,
    PRIORITY,
    PUSH_PROMISE,
    REQUEST,
    RESPONSE,
    TRAILERS,
    Peer,
    block,
    client,
    data,
    frame,
    open_stream,
    padded_data,
    rst_stream,
    server,
    window_update,
)

# -- the states that a stream can be in when a frame comes: each brings a connection there -> the stream's number

State = Callable[[Peer], int]


def idle(peer: Peer) -> int:
    return 1


def idle_of_the_server(peer: Peer) -> int:
    return 2


def opened(peer: Peer) -> int:
    return open_stream(peer).id


def half_closed_local(peer: Peer) -> int:
    """In the client role only: a server that has ended its response resets the stream, if the request goes on."""
    stream = open_stream(peer)
    peer.conn.send_data(stream, b"", end=True)
    return stream.id


def half_closed_remote(peer: Peer) -> int:
    return open_stream(peer, end=True).id


def closed_by_end_stream(peer: Peer) -> int:
    stream = open_stream(peer, end=True)
    peer.conn.send_data(stream, b"", end=True)
    return stream.id


def closed_by_their_reset(peer: Peer) -> int:
    stream = open_stream(peer)
    peer.send(rst_stream(stream.id))
    return stream.id


def closed_by_our_reset(peer: Peer) -> int:
    stream = open_stream(peer)
    peer.conn.reset(stream, ErrorCode.CANCEL)
    return stream.id


def behind_our_goaway(peer: Peer) -> int:
    peer.conn.refuse_new()
    return 1


# -- the frames

FRAMES: dict[str, Callable[[Peer, int], bytes]] = {
    "DATA": lambda peer, stream: data(stream, b"x"),
    "padded": lambda peer, stream: padded_data(stream, b"x", 3),
    "HEADERS": lambda peer, stream: peer.headers(stream, REQUEST if peer.conn.server else RESPONSE),
    "trailers": lambda peer, stream: peer.headers(stream, TRAILERS, end=True),
    "PRIORITY": lambda peer, stream: frame(PRIORITY, 0, stream, b"\0\0\0\x09\x10"),
    "RST_STREAM": lambda peer, stream: rst_stream(stream),
    "PUSH_PROMISE": lambda peer, stream: frame(PUSH_PROMISE, END_HEADERS, stream, b"\0\0\0\2\x82"),
    "WINDOW_UPDATE": lambda peer, stream: window_update(stream, 1),
    "CONTINUATION": lambda peer, stream: frame(CONTINUATION, END_HEADERS, stream, b"\x82"),
    "unknown": lambda peer, stream: frame(0x42, 0xFF, stream, b"x"),
}

# "taken": something is told of it; "-": nothing is told or sent; an error of the stream (S) or the connection (C).
_CODES = {"protocol": ErrorCode.PROTOCOL_ERROR, "closed": ErrorCode.STREAM_CLOSED}
_WORDS = {"+": "taken", "-": "-", "Sp": "S protocol", "Sc": "S closed", "Cp": "C protocol", "Cc": "C closed"}

TABLE: list[tuple[Callable[..., Peer], State, str]] = [
    #                                DATA pad  HEAD tr  PRIO RST PUSH WU CONT other
    (server, idle,                  "Cp   Cp   +    Sp  -    Cp  Cp   Cp Cp   -"),
    (server, idle_of_the_server,    "Cp   Cp   Cp   Cp  -    Cp  Cp   Cp Cp   -"),
    (server, opened,                "+    +    Sp   +   -    +   Cp   -  Cp   -"),
    (server, half_closed_remote,    "Sc   Sc   Sc   Sc  -    +   Cp   -  Cp   -"),
    (server, closed_by_end_stream,  "Sc   Sc   Cc   Cc  -    -   Cp   -  Cp   -"),
    (server, closed_by_their_reset, "Sc   Sc   Cc   Cc  -    -   Cp   -  Cp   -"),
    (server, closed_by_our_reset,   "-    -    -    -   -    -   Cp   -  Cp   -"),
    (server, behind_our_goaway,     "-    -    -    -   -    -   Cp   -  Cp   -"),
    (client, idle,                  "Cp   Cp   Cp   Cp  -    Cp  Cp   Cp Cp   -"),
    (client, idle_of_the_server,    "Cp   Cp   Cp   Cp  -    Cp  Cp   Cp Cp   -"),
    (client, opened,                "+    +    Sp   +   -    +   Cp   -  Cp   -"),
    (client, half_closed_local,     "+    +    Sp   +   -    +   Cp   -  Cp   -"),
    (client, half_closed_remote,    "Sc   Sc   Sc   Sc  -    +   Cp   -  Cp   -"),
    (client, closed_by_end_stream,  "Sc   Sc   Sc   Sc  -    -   Cp   -  Cp   -"),
    (client, closed_by_their_reset, "Sc   Sc   Sc   Sc  -    -   Cp   -  Cp   -"),
    (client, closed_by_our_reset,   "-    -    -    -   -    -   Cp   -  Cp   -"),
]  # fmt: skip

CASES = [
    pytest.param(make, state, kind, _WORDS[short], id=f"{make.__name__}-{state.__name__}-{kind}")
    for make, state, row in TABLE
    for kind, short in zip(FRAMES, row.split(), strict=True)
]


@pytest.mark.parametrize(("make", "state", "kind", "outcome"), CASES)
def test_5_1_a_frame_in_a_state(make: Callable[..., Peer], state: State, kind: str, outcome: str) -> None:
    peer = make()
    stream = state(peer)
    peer.sent()
    peer.heads()
    peer.events()
    sent = FRAMES[kind](peer, stream)
    if outcome == "-":
        peer.ignored(sent)
    elif outcome == "taken":
        assert peer.send(sent) == []
        assert peer.events() != []
        peer.alive()
    elif outcome[0] == "S":
        peer.stream_error(stream, _CODES[outcome[2:]], sent)
        # Whatever else was on its way is dropped, and the stream is not reset again.
        assert peer.send(data(stream, b"late"), window_update(stream, 1), rst_stream(stream)) == []
        peer.alive()
    else:
        peer.connection_error(_CODES[outcome[2:]], sent)


@pytest.mark.parametrize("state", [closed_by_end_stream, closed_by_their_reset, closed_by_our_reset])
def test_5_1_a_response_section_on_a_closed_stream_is_decoded(state: State) -> None:
    """The compression state is the connection's: the next section refers to what this one put into the table."""
    peer = client()
    late = [(b"x-new", b"value")]
    peer.send(peer.headers(state(peer), late, end=True))
    peer.events()
    stream = peer.conn.open_stream(block(REQUEST), end=True)
    peer.send(peer.headers(stream.id, RESPONSE + late))
    assert peer.events("response")[0][2] == RESPONSE + late
