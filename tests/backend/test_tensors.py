"""Promise: bytes become arrays, without a copy where that is safe, and arrays become the bytes that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.backend.errors import InferenceError
from proxy.backend.tensors import BF16, BYTES, DATATYPES, DataType, element_count, fits, from_raw, from_values, to_raw

NUMERIC = [datatype for datatype in DATATYPES.values() if datatype is not BYTES]


@pytest.mark.parametrize("datatype", NUMERIC, ids=lambda datatype: datatype.name)
def test_aligned_bytes_are_viewed_and_others_copied(datatype: DataType) -> None:
    size = datatype.size
    data = memoryview(bytes(8 * size + 1))
    for offset in (0, 1):
        part = data[offset : offset + 8 * size]
        array = from_raw("x", datatype, (2, 4), part)
        assert (array.shape, array.dtype, array.flags.writeable) == ((2, 4), datatype.dtype, False)
        assert array.flags.aligned
        shared = np.shares_memory(array, np.frombuffer(data, np.uint8))
        assert shared == (offset == 0 or size == 1)


def test_the_values_at_an_odd_address() -> None:
    data = b"x" + np.arange(5, dtype="<i8").tobytes()
    assert from_raw("x", DATATYPES["INT64"], (5,), memoryview(data)[1:]).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("datatype", NUMERIC, ids=lambda datatype: datatype.name)
def test_arrays_of_any_layout_become_bytes(datatype: DataType) -> None:
    rows = np.arange(24).reshape(4, 6).astype(datatype.dtype)
    swapped = rows.astype(datatype.dtype.newbyteorder(">"))
    for array in (rows, rows.T, rows[::2, 1::2], rows[:0], swapped, np.asarray(rows[0, 0])):
        assert fits(array, datatype)
        expected = np.ascontiguousarray(array, datatype.dtype).tobytes()
        assert bytes(to_raw(array, datatype, shared=True)) == bytes(to_raw(array, datatype, shared=False)) == expected


def test_shared_arrays_are_copied() -> None:
    array = np.zeros(4, np.int32)
    own, view = to_raw(array, DATATYPES["INT32"], shared=True), to_raw(array, DATATYPES["INT32"], shared=False)
    array[0] = 1
    assert bytes(own) == bytes(16)
    assert bytes(view) == b"\1" + bytes(15)


def test_bf16_of_ml_dtypes_is_taken() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")  # comes with tritonclient
    array = np.array([1.0, -2.5], ml_dtypes.bfloat16)
    assert fits(array, BF16)
    assert bytes(to_raw(array, BF16, shared=False)) == b"\x80\x3f\x20\xc0"


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=20))
def test_strings_survive(elements: list[bytes]) -> None:
    array = np.empty(len(elements), object)
    array[:] = elements
    raw = to_raw(array, BYTES, shared=True)
    assert from_raw("x", BYTES, (len(elements),), raw).tolist() == elements


@settings(deadline=None)
@given(st.binary(max_size=60), st.integers(0, 6))
def test_strings_out_of_any_bytes(data: bytes, count: int) -> None:
    try:
        array = from_raw("x", BYTES, (count,), data)
    except InferenceError:
        return
    assert bytes(to_raw(array, BYTES, shared=True)) == data


def test_strings_of_models() -> None:
    for array in (np.array(["ä", "b"]), np.array(["ä".encode(), b"b"]), np.array(["ä", b"b"], object)):
        assert fits(array, BYTES)
        assert to_raw(array, BYTES, shared=True) == b"\2\0\0\0\xc3\xa4\1\0\0\0b"
    with pytest.raises(TypeError, match="must be bytes or str, not int"):
        to_raw(np.array([10**9], object), BYTES, shared=True)


@pytest.mark.parametrize("dtype", ["i8", "u4", "f4", "O", "?"])
def test_what_does_not_fit(dtype: str) -> None:
    assert not fits(np.zeros(1, dtype), DATATYPES["INT32"])
    assert fits(np.zeros(1, dtype), BYTES) == (dtype == "O")


@pytest.mark.parametrize("shape", [(2**62, 2), (0, 2**62, 8), (2**31, 2**31, 2**31), (2**63 - 1,)])
def test_shapes_that_no_memory_holds(shape: tuple[int, ...]) -> None:
    with pytest.raises(InferenceError, match="is larger than 9223372036854775807 bytes"):
        element_count("x", shape, 2)


def test_the_largest_shape_that_numpy_takes() -> None:
    shape = (0, 2**31, 2**31 - 1)
    assert element_count("x", shape, 2) == 0
    assert from_raw("x", DATATYPES["FP16"], shape, b"").shape == shape


@pytest.mark.parametrize("name", [datatype.name for datatype in NUMERIC if datatype.dtype.kind in "iu"])
def test_limits_of_integers(name: str) -> None:
    datatype = DATATYPES[name]
    low, high = datatype.integer_range or (0, 0)
    assert from_values("x", datatype, (2,), [low, high]).tolist() == [low, high]
    for value in (low - 1, high + 1):
        with pytest.raises(InferenceError, match=f"x: {value} is no {name}, which takes {low} to {high}"):
            from_values("x", datatype, (2,), [0, value])
