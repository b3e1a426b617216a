"""RFC 7541: the encoder, read by the decoder of the `hpack` package."""

from __future__ import annotations

import hpack
import pytest

from proxy.http2 import HeaderBlock
from proxy.http2.hpack import Encoder, Sensitive
from tests.http2.wire import (
    HEADER_TABLE_SIZE,
    HEADERS,
    REQUEST,
    RESPONSE,
    TRAILERS,
    Fields,
    Peer,
    block,
    client,
    open_stream,
    server,
    settings,
)

GRPC: Fields = [*REQUEST, (b"user-agent", b"grpc-python/1.70"), (b"grpc-accept-encoding", b"identity, deflate, gzip")]


def encode(encoder: Encoder, fields: Fields) -> bytes:
    return encoder.take_size_update() + encoder.encode(fields)


def read(decoder: hpack.Decoder, data: bytes) -> Fields:
    return [(bytes(name), bytes(value)) for name, value in decoder.decode(data, raw=True)]


def test_6_a_block_is_read_by_another_implementation() -> None:
    encoder, decoder = Encoder(), hpack.Decoder()
    for fields in (GRPC, RESPONSE, TRAILERS, GRPC, [(b"x", b""), (b"", b"y"), (b"z", bytes(range(256)))]):
        assert read(decoder, encode(encoder, fields)) == fields


def test_6_1_fields_of_the_static_table_are_one_byte() -> None:
    fields = [(b":method", b"GET"), (b":path", b"/"), (b":status", b"200"), (b"accept-encoding", b"gzip, deflate")]
    assert encode(Encoder(), fields) == b"\x82\x84\x88\x90"


def test_6_2_1_stable_fields_become_one_byte_the_second_time() -> None:
    encoder = Encoder()
    first = encode(encoder, GRPC)
    generation = encoder.generation
    second = encode(encoder, GRPC)
    assert len(first) > 100
    assert len(second) == len(GRPC)
    assert encoder.generation == generation


def test_6_2_1_an_entry_keeps_its_meaning_while_others_come_before_it() -> None:
    encoder, decoder = Encoder(), hpack.Decoder()
    for number in range(30):
        fields = [(b":path", b"/a"), (b":path", b"/%d" % number), (b"grpc-encoding", b"gzip")]
        assert read(decoder, encode(encoder, fields)) == fields


def test_6_2_1_a_name_in_the_table_is_an_index_for_other_values() -> None:
    encoder, decoder = Encoder(), hpack.Decoder()
    values = [b"gzip", b"identity", b"deflate" * 40, b"gzip", b"snappy"]
    for value in values:
        for fields in ([(b"grpc-encoding", value)], [(b"te", b"x"), (b"grpc-encoding", value), (b"user-agent", value)]):
            assert read(decoder, encode(encoder, fields)) == fields
    assert len(encode(encoder, [(b"grpc-encoding", b"another")])) <= 10


def test_6_2_2_what_changes_from_call_to_call_is_not_put_into_the_table() -> None:
    encoder = Encoder()
    fields = [(b"grpc-timeout", b"100m"), (b"traceparent", b"00-1-2-3"), (b"x-request-id", b"1")]
    generation = encoder.generation
    assert encode(encoder, fields) == encode(encoder, fields)
    assert encoder.generation == generation


def test_6_2_1_long_values_are_not_put_into_the_table() -> None:
    encoder = Encoder()
    generation = encoder.generation
    encode(encoder, [(b":path", b"/" + b"a" * 256)])
    assert encoder.generation == generation
    encode(encoder, [(b":path", b"/" + b"a" * 255)])
    assert encoder.generation != generation


@pytest.mark.parametrize("name", [b"authorization", b"x-secret", b":path", b"grpc-encoding"])
def test_6_2_3_never_indexed_is_passed_on(name: bytes) -> None:
    encoder, decoder = Encoder(), hpack.Decoder()
    for _ in range(3):
        data = encode(encoder, [Sensitive((name, b"secret"))])
        assert data[0] & 0xF0 == 0x10
        field = decoder.decode(data, raw=True)[0]
        assert isinstance(field, hpack.NeverIndexedHeaderTuple)
        assert tuple(field) == (name, b"secret")


def test_6_2_3_a_sensitive_field_is_never_an_index_though_its_plain_twin_is() -> None:
    encoder = Encoder()
    encode(encoder, [(b"te", b"trailers")])
    assert len(encode(encoder, [(b"te", b"trailers")])) == 1
    assert encode(encoder, [Sensitive((b"te", b"trailers"))])[0] & 0xF0 == 0x10
    assert encode(encoder, [Sensitive((b":method", b"GET"))])[0] & 0xF0 == 0x10


def test_4_4_nothing_is_ever_evicted() -> None:
    """No client can push out of the table what the others use."""
    encoder, decoder = Encoder(), hpack.Decoder()
    known = [(b":path", b"/known"), (b"user-agent", b"known")]
    assert read(decoder, encode(encoder, known)) == known
    for number in range(500):
        fields = [(b":path", b"/%d" % number), (b"user-agent", b"agent-%d" % number)]
        assert read(decoder, encode(encoder, fields)) == fields
    generation = encoder.generation
    data = encode(encoder, known)
    assert len(data) <= 4
    assert read(decoder, data) == known
    assert read(decoder, encode(encoder, [(b":path", b"/new")])) == [(b":path", b"/new")]
    assert encoder.generation == generation


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 256, 16_383, 16_384, 100_000])
def test_5_2_strings_of_any_length(length: int) -> None:
    fields = [(b"x" * max(length, 1), b"v" * length)]
    decoder = hpack.Decoder(max_header_list_size=2**20)
    assert read(decoder, encode(Encoder(), fields)) == fields


# -- 4.2: the size of the table


@pytest.mark.parametrize(
    ("size", "update"), [(0, "20"), (10, "202a"), (30, "203e"), (31, "203f00"), (1337, "203f9a0a")]
)
def test_4_2_a_smaller_table_is_signalled_before_the_next_block_once(size: int, update: str) -> None:
    encoder = Encoder()
    assert encoder.take_size_update() == b""
    encoder.limit_table(size)
    assert encoder.take_size_update() == bytes.fromhex(update)
    assert encoder.take_size_update() == b""


@pytest.mark.parametrize("size", [4096, 4097, 2**32 - 1])
def test_4_2_a_larger_table_is_not_used_and_needs_no_signal(size: int) -> None:
    encoder = Encoder()
    encoder.limit_table(size)
    assert encoder.take_size_update() == b""


@pytest.mark.parametrize(
    ("sizes", "update"), [((100, 4096), "203fe11f"), ((4096, 0, 50), "203f13"), ((0, 0), "20"), ((7, 7), "2027")]
)
def test_4_2_of_several_changes_the_smallest_and_the_last_are_signalled(sizes: tuple[int, ...], update: str) -> None:
    encoder = Encoder()
    for size in sizes:
        encoder.limit_table(size)
    assert encoder.take_size_update() == bytes.fromhex(update)


def test_4_2_the_table_is_used_again_after_a_change() -> None:
    encoder, decoder = Encoder(), hpack.Decoder()
    assert read(decoder, encode(encoder, GRPC)) == GRPC
    for size in (200, 4096, 0, 60, 4096):
        decoder.max_allowed_table_size = size
        encoder.limit_table(size)
        for _ in range(3):
            data = encode(encoder, GRPC)
            assert read(decoder, data) == GRPC
            assert decoder.header_table_size <= size
        assert len(data) == len(GRPC) or size < 4096


# -- the same through a connection, which remembers blocks that it has encoded


def shown(peer: Peer) -> tuple[list[Fields], list[int]]:
    """The header lists that the connection has sent, and the sizes of their blocks."""
    lengths = [len(item.payload) for item in peer.sent() if item.kind == HEADERS]
    return [head[1] for head in peer.heads()], lengths


def test_a_block_is_sent_again_and_read_the_same() -> None:
    peer = client()
    head = block(GRPC)
    for _ in range(5):
        peer.conn.open_stream(head, end=True)
    lists, lengths = shown(peer)
    assert lists == [GRPC] * 5
    assert lengths[1:] == [len(GRPC)] * 4


def test_a_block_is_read_the_same_after_others_went_into_the_table() -> None:
    peer = client()
    head = block(GRPC)
    for number in range(10):
        peer.conn.open_stream(head, end=True)
        peer.conn.open_stream(block([(b":path", b"/%d" % number)]), end=True)
    lists, _ = shown(peer)
    assert lists[::2] == [GRPC] * 10
    assert lists[1::2] == [[(b":path", b"/%d" % number)] for number in range(10)]


def test_more_blocks_than_are_remembered_are_read_the_same() -> None:
    peer = server()
    stream = open_stream(peer)
    heads = [block([(b":status", b"103"), (b"x", b"%d" % number)]) for number in range(200)]
    large = block([(b":status", b"103"), (b"x", b"v" * 2000)])
    for head in [*heads, large, *heads, large]:
        peer.conn.send_headers(stream, head)
    lists, _ = shown(peer)
    assert lists == [list(head.fields) for head in [*heads, large] * 2]


def test_4_2_settings_change_the_table_in_both_directions() -> None:
    peer = client()
    head, other = block(GRPC), block([*GRPC, (b"x", b"y")])
    for size in (4096, 0, 100, 65_536, 50, 4096):
        peer.decoder.max_allowed_table_size = size
        peer.send(settings((HEADER_TABLE_SIZE, size)))
        for item in (head, head, other, head):
            peer.conn.open_stream(item, end=True)
        lists, _ = shown(peer)
        assert lists == [GRPC, GRPC, list(other.fields), GRPC]
        assert peer.decoder.header_table_size <= size


def test_4_2_two_changes_in_one_frame() -> None:
    peer = client()
    head = block(GRPC)
    peer.conn.open_stream(head, end=True)
    peer.conn.open_stream(head, end=True)
    peer.sent()
    peer.heads()
    peer.send(settings((HEADER_TABLE_SIZE, 0), (HEADER_TABLE_SIZE, 4096)))
    peer.conn.open_stream(head, end=True)
    peer.conn.open_stream(head, end=True)
    lists, lengths = shown(peer)
    assert lists == [GRPC, GRPC]
    assert lengths[0] > 100
    assert lengths[1] == len(GRPC)


def test_an_empty_block_can_be_sent() -> None:
    peer = client()
    stream = peer.conn.open_stream(block(GRPC), end=False)
    peer.conn.send_trailers(stream, HeaderBlock([]))
    lists, _ = shown(peer)
    assert lists == [GRPC, []]
