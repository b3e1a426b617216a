"""Fuzz target: HPACK, given any bytes for header blocks.

Invariant: nothing but HpackFault and HeaderListTooLarge leaves the decoder; what it returns is within its limit, and
is what the `hpack` package makes of the same block with the same history; encoded again by our encoder, whose table
the peer resizes now and then, it is decoded by `hpack` to the same fields, never-indexed ones marked as such.

An input is one byte that chooses the limit of header lists, then steps: a byte up to 0xef is the length of a block
that follows, one from 0xf0 on is a SETTINGS_HEADER_TABLE_SIZE for our encoder.
"""

from __future__ import annotations

import hpack

from proxy.http2 import HpackFault
from proxy.http2.errors import HeaderListTooLarge
from proxy.http2.hpack import Decoder, Encoder, Field, Sensitive

_LIMITS = (0, 40, 300, 65_536)
_TABLES = (0, 1, 31, 32, 33, 50, 64, 100, 128, 300, 1000, 4095, 4096, 4097, 65_536, 2**32 - 1)
_ALL = 2**24


class _Checker:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ours, self.theirs = Decoder(limit), hpack.Decoder(max_header_list_size=_ALL)
        self.encoder, self.peer = Encoder(), hpack.Decoder(max_header_list_size=_ALL)

    def block(self, data: bytes) -> bool:
        """One block -> whether the connection that it came on would still stand."""
        try:
            fields: list[Field] | None = self.ours.decode(data)
        except HeaderListTooLarge:
            fields = None
        except HpackFault:
            return False
        wanted = self.theirs.decode(data, raw=True)
        size = sum(len(name) + len(value) + 32 for name, value in wanted)
        assert (fields is None) == (size > self.limit), "the limit is not the limit"
        if fields is not None:
            same(fields, wanted)
            same(fields, self.peer.decode(self.encoder.take_size_update() + self.encoder.encode(fields), raw=True))
        return True

    def resize(self, size: int) -> None:
        self.peer.max_allowed_table_size = size
        self.encoder.limit_table(size)


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
