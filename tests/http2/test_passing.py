"""Fields that only pass through: kept apart from the block, which is then the same for all calls; nothing is lost."""

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.http2.errors import ErrorCode
from proxy.http2.headers import KEPT_NAMES, Passing, RequestHead, check_passing
from proxy.http2.hpack import Decoder, Encoder, Field, Sensitive, encode_literals
from proxy.http2.stream import Stream
from tests.http2.wire import (
    END_HEADERS,
    HEADERS,
    REQUEST,
    RST_STREAM,
    Peer,
    Server,
    block,
    client,
    frame,
    open_stream,
    server,
    window_update,
)

IDS = [(b"x-request-id", b"1f"), (b"grpc-timeout", b"9S")]


def literal(name: bytes, value: bytes, first: int = 0) -> bytes:
    return bytes((first, len(name))) + name + bytes((len(value),)) + value


class Watch(Server):
    """Keeps each request's block, and what only passed through."""

    def __init__(self) -> None:
        self.requests: list[tuple[RequestHead, Passing | None]] = []
        super().__init__()

    def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
        super().on_request(stream, head, end)
        self.requests.append((head, stream.passing))


def raw(stream: int, encoded: bytes) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, encoded)


def watch() -> tuple[Watch, Peer, bytes]:
    """A server, its client, and REQUEST as a block that changes no table any more."""
    conn = Watch()
    peer = Peer(conn)
    encoder = Encoder()
    peer.send(raw(1, encoder.encode(REQUEST)))
    return conn, peer, encoder.encode(REQUEST)


# -- splitting


def test_literals_of_unknown_names_are_kept_apart() -> None:
    decoder = Decoder(65_536)
    fields, passing = decoder.split(b"\x83" + literal(b"x-a", b"1") + literal(b"te", b"trailers"), KEPT_NAMES)
    assert fields == [(b":method", b"POST"), (b"te", b"trailers")]
    assert passing == [(b"x-a", b"1")]


def test_an_indexed_field_of_the_same_name_keeps_its_place() -> None:
    decoder = Decoder(65_536)
    decoder.decode(literal(b"x-a", b"1", 0x40))
    fields, passing = decoder.split(b"\x83" + literal(b"x-a", b"0") + b"\xbe" + literal(b"x-a", b"2"), KEPT_NAMES)
    assert fields == [(b":method", b"POST")]
    assert passing == [(b"x-a", b"0"), (b"x-a", b"1"), (b"x-a", b"2")]


@pytest.mark.parametrize("late", [b"\x84", literal(b":path", b"/")], ids=["indexed", "literal"])
def test_8_3_a_late_pseudo_field_is_still_seen(late: bytes) -> None:
    peer = server()
    peer.send(raw(1, b"\x83\x87" + literal(b":authority", b"a") + literal(b"x-a", b"1") + late))
    assert [event[0] for event in peer.events()] == ["closed", "stream fault"]


def test_a_never_indexed_field_stays_one() -> None:
    _, passing = Decoder(65_536).split(literal(b"x-secret", b"s", 0x10), KEPT_NAMES)
    assert type(passing[0]) is Sensitive
    assert encode_literals(passing) == literal(b"x-secret", b"s", 0x10)


def test_both_lists_count_for_the_limits() -> None:
    size = 2 * (32 + 3 + 1) - 1
    with pytest.raises(Exception, match=f"the limit is {size}"):
        Decoder(size).split(literal(b"x-a", b"1") + literal(b"x-b", b"1"), KEPT_NAMES)


names = st.sampled_from([b"x-a", b"x-b", b"te", b"content-type", b"grpc-timeout", b":path", b"a" * 200])
fields_of_any_kind = st.lists(st.tuples(names, st.binary(max_size=200)), max_size=12)


@given(st.lists(fields_of_any_kind, max_size=4), st.booleans())
def test_nothing_is_lost_and_order_among_one_name_is_kept(sections: list[list[Field]], huffman: bool) -> None:
    encoder, splitting, whole = hpack.Encoder(), Decoder(65_536), Decoder(65_536)
    for section in sections:
        encoded = encoder.encode(section, huffman=huffman)
        fields, passing = splitting.split(encoded, KEPT_NAMES)
        together = whole.decode(encoded)
        by_name = sorted(together, key=lambda field: field[0])
        assert sorted(fields + passing, key=lambda field: field[0]) == by_name
        assert not {name for name, _ in passing if name[:1] != b":"} & KEPT_NAMES


@given(fields_of_any_kind)
def test_what_is_encoded_is_what_another_decoder_reads(section: list[Field]) -> None:
    read = hpack.Decoder(max_header_list_size=2**20).decode(encode_literals(section), raw=True)
    assert [tuple(field) for field in read] == section


# -- validity


@pytest.mark.parametrize(
    "field",
    [
        (b"X-A", b"1"), (b"", b"1"), (b":path", b"/"), (b"connection", b"close"), (b"te", b"gzip"), (b"x a", b"1"),
        (b"x-a", b" 1"), (b"x-a", b"1\t"), (b"x-a", b"1\r\nx: y"), (b"x-a", b"\0"), (b"x-a", b"\x7f"),
    ],
)  # fmt: skip
def test_8_2_what_may_be_wrong_is_looked_at_again(field: Field) -> None:
    assert not check_passing([(b"x-good", b"1"), field])


@pytest.mark.parametrize("value", [b"", b"a b\tc", b"\x80\xff", b"0" * 3000])
def test_8_2_good_fields_pass(value: bytes) -> None:
    assert check_passing([(b"x-a", value)])


def test_8_2_1_a_bad_value_is_a_stream_error() -> None:
    conn, peer, known = watch()
    peer.stream_error(3, ErrorCode.PROTOCOL_ERROR, raw(3, known + literal(b"x-a", b"1\n")))
    assert len(conn.requests) == 1


# -- connections


def test_unique_values_leave_the_head_the_same() -> None:
    conn, peer, known = watch()
    for number in range(3):
        ids = [(b"x-request-id", b"%d" % number)]
        peer.send(raw(3 + 2 * number, known + encode_literals(ids)))
        head, passing = conn.requests[-1]
        assert head is conn.requests[0][0]
        assert passing is not None
        assert passing.fields == ids


def test_a_block_that_comes_again_is_remembered_as_a_whole() -> None:
    conn, peer, known = watch()
    for number in range(3):
        peer.send(raw(3 + 2 * number, known + encode_literals(IDS)))
    (first, apart), (second, none), (third, _) = conn.requests[1:]
    assert apart is not None
    assert apart.fields == IDS
    assert list(first.fields) == REQUEST
    assert none is None
    assert list(second.fields) == REQUEST + IDS
    assert second is third


def test_passing_fields_stand_behind_the_block() -> None:
    peer = client()
    peer.conn.open_stream(block(REQUEST), False, Passing(IDS))
    assert hpack.Decoder().decode(peer.sent()[0].payload, raw=True) == REQUEST + IDS


def test_trailers_that_wait_keep_them() -> None:
    peer = server((4, 0))
    stream = open_stream(peer)
    peer.conn.send_headers(stream, block([(b":status", b"200")]))
    peer.conn.send_data(stream, b"abc", end=False)
    peer.conn.send_trailers(stream, block([(b"grpc-status", b"0")]), Passing(IDS))
    peer.sent()
    sent = peer.send(window_update(1, 3))
    assert [item.kind for item in sent] == [0, HEADERS, RST_STREAM]
    assert peer.decoder.decode(sent[1].payload, raw=True) == [(b"grpc-status", b"0"), *IDS]
