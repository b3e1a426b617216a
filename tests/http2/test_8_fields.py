"""RFC 9113 sections 8.2 and 8.3: which fields a header section may have."""

from __future__ import annotations

import pytest

from proxy.http2 import ErrorCode, HeaderBlock, RequestHead, ResponseHead, Trailers
from proxy.http2.headers import intern_request, intern_trailers
from proxy.http2.hpack import Sensitive
from tests.http2.wire import REQUEST, RESPONSE, Fields, Peer, block, client, server

Field = tuple[bytes, bytes]


def request(*changes: Field, without: tuple[bytes, ...] = ()) -> Fields:
    """A good request with some fields changed, added at the end where there are none, or left out."""
    new = dict(changes)
    fields = [(name, new.pop(name, value)) for name, value in REQUEST if name not in without]
    pseudo = [field for field in new.items() if field[0][:1] == b":"]
    return pseudo + fields + [field for field in new.items() if field[0][:1] != b":"]


GOOD_REQUESTS: list[Fields] = [
    REQUEST,
    request((b":method", b"GET"), (b":path", b"/a%20b/;v=1:2@3?q=a%20b&c=/?")),
    request((b":path", b"/\xe6\xa8\xa1")),
    request((b":authority", b"[::1]:8001")),
    request((b":authority", b"a_b-c.d~e:1")),
    request((b":authority", b"unix%3A%2Frun%2Fgate.sock")),
    request((b":scheme", b"grpc+tls.v-1")),
    request((b":method", b"M-SEARCH!")),
    request((b":scheme", b"http")),
    request((b"host", b"LOCALHOST")),
    request((b"host", b"other"), without=(b":authority",)),
    request((b":scheme", b"custom"), without=(b":authority",)),
    request((b":method", b"OPTIONS"), (b":path", b"*")),
    request((b"x-empty", b""), (b"x", b"a\tb c"), (b"x-high", b"\x80\xff")),
    request((b"!#$%&'*+-.^_`|~09az", b"1")),
    request((b"content-length", b"0")),
    request((b"content-length", b"999999999999999999")),
    [*REQUEST, (b"content-length", b"5"), (b"content-length", b"5")],
    request((b"te", b"trailers")),
    request((b"te", b"Trailers")),  # RFC 9110 section 10.1.4: a keyword, in any case
    [(b":authority", b"a"), (b":path", b"/"), (b":scheme", b"https"), (b":method", b"POST")],
    [(b":method", b"CONNECT"), (b":authority", b"a:443")],
]

BAD_REQUESTS: list[tuple[str, Fields, str]] = [
    ("no :method", request(without=(b":method",)), ":method"),
    ("no :scheme", request(without=(b":scheme",)), ":scheme"),
    ("no :path", request(without=(b":path",)), ":path"),
    ("empty", [], ":method"),
    ("empty :path", request((b":path", b"")), ":path"),
    ("relative :path", request((b":path", b"a/b")), ":path"),
    ("absolute :path", request((b":path", b"http://a/b")), ":path"),
    ("* without OPTIONS", request((b":path", b"*")), ":path"),
    (":method is no token", request((b":method", b"PO ST")), ":method"),
    ("empty :method", request((b":method", b"")), ":method"),
    ("8.3 :status in a request", request((b":status", b"200")), ":status"),
    ("8.3 unknown pseudo field", request((b":protocol", b"websocket")), ":protocol"),
    ("8.3 :path twice", [(b":path", b"/"), *REQUEST], ":path twice"),
    ("8.3 pseudo field behind a regular one", [*REQUEST, (b":authority", b"a")], "wrong place"),
    ("8.3 new pseudo field behind a new regular one", [*REQUEST[:2], (b"x-v", b"1"), *REQUEST[2:]], "wrong place"),
    ("8.3.1 neither :authority nor host", request(without=(b":authority",)), "neither"),
    ("8.3.1 empty :authority", request((b":authority", b"")), "neither"),
    ("8.3.1 empty :authority beside host", request((b":authority", b""), (b"host", b"a")), ":authority is empty"),
    ("8.3.1 HTTPS without authority", request((b":scheme", b"HTTPS"), without=(b":authority",)), "neither"),
    ("8.3.1 empty host", request((b"host", b""), without=(b":authority",)), "neither"),
    ("8.3.1 two hosts", [*REQUEST, (b"host", b"localhost"), (b"host", b"localhost")], "more than one host"),
    ("8.3.1 host and :authority differ", request((b"host", b"other")), "differ"),
    ("8.3.1 userinfo", request((b":authority", b"user@localhost")), "userinfo"),
    ("8.3.1 space in :path", request((b":path", b"/a b")), "white space"),
    ("8.3.1 tab in :path", request((b":path", b"/a\tb")), "white space"),
    ("8.3.1 a second request line in :path", request((b":path", b"/ HTTP/1.1")), "white space"),
    ("8.3.1 fragment in :path", request((b":path", b"/a#b")), "fragment"),
    ("8.3.1 :scheme is no scheme", request((b":scheme", b"1http")), ":scheme"),
    ("8.3.1 a URI for :scheme", request((b":scheme", b"https://a/?")), ":scheme"),
    ("8.3.1 space in :authority", request((b":authority", b"a b")), "no host"),
    ("8.3.1 path in :authority", request((b":authority", b"a/b")), "no host"),
    ("8.3.1 high byte in :authority", request((b":authority", b"a\xff")), "no host"),
    ("8.3.1 path in host", request((b"host", b"a/b"), without=(b":authority",)), "no host"),
    ("8.5 CONNECT with :path", request((b":method", b"CONNECT")), "CONNECT"),
    ("8.5 CONNECT without :authority", [(b":method", b"CONNECT")], "CONNECT"),
    ("8.2 upper case", request((b"X-Upper", b"1")), "lower case"),
    ("8.2.1 empty name", request((b"", b"1")), "empty"),
    ("8.2.1 space in a name", request((b"x y", b"1")), "not allowed"),
    ("8.2.1 colon in a name", request((b"x:y", b"1")), "not allowed"),
    ("8.2.1 control in a name", request((b"x\x01", b"1")), "not allowed"),
    ("8.2.1 high byte in a name", request((b"x\xff", b"1")), "not allowed"),
    ("8.2.1 NUL", request((b"x", b"a\0b")), "value of x"),
    ("8.2.1 LF", request((b"x", b"a\nb")), "value of x"),
    ("8.2.1 CR", request((b"x", b"a\rb")), "value of x"),
    ("8.2.1 DEL", request((b"x", b"a\x7fb")), "value of x"),
    ("8.2.1 space before", request((b"x", b" a")), "value of x"),
    ("8.2.1 space behind", request((b"x", b"a ")), "value of x"),
    ("8.2.1 tab behind", request((b"x", b"a\t")), "value of x"),
    ("8.2.1 LF behind", request((b"x", b"a\n")), "value of x"),
    ("8.2.1 LF in :path", request((b":path", b"/a\nb")), ":path"),
    ("8.2.1 space behind :authority", request((b":authority", b"a ")), ":authority"),
    ("8.2.2 connection", request((b"connection", b"close")), "connection-specific"),
    ("8.2.2 proxy-connection", request((b"proxy-connection", b"close")), "connection-specific"),
    ("8.2.2 keep-alive", request((b"keep-alive", b"5")), "connection-specific"),
    ("8.2.2 transfer-encoding", request((b"transfer-encoding", b"chunked")), "connection-specific"),
    ("8.2.2 upgrade", request((b"upgrade", b"h2c")), "connection-specific"),
    ("8.2.2 te", request((b"te", b"gzip")), "te is"),
    ("8.2.2 te with more", request((b"te", b"trailers, gzip")), "te is"),
    ("8.2.2 te with a weight", request((b"te", b"trailers;q=0.5")), "te is"),
    ("8.2.2 empty te", request((b"te", b"")), "te is"),
    ("8.1.1 content-length is no number", request((b"content-length", b"five")), "not a number"),
    ("8.1.1 signed content-length", request((b"content-length", b"+5")), "not a number"),
    ("8.1.1 empty content-length", request((b"content-length", b"")), "not a number"),
    ("8.1.1 endless content-length", request((b"content-length", b"1" * 19)), "not a number"),
    ("8.1.1 two lengths", [*REQUEST, (b"content-length", b"5"), (b"content-length", b"6")], "twice"),
]


@pytest.mark.parametrize("fields", GOOD_REQUESTS)
def test_8_3_1_good_requests_pass(fields: Fields) -> None:
    assert RequestHead(fields).error is None
    peer = server()
    assert peer.send(peer.headers(1, fields)) == []
    assert peer.events() == [("request", 1, fields, False)]


@pytest.mark.parametrize(
    ("fields", "reason"), [case[1:] for case in BAD_REQUESTS], ids=[case[0] for case in BAD_REQUESTS]
)
def test_8_bad_requests_are_stream_errors(fields: Fields, reason: str) -> None:
    """The first time, the second, when the block is taken for one that comes again, and when it is remembered."""
    peer = server()
    for stream in (1, 3, 5, 7):
        peer.stream_error(stream, ErrorCode.PROTOCOL_ERROR, peer.headers(stream, fields))
        fault = peer.events("request", "stream fault")
        assert [event[:3] for event in fault] == [("stream fault", stream, ErrorCode.PROTOCOL_ERROR)]
        assert reason in fault[0][3]


GOOD_RESPONSES: list[Fields] = [
    RESPONSE,
    [(b":status", b"200"), (b"content-length", b"5")],
    [(b":status", b"599")],
    [(b":status", b"404"), (b"x", b"")],
]

BAD_RESPONSES: list[tuple[str, Fields, str]] = [
    ("8.3.2 no :status", [(b"content-type", b"a/b")], ":status"),
    ("8.3.2 empty", [], ":status"),
    ("8.3.2 :status is no number", [(b":status", b"abc")], ":status"),
    ("8.3.2 :status is too short", [(b":status", b"20")], ":status"),
    ("8.3.2 :status is too long", [(b":status", b"2000")], ":status"),
    ("8.3.2 empty :status", [(b":status", b"")], ":status"),
    ("8.3.2 :status is signed", [(b":status", b"+20")], ":status"),
    ("8.3 :status twice", [(b":status", b"200"), (b":status", b"200")], ":status twice"),
    ("8.3 :path in a response", [*RESPONSE[:1], (b":path", b"/")], ":path"),
    ("8.3 pseudo field behind a regular one", [(b"x", b"y"), (b":status", b"200")], "wrong place"),
    ("8.6 101", [(b":status", b"101")], "101"),
    ("RFC 9110 8.6: content-length in 1xx", [(b":status", b"103"), (b"content-length", b"0")], "informational"),
    ("8.2 upper case", [*RESPONSE, (b"X-Upper", b"1")], "lower case"),
    ("8.2.1 LF", [*RESPONSE, (b"x", b"a\nb")], "value of x"),
    ("8.2.2 connection", [*RESPONSE, (b"connection", b"close")], "connection-specific"),
    ("8.1.1 two lengths", [*RESPONSE, (b"content-length", b"5"), (b"content-length", b"6")], "twice"),
]


def asked() -> Peer:
    peer = client()
    peer.conn.open_stream(block(REQUEST), end=True)
    peer.sent()
    return peer


@pytest.mark.parametrize("fields", GOOD_RESPONSES)
def test_8_3_2_good_responses_pass(fields: Fields) -> None:
    head = ResponseHead(fields)
    assert head.error is None
    assert head.status == int(fields[0][1])
    peer = asked()
    assert peer.send(peer.headers(1, fields)) == []
    assert peer.events() == [("response", 1, fields, False)]


@pytest.mark.parametrize(
    ("fields", "reason"), [case[1:] for case in BAD_RESPONSES], ids=[case[0] for case in BAD_RESPONSES]
)
def test_8_bad_responses_are_stream_errors(fields: Fields, reason: str) -> None:
    peer = asked()
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, fields))
    fault = peer.events("response", "informational", "stream fault")
    assert [event[:3] for event in fault] == [("stream fault", 1, ErrorCode.PROTOCOL_ERROR)]
    assert reason in fault[0][3]


@pytest.mark.parametrize("text", [b"000", b"099", b"600", b"999"])
@pytest.mark.parametrize("end", [False, True])
def test_rfc_9110_15_a_status_out_of_range_is_taken_for_a_5xx(text: bytes, end: bool) -> None:
    """Three digits are well-formed; what they say is not valid, and a client is asked to treat that as a 5xx."""
    fields = [(b":status", text)]
    head = ResponseHead(fields)
    assert head.error is None
    assert head.status == 500
    peer = asked()
    assert peer.send(peer.headers(1, fields, end)) == []
    assert peer.events("response", "informational") == [("response", 1, fields, end)]


# -- white space around values

SPACED = [(b"grpc-status", b"5"), (b"grpc-message", b" no such model: \t"), (b"x", b" "), (b"y", b"")]
TRIMMED = [(b"grpc-status", b"5"), (b"grpc-message", b"no such model:"), (b"x", b""), (b"y", b"")]


def test_8_2_1_white_space_around_a_servers_values_is_taken_off() -> None:
    """Section 8.2.1 calls it malformed, but gRPC servers send it and gRPC clients take it."""
    peer = asked()
    for _ in range(3):
        peer.send(peer.headers(peer.conn.last_local_id, [*RESPONSE, *SPACED], end=True))
        assert peer.events("response")[0][2] == [*RESPONSE, *TRIMMED]
        peer.conn.open_stream(block(REQUEST), end=True)
        peer.send(peer.headers(peer.conn.last_local_id, RESPONSE))
        peer.send(peer.headers(peer.conn.last_local_id, SPACED, end=True))
        assert peer.events("trailers")[0][2] == TRIMMED
        peer.conn.open_stream(block(REQUEST), end=True)
        peer.sent()


def test_8_2_1_a_sensitive_value_stays_one_when_it_is_trimmed() -> None:
    peer = asked()
    seen = []
    peer.conn.on_response = lambda stream, head, end: seen.append(head.fields[1])
    peer.send(peer.headers(1, [(b":status", b"200"), (b"set-cookie", b"a=b ", True)]))  # type: ignore[list-item]
    assert seen == [(b"set-cookie", b"a=b")]
    assert type(seen[0]) is Sensitive


@pytest.mark.parametrize("value", [b"a ", b" a", b"a\t", b" "])
def test_8_2_1_white_space_around_a_clients_trailer_values_is_a_stream_error(value: bytes) -> None:
    peer = server()
    peer.send(peer.request(1))
    peer.stream_error(1, ErrorCode.PROTOCOL_ERROR, peer.headers(1, [(b"x", value)], end=True))


# -- what a head tells


def test_a_request_head_tells_its_parts() -> None:
    head = RequestHead(request((b"content-length", b"12")))
    assert (head.method, head.scheme, head.path, head.authority, head.content_length) == (
        b"POST",
        b"https",
        b"/inference.GRPCInferenceService/ModelInfer",
        b"localhost",
        12,
    )
    assert head.get(b"te") == b"trailers"
    assert head.get(b"x") is None
    assert head.get(b"x", b"default") == b"default"


def test_get_finds_the_first_of_several() -> None:
    assert Trailers([(b"a", b"1"), (b"a", b"2")]).get(b"a") == b"1"


def test_checked_fields_are_not_checked_again() -> None:
    assert HeaderBlock([(b"Upper", b"a\n")], checked=True).error is None
    assert HeaderBlock([(b"Upper", b"a")]).error is not None


# -- equal header sections are one object


def test_equal_field_lists_give_the_same_block() -> None:
    assert intern_request(list(REQUEST)) is intern_request(tuple(REQUEST))
    assert intern_request(REQUEST) is not intern_request([*REQUEST, (b"x", b"y")])


def test_kinds_of_blocks_are_kept_apart() -> None:
    fields = [(b"x", b"only")]
    assert isinstance(intern_trailers(fields), Trailers)
    assert isinstance(intern_request(fields), RequestHead)


def test_large_blocks_are_not_kept() -> None:
    fields = [(b"x", b"v" * 3000)]
    assert intern_trailers(fields) is not intern_trailers(fields)


def test_blocks_with_a_sensitive_field_are_not_kept_nor_given_for_plain_ones() -> None:
    secret = [*REQUEST, Sensitive((b"authorization", b"Bearer 1"))]
    plain = [*REQUEST, (b"authorization", b"Bearer 1")]
    assert intern_request(secret) is not intern_request(secret)
    kept = intern_request(plain)
    again = intern_request(secret)
    assert again is not kept
    assert type(again.fields[-1]) is Sensitive
    assert type(intern_request(plain).fields[-1]) is tuple


def test_blocks_are_kept_in_bounded_number() -> None:
    first = intern_trailers([(b"x-bounded", b"first")])
    for number in range(1000):
        intern_trailers([(b"x-bounded", b"%d" % number)])
    assert intern_trailers([(b"x-bounded", b"first")]) is not first
