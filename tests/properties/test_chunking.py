"""However the bytes of a peer are cut into reads, the same is told and the same is answered."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.http2.wire import PREFACE, REQUEST, Client, Server, block, settings
from tests.properties.quick import quick
from tests.properties.traffic import any_frame, chunked, conversation, cuts, disturbed

Conn = Server | Client


def make(is_server: bool) -> Conn:
    if is_server:
        return Server(max_streams=3)
    conn = Client()
    for number in range(4):
        conn.open_stream(block(REQUEST), end=number % 2 == 0)
    return conn


def outcome(conn: Conn, pieces: list[bytes]) -> tuple[list[Any], bytes, bool]:
    """What was told, with the pieces of DATA joined; what was sent; whether it was the end."""
    for piece in pieces:
        conn.receive(piece)
    told: list[Any] = []
    for event in conn.events:
        if event[0] == "data" and told and told[-1][:2] == event[:2] and not told[-1][3]:
            told[-1] = ("data", event[1], told[-1][2] + event[2], event[3])
        elif event[0] == "data" and not event[2] and not event[3]:
            continue  # an empty frame says nothing
        else:
            told.append(event)
    return told, b"".join(conn.take_output()), conn.closed


@quick
@given(st.data(), st.booleans(), cuts)
def test_any_chunking_of_a_conversation_is_the_same(data: st.DataObject, is_server: bool, cuts: list[int]) -> None:
    text = data.draw(conversation(from_client=is_server))
    whole = outcome(make(is_server), [text])
    assert not whole[2]
    assert outcome(make(is_server), chunked(text, cuts)) == whole


@quick
@given(st.data(), st.booleans(), cuts)
def test_any_chunking_of_a_broken_one_is_the_same(data: st.DataObject, is_server: bool, cuts: list[int]) -> None:
    text = data.draw(disturbed(from_client=is_server))
    assert outcome(make(is_server), chunked(text, cuts)) == outcome(make(is_server), [text])


@quick
@given(st.data(), st.booleans())
def test_bytes_that_come_one_by_one_are_the_same(data: st.DataObject, is_server: bool) -> None:
    text = data.draw(conversation(from_client=is_server, streams=2))
    pieces = [text[at : at + 1] for at in range(len(text))]
    assert outcome(make(is_server), pieces) == outcome(make(is_server), [text])


@quick
@given(st.lists(any_frame, max_size=12), st.booleans(), cuts)
def test_any_chunking_of_any_frames_is_the_same(frames: list[bytes], is_server: bool, cuts: list[int]) -> None:
    text = (PREFACE if is_server else b"") + settings() + b"".join(frames)
    assert outcome(make(is_server), chunked(text, cuts)) == outcome(make(is_server), [text])
