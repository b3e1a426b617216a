"""RFC 9113 section 10.5: what a peer can make us keep or do is bounded, also for one that sends and never reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest

from tests.http2.wire import (
    DATA,
    REQUEST,
    RESPONSE,
    Peer,
    block,
    data,
    open_stream,
    rst_stream,
    server,
    window_update,
)

Flood = Callable[[Peer], Iterator[bytes]]


def refused(peer: Peer) -> Iterator[bytes]:
    """Requests over the limit, each answered with REFUSED_STREAM."""
    head = peer.request(1)
    peer.conn.receive(head)
    for stream in count(3, 2):
        yield head[:5] + stream.to_bytes(4, "big") + head[9:]


def malformed(peer: Peer) -> Iterator[bytes]:
    """Malformed requests, each answered with PROTOCOL_ERROR."""
    for stream in count(1, 2):
        yield peer.request(stream, (b"connection", b"close"))


def skipped(peer: Peer) -> Iterator[bytes]:
    """Data for streams that were never used, each answered with STREAM_CLOSED."""
    peer.conn.receive(peer.request(2**31 - 1))
    for stream in count(1, 2):
        yield data(stream, b"")


def zero(peer: Peer) -> Iterator[bytes]:
    """WINDOW_UPDATE of zero for streams that were never used, each answered with PROTOCOL_ERROR."""
    peer.conn.receive(peer.request(2**31 - 1))
    for stream in count(1, 2):
        yield window_update(stream, 0)


@pytest.mark.parametrize("flood", [refused, malformed, skipped, zero])
def test_10_5_resets_that_are_not_read_do_not_pile_up(flood: Flood) -> None:
    peer = server(max_streams=1)
    frames = flood(peer)
    peer.conn.paused = True
    size = 0
    for _ in range(20_000):
        peer.conn.receive(next(frames))
        size += peer.conn.out_size
        peer.conn.take_output()
    assert size < 150_000, "13 bytes for each frame, kept until the peer reads"


@pytest.mark.parametrize("flood", [refused, malformed, skipped, zero])
def test_10_5_what_is_remembered_of_resets_is_bounded(flood: Flood) -> None:
    peer = server(max_streams=1)
    frames = flood(peer)
    for _ in range(3000):
        peer.conn.receive(next(frames))
        peer.conn.take_output()
    assert len(peer.conn.resets) <= 512


def test_10_5_what_waits_for_a_stalled_peer_is_bounded_by_the_window_of_its_source() -> None:
    """A relay that credits what it has sent gets no more than the window while nothing can be sent."""
    down = server(max_streams=1)
    source = server(max_streams=1)
    down.send(down.request(1, end=True))
    source.send(source.request(1))
    stream = down.conn.streams[1]
    stream.partner = source.conn.streams[1]
    down.conn.send_headers(stream, block(RESPONSE))
    down.conn.paused = True
    kept = 0
    for _ in range(100):
        sent = source.send(data(1, bytes(16_000)))
        if not source.conn.streams:
            break
        assert [item for item in sent if item.stream == 1] == [], "no credit while nothing leaves"
        kept += 16_000
        down.conn.send_data(stream, bytes(16_000), end=False)
    assert kept <= 65_535
    assert [item for item in down.sent() if item.kind == DATA] == []


def test_10_5_opening_and_resetting_streams_leaves_nothing_behind() -> None:
    peer = server()
    for number in range(1, 4000, 2):
        peer.send(peer.headers(number, REQUEST), rst_stream(number))
    assert peer.conn.streams == {}
    assert peer.conn.resets == {}
    assert peer.conn.blocked == {}
    assert len(peer.events("request")) == 2000
    stream = open_stream_at(peer, 4001)
    assert stream in peer.conn.streams


def open_stream_at(peer: Peer, number: int) -> int:
    peer.send(peer.headers(number, REQUEST))
    return number


def test_10_5_a_backlog_leaves_nothing_behind(peer: Peer) -> None:
    stream = open_stream(peer)
    peer.conn.paused = True
    peer.conn.send_data(stream, b"abc", end=False)
    assert peer.conn.blocked
    peer.send(rst_stream(1))
    assert peer.conn.blocked == {}
