"""RFC 9113 section 8.1: requests and responses as they are framed, in both roles."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode
from tests.http2.wire import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    Fields,
    Peer,
    block,
    client,
    data,
    frame,
    open_stream,
    rst_stream,
    server,
)

# -- requests


def test_8_1_a_request_with_a_body_and_its_answer() -> None:
    peer = server()
    assert peer.send(peer.request(1), data(1, b"abc"), data(1, b"", end=True)) == []
    assert peer.events() == [("request", 1, REQUEST, False), ("data", 1, b"abc", False), ("data", 1, b"", True)]
    stream = peer.conn.streams[1]
    peer.conn.send_headers(stream, block(RESPONSE))
    peer.conn.send_data(stream, b"def", end=False)
    peer.conn.send_trailers(stream, block(TRAILERS))
    assert [(item.kind, item.ends) for item in peer.sent()] == [(HEADERS, False), (DATA, False), (HEADERS, True)]
    assert peer.heads() == [(1, RESPONSE, False), (1, TRAILERS, True)]
    assert peer.events() == [("closed", 1)]


def test_8_1_a_request_without_a_body() -> None:
    peer = server()
    peer.send(peer.request(1, end=True))
    assert peer.events() == [("request", 1, REQUEST, True)]


def test_8_1_a_request_with_trailers() -> None:
    peer = server()
    peer.send(peer.request(1), data(1, b"abc"), peer.headers(1, [(b"x-sum", b"1")], end=True))
    assert peer.events()[1:] == [("data", 1, b"abc", False), ("trailers", 1, [(b"x-sum", b"1")])]
    assert peer.conn.streams[1].remote_closed


def test_8_1_an_early_response_ends_the_request_with_no_error() -> None:
    """The response is complete before the request: the rest of that is not needed, and its sender is told so."""
    peer = server()
    peer.send(peer.request(1))
    peer.conn.send_headers(peer.conn.streams[1], block(RESPONSE), end=True)
    sent = peer.sent()
    assert [(item.kind, item.ends) for item in sent] == [(HEADERS, True), (RST_STREAM, False)]
    assert sent[1].code == ErrorCode.NO_ERROR
    peer.events()
    peer.ignored(data(1, b"on its way"), peer.headers(1, TRAILERS, end=True))


@pytest.mark.parametrize("how", ["data", "trailers", "data that waited"])
def test_8_1_an_early_response_ends_the_request_however_it_ends(how: str) -> None:
    peer = server()
    stream = open_stream(peer)
    peer.conn.paused = how == "data that waited"
    if how == "trailers":
        peer.conn.send_trailers(stream, block(TRAILERS))
    else:
        peer.conn.send_data(stream, b"abc", end=True)
    peer.conn.resume()
    sent = peer.sent()
    assert sent[-2].ends
    assert (sent[-1].kind, sent[-1].code) == (RST_STREAM, ErrorCode.NO_ERROR)
    assert peer.conn.streams == {}


def test_8_1_a_response_with_informational_ones_before_it() -> None:
    peer = server()
    peer.send(peer.request(1, end=True))
    stream = peer.conn.streams[1]
    peer.conn.send_headers(stream, block([(b":status", b"103"), (b"link", b"</a>")]))
    peer.conn.send_headers(stream, block(RESPONSE))
    peer.sent()
    assert [fields[0][1] for _, fields, _ in peer.heads()] == [b"103", b"200"]


def test_8_1_a_request_head_over_the_limit_is_reported_and_can_be_answered() -> None:
    """The compression state survives: the next request refers to what the large one put into the table."""
    peer = server(header_list=4096)
    assert peer.send(peer.request(1, (b"x-new", b"v"), (b"x-long", b"v" * 5000), end=True)) == []
    assert peer.events() == [("too large", 1, 4096)]
    peer.conn.send_headers(peer.conn.streams[1], block(RESPONSE), end=True)
    assert peer.sent()[0].ends
    peer.send(peer.request(3, (b"x-new", b"v"), end=True))
    assert peer.events("request") == [("request", 3, [*REQUEST, (b"x-new", b"v")], True)]


def test_8_1_the_same_request_head_is_understood_every_time() -> None:
    """Also when the table has changed in between, so that the same bytes would mean something else."""
    peer = server()
    for number in range(1, 60, 2):
        extra = (b"x-number", b"%d" % (number // 10))
        peer.send(peer.request(number, extra, end=True))
        assert peer.events() == [("request", number, [*REQUEST, extra], True)]


def test_8_1_more_heads_than_are_remembered_are_understood() -> None:
    peer = server(max_streams=1000)
    for _ in range(2):
        for number in range(100):
            stream = peer.conn.last_remote_id + 2 if peer.conn.last_remote_id else 1
            literal = b"\x00\x01x" + bytes((2,)) + b"%02d" % number
            peer.send(request_with(stream, literal))
            assert peer.events()[0][2][-1] == (b"x", b"%02d" % number)


def request_with(stream: int, literal: bytes) -> bytes:
    """A request that touches no table: static fields and one literal."""
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x83\x87\x84\x01\x01h" + literal)


@pytest.mark.parametrize("extra", [[], [(b"content-length", b"5")]])
def test_8_1_trailers_without_end_stream_are_a_stream_error(peer: Peer, extra: Fields) -> None:
    open_stream(peer)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, TRAILERS + extra))
    assert peer.events("trailers") == []


@pytest.mark.parametrize(
    "field",
    [(b":path", b"/"), (b":status", b"200"), (b"Grpc-Status", b"0"), (b"connection", b"close"), (b"x", b"a\nb")],
)
def test_8_1_malformed_trailers_are_a_stream_error(peer: Peer, field: tuple[bytes, bytes]) -> None:
    open_stream(peer)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [field], end=True))
    assert peer.events("trailers") == []


def test_8_1_trailers_over_the_limit_are_a_stream_error() -> None:
    for make in (server, client):
        peer = make(header_list=4096)
        open_stream(peer)
        peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [(b"x", b"v" * 5000)], end=True))
        assert "4096" in peer.events("stream fault")[0][3]


def test_8_1_1_a_malformed_request_is_a_stream_error_and_its_neighbours_go_on() -> None:
    peer = server()
    peer.send(peer.request(1))
    peer.stream_error(3, ErrorCode.PROTOCOL_ERROR, peer.request(3, (b"Upper", b"case")))
    assert [event[:2] for event in peer.events("request", "stream fault", "closed")] == [
        ("request", 1),
        ("closed", 3),
        ("stream fault", 3),
    ]
    assert list(peer.conn.streams) == [1]


def test_8_1_1_content_length_without_data_is_a_stream_error() -> None:
    peer = server()
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.request(1, (b"content-length", b"5"), end=True))
    assert peer.events("request") == []


def test_8_1_1_content_length_of_zero_without_data() -> None:
    peer = server()
    peer.send(peer.request(1, (b"content-length", b"0"), end=True))
    assert [event[0] for event in peer.events()] == ["request"]


# -- responses


def asked(end: bool = True) -> Peer:
    """The peer of a client that has sent a request on stream 1."""
    peer = client()
    peer.conn.open_stream(block(REQUEST), end=end)
    assert [(item.kind, item.stream, item.ends) for item in peer.sent()] == [(HEADERS, 1, end)]
    assert peer.heads() == [(1, REQUEST, end)]
    return peer


def test_8_1_a_response_with_data_and_trailers() -> None:
    peer = asked()
    peer.send(peer.headers(1, RESPONSE), data(1, b"abc"), peer.headers(1, TRAILERS, end=True))
    assert peer.events() == [
        ("response", 1, RESPONSE, False),
        ("data", 1, b"abc", False),
        ("trailers", 1, TRAILERS),
        ("closed", 1),
    ]


def test_8_1_a_response_that_ends_with_data() -> None:
    peer = asked()
    peer.send(peer.headers(1, RESPONSE), data(1, b"abc", end=True))
    assert peer.events()[1:] == [("data", 1, b"abc", True), ("closed", 1)]


def test_8_1_a_response_of_headers_only() -> None:
    peer = asked()
    peer.send(peer.headers(1, RESPONSE, end=True))
    assert peer.events() == [("response", 1, RESPONSE, True), ("closed", 1)]


def test_8_1_a_response_before_the_request_has_ended_leaves_the_stream_half_open() -> None:
    """Until the server says that it doesn't want the rest (RST_STREAM with NO_ERROR), or it is sent."""
    peer = asked(end=False)
    peer.send(peer.headers(1, RESPONSE, end=True))
    stream = peer.conn.streams[1]
    assert peer.events() == [("response", 1, RESPONSE, True)]
    peer.conn.send_data(stream, b"abc", end=False)
    assert len(peer.sent()) == 1
    peer.send(rst_stream(1, 0))
    assert peer.events() == [("closed", 1), ("reset", 1, 0)]


def test_8_1_a_response_before_the_request_has_ended_waits_for_its_end() -> None:
    peer = asked(end=False)
    peer.send(peer.headers(1, RESPONSE, end=True))
    peer.conn.send_data(peer.conn.streams[1], b"", end=True)
    assert peer.events()[-1] == ("closed", 1)
    assert [item.kind for item in peer.sent()] == [DATA]


@pytest.mark.parametrize("count", [1, 3])
def test_8_1_informational_responses_come_before_the_final_one(count: int) -> None:
    peer = asked()
    early = [(b":status", b"103"), (b"link", b"</a>")]
    peer.send(*[peer.headers(1, early) for _ in range(count)], peer.headers(1, RESPONSE, end=True))
    assert peer.events()[:-1] == [("informational", 1, early)] * count + [("response", 1, RESPONSE, True)]


def test_8_1_an_informational_response_must_not_end_the_stream() -> None:
    peer = asked()
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [(b":status", b"100")], end=True))
    assert peer.events("informational", "response") == []


def test_8_1_an_informational_response_behind_the_final_one_is_a_stream_error() -> None:
    peer = asked()
    peer.send(peer.headers(1, RESPONSE))
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [(b":status", b"100")]))


@pytest.mark.parametrize("before", [None, b"103"])
@pytest.mark.parametrize("payload", [b"", b"abc"])
def test_8_1_data_before_the_response_head_is_a_stream_error(before: bytes | None, payload: bytes) -> None:
    peer = asked()
    if before:
        peer.send(peer.headers(1, [(b":status", before)]))
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, data(1, payload))
    assert peer.events("data") == []


def test_8_1_1_a_malformed_response_is_a_stream_error() -> None:
    peer = asked()
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [(b":status", b"abc")]))
    assert [event[0] for event in peer.events("response", "stream fault")] == ["stream fault"]


def test_8_1_a_response_head_over_the_limit_is_a_stream_error() -> None:
    peer = client(header_list=4096)
    peer.conn.open_stream(block(REQUEST), end=True)
    peer.sent()
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [*RESPONSE, (b"x", b"v" * 5000)]))
    assert "4096" in peer.events("stream fault")[0][3]


SEVEN = (b"content-length", b"7")


def test_8_1_1_content_length_without_data_in_a_response_that_has_ended_is_a_stream_error() -> None:
    peer = asked(end=False)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [*RESPONSE, SEVEN], end=True))
    assert [event[0] for event in peer.events("response", "stream fault")] == ["stream fault"]


@pytest.mark.parametrize("length", [[], [(b"content-length", b"0")]])
def test_8_1_1_a_response_that_has_ended_may_say_that_it_has_no_content(length: Fields) -> None:
    peer = asked()
    peer.send(peer.headers(1, RESPONSE + length, end=True))
    assert [event[0] for event in peer.events()] == ["response", "closed"]


NO_CONTENT = ["HEAD", "204", "304"]


def without_content(what: str) -> tuple[Peer, Fields]:
    """The peer of a client whose stream 1 gets a response without content, and the fields of that."""
    peer = asked()
    if what == "HEAD":
        peer.conn.streams[1].expect = 0
        return peer, RESPONSE
    return peer, [(b":status", what.encode())]


@pytest.mark.parametrize("what", NO_CONTENT)
@pytest.mark.parametrize("length", [[], [SEVEN]])
def test_8_1_1_a_response_without_content_may_have_a_content_length(what: str, length: Fields) -> None:
    """RFC 9110 sections 8.6 and 9.3.2: it tells what GET would have got."""
    peer, fields = without_content(what)
    peer.send(peer.headers(1, fields + length, end=True))
    assert [event[0] for event in peer.events()] == ["response", "closed"]


@pytest.mark.parametrize("what", NO_CONTENT)
@pytest.mark.parametrize("length", [[], [SEVEN]])
@pytest.mark.parametrize("with_trailers", [False, True])
def test_8_1_1_a_response_without_content_may_end_later(what: str, length: Fields, with_trailers: bool) -> None:
    peer, fields = without_content(what)
    end = peer.headers(1, TRAILERS, end=True) if with_trailers else data(1, b"", end=True)
    peer.send(peer.headers(1, fields + length), end)
    assert [event[0] for event in peer.events()] == ["response", "trailers" if with_trailers else "data", "closed"]


@pytest.mark.parametrize("what", NO_CONTENT)
@pytest.mark.parametrize("length", [[], [SEVEN]])
def test_8_1_1_a_response_without_content_has_no_data(what: str, length: Fields) -> None:
    peer, fields = without_content(what)
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, fields + length), data(1, b"content", end=True))
    assert peer.events("data") == []


@pytest.mark.parametrize("value", [b"3", b"7", b"x"])
def test_rfc_9110_6_5_1_content_length_among_trailers_frames_nothing(peer: Peer, value: bytes) -> None:
    """It came too late for that, and trailers are never merged into the header section; it is a field as any other."""
    open_stream(peer)
    late = [*TRAILERS, (b"content-length", value)]
    peer.send(data(1, b"abc"), peer.headers(1, late, end=True))
    assert [event[0] for event in peer.events()] == ["data", "trailers"]
    peer.alive()


def test_8_1_a_client_sends_trailers_and_data() -> None:
    peer = asked(end=False)
    stream = peer.conn.streams[1]
    peer.conn.send_data(stream, b"abc", end=False)
    peer.conn.send_trailers(stream, block([(b"x-sum", b"1")]))
    assert [(item.kind, item.ends) for item in peer.sent()] == [(DATA, False), (HEADERS, True)]
    assert stream.local_closed
    peer.send(peer.headers(1, RESPONSE, end=True))
    assert peer.conn.streams == {}


def test_5_1_a_closed_connection_opens_no_streams() -> None:
    peer = client()
    assert peer.conn.room() > 0
    peer.send(b"\xff" * 9)
    assert peer.conn.room() == 0
