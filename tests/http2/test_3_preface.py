"""RFC 9113 section 3.4: what both sides say first."""

from __future__ import annotations

import struct

import pytest

from proxy.http2 import ConnectionFault, ErrorCode
from tests.http2.wire import (
    ACK,
    ENABLE_PUSH,
    GOAWAY,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_HEADER_LIST_SIZE,
    MAX_WINDOW,
    PREFACE,
    SETTINGS,
    WINDOW,
    WINDOW_UPDATE,
    Client,
    Frame,
    Server,
    client,
    frame,
    parse,
    ping,
    server,
    settings,
)


def announced(item: Frame) -> dict[int, int]:
    assert item.kind == SETTINGS
    assert item.flags == 0
    return dict(struct.iter_unpack(">HL", item.payload))


def test_3_4_a_server_begins_with_its_settings() -> None:
    greeting = server(stream_window=100_000, max_streams=7, header_list=8192).greeting
    assert announced(greeting[0]) == {
        MAX_CONCURRENT_STREAMS: 7,
        INITIAL_WINDOW_SIZE: 100_000,
        MAX_HEADER_LIST_SIZE: 8192,
    }


def test_3_4_a_client_begins_with_the_magic_and_its_settings() -> None:
    conn = Client(stream_window=70_000, header_list=9000)
    out = b"".join(conn.take_output())
    assert out.startswith(PREFACE)
    assert announced(parse(out)[0]) == {ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: 70_000, MAX_HEADER_LIST_SIZE: 9000}


@pytest.mark.parametrize(
    ("stream_window", "max_streams", "target"),
    [(WINDOW, 3, 3 * WINDOW), (MAX_WINDOW, 3, MAX_WINDOW), (100_000, 0, 100_000)],
)
def test_6_9_2_the_connection_window_has_room_for_all_stream_windows(
    stream_window: int, max_streams: int, target: int
) -> None:
    greeting = server(stream_window=stream_window, max_streams=max_streams).greeting
    assert [(item.kind, item.stream, item.number) for item in greeting[1:]] == [(WINDOW_UPDATE, 0, target - WINDOW)]


def test_6_9_2_the_default_connection_window_needs_no_update() -> None:
    assert [item.kind for item in server(stream_window=WINDOW, max_streams=1).greeting] == [SETTINGS]


@pytest.mark.parametrize(
    "start",
    [b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"X", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\t" + settings(), bytes(100)],
    ids=["HTTP/1.1", "first byte", "last byte", "zeros"],
)
def test_3_4_a_wrong_magic_is_a_connection_error(start: bytes) -> None:
    conn = Server()
    conn.take_output()
    conn.receive(start)
    assert conn.events == [("fault", ErrorCode.PROTOCOL_ERROR, "the connection preface is not HTTP/2's")]
    assert [item.kind for item in parse(b"".join(conn.take_output()))] == [GOAWAY]


@pytest.mark.parametrize("first", [frame(SETTINGS, ACK), ping(), frame(0x42)], ids=["ACK", "PING", "unknown"])
@pytest.mark.parametrize("conn_type", [Server, Client])
def test_3_4_the_first_frame_is_settings_and_no_acknowledgement(
    conn_type: type[Server] | type[Client], first: bytes
) -> None:
    conn = conn_type()
    conn.receive((PREFACE if conn.server else b"") + first)
    assert [event[:2] for event in conn.events] == [("fault", ErrorCode.PROTOCOL_ERROR)]
    assert conn.closed


@pytest.mark.parametrize("conn_type", [Server, Client])
def test_3_4_the_preface_may_come_byte_by_byte(conn_type: type[Server] | type[Client]) -> None:
    conn = conn_type()
    conn.take_output()
    start = (PREFACE if conn.server else b"") + settings((INITIAL_WINDOW_SIZE, 5)) + ping()
    for at in range(len(start)):
        assert not conn.closed
        conn.receive(start[at : at + 1])
    assert conn.events == [("settings",)]
    assert [(item.kind, item.flags) for item in parse(b"".join(conn.take_output()))] == [(SETTINGS, ACK), (6, ACK)]


def test_3_4_a_client_may_send_requests_before_the_servers_settings() -> None:
    """It announced nothing yet: the defaults hold."""
    conn = Client()
    assert conn.room() == 100


def test_output_is_announced_once_to_whoever_flushes() -> None:
    conn = Server()
    assert conn.wake == [conn]
    size = conn.out_size
    assert len(b"".join(conn.take_output())) == size
    assert conn.out_size == 0
    conn.wake.clear()
    conn.receive(PREFACE + settings() + ping() + ping())
    assert conn.wake == [conn]
    assert conn.out_size == len(b"".join(conn.take_output())) == 9 + 17 + 17


def test_a_connection_can_be_failed_from_above_once() -> None:
    peer = client()
    fault = ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too much")
    peer.conn.fail(fault)
    peer.conn.fail(fault)
    assert [(item.kind, item.code, item.payload[8:]) for item in peer.sent()] == [
        (GOAWAY, ErrorCode.ENHANCE_YOUR_CALM, b"too much")
    ]
    assert peer.events() == [("fault", ErrorCode.ENHANCE_YOUR_CALM, "too much")]
    assert str(fault) == "ENHANCE_YOUR_CALM: too much"
