"""Tensors as JSON: lists of numbers, booleans and strings <-> what the dataplane takes and gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from proxy.backend.errors import invalid
from proxy.backend.execution import Output
from proxy.backend.services.parameters import MOST_DIMS
from proxy.backend.services.rest.faults import too_large
from proxy.backend.services.rest.jsontext import named
from proxy.backend.tensors import BOOL, BYTES, DATATYPES, Buffer, DataType, element_count, from_raw

_MOST_SENT = 32 * 2**20  # bytes of tensors that an answer may have as JSON, and
_MOST_ELEMENTS = 4 * 2**20  # elements: each is an object of Python's on its way
_NO_JSON = ("FP16", "BF16")  # as in Triton


def to_tensor(label: str, name: str, shape: Sequence[int], data: Any) -> tuple[Buffer | None, list[Any] | None]:
    """(raw bytes, None), or (None, values) for BYTES. `name` is the data type's. Raises InferenceError.

    A data type that doesn't exist and negative dimensions are the dataplane's to refuse.
    """
    if name in _NO_JSON:
        raise invalid(f"{label}: {name} can't be sent as JSON; send it with the binary tensor extension")
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
        kinds = set(map(type, values))
        if list not in kinds:
            return values
        if len(kinds) > 1:
            raise invalid(f"{label}: data has lists beside elements; nest it as the shape says, or not at all")
        if len(set(map(len, values))) > 1:
            raise invalid(f"{label}: data has lists of different lengths; nest it as the shape says, or not at all")
        values = list(chain.from_iterable(values))
    raise invalid(f"{label}: data is nested more than {MOST_DIMS} deep")


def _check_kinds(label: str, datatype: DataType, values: list[Any], *allowed: type) -> None:
    # By exact type: a bool is an int to Python.
    if set(map(type, values)).issubset(allowed):
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
        _check_kinds(label, datatype, values, int)
        for value in (min(values), max(values)):
            if not limits[0] <= value <= limits[1]:
                raise invalid(f"{label}: {named(value)} is no {datatype.name}, which takes {limits[0]} to {limits[1]}")
    else:
        return _floats(label, datatype, values)
    return np.array(values, datatype.dtype).data.cast("B")


def _floats(label: str, datatype: DataType, values: list[Any]) -> Buffer:
    _check_kinds(label, datatype, values, float, int)
    try:
        wide = np.array(values, np.float64)
    except OverflowError:
        raise invalid(f"{label}: data has a number that is too large for {datatype.name}") from None
    if datatype.size == wide.itemsize:
        return wide.data.cast("B")
    with np.errstate(over="ignore"):
        made = wide.astype(datatype.dtype)
    lost = np.isinf(made) & np.isfinite(wide)
    if lost.any():
        raise invalid(f"{label}: {wide[lost.argmax()]!s} is too large for {datatype.name}")
    return made.data.cast("B")


def check_sendable(label: str, datatype: DataType, remedy: str) -> None:
    """Before the model is run for it. Raises InferenceError."""
    if datatype.name in _NO_JSON:
        raise invalid(f"{label}: {datatype.name} can't be sent as JSON; {remedy}")


def check_size(outputs: Sequence[Output], remedy: str) -> int:
    """The bytes of outputs that are to be JSON. Raises InferenceError when they are too many."""
    size = sum(len(output.data) for output in outputs)
    elements = sum(math.prod(output.shape) for output in outputs)
    if size > _MOST_SENT or elements > _MOST_ELEMENTS:
        raise too_large(
            f"outputs of {size} bytes and {elements} elements are too much for JSON, which takes {_MOST_SENT} bytes "
            f"and {_MOST_ELEMENTS} elements; {remedy}"
        )
    return size


def to_list(output: Output, remedy: str) -> list[Any]:
    """The elements of an output, flat. Raises InferenceError for strings that are no text."""
    datatype = DATATYPES[output.datatype]
    label = f"output '{output.name}'"
    if datatype is BYTES:
        elements = from_raw(label, BYTES, output.shape, output.data).ravel().tolist()
        return [_text(label, at, element, remedy) for at, element in enumerate(elements)]
    made: list[Any] = np.frombuffer(output.data, datatype.dtype).tolist()
    return made


def _text(label: str, at: int, element: bytes, remedy: str) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        # Triton sends the bytes as they are, which no JSON parser takes.
        raise invalid(f"{label}: element {at} is not UTF-8, so it can't be sent as JSON; {remedy}") from None


