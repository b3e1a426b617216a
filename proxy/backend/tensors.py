"""Data types, and tensors <-> the bytes in which they travel.

The layout on the wire is that of Triton: row by row, little-endian, no padding; an element of BYTES is its length
(uint32, little-endian) followed by its bytes. Shapes and sizes are checked before anything is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from proxy.backend.errors import invalid

Array = npt.NDArray[Any]
Buffer = bytes | memoryview

_LENGTH = struct.Struct("<I")
_LARGEST = 2**63 - 1  # what a size in bytes may be for numpy, zeros in the shape left out


@dataclass(frozen=True, slots=True, eq=False)
class DataType:
    """An element type under its protocol name; `size` is in bytes, 0 for BYTES, whose elements differ.

    `dtype` is what a model sees: BYTES is an object array of `bytes`; BF16, which numpy lacks, the bit patterns as
    uint16 (`(x.astype("uint32") << 16).view("float32")` are its values).
    """

    name: str
    dtype: np.dtype[Any]
    size: int

    @property
    def integer_range(self) -> tuple[int, int] | None:
        """Smallest and largest value of an integer type."""
        if self.dtype.kind not in "iu":
            return None
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)


def _type(name: str, dtype: str) -> DataType:
    made = np.dtype(dtype)
    return DataType(name, made, 0 if made.hasobject else made.itemsize)


DATATYPES = {
    made.name: made
    for made in (
        _type("BOOL", "?"),
        _type("UINT8", "u1"),
        _type("UINT16", "<u2"),
        _type("UINT32", "<u4"),
        _type("UINT64", "<u8"),
        _type("INT8", "i1"),
        _type("INT16", "<i2"),
        _type("INT32", "<i4"),
        _type("INT64", "<i8"),
        _type("FP16", "<f2"),
        _type("FP32", "<f4"),
        _type("FP64", "<f8"),
        _type("BF16", "<u2"),
        _type("BYTES", "O"),
    )
}
BYTES = DATATYPES["BYTES"]
BOOL = DATATYPES["BOOL"]
BF16 = DATATYPES["BF16"]


def element_count(label: str, shape: Sequence[int], size: int) -> int:
    """Elements in a tensor of this shape. Raises InferenceError for a shape that no memory could hold.

    Python's integers don't overflow, numpy's do, and with a 0 among the dimensions it multiplies the others all the
    same: (0, 2**62, 8) has no elements and still can't be made.
    """
    count = prod(shape)
    largest = count or prod(dim for dim in shape if dim)
    if largest * max(size, 1) > _LARGEST:
        raise invalid(f"{label}: shape {list(shape)} is larger than {_LARGEST} bytes")
    return count


def from_raw(label: str, datatype: DataType, shape: tuple[int, ...], data: Buffer) -> Array:
    """The array of the given shape over `data`, read-only, without a copy where alignment allows it.

    The size of `data` must have been checked unless `datatype` is BYTES. Raises InferenceError.
    """
    if datatype is BYTES:
        return _objects(_split(label, data, prod(shape))).reshape(shape)
    if datatype is BOOL:
        return _booleans(data).reshape(shape)
    array = np.frombuffer(data, datatype.dtype)
    if not array.flags.aligned:
        # Numpy copes with any address; other native code that a model may call does not.
        array = array.copy()
        array.flags.writeable = False
    return array.reshape(shape)


def _booleans(data: Buffer) -> Array:
    octets = np.frombuffer(data, np.uint8)
    # A numpy bool that is neither 0 nor 1 breaks comparisons and arithmetic in odd ways.
    if octets.size and octets.max() > 1:
        return np.not_equal(octets, 0)
    return octets.view(np.bool_)


def _split(label: str, data: Buffer, count: int) -> list[bytes]:
    view = memoryview(data)
    total, at = len(view), 0
    elements: list[bytes] = []
    while at < total:
        if total - at < 4:
            raise invalid(f"{label}: element {len(elements)} needs a 4-byte length, but only {total - at} bytes follow")
        (length,) = _LENGTH.unpack_from(view, at)
        at += 4
        if length > total - at:
            raise invalid(f"{label}: element {len(elements)} has length {length}, but only {total - at} bytes follow")
        elements.append(bytes(view[at : at + length]))
        at += length
        if len(elements) > count:
            raise invalid(f"{label}: more elements than the {count} that its shape asks for")
    if len(elements) != count:
        raise invalid(f"{label}: {len(elements)} elements, but its shape asks for {count}")
    return elements


def _objects(elements: Iterable[Any]) -> Array:
    items = list(elements)
    array = np.empty(len(items), object)
    array[:] = items
    return array


def from_values(label: str, datatype: DataType, shape: tuple[int, ...], values: Sequence[Any]) -> Array:
    """The array of the given shape from a flat sequence of as many Python values. Raises InferenceError."""
    if datatype is BYTES:
        return _objects(values).reshape(shape)
    if values and (limits := datatype.integer_range) is not None:
        for value in (min(values), max(values)):
            if not limits[0] <= value <= limits[1]:
                raise invalid(f"{label}: {value} is no {datatype.name}, which takes {limits[0]} to {limits[1]}")
    return np.fromiter(values, datatype.dtype, len(values)).reshape(shape)


def fits(array: Array, datatype: DataType) -> bool:
    """Whether an array that a model made can be sent under this type as it is (byte order aside)."""
    if datatype is BYTES:
        return array.dtype.kind in "OSU"
    if datatype is BF16 and array.dtype.name == "bfloat16":
        return True
    return bool(array.dtype.newbyteorder("<") == datatype.dtype)


def to_raw(array: Array, datatype: DataType, *, shared: bool) -> Buffer:
    """The bytes of an array that `fits`. `shared`: someone else may write to it later, so copy it.

    Raises TypeError for an element of BYTES that is neither bytes nor str (which is sent as UTF-8).
    """
    if datatype is BYTES:
        return b"".join(_joined(array))
    if array.nbytes == 0:
        return b""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    # Not tobytes(): it holds the interpreter lock for as long as a large copy takes.
    flat = np.array(array, datatype.dtype, order="C", copy=True if shared else None)
    return flat.reshape(-1).data.cast("B")


def _joined(array: Array) -> Iterable[bytes]:
    for item in array.ravel().tolist():
        if not isinstance(item, (bytes, str)):
            raise TypeError(f"elements of BYTES must be bytes or str, not {type(item).__name__}")
        element = item.encode() if isinstance(item, str) else item
        yield _LENGTH.pack(len(element))
        yield element
