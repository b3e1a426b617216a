"""Header fields as HTTP/2 wants them (RFC 9113 section 8), and what is remembered about a header block.

A client sends the same header block with every call, so everything that is derived from one (validity, pseudo
fields, and in `note` whatever the layer above derives) is derived once and found again by identity: equal field
lists give the same object, for all connections, until the bounded table of them is emptied.

May not do I/O, and may not know what the fields mean beyond HTTP/2.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from proxy.http2.hpack import ENTRY_OVERHEAD, STABLE_NAMES, Field, Sensitive, encode_literals

# RFC 9110 section 5.6.2 tokens, in lower case only (RFC 9113 section 8.2).
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
# RFC 9113 section 8.2.1 forbids NUL, CR, LF and white space at the ends; RFC 9110 section 5.5 calls every other
# control character but HTAB invalid as well.
_WHITE = b" \t"
_ALLOWED_IN_VALUES = bytes([byte for byte in range(256) if byte == 9 or (byte >= 32 and byte != 127)])
_CONNECTION_SPECIFIC = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
# RFC 3986: what a scheme, an authority without userinfo, and a path with its query are made of. Bytes beyond ASCII
# ought to be percent-encoded in a path, but clients send them as they are typed. White space, or a fragment, in one
# would mean something else to a server behind that reads lines.
_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*").fullmatch
_NOT_IN_PATH = re.compile(rb"[\x00-\x20\x7f#]").search
_AUTHORITY = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=:%\[\]]*").fullmatch
_REQUEST_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_STATUS = re.compile(rb"[0-9]{3}").fullmatch
_INVALID_STATUS = 500
_NO_CONTENT = (204, 304)
_DIGITS = re.compile(rb"[0-9]{1,18}").fullmatch


# Fields that somebody here, or in the layer above, reads. All others only pass through, see `Passing`.
KEPT_NAMES = STABLE_NAMES | _CONNECTION_SPECIFIC | {b"te", b"host", b"content-length", b"grpc-status"}


class HeaderBlock:
    """A decoded header block: `fields` in order; `error` says why it is malformed, or is None; `note` is for the
    layer above, which may keep there what it derives from the fields.

    `size` is what the fields take as RFC 9113 section 6.5.2 counts it, or 0 where nobody has counted: interners do.
    """

    __slots__ = ("error", "fields", "note", "size")

    def __init__(self, fields: Sequence[Field], checked: bool = False) -> None:
        """`checked`: the fields come from a block that was checked, or from the gate itself."""
        self.fields: tuple[Field, ...] = tuple(fields)
        self.size = 0
        self.note: Any = None
        self.error: str | None = None if checked else self._check()

    def _check(self) -> str | None:
        return check_regular(self.fields)

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """The first value of a field."""
        for key, value in self.fields:
            if key == name:
                return value
        return default


class Trailers(HeaderBlock):
    """A trailer section: no pseudo-header fields (section 8.1)."""

    __slots__ = ()


class _Message(HeaderBlock):
    """Shared by requests and responses: pseudo-header fields stand first, each once."""

    __slots__ = ("content_length", "pseudo")

    _allowed: frozenset[bytes] = frozenset()

    def _check(self) -> str | None:
        self.content_length: int | None = None
        self.pseudo: dict[bytes, bytes] = {}
        fields = self.fields
        count = 0
        for name, value in fields:
            if name[:1] != b":":
                break
            if name not in self._allowed:
                return f"unknown pseudo-header field {name[:32]!r}"
            if name in self.pseudo:
                return f"pseudo-header field {name.decode()} twice"
            if _is_bad_value(value):
                return f"a character that is not allowed in {name.decode()}"
            self.pseudo[name] = value
            count += 1
        return check_regular(fields[count:]) or self._check_length(fields[count:]) or self._check_pseudo()

    def _check_length(self, fields: Sequence[Field]) -> str | None:
        for name, value in fields:
            if name == b"content-length":
                if not _DIGITS(value):
                    return "content-length is not a number"
                if self.content_length not in (None, int(value)):
                    return "content-length twice, with different values"
                self.content_length = int(value)
        return None

    def _check_pseudo(self) -> str | None:
        raise NotImplementedError


class RequestHead(_Message):
    """A request's header section (section 8.3.1)."""

    __slots__ = ("authority", "method", "path", "scheme")

    _allowed = _REQUEST_PSEUDO

    def _check_pseudo(self) -> str | None:
        get = self.pseudo.get
        self.method = get(b":method", b"")
        self.scheme = get(b":scheme", b"")
        self.path = get(b":path", b"")
        self.authority = get(b":authority", b"")
        if not _NAME(self.method.lower()):
            return ":method is missing or not a token"
        if self.method == b"CONNECT":
            if b":scheme" in self.pseudo or b":path" in self.pseudo or not self.authority:
                return "CONNECT has :authority and neither :scheme nor :path"
            return None
        if not self.scheme or not self.path:
            return "a request needs :method, :scheme and :path"
        if not _SCHEME(self.scheme):
            return ":scheme is not a scheme (RFC 3986 section 3.1)"
        if self.path[:1] != b"/" and not (self.path == b"*" and self.method == b"OPTIONS"):
            return ":path doesn't begin with /"
        if _NOT_IN_PATH(self.path):
            return ":path has white space or a fragment"
        return self._check_authority()

    def _check_authority(self) -> str | None:
        hosts = [value for name, value in self.fields if name == b"host"]
        if len(hosts) > 1:
            return "more than one host field"
        if hosts and self.authority and hosts[0].lower() != self.authority.lower():
            return "host and :authority differ"
        if self.scheme.lower() in (b"http", b"https"):  # in any case: RFC 3986 section 3.1
            if not (self.authority or (hosts and hosts[0])):
                return "neither :authority nor host"
            if b":authority" in self.pseudo and not self.authority:
                return ":authority is empty"
        if b"@" in self.authority:
            return ":authority has a userinfo part"
        if not _AUTHORITY(self.authority) or (hosts and not _AUTHORITY(hosts[0])):
            return ":authority or host has a character that no host and port has (RFC 3986 section 3.2)"
        return None


class ResponseHead(_Message):
    """A response's header section (section 8.3.2); `status` is 0 where it is malformed.

    A `status` outside 100 to 599 reads 500: RFC 9110 section 15 asks to process such a response as if it had a 5xx.
    `expect` is how many bytes of content have to follow, or -1 for any number.
    """

    __slots__ = ("expect", "status")

    _allowed = frozenset((b":status",))

    def _check_pseudo(self) -> str | None:
        text = self.pseudo.get(b":status", b"")
        self.status = 0
        self.expect = -1
        if not _STATUS(text):
            return ":status is missing or no status code"
        self.status = int(text) if b"100" <= text < b"600" else _INVALID_STATUS
        if self.status == 101:
            return "101 does not exist in HTTP/2 (section 8.6)"
        if self.status < 200 and self.content_length is not None:
            return "an informational response with content-length"
        if self.status in _NO_CONTENT:
            self.expect = 0  # whatever content-length says (section 8.1.1; RFC 9110 sections 15.3.5 and 15.4.5)
        elif self.content_length is not None:
            self.expect = self.content_length
        return None


def _is_bad_value(value: bytes) -> bool:
    """In fifty times less than a regular expression takes for a long value, of which an attacker can send many."""
    if value[:1] in _WHITE or value[-1:] in _WHITE:
        return value != b""
    return value.translate(None, _ALLOWED_IN_VALUES) != b""


def check_regular(fields: Sequence[Field]) -> str | None:
    """What is wrong with regular (not pseudo) fields, or None."""
    for name, value in fields:
        if not _NAME(name):
            if name[:1] == b":":
                return f"pseudo-header field {name[:32]!r} in a wrong place"
            return f"field name {name[:32]!r} is empty, not in lower case, or has a character that is not allowed"
        if _is_bad_value(value):
            return f"a character that is not allowed in the value of {name[:32].decode()}"
        if name in _CONNECTION_SPECIFIC:
            return f"connection-specific field {name.decode()}"
        if name == b"te" and value != b"trailers" and value.lower() != b"trailers":  # RFC 9110 section 10.1.4
            return "te is something else than trailers"
    return None


_good_names: set[bytes] = set()
_GOOD_NAMES = 1024


def _is_good_name(name: bytes) -> bool:
    if len(name) > 64 or not _NAME(name) or name in _CONNECTION_SPECIFIC or name == b"te":
        return False
    if len(_good_names) >= _GOOD_NAMES:
        _good_names.clear()
    _good_names.add(name)
    return True


class Passing:
    """Fields that a header section has besides those of its HeaderBlock: literals that change from call to call.

    Ids, tokens and timeouts would make every block a new one, to be decoded, checked and encoded at full length. Kept
    apart, they leave the block the same; `encoded` is what goes out behind the block's own encoding.
    """

    __slots__ = ("encoded", "fields", "size_bound")

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = fields
        self.encoded = encode_literals(fields)
        # What HeaderBlock.size counts, and a few bytes more, for the price of no loop.
        self.size_bound = len(self.encoded) + ENTRY_OVERHEAD * len(fields)

    def get(self, name: bytes) -> bytes | None:
        """The first value of a field."""
        for key, value in self.fields:
            if key == name:
                return value
        return None


def list_size(block: HeaderBlock, passing: Passing | None) -> int:
    """What a header section takes, as RFC 9113 section 6.5.2 counts it."""
    return block.size + (_size(passing.fields) if passing is not None else 0)


def _size(fields: Sequence[Field]) -> int:
    return sum([len(name) + len(value) + ENTRY_OVERHEAD for name, value in fields])


def check_passing(fields: Sequence[Field]) -> bool:
    """Whether these are valid and nothing but regular fields; False for what `check_regular` should look at, too."""
    for name, value in fields:
        if name not in _good_names and not _is_good_name(name):
            return False
        if _is_bad_value(value):
            return False
    return True


Block = TypeVar("Block", bound=HeaderBlock)

_INTERNED = 512
INTERNED_BYTES = 2048


def _trim(field: Field) -> Field:
    trimmed = (field[0], field[1].strip(b" \t"))
    return Sensitive(trimmed) if type(field) is Sensitive else trimmed


def _trimmed(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    """The fields without white space around their values; the same object where there is none."""
    if not any(value and (value[0] in _WHITE or value[-1] in _WHITE) for _, value in fields):
        return fields
    return tuple([_trim(field) for field in fields])


def interner(kind: type[Block], trim: bool = False) -> Callable[[Sequence[Field]], Block]:
    """A function from field lists to blocks of this kind, the same block for the same fields.

    trim: white space around values is taken off instead of refused. RFC 9113 section 8.2.1 calls it malformed, but
    gRPC servers send it (a grpc-message that ends in a space), and gRPC allows to strip it.

    Bounded: 512 blocks of at most 2 KiB each; when full it is emptied, which costs time and nothing else. Lists with
    a never-indexed field are not shared between connections.
    """
    known: dict[tuple[Field, ...], Block] = {}

    def intern(fields: Sequence[Field]) -> Block:
        key = tuple(fields)
        block = known.get(key)
        shared = Sensitive not in map(type, key)
        if block is not None and shared:
            return block
        block = kind(_trimmed(key) if trim else key)
        block.size = _size(block.fields)
        if block.size <= INTERNED_BYTES and shared:
            if len(known) >= _INTERNED:
                known.clear()
            known[key] = block
        return block

    return intern


intern_request = interner(RequestHead)
intern_response = interner(ResponseHead, trim=True)
intern_trailers = interner(Trailers)
intern_response_trailers = interner(Trailers, trim=True)
