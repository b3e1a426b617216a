"""RFC 9113 section 10.5: budgets for what costs a client little and a server something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, cycle, repeat

import pytest

from proxy.http2 import Abuse, ErrorCode, guards
from tests.http2.wire import (
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    PRIORITY,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    Peer,
    block,
    client,
    data,
    frame,
    goaway,
    open_stream,
    padded_data,
    ping,
    rst_stream,
    server,
    settings,
    window_update,
)

# What costs one unit of each kind, again and again; stream 1 is open.


def resets(peer: Peer) -> Iterator[bytes]:
    """CVE-2023-44487: a request and its cancellation."""
    for stream in count(3, 2):
        yield peer.request(stream) + rst_stream(stream)


def malformed(peer: Peer) -> Iterator[bytes]:
    """CVE-2025-8671: a request that we have to reset."""
    for stream in count(3, 2):
        yield peer.request(stream, (b"connection", b"close"))


def late_data(peer: Peer) -> Iterator[bytes]:
    peer.send(peer.request(1001, end=True))
    for stream in count(3, 2):
        yield data(stream, b"x")


def late_updates(peer: Peer) -> Iterator[bytes]:
    peer.send(peer.request(1001, end=True))
    for stream in count(3, 2):
        yield window_update(stream, 0)


def many_fields(peer: Peer, same: bool = False) -> Iterator[bytes]:
    """Blocks with a hundred fields, and never the same one; or the same one again and again, too long to be kept."""
    for stream in count(3, 2):
        fields = b"".join(b"\x00\x03x-%c\x05%05d" % (97 + number % 26, 7 if same else stream) for number in range(92))
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, b"".join(map(literal, REQUEST)) + fields)
        peer.conn.streams.clear()  # answered


def literal(field: tuple[bytes, bytes]) -> bytes:
    return b"\x00" + bytes((len(field[0]),)) + field[0] + bytes((len(field[1]),)) + field[1]


def long_fields(peer: Peer) -> Iterator[bytes]:
    """A few bytes that stand for 60 KiB of fields."""
    peer.send(peer.request(3, (b"x-long", b"v" * 3800), end=True))
    field = peer.block([(b"x-long", b"v" * 3800)])
    start = peer.block(REQUEST)
    for stream in count(5, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, start + field * 16)
        peer.conn.streams.clear()


def data_behind_a_reset(peer: Peer) -> Iterator[bytes]:
    peer.send(peer.request(3, (b"connection", b"close")))
    peer.conn.stray_allowed = 0
    return repeat(data(3, b"x"))


def late_resets(peer: Peer) -> Iterator[bytes]:
    peer.send(peer.request(3, end=True), rst_stream(3))
    peer.conn.refill()
    return repeat(rst_stream(3))


def refused(peer: Peer) -> Iterator[bytes]:
    peer.conn.max_streams = 1
    for stream in count(3, 2):
        yield peer.request(stream)


def large(peer: Peer) -> Iterator[bytes]:
    """A few bytes that stand for a header list over the limit."""
    peer.send(peer.request(3, (b"x-large", b"v" * 3000)))
    field = peer.block([(b"x-large", b"v" * 3000)])
    for stream in count(5, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, field * 30)


FLOODS: dict[str, tuple[str, Callable[[Peer], Iterator[bytes]]]] = {
    "PING": (guards.PING, lambda peer: repeat(ping())),
    "SETTINGS": (guards.SETTINGS, lambda peer: repeat(settings())),
    "small SETTINGS": (guards.SETTINGS, lambda peer: repeat(settings(*[(HEADER_TABLE_SIZE, 4096)] * 9))),
    "PRIORITY": (guards.PRIORITY, lambda peer: repeat(frame(PRIORITY, 0, 1, bytes(5)))),
    "WINDOW_UPDATE": (guards.WINDOW_UPDATE, lambda peer: cycle([window_update(0, 1), window_update(1, 1)])),
    "empty DATA": (guards.EMPTY_DATA, lambda peer: repeat(data(1, b""))),
    "empty padded DATA": (guards.EMPTY_DATA, lambda peer: repeat(padded_data(1, b"", 0))),
    "unknown frames": (guards.UNKNOWN_FRAME, lambda peer: repeat(frame(0x42, 0xFF, 1, b"x"))),
    "rapid reset": (guards.RESET, resets),
    "malformed requests": (guards.PROVOKED_RESET, malformed),
    "late DATA": (guards.PROVOKED_RESET, late_data),
    "late WINDOW_UPDATE": (guards.PROVOKED_RESET, late_updates),
    "refused requests": (guards.PROVOKED_RESET, refused),
    "large header lists": (guards.LARGE_HEADERS, large),
    "many fields": (guards.MANY_FIELDS, many_fields),
    "many fields, the same": (guards.MANY_FIELDS, lambda peer: many_fields(peer, same=True)),
    "long fields": (guards.LONG_FIELDS, long_fields),
    "short DATA for a stream that was reset": (guards.STRAY_FRAME, data_behind_a_reset),
    "PING ACK": (guards.STRAY_FRAME, lambda peer: repeat(ping(ack=True))),
    "SETTINGS ACK": (guards.STRAY_FRAME, lambda peer: repeat(frame(4, 1))),
    "GOAWAY": (guards.STRAY_FRAME, lambda peer: repeat(goaway(0))),
    "late RST_STREAM": (guards.STRAY_FRAME, late_resets),
}


# What one of these costs, if not 1: fields beyond 64, KiB.
COSTS = {"many fields": len(REQUEST) + 92 - 64, "many fields, the same": len(REQUEST) + 92 - 64, "long fields": 60}


def how_many(peer: Peer, frames: Iterator[bytes], most: int) -> int:
    """How many of these frames the connection takes in one interval before it is ended, if it is."""
    peer.conn.receive(next(frames))
    peer.conn.refill()
    for number in range(most):
        peer.conn.receive(next(frames))
        if peer.conn.closed:
            return number
    return most


@pytest.mark.parametrize("name", FLOODS)
def test_10_5_a_flood_ends_the_connection_when_its_budget_is_spent(name: str) -> None:
    kind, make = FLOODS[name]
    budget = guards.BUDGETS[kind] // COSTS.get(name, 1)
    peer = server()
    open_stream(peer)
    peer.send(frame(4, 1))  # it knows our SETTINGS
    taken = how_many(peer, make(peer), 3 * budget)
    # Streams that were opened in the interval let a client reset some more.
    assert taken == budget if kind != guards.RESET else budget <= taken <= 2 * budget
    last = peer.sent()[-1]
    assert (last.kind, last.code) == (GOAWAY, ErrorCode.ENHANCE_YOUR_CALM)
    fault = peer.conn.fault
    assert isinstance(fault, Abuse)
    assert fault.kind == kind


def test_10_5_a_rapid_reset_is_seen_though_stream_identifiers_are_skipped() -> None:
    peer = server()
    frames = (peer.request(stream) + rst_stream(stream) for stream in count(1, 4))
    assert how_many(peer, frames, 5000) < 1000


def test_10_5_a_client_that_works_may_cancel_as_many_calls_again() -> None:
    peer = server()
    for stream in count(1, 4):
        peer.conn.receive(peer.request(stream, end=True))
        peer.conn.send_headers(peer.conn.streams[stream], block(RESPONSE), end=True)
        peer.conn.receive(peer.request(stream + 2) + rst_stream(stream + 2))
        peer.sent()
        if stream > 4000:
            break
    peer.alive()


@pytest.mark.parametrize("name", FLOODS)
def test_10_5_the_same_spread_over_time_is_no_flood(name: str) -> None:
    kind, make = FLOODS[name]
    peer = server(max_streams=10_000)
    open_stream(peer)
    frames = make(peer)
    for _ in range(3):
        for _ in range(guards.BUDGETS[kind] // COSTS.get(name, 1)):
            peer.conn.receive(next(frames))
        peer.conn.refill()
    peer.sent()
    peer.alive()


def test_5_1_2_who_cannot_know_our_settings_may_open_more_streams() -> None:
    peer = server(max_streams=1)
    peer.conn.receive(b"".join(peer.request(stream) for stream in range(1, 1001, 2)))
    refused = [item for item in peer.sent() if item.kind == RST_STREAM]
    assert {item.code for item in refused} == {ErrorCode.REFUSED_STREAM}
    assert len(refused) == 499
    peer.alive()


def test_10_5_what_was_on_its_way_to_a_stream_that_we_ended_is_no_flood() -> None:
    """Answers at the head, as when there is no room: the body and its end are behind it already."""
    peer = server()
    for stream in range(1, 5001, 2):
        peer.conn.receive(peer.request(stream))
        peer.conn.send_headers(peer.conn.streams[stream], block(RESPONSE), end=True)
        peer.conn.receive(data(stream, b"small", end=True))
        peer.sent()
    peer.alive()


def test_10_5_what_a_server_sends_behind_our_cancel_is_no_flood() -> None:
    peer = client()
    stream = open_stream(peer)
    peer.conn.reset(stream, ErrorCode.CANCEL)
    for _ in range(3):
        peer.conn.receive(data(1, b"a token of an answer") * 1000)
    peer.sent()
    peer.alive()


def test_10_5_all_calls_that_a_client_may_have_may_be_cancelled_at_once() -> None:
    peer = server(max_streams=256)
    for stream in range(1, 513, 2):
        peer.conn.receive(peer.request(stream))
    peer.conn.refill()
    peer.conn.receive(b"".join(rst_stream(stream) for stream in range(1, 513, 2)))
    peer.sent()
    peer.alive()


def test_10_5_a_long_token_with_each_call_is_no_flood() -> None:
    peer = server()
    for stream in range(1, 5001, 2):
        token = (b"authorization", b"Bearer " + bytes(b"%05d" % stream) + b"t" * 9000)
        fields = b"".join(map(literal, REQUEST)) + b"\x00\x0dauthorization\x7f"
        more = len(token[1]) - 127
        peer.conn.receive(
            frame(HEADERS, END_HEADERS | END_STREAM, stream, fields + bytes((more & 127 | 128, more >> 7)) + token[1])
        )
        peer.conn.streams.clear()
    peer.sent()
    peer.alive()


def test_10_5_a_ping_for_each_frame_of_data_is_no_flood() -> None:
    """As grpc-go does, to estimate the bandwidth."""
    peer = server(max_streams=10_000)
    for stream in range(1, 2001, 2):
        peer.conn.receive(peer.request(stream, end=True))
        peer.conn.send_headers(peer.conn.streams[stream], block(RESPONSE))
        peer.conn.send_data(peer.conn.streams[stream], b"answer", end=True)
        peer.conn.receive(ping())
        peer.sent()
    peer.alive()


def test_10_5_a_server_may_end_each_answer_with_an_empty_frame() -> None:
    peer = client()
    for _ in range(10_000):
        stream = peer.conn.open_stream(block(REQUEST), end=True).id
        peer.conn.receive(peer.headers(stream, RESPONSE) + data(stream, b"x") + data(stream, b""))
        peer.conn.receive(peer.headers(stream, TRAILERS, end=True))
        peer.sent()
    peer.alive()


def test_10_5_remembered_blocks_with_many_fields_cost_nothing() -> None:
    peer = server(max_streams=10_000)
    fields = [(b"x-%d" % number, b"") for number in range(90)]
    peer.send(peer.request(1, *fields, end=True))
    for stream in range(3, 4001, 2):
        peer.conn.receive(peer.request(stream, *fields, end=True))
        peer.conn.streams.clear()
    peer.sent()
    peer.alive()


def test_10_5_settings_with_many_values_cost_more() -> None:
    peer = server()
    many = settings(*[(HEADER_TABLE_SIZE, size) for size in range(2000)])
    peer.conn.receive(many)
    assert isinstance(peer.conn.fault, Abuse)
    assert peer.conn.fault.kind == guards.SETTINGS


def test_10_5_a_header_block_that_never_ends_is_abuse() -> None:
    peer = server()
    peer.conn.receive(frame(HEADERS, 0, 1, b""))
    for _ in range(100):
        peer.conn.receive(frame(9, 0, 1, b""))
    assert isinstance(peer.conn.fault, Abuse)
    assert peer.conn.fault.kind == guards.CONTINUATION


def test_10_5_answers_that_are_not_read_are_abuse() -> None:
    peer = server()
    peer.conn.paused = True
    for _ in range(1001):
        peer.conn.receive(ping())
        peer.conn.refill()
    assert isinstance(peer.conn.fault, Abuse)
    assert peer.conn.fault.kind == guards.UNREAD


def test_10_5_what_ends_a_stream_or_answers_us_costs_nothing() -> None:
    peer = server()
    for stream in range(1, 801, 2):
        peer.conn.receive(peer.request(stream) + data(stream, b"abc") + data(stream, b"", end=True))
        peer.conn.receive(ping(ack=True) + frame(4, 1))
        peer.conn.send_headers(peer.conn.streams[stream], block(RESPONSE), end=True)
        peer.sent()
    peer.alive()


def test_10_5_a_spender_is_named_once_an_interval() -> None:
    """Whoever keeps the time refills those alone that have spent anything."""
    peer = server()
    spenders: list[object] = []
    peer.conn.spenders = spenders
    peer.conn.refill()
    peer.conn.receive(peer.request(1))
    assert spenders == []
    peer.conn.receive(ping() + ping() + settings())
    assert spenders == [peer.conn]
    spenders.clear()
    peer.conn.refill()
    peer.conn.receive(ping())
    assert spenders == [peer.conn]


UPSTREAM_FLOODS = {
    ping(): guards.PING,
    settings(): guards.SETTINGS,
    frame(PRIORITY, 0, 1, bytes(5)): guards.PRIORITY,
    window_update(0, 1): guards.WINDOW_UPDATE,
    data(1, b""): guards.EMPTY_DATA,
    frame(0x42): guards.UNKNOWN_FRAME,
    ping(ack=True): guards.STRAY_FRAME,
}


@pytest.mark.parametrize("flood", UPSTREAM_FLOODS, ids=UPSTREAM_FLOODS.values())
def test_10_5_a_server_has_twenty_times_as_much(flood: bytes) -> None:
    """It is trusted, and shared: a connection that is ended takes the calls of many clients with it."""
    peer = client()
    open_stream(peer)
    most = 20 * guards.BUDGETS[UPSTREAM_FLOODS[flood]]
    for _ in range(2):
        peer.conn.refill()
        peer.conn.receive(flood * (most - 2))
        peer.sent()
        peer.alive()
    peer.conn.refill()
    peer.conn.receive(flood * (most + 1))
    assert peer.conn.closed
    assert isinstance(peer.conn.fault, Abuse)
    assert peer.conn.fault.kind == UPSTREAM_FLOODS[flood]


def test_10_5_what_a_server_does_to_calls_has_no_budget() -> None:
    """Its resets, and ours of what it breaks, end calls that were made; there are no more of them."""
    peer = client()
    for number in range(3000):
        stream = peer.conn.open_stream(block(REQUEST), end=False).id
        peer.conn.receive(rst_stream(stream) if number % 2 else data(stream, b"before the head"))
    peer.sent()
    peer.alive()


def test_10_5_1_a_header_bomb_ends_the_connection() -> None:
    """One large field put into the table, then a few hundred bytes that each stand for it."""
    peer = server()
    large = b"\x40\x01x\x7f" + bytes((3800 - 127 & 0x7F | 0x80, 3800 - 127 >> 7)) + b"v" * 3800
    peer.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, large + b"\xbe" * 400))
    assert peer.conn.closed
    assert isinstance(peer.conn.fault, Abuse)
    assert peer.conn.fault.kind == guards.LARGE_HEADERS
    assert peer.conn.fault.code == ErrorCode.ENHANCE_YOUR_CALM
