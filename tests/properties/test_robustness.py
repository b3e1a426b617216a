"""Whatever a peer sends, nothing but GOAWAY comes of it: no exception leaves `receive`, and what is sent is HTTP/2."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from proxy.http2 import ErrorCode
from tests.http2.wire import (
    GOAWAY,
    PREFACE,
    REQUEST,
    RESPONSE,
    SETTINGS,
    TRAILERS,
    Client,
    Frame,
    Server,
    block,
    parse,
    settings,
)
from tests.properties.quick import quick
from tests.properties.traffic import any_frame, chunked, cuts, disturbed

Conn = Server | Client

# What the layer above does between reads: (which of the streams there are, what, how much).
actions = st.tuples(
    st.integers(0, 3),
    st.sampled_from(["head", "data", "end", "trailers", "reset", "credit", "drop", "pause", "resume", "take"]),
    st.integers(0, 70_000),
)


def act(conn: Conn, which: int, what: str, size: int) -> None:
    if what == "pause":
        conn.paused = True
        return
    if what == "resume":
        conn.resume()
        return
    if isinstance(conn, Client) and what == "head" and conn.room() > 0:
        conn.open_stream(block(REQUEST), end=size % 2 == 0)
        return
    if not conn.streams:
        return
    stream = list(conn.streams.values())[which % len(conn.streams)]
    if what == "head":
        conn.send_headers(stream, block(RESPONSE), end=size % 2 == 0)
    elif what in ("data", "end"):
        conn.send_data(stream, bytes(size), end=what == "end")
    elif what == "trailers":
        conn.send_trailers(stream, block(TRAILERS))
    elif what == "reset":
        conn.reset(stream, ErrorCode.CANCEL)
    elif what == "credit":
        conn.credit(stream, size)
    elif what == "drop":
        conn.drop_backlog(stream)


def judge(conn: Conn, out: list[Frame]) -> None:
    """What any outcome has in common."""
    assert out[0].kind == SETTINGS
    goaways = [item for item in out if item.kind == GOAWAY]
    assert len(goaways) == conn.closed
    faults = [event for event in conn.events if event[0] == "fault"]
    assert [event[1] for event in faults] == [item.code for item in goaways]
    assert all(item.code != ErrorCode.INTERNAL_ERROR for item in goaways)
    closed = sorted(event[1] for event in conn.events if event[0] == "closed")
    assert all(len(list(group)) == 1 for _, group in groupby(closed)), "a stream is closed once"
    if goaways:
        assert out[-1] is goaways[0]


def run(conn: Conn, pieces: list[bytes], between: list[tuple[int, str, int]]) -> None:
    out = b""
    for index, piece in enumerate(pieces):
        conn.receive(piece)
        if not conn.closed and index < len(between):
            act(conn, *between[index])
        if index % 3 == 0:
            out += b"".join(conn.take_output())
    out += b"".join(conn.take_output())
    judge(conn, parse(out))


def make(is_server: bool) -> Conn:
    if is_server:
        return Server(max_streams=3)
    conn = Client()
    conn.open_stream(block(REQUEST), end=False)
    conn.open_stream(block(REQUEST), end=True)
    return conn


@quick
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_any_bytes(data: bytes, is_server: bool, with_preface: bool) -> None:
    if with_preface:
        data = (PREFACE if is_server else b"") + settings() + data
    run(make(is_server), [data], [])


@quick
@given(st.lists(any_frame, max_size=20), st.booleans(), st.lists(actions, max_size=20))
def test_any_frames_and_any_actions(frames: list[bytes], is_server: bool, between: list[tuple[int, str, int]]) -> None:
    run(make(is_server), [(PREFACE if is_server else b"") + settings(), *frames], between)


@quick
@given(st.data(), st.booleans(), cuts, st.lists(actions, max_size=40))
def test_a_broken_conversation_and_any_actions(
    data: st.DataObject, is_server: bool, cuts: list[int], between: list[tuple[int, str, int]]
) -> None:
    run(make(is_server), chunked(data.draw(disturbed(from_client=is_server)), cuts), between)
