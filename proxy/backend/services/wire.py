"""ModelInferRequest and ModelInferResponse <-> bytes, without moving tensors more often than need be.

protobuf copies the contents of a bytes field when it parses them and again whenever they are read, and serializes
64 MiB in a third of a second. A large tensor is therefore cut out of the message before protobuf sees it, and put
after what protobuf wrote: the order of fields in a message is free (https://protobuf.dev/programming-guides/encoding/,
"Field Order"), and elements of a repeated field keep their order among each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from proxy.backend.errors import Code, InferenceError
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.services.parameters import MOST_DIMS
from proxy.backend.tensors import Buffer

_LARGE = 32 * 1024  # bytes; below, protobuf's copies cost less than the interpreter's way through the fields
# More than any honest request has: protobuf makes 90 bytes of an empty input of two, and holds up the event loop.
_MOST_FIELDS = 4096
# Of inputs and outputs: what they have besides packed numbers, which are one. Each costs a microsecond or more.
_MOST_INNER = 65_536
_MOST_PARSED = 16 * 2**20  # bytes for protobuf: all but raw_input_contents
_MOST_UNUSUAL = 64 * 2**10  # bytes of a message that can't be cut, but may be right
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_RAW_INPUT_TAG = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | _LEN
_SHORT = [bytes((value,)) for value in range(0x80)]
# Packed, a byte may become eight.
_SHAPE_TAG = pb.ModelInferRequest.InferInputTensor.SHAPE_FIELD_NUMBER << 3 | _LEN
_LONGEST_SHAPE = 10 * MOST_DIMS
MOST_GROWTH = 8
_SHORT_FIELD = 64  # bytes; what is in it can't be many
# The fields that hold messages: inputs, outputs and parameters of a request; contents and parameters of an input.
_NESTED = (
    frozenset(
        (
            pb.ModelInferRequest.INPUTS_FIELD_NUMBER,
            pb.ModelInferRequest.OUTPUTS_FIELD_NUMBER,
            pb.ModelInferRequest.PARAMETERS_FIELD_NUMBER,
        )
    ),
    frozenset(
        (
            pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER,
            pb.ModelInferRequest.InferInputTensor.PARAMETERS_FIELD_NUMBER,
        )
    ),
)
_RAW_OUTPUT_PREFIX = bytes((pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | _LEN,))


def is_long(data: Buffer) -> bool:
    """Whether a message is to be cut before it is parsed."""
    return len(data) >= _LARGE


def parse_short(data: Buffer) -> tuple[pb.ModelInferRequest, Sequence[Buffer]]:
    """The request, and its raw_input_contents. Raises protobuf's DecodeError."""
    request = pb.ModelInferRequest.FromString(bytes(data))
    return request, request.raw_input_contents


def cut(data: Buffer) -> tuple[bytes, Sequence[Buffer] | None]:
    """(what protobuf has to parse, the raw_input_contents as views, or None where they are still in it).

    Raises DecodeError, and InferenceError for what would cost much more to parse than it did to send.
    """
    try:
        rest, raw = _cut(memoryview(data))
    except (IndexError, ValueError):
        # Malformed or unusual; protobuf is the judge of that.
        if len(data) > _MOST_UNUSUAL:
            raise DecodeError("cannot be cut") from None
        return bytes(data), None
    if len(rest) > _MOST_PARSED:
        raise _too_much(
            f"{len(rest)} bytes besides raw_input_contents, more than {_MOST_PARSED}; send large tensors in those"
        )
    return rest, raw


def parse_rest(rest: bytes) -> pb.ModelInferRequest:
    """The request of a message that was cut. Raises DecodeError and InferenceError."""
    if len(rest) >= _LARGE:
        _check_inner(memoryview(rest))
    return pb.ModelInferRequest.FromString(rest)


def check_fields(data: Buffer) -> None:
    """Raises InferenceError for a message of too many fields, of whatever type it is."""
    try:
        _cut(memoryview(data))
    except (IndexError, ValueError):
        if len(data) > _MOST_UNUSUAL:
            raise _too_much(f"more than {_MOST_FIELDS} fields, or is malformed") from None


def _check_inner(data: memoryview) -> None:
    """Raises InferenceError for more than _MOST_INNER fields within fields. Malformed ones are protobuf's to refuse."""
    left = _MOST_INNER
    waiting = [(data, 0)]
    while waiting:
        view, depth = waiting.pop()
        at, end = 0, len(view)
        try:
            while at < end:
                tag, at = _varint(view, at)
                kind = tag & 7
                if kind == _LEN:
                    length, at = _varint(view, at)
                    if depth == 1 and tag == _SHAPE_TAG and length > _LONGEST_SHAPE:
                        raise _too_much(f"an input with a shape of more than {MOST_DIMS} dimensions")
                    # Inputs hold contents, which hold elements; maps are no deeper. Names and numbers aren't messages,
                    # but to take them for such does no harm: what they are made of is counted at most.
                    if depth < 2 and length > _SHORT_FIELD and tag >> 3 in _NESTED[depth]:
                        waiting.append((view[at : at + length], depth + 1))
                    at += length
                elif kind == _VARINT:
                    _, at = _varint(view, at)
                elif kind in (_I64, _I32):
                    at += 8 if kind == _I64 else 4
                else:
                    return  # a group
                left -= 1
                if left < 0:
                    raise _too_much(
                        f"more than {_MOST_INNER} elements or parameters; send large tensors in raw_input_contents"
                    )
        except (IndexError, ValueError):
            continue


def _too_much(what: str) -> InferenceError:
    return InferenceError(Code.RESOURCE_EXHAUSTED, f"request has {what}")


def _cut(data: memoryview) -> tuple[bytes, list[memoryview]]:
    """(the message without raw_input_contents, those contents). Raises IndexError or ValueError if it can't be cut."""
    kept: list[memoryview] = []
    raw: list[memoryview] = []
    at, end = 0, len(data)
    while at < end:
        if len(kept) + len(raw) > _MOST_FIELDS:
            if end > _MOST_UNUSUAL:
                raise _too_much(f"more than {_MOST_FIELDS} fields")
            raise ValueError("fields")
        start = at
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _LEN:
            length, at = _varint(data, at)
            contents = data[at : at + length]
            at += length
            if tag == _RAW_INPUT_TAG:
                raw.append(contents)
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_I64, _I32):
            at += 8 if kind == _I64 else 4
        else:
            raise ValueError("group")
        if at > end:
            raise ValueError("truncated")
        if tag != _RAW_INPUT_TAG:
            kept.append(data[start:at])
    return b"".join(kept), raw


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        octet = data[at]
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint")


def contents_behind(data: Buffer, at: int, most: int) -> list[Buffer] | None:
    """The raw_input_contents from there to the end of a message; None where there are more, or anything else."""
    raw: list[Buffer] = []
    end = len(data)
    while at < end:
        if data[at] != _RAW_INPUT_TAG or len(raw) == most:
            return None
        try:
            length, at = _varint(data, at + 1)
        except (IndexError, ValueError):
            return None
        if at + length > end:
            return None
        raw.append(data[at : at + length])
        at += length
    return raw


def length_of_head(data: Buffer, raw: Sequence[Buffer]) -> int:
    """How many bytes of a message come before these raw_input_contents, if nothing comes between and behind; or -1."""
    length = len(data) - sum(1 + len(_as_varint(len(contents))) + len(contents) for contents in raw)
    found = contents_behind(data, length, len(raw)) if length >= 0 else None
    return length if found is not None and list(map(len, found)) == list(map(len, raw)) else -1


def with_contents(head: bytes, raw: Sequence[Buffer]) -> list[Buffer]:
    """A ModelInferResponse with these raw_output_contents, in pieces, of which those contents are some."""
    pieces: list[Buffer] = [head]
    for contents in raw:
        pieces.append(_RAW_OUTPUT_PREFIX + _as_varint(len(contents)))
        pieces.append(contents)
    return pieces


def as_field(number: int, pieces: Sequence[Buffer]) -> list[Buffer]:
    """A message with nothing but a field of this number, at most 15, whose contents are given in pieces."""
    return [bytes((number << 3 | _LEN,)) + _as_varint(sum(map(len, pieces))), *pieces]


def _as_varint(value: int) -> bytes:
    if value < 0x80:
        return _SHORT[value]
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)
