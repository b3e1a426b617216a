"""Header compression (RFC 7541): a decoder and an encoder. No I/O; knows nothing of streams or of HTTP's rules.

A field is a (name, value) pair of bytes. A field that came as "never indexed" (section 6.2.3) is a `Sensitive`
pair, and the encoder passes that on, as an intermediary must.

The encoder never evicts: it adds fields with stable names to its dynamic table until that is full and sends
everything else as plain literals. So no client can thrash the table of an upstream connection that it shares with
others, and a block once encoded stays valid until the next insertion, of which there are few.
"""

import re
from collections.abc import Iterable

from proxy.http2 import huffman
from proxy.http2.errors import HeaderBomb, HeaderListTooLarge, HpackFault

Field = tuple[bytes, bytes]


class Sensitive(tuple[bytes, bytes]):
    """A never-indexed field."""

    __slots__ = ()


STATIC_TABLE: tuple[Field, ...] = (
    (b':authority', b''),
    (b':method', b'GET'),
    (b':method', b'POST'),
    (b':path', b'/'),
    (b':path', b'/index.html'),
    (b':scheme', b'http'),
    (b':scheme', b'https'),
    (b':status', b'200'),
    (b':status', b'204'),
    (b':status', b'206'),
    (b':status', b'304'),
    (b':status', b'400'),
    (b':status', b'404'),
    (b':status', b'500'),
    (b'accept-charset', b''),
    (b'accept-encoding', b'gzip, deflate'),
    (b'accept-language', b''),
    (b'accept-ranges', b''),
    (b'accept', b''),
    (b'access-control-allow-origin', b''),
    (b'age', b''),
    (b'allow', b''),
    (b'authorization', b''),
    (b'cache-control', b''),
    (b'content-disposition', b''),
    (b'content-encoding', b''),
    (b'content-language', b''),
    (b'content-length', b''),
    (b'content-location', b''),
    (b'content-range', b''),
    (b'content-type', b''),
    (b'cookie', b''),
    (b'date', b''),
    (b'etag', b''),
    (b'expect', b''),
    (b'expires', b''),
    (b'from', b''),
    (b'host', b''),
    (b'if-match', b''),
    (b'if-modified-since', b''),
    (b'if-none-match', b''),
    (b'if-range', b''),
    (b'if-unmodified-since', b''),
    (b'last-modified', b''),
    (b'link', b''),
    (b'location', b''),
    (b'max-forwards', b''),
    (b'proxy-authenticate', b''),
    (b'proxy-authorization', b''),
    (b'range', b''),
    (b'referer', b''),
    (b'refresh', b''),
    (b'retry-after', b''),
    (b'server', b''),
    (b'set-cookie', b''),
    (b'strict-transport-security', b''),
    (b'transfer-encoding', b''),
    (b'user-agent', b''),
    (b'vary', b''),
    (b'via', b''),
    (b'www-authenticate', b''),
)
_STATIC_COUNT = len(STATIC_TABLE)
_STATIC_FIELDS = {field: index for index, field in reversed(list(enumerate(STATIC_TABLE, 1)))}
_STATIC_NAMES = {field[0]: index for index, field in reversed(list(enumerate(STATIC_TABLE, 1)))}

ENTRY_OVERHEAD = 32  # section 4.1
DEFAULT_TABLE_SIZE = 4096
_MAX_INTEGER = 2**24  # far above any legal index, length or table size here; more is an attack

MAX_FIELDS = 256  # each is looked at one by one, so that thousands of tiny ones cost more than their bytes say
_BOMB_BYTES = 1_048_576  # a list so far over the limit is no mistake

# Most blocks begin with, or are, fields that stand in the tables. At most so many: the bound of a list's size is
# looked at only behind them.
_INDEXED_RUN = re.compile(rb"[\x81-\xfe]{1,16}").match
_RUNS = 32
_FIRST_DYNAMIC = 0x80 + _STATIC_COUNT + 1

# Section 4.2 says that two do, but some send one for each SETTINGS.
_MAX_UPDATES = 16

_MEMO_ENTRIES = 512
_MEMO_VALUE_BYTES = 512
_huffman_memo: dict[bytes, bytes] = {}


def _huffman(data: bytes) -> bytes:
    """Decode a string, remembering short ones: new connections send the same paths and agents again and again."""
    value = _huffman_memo.get(data)
    if value is None:
        value = huffman.decode(data)
        if len(data) <= _MEMO_VALUE_BYTES:
            if len(_huffman_memo) >= _MEMO_ENTRIES:
                _huffman_memo.clear()
            _huffman_memo[data] = value
    return value


def _integer(data: bytes, pos: int, prefix: int) -> tuple[int, int]:
    """An integer with an N-bit prefix mask (section 5.1) -> (value, position behind it)."""
    value = data[pos] & prefix
    pos += 1
    if value < prefix:
        return value, pos
    shift = 0
    while True:
        byte = data[pos]
        pos += 1
        value += (byte & 0x7F) << shift
        if value > _MAX_INTEGER or shift > 28:
            raise HpackFault("an integer in a header block is too large")
        if byte < 0x80:
            return value, pos
        shift += 7


def _string(data: bytes, pos: int) -> tuple[bytes, int]:
    """A string literal (section 5.2) -> (value, position behind it)."""
    coded = data[pos] & 0x80
    length, pos = _integer(data, pos, 0x7F)
    end = pos + length
    if end > len(data):
        raise HpackFault("a header block ends inside a string")
    text = data[pos:end]
    return (_huffman(text) if coded else text), end


class Decoder:
    """Decodes the header blocks of one direction of one connection.

    `table_limit` is the SETTINGS_HEADER_TABLE_SIZE that we announced; `list_limit` the most that a decoded header
    list may take, counted as RFC 9113 section 10.5.1 does (name + value + 32 a field).
    `generation` changes whenever the dynamic table does: a block decoded before means the same only while it stands.
    """

    __slots__ = ("_runs", "_size", "_table", "_table_max", "generation", "list_limit", "table_limit")

    def __init__(self, list_limit: int, table_limit: int = DEFAULT_TABLE_SIZE) -> None:
        self._table: list[Field] = []  # newest last
        self._runs: dict[bytes, tuple[tuple[Field, ...], int]] = {}
        self._size = 0
        self._table_max = table_limit
        self.table_limit = table_limit
        self.list_limit = list_limit
        self.generation = 0

    def decode(self, block: bytes) -> list[Field]:
        """All fields of a block, in order.

        HpackFault for what can't be decoded; HeaderBomb for far too much; HeaderListTooLarge when the list is over the
        limit, after the whole block was decoded, so that the connection can go on.
        """
        try:
            return self._decode(block, None, frozenset())
        except IndexError:
            raise HpackFault("a header block ends inside a field") from None

    def split(self, block: bytes, kept: frozenset[bytes]) -> tuple[list[Field], list[Field]]:
        """The fields of a block in two lists, with the errors of `decode`.

        The second list has the literals whose name is neither in `kept` nor that of a pseudo-header field: those that
        change from call to call (ids, tokens, timeouts) and that a proxy passes on without knowing what they are. The
        first has the rest, which is much the same for all calls. Order is kept within each list and, across the two,
        among fields of one name; among others it means nothing (RFC 9110 section 5.3).
        """
        passing: list[Field] = []
        try:
            return self._decode(block, passing, kept), passing
        except IndexError:
            raise HpackFault("a header block ends inside a field") from None

    def _decode(self, block: bytes, passing: list[Field] | None, kept: frozenset[bytes]) -> list[Field]:
        limit = self.list_limit
        run = _INDEXED_RUN(block)
        if run is None:
            fields: list[Field] = []
            pos = total = 0
        else:
            known = self._runs.get(run.group()) or self._indexed_run(run.group())
            fields, pos, total = list(known[0]), run.end(), known[1]
        keep = append = fields.append
        behind_names = passing if passing is not None else fields
        names: set[bytes] = set()  # of passing fields
        updates = 0
        table = self._table
        end = len(block)
        while pos < end:
            byte = block[pos]
            if byte >= 0x80:  # indexed field, section 6.1
                if byte != 0xFF:
                    index = byte & 0x7F
                    pos += 1
                else:
                    index, pos = _integer(block, pos, 0x7F)
                behind = index - _STATIC_COUNT
                # Below, by their position from the end: the newest entry has the lowest index (section 2.3.3).
                field = table[-behind] if 0 < behind <= len(table) else self._lookup(index)
                if names and (field[0] in names or field[0][:1] == b":"):
                    # One of the same name, whose order counts, or a pseudo-header field, whose place is then an error
                    # that must not be hidden.
                    append = behind_names.append
            elif byte & 0xE0 != 0x20:
                # A literal: with incremental indexing (section 6.2.1), without (6.2.2), or never indexed (6.2.3).
                index = byte & (0x3F if byte >= 0x40 else 0x0F)
                if index == 0:
                    name, pos = _string(block, pos + 1)
                else:
                    index, pos = _integer(block, pos, 0x3F if byte >= 0x40 else 0x0F)
                    name = self._lookup(index)[0]
                length = block[pos]
                if length < 0x7F:  # a plain string of usual length
                    pos += 1 + length
                    if pos > end:
                        raise HpackFault("a header block ends inside a string")
                    value = block[pos - length : pos]
                else:
                    value, pos = _string(block, pos)
                field = (name, value)
                if byte >= 0x40:
                    self._insert(field)
                elif byte >= 0x10:
                    field = Sensitive(field)
                if passing is not None and (names if name[:1] == b":" else name not in kept):
                    append = passing.append
                    names.add(name)
            else:  # dynamic table size update, section 6.3
                if fields or total:
                    raise HpackFault("a table size update behind a field (RFC 7541 section 4.2)")
                updates += 1
                if updates > _MAX_UPDATES:
                    raise HpackFault(f"more than {_MAX_UPDATES} table size updates (RFC 7541 section 4.2)")
                size, pos = _integer(block, pos, 0x1F)
                self._resize(size)
                continue
            total += len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
            if total <= limit:
                append(field)
            elif total > limit + _BOMB_BYTES:
                raise HeaderBomb(f"a header block that decodes to {_BOMB_BYTES} bytes more than the limit of {limit}")
            append = keep
        self._check_size(total, len(fields) + len(passing or ()))
        return fields

    def _indexed_run(self, run: bytes) -> tuple[tuple[Field, ...], int]:
        """The fields of a run of indexed fields, and their size; remembered while the dynamic table stands."""
        table, size, fields = self._table, 0, []
        if max(run) >= _FIRST_DYNAMIC + len(table):
            raise HpackFault(f"header index {max(run) - 0x80} is in no table")
        for byte in run:
            field = STATIC_TABLE[byte - 0x81] if byte < _FIRST_DYNAMIC else table[_FIRST_DYNAMIC - 1 - byte]
            fields.append(field)
            size += len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
        known = tuple(fields), size
        if len(self._runs) >= _RUNS:
            self._runs.clear()
        self._runs[run] = known
        return known

    def _check_size(self, total: int, count: int) -> None:
        if total > self.list_limit:
            raise HeaderListTooLarge(f"{total} bytes of header fields, the limit is {self.list_limit}")
        if count > MAX_FIELDS:
            raise HeaderListTooLarge(f"{count} header fields, the limit is {MAX_FIELDS}")

    def _lookup(self, index: int) -> Field:
        if 0 < index <= _STATIC_COUNT:
            return STATIC_TABLE[index - 1]
        behind = index - _STATIC_COUNT
        if index == 0 or behind > len(self._table):
            raise HpackFault(f"header index {index} is in no table")
        return self._table[-behind]

    def _insert(self, field: Field) -> None:
        self.generation += 1
        self._runs.clear()
        size = len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
        if size > self._table_max:  # section 4.4: it empties the table and is not an error
            self._table.clear()
            self._size = 0
            return
        self._table.append(field)
        self._size += size
        self._evict()

    def _resize(self, size: int) -> None:
        if size > self.table_limit:
            raise HpackFault(f"a table size of {size}, the limit announced is {self.table_limit}")
        if size != self._table_max:
            self.generation += 1
            self._runs.clear()
            self._table_max = size
            self._evict()

    def _evict(self) -> None:
        gone = 0
        while self._size > self._table_max:
            name, value = self._table[gone]
            self._size -= len(name) + len(value) + ENTRY_OVERHEAD
            gone += 1
        del self._table[:gone]


def _encode_integer(value: int, prefix: int, first: int) -> bytes:
    """An integer with an N-bit prefix mask under the pattern `first` (section 5.1)."""
    if value < prefix:
        return bytes((first | value,))
    out = bytearray((first | prefix,))
    value -= prefix
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_ONE_BYTE = [bytes((value,)) for value in range(128)]


def _encode_string(text: bytes) -> bytes:
    """A plain string literal. Huffman coding would cost more time here than the bytes cost on a socket."""
    length = len(text)
    return (bytes((length,)) if length < 0x7F else _encode_integer(length, 0x7F, 0)) + text


_literal_names: dict[bytes, bytes] = {}


def encode_literals(fields: Iterable[Field]) -> bytes:
    """Fields as literals with literal names: what can stand behind any block, on any connection."""
    parts: list[bytes] = []
    for field in fields:
        name, value = field
        start = _literal_names.get(name)
        if start is None:
            start = _encode_string(name)
            if len(_literal_names) >= _MEMO_ENTRIES:
                _literal_names.clear()
            if len(name) <= _MEMO_VALUE_BYTES:
                _literal_names[name] = start
        length = len(value)
        parts.append(b"\x10" if type(field) is Sensitive else b"\x00")
        parts.append(start)
        parts.append(_ONE_BYTE[length] if length < 0x7F else _encode_integer(length, 0x7F, 0))
        parts.append(value)
    return b"".join(parts)


# Fields whose values repeat from call to call. All others (ids, timeouts, tokens, dates) are never put in the table.
STABLE_NAMES = frozenset(
    (
        b":method", b":scheme", b":path", b":authority", b":status", b"content-type", b"te", b"user-agent",
        b"grpc-accept-encoding", b"grpc-encoding", b"grpc-status", b"accept-encoding", b"server",
    )
)  # fmt: skip
_MAX_STABLE_VALUE = 256


class Encoder:
    """Encodes the header blocks of one direction of one connection.

    `generation` changes with each insertion and size change: an encoded block may be sent again while it stands.
    """

    __slots__ = ("_fields", "_inserted", "_names", "_pending_size", "_size", "_table_max", "generation")

    def __init__(self) -> None:
        self._fields: dict[Field, int] = {}  # -> how many insertions there were before
        self._names: dict[bytes, int] = {}
        self._inserted = 0
        self._size = 0
        self._table_max = DEFAULT_TABLE_SIZE
        self._pending_size: int | None = None
        self.generation = 0

    def limit_table(self, size: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE. A smaller table empties ours; a larger one than 4096 isn't used.

        The change is signalled at the start of the next block (section 4.2): `take_size_update`.
        """
        size = min(size, DEFAULT_TABLE_SIZE)
        if size == self._table_max and self._pending_size is None:
            return
        self._fields.clear()
        self._names.clear()
        self._inserted = self._size = 0
        self._table_max = size
        self._pending_size = size
        self.generation += 1

    def take_size_update(self) -> bytes:
        """What has to stand before the next block: nothing, or the table size update.

        The table is emptied with a size of zero first, since entries may be in it that we no longer count.
        """
        size = self._pending_size
        if size is None:
            return b""
        self._pending_size = None
        return b"\x20" + (_encode_integer(size, 0x1F, 0x20) if size else b"")

    def encode(self, fields: Iterable[Field]) -> bytes:
        """A header block. Call `take_size_update` first and put its bytes before it."""
        return b"".join([self._encode_field(field) for field in fields])

    def _encode_field(self, field: Field) -> bytes:
        if type(field) is Sensitive:
            return self._encode_literal(field, 0x0F, 0x10)
        index = _STATIC_FIELDS.get(field)
        if index is not None:
            return bytes((0x80 | index,))
        position = self._fields.get(field)
        if position is not None:
            return _encode_integer(_STATIC_COUNT + self._inserted - position, 0x7F, 0x80)
        size = len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
        if field[0] in STABLE_NAMES and len(field[1]) <= _MAX_STABLE_VALUE and self._size + size <= self._table_max:
            literal = self._encode_literal(field, 0x3F, 0x40)
            self._fields[field] = self._inserted
            self._names.setdefault(field[0], self._inserted)
            self._inserted += 1
            self._size += size
            self.generation += 1
            return literal
        return self._encode_literal(field, 0x0F, 0x00)

    def _encode_literal(self, field: Field, prefix: int, pattern: int) -> bytes:
        name, value = field
        index = _STATIC_NAMES.get(name, 0)
        if not index and (position := self._names.get(name)) is not None:
            index = _STATIC_COUNT + self._inserted - position
        if index:
            return _encode_integer(index, prefix, pattern) + _encode_string(value)
        return bytes((pattern,)) + _encode_string(name) + _encode_string(value)
