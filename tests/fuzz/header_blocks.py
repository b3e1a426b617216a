"""Fuzz target: HPACK, given any bytes for header blocks.

Invariant: nothing but HpackFault, HeaderListTooLarge and HeaderBomb leaves the decoder; what it returns is within its
limit, and is what the `hpack` package makes of the same block with the same history; encoded again by our encoder,
whose table the peer resizes now and then, it is decoded by `hpack` to the same fields, never-indexed ones marked as
such. A block that is split has the same fields too, those of one name in their order; and those that only pass through,
encoded to stand behind any other block, are what they were and leave no trace in the table.

An input is one byte that chooses the limit of header lists, then steps: a byte up to 0xef is the length of a block
that follows, one from 0xf0 on is a SETTINGS_HEADER_TABLE_SIZE for our encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import hpack

from proxy.http2 import HpackFault
from proxy.http2.errors import HeaderBomb, HeaderListTooLarge
from proxy.http2.headers import KEPT_NAMES
from proxy.http2.hpack import Decoder, Encoder, Field, Sensitive, encode_literals

_LIMITS = (0, 40, 300, 65_536)
_TABLES = (0, 1, 31, 32, 33, 50, 64, 100, 128, 300, 1000, 4095, 4096, 4097, 65_536, 2**32 - 1)
_ALL = 2**24
Result = TypeVar("Result")


class _Checker:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ours, self.theirs = Decoder(limit), hpack.Decoder(max_header_list_size=_ALL)
        self.splitter = Decoder(limit)
        self.encoder, self.peer = Encoder(), hpack.Decoder(max_header_list_size=_ALL)

    def block(self, data: bytes) -> bool:
        """One block -> whether the connection that it came on would still stand."""
        fields, fault = _outcome(self.ours.decode, data)
        parts, same_fault = _outcome(lambda text: self.splitter.split(text, KEPT_NAMES), data)
        assert fault is same_fault, "to split a block is to decode it"
        if fault is HpackFault:
            return False
        wanted = self.theirs.decode(data, raw=True)
        size = sum(len(name) + len(value) + 32 for name, value in wanted)
        if fault is HeaderBomb:
            assert size > self.limit
            return False
        assert (fields is None) == (size > self.limit), "the limit is not the limit"
        if fields is not None and parts is not None:
            same(fields, wanted)
            same(fields, self.peer.decode(self.encoder.take_size_update() + self.encoder.encode(fields), raw=True))
            check_parts(fields, *parts)
        return True

    def resize(self, size: int) -> None:
        self.peer.max_allowed_table_size = size
        self.encoder.limit_table(size)


def _outcome(decode: Callable[[bytes], Result], data: bytes) -> tuple[Result | None, type[Exception] | None]:
    """What comes of it, and the fault if there is one."""
    try:
        return decode(data), None
    except (HeaderListTooLarge, HpackFault, HeaderBomb) as fault:
        return None, type(fault)


def check_parts(fields: list[Field], kept: list[Field], passing: list[Field]) -> None:
    assert _by_name(kept + passing) == _by_name(fields)
    # A pseudo-header field stays behind what it came behind, where it is an error.
    assert not any(name in KEPT_NAMES for name, _ in passing if name[:1] != b":")
    assert not passing or passing[0][0][:1] != b":"
    reader = hpack.Decoder(max_header_list_size=_ALL)
    same(passing, reader.decode(encode_literals(passing), raw=True))
    assert not reader.header_table.dynamic_entries


def _by_name(fields: list[Field]) -> list[tuple[bytes, bytes, bool]]:
    """In order of their names, those of one name in the order in which they are; and whether they are sensitive."""
    marked = [(*field, type(field) is Sensitive) for field in fields]
    return sorted(marked, key=lambda field: field[0])


def same(fields: list[Field], others: list[hpack.HeaderTuple]) -> None:
    assert [tuple(field) for field in others] == [tuple(field) for field in fields]
    assert [not field.indexable for field in others] == [type(field) is Sensitive for field in fields]


def target(data: bytes) -> None:
    if not data:
        return
    checker = _Checker(_LIMITS[data[0] % len(_LIMITS)])
    pos = 1
    while pos < len(data):
        step = data[pos]
        pos += 1
        if step >= 0xF0:
            checker.resize(_TABLES[step & 0x0F])
            continue
        if not checker.block(data[pos : pos + step]):
            return
        pos += step
