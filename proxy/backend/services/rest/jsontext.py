"""JSON <-> values, within limits: size, depth, keys that are there twice, text that is not Unicode.

The interpreter's parser holds its lock from the first byte to the last, in whatever thread it runs, unless it calls
functions of Python's: so that a large document leaves the event loop its turns, numbers and objects are made by such.
Measured with 30 MB of floats, that costs nothing. Strings and lists without numbers have no such points, and take many
times their bytes; `weigh` limits how many there are. Its writer has none at all: what is long is written in slices.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proxy.backend.errors import invalid
from proxy.backend.services.rest.faults import too_large
from proxy.backend.tensors import Buffer

MOST_PARSED = 16 * 2**20  # bytes of a document; larger tensors are for the binary tensor extension
MOST_LISTS = 2**20  # lists and objects of a document
MOST_QUOTES = 2**20  # around its strings, and in them
LONG_TO_PARSE = 64 * 2**10  # bytes; from here on it is not the event loop that parses them
_MOST_SILENT = 2**17  # lists in parts of a document that may have no number: 10 ms
_PART = 32 * 2**10  # bytes
# Bytes that are held at most, when parsed, for: a byte (a number of four takes 32 and 8), a list or an object, a quote.
_OF_BYTE, _OF_LIST, _OF_QUOTE = 12, 160, 32
_REMEDY = "don't nest the data, or send it with the binary tensor extension (binary_data_size)"

_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))
_GIVES_WAY = re.compile(rb"[0-9{]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        # Parsers differ in which one counts; what a gate or a log in front saw may be the other.
        twice = _twice([name for name, _ in pairs])
        raise invalid(f"request is not valid JSON: key '{twice:.100}' is there twice in an object")
    return made


def _twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _float(text: str) -> float:
    return float(text)


MINUS_ZERO = -0.0
"""What `-0` becomes, this object itself: a float's sign counts, and an integer has none."""
_INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _int(text: str) -> float:
    return int(text) or (MINUS_ZERO if text == "-0" else 0)


def is_written_infinite(value: float) -> bool:
    """Whether an infinite number was written so, and is none that is too large, such as 1e999."""
    return value is _INFINITE["Infinity"] or value is _INFINITE["-Infinity"]


# NaN, Infinity and -Infinity are no JSON, but Triton and its client read and write them, and they are honest values of
# a tensor: null would lose which one it was.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_INFINITE.__getitem__)
_SIGNED_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_INFINITE.__getitem__, parse_int=_int)
_YIELDING_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_INFINITE.__getitem__, parse_float=_float, parse_int=_int
)


def check_size(size: int) -> None:
    """Raises InferenceError for more bytes than a request for inference may have as JSON."""
    if size > MOST_PARSED:
        raise too_large(
            f"JSON of {size} bytes is larger than {MOST_PARSED} bytes; send large tensors with the binary tensor "
            "extension (binary_data_size)"
        )


def weigh(data: memoryview) -> int:
    """Bytes that a large document may take when parsed. Raises InferenceError for one that would hold up the server."""
    lists = quotes = silent = 0
    for at in range(0, len(data), _PART):
        part = bytes(data[at : at + _PART])
        strings, opened = part.count(b'"'), part.count(b"[")
        quotes += strings
        lists += opened + part.count(b"{")
        # A digit beside strings may be in one of them. Beside none, it is a number, or there are no lists at all.
        if strings or not _GIVES_WAY.search(part):
            silent += opened
    for name, count, most in (("lists and objects", lists, MOST_LISTS), ("quotes", quotes, MOST_QUOTES)):
        if count > most:
            raise too_large(f"JSON has {count} {name}, more than {most}; {_REMEDY}")
    if silent > _MOST_SILENT:
        raise too_large(f"JSON has {silent} lists of no numbers, more than {_MOST_SILENT}; {_REMEDY}")
    return _OF_BYTE * len(data) + _OF_LIST * lists + _OF_QUOTE * quotes


def loads(data: Buffer) -> Any:
    """The value of a document. Raises InferenceError."""
    if not data:
        raise invalid("request body is empty; JSON is expected")
    try:
        text = str(data, "utf-8")
        if len(data) < LONG_TO_PARSE:
            return (_SIGNED_DECODER if "-0" in text else _DECODER).decode(text)
        return _YIELDING_DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise invalid(f"request is not valid JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise invalid(
            f"request is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise invalid("request is not valid JSON: it is nested too deep") from None
    except ValueError:
        # The interpreter's limit, against numbers that take minutes to read (CVE-2020-10735).
        raise invalid("request is not valid JSON: it has a number of more than 4300 digits") from None


def dumps(value: Any) -> bytes:
    """The document of a value. Half of a surrogate pair, which UTF-8 can't say, becomes "?"."""
    return _ENCODER.encode(value).encode("utf-8", "replace")


class Written:
    """A value in a document that is written already: to be put there piece by piece, as it comes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces


def dumps_in_pieces(value: Any) -> Iterator[bytes]:
    """The document of a value with `Written` ones in its objects and lists, never much of it at once."""
    if isinstance(value, Written):
        yield from value.pieces
    elif isinstance(value, Mapping):
        for number, (key, one) in enumerate(value.items()):
            yield (b"," if number else b"{") + dumps(key) + b":"
            yield from dumps_in_pieces(one)
        yield b"}" if value else b"{}"
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield b"," if number else b"["
            yield from dumps_in_pieces(one)
        yield b"]" if value else b"[]"
    else:
        yield dumps(value)


def named(value: Any) -> str:
    """A value of JSON as an error shows it: short, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = value[:41] if isinstance(value, str) else value
    return f"{text!r:.40}"


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can say it: half of a surrogate pair, written with an escape, is JSON but no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
