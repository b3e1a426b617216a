"""Tensors as JSON: lists of numbers, booleans and strings <-> what the dataplane takes and gives."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from proxy.backend.errors import InferenceError, invalid
from proxy.backend.execution import Output
from proxy.backend.services.parameters import MOST_DIMS
from proxy.backend.services.rest.faults import too_large
from proxy.backend.services.rest.jsontext import MINUS_ZERO, Written, dumps, is_written_infinite, named
from proxy.backend.tensors import BOOL, BYTES, DATATYPES, Array, Buffer, DataType, element_count, from_raw

_MOST_SENT = 32 * 2**20  # bytes of tensors that an answer may have as JSON, and
_MOST_ELEMENTS = 4 * 2**20  # elements: each is an object of Python's on its way
_DIGITS = 24  # bytes of a number, and what is between it and the next
_NO_JSON = ("FP16", "BF16")  # as in Triton
# A call into C holds the interpreter's lock until it returns, in whatever thread, so that none gets more than
_SLICE = 64 * 2**10  # elements of a list, or characters of a string, and
_WRITTEN = 4096  # elements to write: a float takes 0.2 us and more
T = TypeVar("T")


def to_tensor(label: str, name: str, shape: Sequence[int], data: Any) -> tuple[Buffer | None, list[Any] | None]:
    """(raw bytes, None), or (None, values) for BYTES. `name` is the data type's. Raises InferenceError.

    A data type that doesn't exist and negative dimensions are the dataplane's to refuse.
    """
    check_readable(label, name)
    values = _flat(label, data)
    datatype = DATATYPES.get(name)
    if datatype is None or any(dim < 0 for dim in shape):
        return None, values
    count = element_count(label, shape, datatype.size)
    if len(values) != count:
        raise invalid(f"{label}: shape {list(shape)} has {count} elements, data has {len(values)}")
    if datatype is BYTES:
        return None, _strings(label, values)
    return _numbers(label, datatype, values), None


def _flat(label: str, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise invalid(f"{label}: data is {named(data)}; it must be a list")
    values: list[Any] = data
    for _ in range(MOST_DIMS):
        kinds = _kinds(values)
        if list not in kinds:
            return values
        if len(kinds) > 1:
            raise invalid(f"{label}: data has lists beside elements; nest it as the shape says, or not at all")
        if len(_all(len, values)) > 1:
            raise invalid(f"{label}: data has lists of different lengths; nest it as the shape says, or not at all")
        values = values[0] if len(values) == 1 else _joined(values)
    raise invalid(f"{label}: data is nested more than {MOST_DIMS} deep")


def _sliced(values: list[Any], most: int = _SLICE) -> Iterator[list[Any]]:
    if len(values) <= most:
        yield values
        return
    for at in range(0, len(values), most):
        yield values[at : at + most]


def _joined(lists: list[Any]) -> list[Any]:
    made: list[Any] = []
    for part in _sliced(lists, _WRITTEN):
        made.extend(chain.from_iterable(part))
    return made


def _kinds(values: list[Any]) -> set[type]:
    return _all(type, values)


def _all(of: Callable[[Any], T], values: list[Any]) -> set[T]:
    """What there is of `of(value)`."""
    found: set[T] = set()
    for part in _sliced(values):
        found.update(map(of, part))
    return found


def _check_kinds(label: str, datatype: DataType, values: list[Any], *allowed: type) -> None:
    # By exact type: a bool is an int to Python.
    if _kinds(values).issubset(allowed):
        return
    at, value = next((at, value) for at, value in enumerate(values) if type(value) not in allowed)
    wanted = {bool: "true or false", str: "a string", int: "an integer", float: "a number"}[allowed[0]]
    raise invalid(f"{label}: element {at} is {named(value)}; for {datatype.name} it must be {wanted}")


def _strings(label: str, values: list[Any]) -> list[Any]:
    _check_kinds(label, BYTES, values, str)
    try:
        return [value.encode() for value in values]
    except UnicodeEncodeError:
        raise invalid(f"{label}: data has half of a surrogate pair, which is no text") from None


def _numbers(label: str, datatype: DataType, values: list[Any]) -> Buffer:
    if not values:
        return b""
    if datatype is BOOL:
        _check_kinds(label, datatype, values, bool)
    elif (limits := datatype.integer_range) is not None:
        if float in _kinds(values):
            values = [0 if value is MINUS_ZERO else value for value in values]
        _check_kinds(label, datatype, values, int)
        _check_range(label, datatype, values, *limits)
    else:
        return _floats(label, datatype, values)
    return _array(values, datatype.dtype).data.cast("B")


def _check_range(label: str, datatype: DataType, values: list[Any], least: int, most: int) -> None:
    for part in _sliced(values):
        for value in (min(part), max(part)):
            if not least <= value <= most:
                raise invalid(f"{label}: {named(value)} is no {datatype.name}, which takes {least} to {most}")


def _array(values: list[Any], dtype: np.dtype[Any]) -> Array:
    if len(values) <= _SLICE:
        return np.array(values, dtype)
    made = np.empty(len(values), dtype)
    for at in range(0, len(values), _SLICE):
        made[at : at + _SLICE] = np.array(values[at : at + _SLICE], dtype)
    return made


def _floats(label: str, datatype: DataType, values: list[Any]) -> Buffer:
    _check_kinds(label, datatype, values, float, int)
    try:
        wide = _array(values, np.dtype(np.float64))
    except OverflowError:
        raise invalid(f"{label}: data has a number that is too large for {datatype.name}") from None
    made = wide
    if datatype.size != wide.itemsize:
        with np.errstate(over="ignore"):
            made = wide.astype(datatype.dtype)
    if not np.isfinite(made).all():
        _check_infinite(label, datatype, values, wide, made)
    return made.data.cast("B")


def _check_infinite(label: str, datatype: DataType, values: list[Any], wide: Array, made: Array) -> None:
    for at in np.flatnonzero(np.isinf(wide)):
        if not is_written_infinite(values[at]):
            raise invalid(f"{label}: element {at} is too large for {datatype.name}; write Infinity if it is meant")
    lost = np.isinf(made) & np.isfinite(wide)
    if lost.any():
        raise invalid(f"{label}: {wide[lost.argmax()]!s} is too large for {datatype.name}")


def check_readable(label: str, name: str) -> None:
    """Raises InferenceError for a data type of which no values can be sent as JSON."""
    if name in _NO_JSON:
        raise invalid(f"{label}: {name} can't be sent as JSON; send it with the binary tensor extension")


def check_sendable(label: str, datatype: DataType, remedy: str) -> None:
    """Before the model is run for it. Raises InferenceError."""
    if datatype.name in _NO_JSON:
        raise invalid(f"{label}: {datatype.name} can't be sent as JSON; {remedy}")


def check_size(outputs: Sequence[Output], remedy: str) -> int:
    """About how many bytes of JSON outputs make. Raises InferenceError when they are too large for that."""
    size = sum(len(output.data) for output in outputs)
    counts = [math.prod(output.shape) for output in outputs]
    if size > _MOST_SENT or sum(counts) > _MOST_ELEMENTS:
        raise too_large(
            f"outputs of {size} bytes and {sum(counts)} elements are too much for JSON, which takes {_MOST_SENT} bytes "
            f"and {_MOST_ELEMENTS} elements; {remedy}"
        )
    texts = sum(len(output.data) for output in outputs if output.datatype == BYTES.name)
    return 2 * texts + _DIGITS * sum(counts)


def to_list(output: Output, remedy: str) -> list[Any]:
    """The elements of an output, flat. Raises InferenceError for strings that are no text."""
    datatype = DATATYPES[output.datatype]
    label = f"output '{output.name}'"
    if datatype is BYTES:
        elements = from_raw(label, BYTES, output.shape, output.data).ravel().tolist()
        return [_text(label, at, element, remedy) for at, element in enumerate(elements)]
    made: list[Any] = np.frombuffer(output.data, datatype.dtype).tolist()
    return made


def to_written(output: Output, remedy: str, *, bare: bool = False) -> Written:
    """The same, as a part of a document; bare: the only element, not in a list."""
    datatype = DATATYPES[output.datatype]
    slices = _written_strings(output, remedy) if datatype is BYTES else _written_numbers(output, datatype)
    return Written(slices if bare else _bracketed(slices))


def _bracketed(slices: Iterator[bytes]) -> Iterator[bytes]:
    yield b"["
    yield from slices
    yield b"]"


def _written_numbers(output: Output, datatype: DataType) -> Iterator[bytes]:
    numbers = np.frombuffer(output.data, datatype.dtype)
    for at in range(0, len(numbers), _WRITTEN):
        written = dumps(numbers[at : at + _WRITTEN].tolist())[1:-1]
        yield b"," + written if at else written


def _written_strings(output: Output, remedy: str) -> Iterator[bytes]:
    label, view = f"output '{output.name}'", memoryview(output.data)
    at = number = size = 0
    texts: list[str] = []
    before = b""
    while at < len(view):
        length = int.from_bytes(view[at : at + 4], "little")
        element = view[at + 4 : at + 4 + length]
        at += 4 + length
        if texts and (len(texts) == _WRITTEN or size + length > _SLICE):
            yield before + dumps(texts)[1:-1]
            texts, size, before = [], 0, b","
        if length > _SLICE:
            yield before
            yield from _written_string(label, number, element, remedy)
            before = b","
        else:
            texts.append(_text(label, number, bytes(element), remedy))
            size += length
        number += 1
    if texts:
        yield before + dumps(texts)[1:-1]


def _written_string(label: str, at: int, element: memoryview, remedy: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    yield b'"'
    for start in range(0, len(element), _SLICE):
        part = element[start : start + _SLICE]
        try:
            text = decoder.decode(bytes(part), start + len(part) == len(element))
        except UnicodeDecodeError:
            raise _no_text(label, at, remedy) from None
        yield dumps(text)[1:-1]
    yield b'"'


def _text(label: str, at: int, element: bytes, remedy: str) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise _no_text(label, at, remedy) from None


def _no_text(label: str, at: int, remedy: str) -> InferenceError:
    # Triton sends the bytes as they are, which no JSON parser takes.
    return invalid(f"{label}: element {at} is not UTF-8, so it can't be sent as JSON; {remedy}")
