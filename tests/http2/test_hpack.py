"""RFC 7541: the decoder, by the examples of appendix C and against the `hpack` package."""

from __future__ import annotations

import hpack
import hpack.huffman_table
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from proxy.http2 import HpackFault, huffman
from proxy.http2.errors import HeaderBomb, HeaderListTooLarge
from proxy.http2.hpack import MAX_FIELDS, STATIC_TABLE, Decoder, Sensitive
from tests.http2.wire import server

Fields = list[tuple[bytes, bytes]]


def fields(text: str) -> Fields:
    """One field a line, as appendix C writes them."""
    pairs = [line.strip().split(": ", 1) for line in text.strip().splitlines()]
    return [(name.encode(), value.encode()) for name, value in pairs]


def table(decoder: Decoder) -> Fields:
    """The dynamic table, newest first, as the indices behind the static table show it."""
    entries: Fields = []
    try:
        while True:
            entries += decoder.decode(bytes((0x80 | 62 + len(entries),)))
    except HpackFault:
        return entries


# -- appendix C

REQUESTS = [
    fields(":method: GET\n:scheme: http\n:path: /\n:authority: www.example.com"),
    fields(":method: GET\n:scheme: http\n:path: /\n:authority: www.example.com\ncache-control: no-cache"),
    fields(
        ":method: GET\n:scheme: https\n:path: /index.html\n:authority: www.example.com\ncustom-key: custom-value"
    ),
]
REQUEST_TABLES = [
    fields(":authority: www.example.com"),
    fields("cache-control: no-cache\n:authority: www.example.com"),
    fields("custom-key: custom-value\ncache-control: no-cache\n:authority: www.example.com"),
]
C_3 = [
    "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
    "8286 84be 5808 6e6f 2d63 6163 6865",
    "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
]
C_4 = [
    "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
    "8286 84be 5886 a8eb 1064 9cbf",
    "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
]
RESPONSES = [
    fields(
        """
        :status: 302
        cache-control: private
        date: Mon, 21 Oct 2013 20:13:21 GMT
        location: https://www.example.com
        """
    ),
    fields(
        """
        :status: 307
        cache-control: private
        date: Mon, 21 Oct 2013 20:13:21 GMT
        location: https://www.example.com
        """
    ),
    fields(
        """
        :status: 200
        cache-control: private
        date: Mon, 21 Oct 2013 20:13:22 GMT
        location: https://www.example.com
        content-encoding: gzip
        set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1
        """
    ),
]
RESPONSE_TABLES = [
    list(reversed(RESPONSES[0])),
    [RESPONSES[1][0], RESPONSES[0][3], RESPONSES[0][2], RESPONSES[0][1]],
    [RESPONSES[2][5], RESPONSES[2][4], RESPONSES[2][2]],
]
C_5 = [
    "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3120 474d"
    "546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
    "4803 3330 37c1 c0bf",
    "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970 7738 666f"
    "6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61 6765 3d33 3630 303b"
    "2076 6572 7369 6f6e 3d31",
]
C_6 = [
    "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 63c7"
    "8f0b 97c8 e9ae 82ae 43d3",
    "4883 640e ffc1 c0bf",
    "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7 b335"
    "dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
]


@pytest.mark.parametrize(
    ("block", "field", "indexed"),
    [
        ("400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572", "custom-key: custom-header", True),
        ("040c 2f73 616d 706c 652f 7061 7468", ":path: /sample/path", False),
        ("1008 7061 7373 776f 7264 0673 6563 7265 74", "password: secret", False),
        ("82", ":method: GET", False),
    ],
    ids=["C.2.1", "C.2.2", "C.2.3", "C.2.4"],
)
def test_c_2_header_field_representations(block: str, field: str, indexed: bool) -> None:
    decoder = Decoder(65_536)
    assert decoder.decode(bytes.fromhex(block)) == fields(field)
    assert table(decoder) == (fields(field) if indexed else [])


@pytest.mark.parametrize("blocks", [C_3, C_4], ids=["C.3", "C.4 Huffman"])
def test_c_requests(blocks: list[str]) -> None:
    decoder = Decoder(65_536)
    for block, expected, entries in zip(blocks, REQUESTS, REQUEST_TABLES, strict=True):
        assert decoder.decode(bytes.fromhex(block)) == expected
        assert table(decoder) == entries


@pytest.mark.parametrize("blocks", [C_5, C_6], ids=["C.5", "C.6 Huffman"])
def test_c_responses_with_a_table_of_256_bytes_which_evicts(blocks: list[str]) -> None:
    decoder = Decoder(65_536, table_limit=256)
    for block, expected, entries in zip(blocks, RESPONSES, RESPONSE_TABLES, strict=True):
        assert decoder.decode(bytes.fromhex(block)) == expected
        assert table(decoder) == entries


# -- 5.1: integers. A table size update is the shortest way to write one, by a prefix of five bits.


@pytest.mark.parametrize(
    ("block", "size"),
    [("20", 0), ("2a", 10), ("3e", 30), ("3f00", 31), ("3f9a0a", 1337), ("3fe11f", 4096), ("3fe1 9f80 8000", 4096)],
)
def test_5_1_integers(block: str, size: int) -> None:
    """A field of `size` fits into a table of `size`, and one byte more doesn't."""
    for extra, fits in ((0, True), (1, False)):
        decoder = Decoder(65_536)
        assert decoder.decode(bytes.fromhex(block)) == []
        if size >= 33:
            length = size - 33 + extra
            value = b"\x7f" + _tail(length - 127) if length >= 127 else bytes((length,))
            decoder.decode(b"\x40\x01x" + value + bytes(length))
            assert len(table(decoder)) == fits


def _tail(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def test_6_10_trailers_are_forgotten_when_the_table_changes() -> None:
    """The same bytes then mean another field."""
    peer = server()
    for stream, name in ((1, b"x-first"), (3, b"x-second"), (5, b"x-third")):
        fields = [(name, b"value")]
        peer.send(peer.request(stream, *fields))
        trailers = peer.headers(stream, fields, end=True)
        assert trailers[9:] == b"\xbe"
        peer.events()
        peer.send(trailers)
        assert peer.events("trailers") == [("trailers", stream, fields)]
        peer.conn.streams.clear()


def test_10_5_1_a_list_of_too_many_fields_is_over_the_limit() -> None:
    decoder = Decoder(2**20)
    assert len(decoder.decode(b"\x82" * MAX_FIELDS)) == MAX_FIELDS
    with pytest.raises(HeaderListTooLarge, match="fields"):
        decoder.decode(b"\x82" * (MAX_FIELDS + 1))
    assert decoder.decode(b"\x82") == [(b":method", b"GET")]


@pytest.mark.parametrize(
    "block",
    ["ff", "ff80", "ffffff", "3f", "3fe1", "41", "4103", "410361", "40", "4001", "400178", "00017f", "7f", "0f80"],
)
def test_a_block_that_ends_too_early_is_an_error(block: str) -> None:
    with pytest.raises(HpackFault, match="ends inside"):
        Decoder(65_536).decode(bytes.fromhex(block))


@pytest.mark.parametrize("block", ["ff" + "ff" * 10, "ff" + "80" * 4 + "01", "ff" + "80" * 5 + "00", "3fffffffff0f"])
def test_5_1_an_integer_that_is_too_large_or_too_long_is_an_error(block: str) -> None:
    with pytest.raises(HpackFault, match="too large"):
        Decoder(65_536).decode(bytes.fromhex(block))


@pytest.mark.parametrize("block", ["80", "be", "c0", "ff01", "fe", "7f0001 61", "ffff7f"])
def test_2_3_3_an_index_in_no_table_is_an_error(block: str) -> None:
    with pytest.raises(HpackFault, match="in no table"):
        Decoder(65_536).decode(bytes.fromhex(block))


@pytest.mark.parametrize("index", range(1, 62))
def test_a_the_static_table(index: int) -> None:
    field = hpack.Decoder().decode(bytes((0x80 | index,)), raw=True)[0]
    assert Decoder(65_536).decode(bytes((0x80 | index,))) == [tuple(field)]
    assert STATIC_TABLE[index - 1] == tuple(field)


# -- 4: the dynamic table


def literal(name: bytes, value: bytes) -> bytes:
    return b"\x40" + bytes((len(name),)) + name + bytes((len(value),)) + value


def test_4_2_a_table_size_update_evicts() -> None:
    decoder = Decoder(65_536)
    decoder.decode(literal(b"a", b"1") + literal(b"b", b"2") + literal(b"c", b"3"))
    decoder.decode(b"\x3f" + _tail(68 - 31))  # two fields of 34 bytes
    assert table(decoder) == [(b"c", b"3"), (b"b", b"2")]
    decoder.decode(b"\x20")
    assert table(decoder) == []
    decoder.decode(b"\x3f" + _tail(4096 - 31) + literal(b"d", b"4"))
    assert table(decoder) == [(b"d", b"4")]


def test_4_2_several_size_updates_may_stand_at_the_beginning() -> None:
    decoder = Decoder(65_536)
    decoder.decode(literal(b"a", b"1"))
    assert decoder.decode(b"\x20\x3f" + _tail(4096 - 31) + literal(b"b", b"2")) == [(b"b", b"2")]
    assert table(decoder) == [(b"b", b"2")]


def test_4_2_a_size_update_over_the_announced_limit_is_an_error() -> None:
    with pytest.raises(HpackFault, match="4097"):
        Decoder(65_536).decode(b"\x3f" + _tail(4097 - 31))


def test_4_2_a_size_update_behind_a_field_is_an_error() -> None:
    with pytest.raises(HpackFault, match="behind a field"):
        Decoder(65_536).decode(b"\x82\x20")


def test_4_2_a_size_update_behind_a_field_over_the_limit_is_an_error() -> None:
    with pytest.raises(HpackFault, match="behind a field"):
        Decoder(10).decode(literal(b"a", b"1") + b"\x20")


def test_4_4_a_field_larger_than_the_table_empties_it() -> None:
    decoder = Decoder(65_536, table_limit=100)
    decoder.decode(literal(b"a", b"1"))
    assert decoder.decode(literal(b"long", b"v" * 65)) == [(b"long", b"v" * 65)]
    assert table(decoder) == []
    decoder.decode(literal(b"full", b"v" * 64))
    assert table(decoder) == [(b"full", b"v" * 64)]


def test_4_4_a_field_may_take_the_whole_table() -> None:
    decoder = Decoder(65_536, table_limit=100)
    decoder.decode(literal(b"a", b"1"))
    decoder.decode(literal(b"long", b"v" * 64))
    assert table(decoder) == [(b"long", b"v" * 64)]


def test_4_4_a_name_may_refer_to_the_entry_that_its_field_evicts() -> None:
    decoder = Decoder(65_536, table_limit=100)
    decoder.decode(literal(b"long-name", b"1"))
    assert decoder.decode(b"\x7e\x3c" + b"v" * 60) == [(b"long-name", b"v" * 60)]
    assert table(decoder) == []


def test_the_generation_tells_when_the_table_has_changed() -> None:
    decoder = Decoder(65_536)
    seen = [decoder.generation]
    for block, changes in (
        (b"\x82", False),
        (literal(b"a", b"1"), True),
        (b"\xbe\x00\x01x\x01y", False),
        (b"\x3f" + _tail(4096 - 31), False),
        (b"\x20", True),
        (b"\x20", False),
        (literal(b"a", b"1"), True),
    ):
        decoder.decode(block)
        assert (decoder.generation != seen[-1]) is changes
        seen.append(decoder.generation)


# -- 6.2.3


@pytest.mark.parametrize(
    ("pattern", "sensitive"), [(0x10, True), (0x00, False), (0x40, False)], ids=["never", "without", "incremental"]
)
def test_6_2_3_never_indexed_fields_are_marked(pattern: int, sensitive: bool) -> None:
    decoder = Decoder(65_536)
    for block in (bytes((pattern,)) + b"\x01x\x01y", bytes((pattern | 4,)) + b"\x02/a"):
        field = decoder.decode(block)[0]
        assert (type(field) is Sensitive) is sensitive
        assert field in ((b"x", b"y"), (b":path", b"/a"))


# -- the limit of the list


@pytest.mark.parametrize(("size", "fits"), [(100, True), (101, False)])
def test_10_5_1_a_list_is_counted_with_32_bytes_a_field(size: int, fits: bool) -> None:
    decoder = Decoder(100 + 42)  # :method: GET is 10 bytes and 32
    block = b"\x82" + literal(b"x", b"v" * (size - 33))
    if fits:
        assert len(decoder.decode(block)) == 2
    else:
        with pytest.raises(HeaderListTooLarge, match="143 bytes of header fields, the limit is 142"):
            decoder.decode(block)


def test_10_5_1_a_block_over_the_limit_is_decoded_to_its_end() -> None:
    decoder = Decoder(50)
    with pytest.raises(HeaderListTooLarge):
        decoder.decode(literal(b"a", b"1") + literal(b"long", b"v" * 100) + literal(b"b", b"2"))
    decoder.list_limit = 1000
    assert table(decoder) == [(b"b", b"2"), (b"long", b"v" * 100), (b"a", b"1")]


def test_10_5_1_a_few_bytes_that_stand_for_a_large_list_cost_no_memory() -> None:
    """The bomb: one large field in the table, and thousands of references to it."""
    decoder = Decoder(65_536)
    decoder.decode(b"\x40\x01x\x7f" + _tail(4000 - 127) + bytes(4000))
    with pytest.raises(HeaderListTooLarge, match="806600"):
        decoder.decode(b"\xbe" * 200)
    with pytest.raises(HeaderBomb):
        decoder.decode(b"\xbe" * 16_000)


# -- 5.2: strings


CODER = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)


@pytest.mark.parametrize("symbol", range(256))
def test_5_2_every_symbol_of_the_huffman_code(symbol: int) -> None:
    for text in (bytes((symbol,)), bytes((symbol,)) * 3, b"a" + bytes((symbol,)) + b"z"):
        coded = CODER.encode(text)
        assert huffman.decode(coded) == text == hpack.huffman_table.decode_huffman(coded)


def test_5_2_the_empty_string() -> None:
    assert huffman.decode(b"") == b""
    assert Decoder(100).decode(b"\x00\x01x\x80") == [(b"x", b"")]


@pytest.mark.parametrize("bits", range(1, 8))
def test_5_2_padding_is_the_beginning_of_eos(bits: int) -> None:
    """A symbol of eight bits less the padding's, then ones; no other padding is allowed."""
    length, text = next(
        (size, bytes((symbol,)))
        for symbol, size in enumerate(REQUEST_CODES_LENGTH[:256])
        if -size % 8 == bits
    )
    coded = CODER.encode(text)
    assert len(coded) * 8 - length == bits
    assert huffman.decode(coded) == text
    for wrong in range(2**bits - 1):
        spoilt = coded[:-1] + bytes((coded[-1] & ~(2**bits - 1) | wrong,))
        try:
            decoded = huffman.decode(spoilt)
        except HpackFault:
            continue
        assert CODER.encode(decoded) == spoilt, "other padding was taken"


@pytest.mark.parametrize("text", [b"", b"a", b"www.example.com", b"\x00\xff"])
def test_5_2_a_whole_byte_of_padding_is_an_error(text: bytes) -> None:
    with pytest.raises(HpackFault, match="padding"):
        huffman.decode(CODER.encode(text) + b"\xff")


@pytest.mark.parametrize("coded", [b"\xff\xff\xff\xff", b"\x1f\xff\xff\xff\xff\xff", b"\xff\xff\xff\xfc"])
def test_5_2_eos_in_a_string_is_an_error(coded: bytes) -> None:
    for _ in range(2):  # also when the same steps were taken before
        with pytest.raises(HpackFault, match="EOS"):
            huffman.decode(coded)


@pytest.mark.parametrize("block", [b"\x00\x01x\x81\x00", b"\x00\x84\xff\xff\xff\xff\x00", b"\x00\x01x\x85\x00"])
def test_5_2_a_bad_huffman_string_is_an_error_of_the_block(block: bytes) -> None:
    with pytest.raises(HpackFault):
        Decoder(65_536).decode(block)


def test_5_2_strings_are_decoded_the_same_however_many_were_remembered() -> None:
    for number in [*range(700), *range(700)]:
        text = b"value-%d" % number
        coded = CODER.encode(text)
        assert Decoder(65_536).decode(b"\x00\x01x" + bytes((0x80 | len(coded),)) + coded) == [(b"x", text)]


def test_5_2_a_long_string_is_decoded() -> None:
    text = b"long" * 500
    coded = CODER.encode(text)
    block = b"\x00\x01x\xff" + _tail(len(coded) - 127) + coded
    assert Decoder(65_536).decode(block) == [(b"x", text)]


# -- 10.5.1 what a block costs is bounded by its bytes


def test_names_behind_passing_literals_are_not_compared_one_by_one() -> None:
    """37 KB of literals and indexed fields took seconds when each indexed field was compared with each literal."""

    class Counting(frozenset[bytes]):
        looked = 0

        def __contains__(self, item: object) -> bool:
            Counting.looked += 1
            return super().__contains__(item)

    block = b"\x00\x01a\x00" * 1980 + b"\x82" * 20_000
    with pytest.raises(HeaderListTooLarge):
        Decoder(65_536).split(block, Counting((b"te",)))
    assert Counting.looked <= 1980


@pytest.mark.parametrize("prefix", [b"\x20", b"\x3f\xe1\x1f"])
def test_4_2_few_size_updates(prefix: bytes) -> None:
    Decoder(65_536).decode(prefix * 16 + b"\x82")
    with pytest.raises(HpackFault, match="16 table size updates"):
        Decoder(65_536).decode(prefix * 17 + b"\x82")
