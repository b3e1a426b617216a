"""HPACK against the `hpack` package: what one side encodes the other decodes, whatever becomes of the tables."""

from __future__ import annotations

import hpack
import hpack.huffman_table
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given
from hypothesis import strategies as st

from proxy.http2 import HpackFault, huffman
from proxy.http2.errors import HeaderListTooLarge
from proxy.http2.hpack import STATIC_TABLE, Decoder, Encoder, Sensitive
from tests.properties.quick import quick

CODER = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)

names = st.sampled_from([name for name, _ in STATIC_TABLE] + [b"user-agent", b"te", b"grpc-encoding", b"x-a", b"x-b"])
values = st.sampled_from([b"", b"1", b"200", b"gzip", b"trailers", b"/", b"v" * 300]) | st.binary(max_size=40)
fields = st.tuples(names | st.binary(max_size=10), values) | st.sampled_from(STATIC_TABLE)
blocks = st.lists(st.tuples(fields, st.booleans()), max_size=12)
table_sizes = st.sampled_from([0, 1, 31, 40, 100, 300, 4095, 4096, 4097, 65_536])


@quick
@given(st.lists(blocks | table_sizes, max_size=20))
def test_what_we_encode_hpack_decodes(steps: list[object]) -> None:
    encoder, decoder = Encoder(), hpack.Decoder(max_header_list_size=2**20)
    for step in steps:
        if isinstance(step, int):  # SETTINGS_HEADER_TABLE_SIZE of the peer
            decoder.max_allowed_table_size = step
            encoder.limit_table(step)
            continue
        wanted = [Sensitive(field) if sensitive else field for field, sensitive in step]  # type: ignore[attr-defined]
        data = encoder.take_size_update() + encoder.encode(wanted)
        read = decoder.decode(data, raw=True)
        assert [tuple(field) for field in read] == [tuple(field) for field in wanted]
        assert [not field.indexable for field in read] == [type(field) is Sensitive for field in wanted]


@quick
@given(st.lists(st.tuples(blocks, st.booleans()) | table_sizes, max_size=20))
def test_what_hpack_encodes_we_decode(steps: list[object]) -> None:
    encoder, decoder, theirs = hpack.Encoder(), Decoder(2**20), hpack.Decoder(max_header_list_size=2**20)
    for step in steps:
        if isinstance(step, int):  # an encoder may use less than it is allowed
            if encoder.header_table_size != min(step, 4096):  # `hpack` forgets a change that is made twice
                encoder.header_table_size = min(step, 4096)
            continue
        listed, coded = step  # type: ignore[misc]
        wanted = [(*field, sensitive) for field, sensitive in listed]
        data = encoder.encode(wanted, huffman=coded)
        read = decoder.decode(data)
        assert [tuple(field) for field in read] == [field for field, _ in listed]
        # `hpack` sends a sensitive field that a table has as its index, and that says nothing of sensitivity.
        marked = [not field.indexable for field in theirs.decode(data, raw=True)]
        assert [type(field) is Sensitive for field in read] == marked


@quick
@given(st.lists(st.tuples(blocks, st.booleans()), max_size=20), st.integers(0, 400))
def test_lists_over_the_limit_leave_the_table_as_it_should_be(
    steps: list[tuple[list[tuple[tuple[bytes, bytes], bool]], bool]], limit: int
) -> None:
    encoder, decoder = hpack.Encoder(), Decoder(limit)
    for listed, coded in steps:
        wanted = [field for field, _ in listed]
        data = encoder.encode(wanted, huffman=coded)
        if sum(len(name) + len(value) + 32 for name, value in wanted) <= limit:
            assert [tuple(field) for field in decoder.decode(data)] == wanted
        else:
            with pytest.raises(HeaderListTooLarge):
                decoder.decode(data)


@quick
@given(st.lists(st.binary(max_size=30), max_size=5))
def test_any_bytes_are_decoded_as_hpack_does_or_refused(pieces: list[bytes]) -> None:
    """Where both decode, they agree; `hpack` takes some things that RFC 7541 forbids."""
    ours, theirs = Decoder(2**20), hpack.Decoder(max_header_list_size=2**20)
    for piece in pieces:
        try:
            read = ours.decode(piece)
        except HpackFault:
            return
        assert [tuple(field) for field in read] == [tuple(field) for field in theirs.decode(piece, raw=True)]


@quick
@given(st.binary(max_size=200))
def test_huffman_strings_of_hpack_are_decoded(text: bytes) -> None:
    assert huffman.decode(CODER.encode(text)) == text


@quick
@given(st.binary(max_size=30))
def test_any_huffman_string_is_decoded_as_hpack_does(coded: bytes) -> None:
    try:
        text = huffman.decode(coded)
    except HpackFault:
        return
    assert text == hpack.huffman_table.decode_huffman(coded)
    assert CODER.encode(text) == coded
