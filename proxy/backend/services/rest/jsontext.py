"""JSON <-> values, within limits: size, depth, keys that are there twice, text that is not Unicode.

The interpreter's parser holds its lock from the first byte to the last, in whatever thread it runs, unless it calls
functions of Python's: so that a large document leaves the event loop its turns, numbers and objects are made by such.
Measured with 30 MB of floats, that costs nothing. Documents of nothing but strings, whose parsing is quick, and of
empty lists have no such points; that is what the limit on their size is for.
"""

from __future__ import annotations

import json
from typing import Any

from proxy.backend.errors import invalid
from proxy.backend.services.rest.faults import too_large
from proxy.backend.tensors import Buffer

MOST_PARSED = 32 * 2**20  # bytes of a document; larger tensors are for the binary tensor extension
LONG_TO_PARSE = 64 * 2**10  # bytes; from here on it is not the event loop that parses them
WEIGHT = 8  # bytes that a byte of a document may take when parsed: an empty list of two takes 64, a number 32

_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        # Parsers differ in which one counts; what a gate or a log in front saw may be the other.
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise invalid(f"request is not valid JSON: key '{twice:.100}' is there twice in an object")
    return made


def _float(text: str) -> float:
    return float(text)


def _int(text: str) -> int:
    return int(text)


# NaN, Infinity and -Infinity are no JSON, but Triton and its client read and write them, and they are honest values of
# a tensor: null would lose which one it was.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_YIELDING_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int)


def check_size(size: int) -> None:
    """Raises InferenceError for more bytes than a request for inference may have as JSON."""
    if size > MOST_PARSED:
        raise too_large(
            f"JSON of {size} bytes is larger than {MOST_PARSED} bytes; send large tensors with the binary tensor "
            "extension (binary_data_size)"
        )


def loads(data: Buffer) -> Any:
    """The value of a document. Raises InferenceError."""
    if not data:
        raise invalid("request body is empty; JSON is expected")
    decoder = _DECODER if len(data) < LONG_TO_PARSE else _YIELDING_DECODER
    try:
        return decoder.decode(str(data, "utf-8"))
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
