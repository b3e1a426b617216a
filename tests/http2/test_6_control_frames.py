"""RFC 9113 sections 6.4 to 6.8: RST_STREAM, SETTINGS, PING, GOAWAY."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode, error_name
from tests.http2.wire import (
    ACK,
    ENABLE_PUSH,
    GOAWAY,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    MAX_WINDOW,
    PING,
    REQUEST,
    RESPONSE,
    SETTINGS,
    TRAILERS,
    Client,
    Frame,
    Peer,
    Server,
    block,
    client,
    data,
    frame,
    goaway,
    open_stream,
    ping,
    rst_stream,
    server,
    settings,
    window_update,
)

SETTINGS_ACK = Frame(SETTINGS, ACK, 0, b"")


# -- 6.4


@pytest.mark.parametrize("code", [0, 8, 0xFFFF_FFFF])
def test_6_4_a_reset_ends_the_stream_with_any_code(peer: Peer, code: int) -> None:
    stream = open_stream(peer)
    assert peer.send(rst_stream(1, code)) == []
    assert peer.events() == [("closed", 1), ("reset", 1, code)]
    assert peer.conn.streams == {}
    assert stream.local_closed
    assert stream.remote_closed
    peer.alive()


# -- 6.5


def test_6_5_settings_are_acknowledged_in_order(peer: Peer) -> None:
    sent = peer.send(settings(), ping(), settings((MAX_HEADER_LIST_SIZE, 1000)))
    assert sent == [SETTINGS_ACK, Frame(PING, ACK, 0, b"01234567"), SETTINGS_ACK]
    assert peer.events() == [("settings",), ("settings",)]
    assert peer.conn.peer.max_header_list == 1000


def test_6_5_an_acknowledgement_is_not_acknowledged(peer: Peer) -> None:
    peer.ignored(frame(SETTINGS, ACK))


def test_6_5_an_acknowledgement_with_a_payload_is_a_connection_error(peer: Peer) -> None:
    peer.connection_error(ErrorCode.FRAME_SIZE_ERROR, frame(SETTINGS, ACK, 0, bytes(6)))


@pytest.mark.parametrize("conn_type", [Server, Client])
def test_6_5_3_an_acknowledgement_is_waited_for(conn_type: type[Server] | type[Client]) -> None:
    """Whoever has a clock asks for it. One too many, or one before its time, is harmless."""
    told = []

    class Waiting(conn_type):  # type: ignore[valid-type,misc]
        def on_settings_acked(self) -> None:
            told.append(self.settings_acked)

    peer = Peer(Waiting())
    assert not peer.conn.settings_acked
    assert told == []
    for _ in range(3):
        peer.ignored(frame(SETTINGS, ACK))
        assert peer.conn.settings_acked
    assert told == [True]


def test_6_5_3_settings_are_not_acknowledged_by_settings(peer: Peer) -> None:
    peer.send(settings(), ping(ack=True))
    assert not peer.conn.settings_acked


@pytest.mark.parametrize("key", [0, 7, 8, 0xFFFF])
def test_6_5_2_unknown_settings_are_ignored(peer: Peer, key: int) -> None:
    assert peer.send(settings((key, 2**32 - 1))) == [SETTINGS_ACK]


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        (ENABLE_PUSH, 2, ErrorCode.PROTOCOL_ERROR),
        (INITIAL_WINDOW_SIZE, MAX_WINDOW + 1, ErrorCode.FLOW_CONTROL_ERROR),
        (MAX_FRAME_SIZE, 16_383, ErrorCode.PROTOCOL_ERROR),
        (MAX_FRAME_SIZE, 2**24, ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_6_5_2_values_that_are_not_allowed_are_connection_errors(
    peer: Peer, key: int, value: int, code: ErrorCode
) -> None:
    peer.connection_error(code, settings((key, value)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (ENABLE_PUSH, 0),
        (INITIAL_WINDOW_SIZE, 0),
        (INITIAL_WINDOW_SIZE, MAX_WINDOW),
        (MAX_FRAME_SIZE, 16_384),
        (MAX_FRAME_SIZE, 2**24 - 1),
        (HEADER_TABLE_SIZE, 0),
        (HEADER_TABLE_SIZE, 2**32 - 1),
        (MAX_HEADER_LIST_SIZE, 0),
    ],
)
def test_6_5_2_values_at_the_edge_are_allowed(peer: Peer, key: int, value: int) -> None:
    assert peer.send(settings((key, value))) == [SETTINGS_ACK]
    peer.alive()


def test_6_5_2_only_a_client_may_enable_push() -> None:
    assert server().send(settings((ENABLE_PUSH, 1))) == [SETTINGS_ACK]
    client().connection_error(ErrorCode.PROTOCOL_ERROR, settings((ENABLE_PUSH, 1)))


def test_6_5_3_settings_are_applied_in_order(peer: Peer) -> None:
    peer.send(settings((INITIAL_WINDOW_SIZE, 7), (INITIAL_WINDOW_SIZE, 9)))
    assert open_stream(peer).send_window == 9


# -- 6.7


def test_6_7_a_ping_is_answered_with_its_payload(peer: Peer) -> None:
    assert peer.send(ping(b"\xff\0abcdef")) == [Frame(PING, ACK, 0, b"\xff\0abcdef")]


def test_6_7_an_answer_is_not_answered(peer: Peer) -> None:
    peer.ignored(ping(ack=True))


@pytest.mark.parametrize("flood", [ping(), settings()], ids=["PING", "SETTINGS"])
def test_10_5_answers_that_are_not_read_end_the_connection(peer: Peer, flood: bytes) -> None:
    """A peer that asks and never reads would fill our memory with answers."""
    peer.conn.paused = True
    for _ in range(1000):
        peer.conn.receive(flood)
        peer.conn.refill()
    assert not peer.conn.closed
    peer.events()
    for _ in range(10):
        peer.conn.receive(flood)
    assert peer.events("fault")[0][1] == ErrorCode.ENHANCE_YOUR_CALM
    assert peer.sent()[-1].kind == GOAWAY


def test_10_5_answers_that_are_read_may_be_many(peer: Peer) -> None:
    for _ in range(3):
        peer.conn.paused = True
        for _ in range(900):
            peer.conn.receive(ping())
            peer.conn.refill()
        peer.conn.resume()
        assert len(peer.sent()) == 900
        peer.alive()


def test_10_5_answers_of_several_pauses_are_not_added_up(peer: Peer) -> None:
    for _ in range(3):
        peer.conn.paused = True
        for _ in range(600):
            peer.conn.receive(ping())
            peer.conn.refill()
        peer.conn.resume()
        assert len(peer.sent()) == 600


# -- 6.8


def test_6_8_goaway_is_reported(peer: Peer) -> None:
    stream = open_stream(peer)
    assert peer.send(goaway(1, 2, b"why")) == []
    assert peer.events() == [("goaway", 1, 2, b"why")]
    assert peer.conn.goaway_received
    assert stream.id in peer.conn.streams
    peer.alive()


def test_6_8_unknown_error_codes_and_reserved_bits_are_allowed(peer: Peer) -> None:
    peer.send(goaway(5 | 1 << 31, 0xDEAD_BEEF))
    assert peer.events() == [("goaway", 5, 0xDEAD_BEEF, b"")]


def test_6_8_goaway_names_the_last_request_and_the_reason() -> None:
    peer = server()
    peer.send(peer.request(1), peer.request(9))
    peer.events()
    sent = peer.connection_error(ErrorCode.FRAME_SIZE_ERROR, frame(PING, 0, 0, b""))
    assert sent[-1].number == 9
    assert b"PING" in sent[-1].payload[8:]


def test_6_8_the_reason_in_goaway_is_short() -> None:
    peer = server()
    peer.conn.send_goaway(ErrorCode.NO_ERROR, "x" * 1000)
    assert peer.sent()[0].payload[8:] == b"x" * 256


def test_6_8_goaway_refuses_the_requests_behind_its_last_stream() -> None:
    peer = client()
    streams = [peer.conn.open_stream(block(REQUEST), end=True) for _ in range(3)]
    peer.sent()
    assert peer.send(goaway(1, ErrorCode.ENHANCE_YOUR_CALM, b"later")) == []
    assert peer.events() == [
        ("goaway", 1, 11, b"later"),
        ("closed", 3),
        ("refused", 3, 11, b"later"),
        ("closed", 5),
        ("refused", 5, 11, b"later"),
    ]
    assert list(peer.conn.streams) == [1]
    assert streams[1].local_closed
    assert streams[1].remote_closed
    assert peer.conn.room() == 0
    peer.send(peer.headers(1, RESPONSE), data(1, b"abc"), peer.headers(1, TRAILERS, end=True))
    assert [event[0] for event in peer.events()] == ["response", "data", "trailers", "closed"]


def test_6_8_a_second_goaway_refuses_more() -> None:
    peer = client()
    for _ in range(2):
        peer.conn.open_stream(block(REQUEST), end=True)
    peer.send(goaway(MAX_WINDOW))
    assert peer.events() == [("goaway", MAX_WINDOW, 0, b"")]
    assert peer.conn.room() == 0
    peer.send(goaway(1))
    assert peer.events("refused") == [("refused", 3, 0, b"")]


def test_6_8_each_goaway_may_name_a_lower_stream() -> None:
    peer = client()
    for _ in range(4):
        peer.conn.open_stream(block(REQUEST), end=True)
    refused = []
    for last in (7, 5, 5, 1, 0):
        peer.send(goaway(last))
        refused.append([event[1] for event in peer.events("refused")])
    assert refused == [[], [7], [], [3, 5], [1]]
    peer.alive()


@pytest.mark.parametrize(("first", "second"), [(1, 3), (0, 1), (3, MAX_WINDOW)])
def test_6_8_a_goaway_with_a_higher_last_stream_is_a_connection_error(first: int, second: int) -> None:
    """The server must not: what it gave up may have been sent to another one. nghttp2, Netty and gRPC do the same."""
    peer = client()
    for _ in range(2):
        peer.conn.open_stream(block(REQUEST), end=True)
    peer.send(goaway(first))
    peer.sent()
    peer.events()
    peer.connection_error(ErrorCode.PROTOCOL_ERROR, goaway(second))


def test_6_8_the_goaway_of_a_client_is_about_pushed_streams() -> None:
    """There are none: whatever it names, and in whatever order, its calls go on."""
    peer = server()
    stream = open_stream(peer)
    peer.send(goaway(0), goaway(MAX_WINDOW), goaway(2), goaway(1))
    peer.send(data(1, b"abc", end=True))
    assert peer.events("data") == [("data", 1, b"abc", True)]
    peer.conn.send_data(stream, b"", end=True)
    assert peer.sent()[-1].ends
    peer.alive()


def test_6_8_a_server_drains_in_two_steps() -> None:
    peer = server()
    peer.send(peer.request(1))
    peer.conn.drain()
    assert [(item.kind, item.number, item.code) for item in peer.sent()] == [(GOAWAY, MAX_WINDOW, 0)]
    peer.send(peer.request(3))
    peer.conn.refuse_new()
    assert [(item.kind, item.number, item.code) for item in peer.sent()] == [(GOAWAY, 3, 0)]
    assert [event[1] for event in peer.events("request")] == [1, 3]
    # What the client sent before it knew is ignored; the block is decoded, and the connection goes on.
    peer.ignored(peer.request(5, (b"x-new", b"v"), end=True))
    peer.conn.send_headers(peer.conn.streams[1], block(RESPONSE), end=True)
    assert peer.sent()[0].ends


def test_6_8_the_last_stream_never_grows() -> None:
    """Else the client must take its ignored request for one that may have run, and can't repeat it."""
    peer = server()
    peer.send(peer.request(1))
    peer.conn.refuse_new()
    assert [item.number for item in peer.sent()] == [1]
    peer.send(peer.request(3))
    sent = peer.send(ping(b"short"))
    assert [(item.kind, item.number) for item in sent] == [(GOAWAY, 1)]


def test_6_8_all_of_an_ignored_request_is_ignored() -> None:
    peer = server()
    peer.send(peer.request(1))
    peer.conn.refuse_new()
    peer.sent()
    peer.events()
    peer.ignored(peer.request(3), data(3, b"abc"), window_update(3, 5), peer.headers(3, TRAILERS, end=True))
    peer.ignored(peer.request(5), rst_stream(5), data(5, b"abc", end=True))


# -- 7


def test_7_error_codes_have_the_numbers_of_the_rfc() -> None:
    assert [code.name for code in sorted(ErrorCode)] == [
        "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
        "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
        "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
    ]  # fmt: skip
    assert [int(code) for code in sorted(ErrorCode)] == list(range(14))


@pytest.mark.parametrize(("code", "name"), [(0, "NO_ERROR"), (13, "HTTP_1_1_REQUIRED"), (14, "error code 0xe")])
def test_7_error_codes_in_words(code: int, name: str) -> None:
    assert error_name(code) == name


