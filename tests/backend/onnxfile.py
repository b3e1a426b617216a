"""ONNX files made by hand, so that the tests need no exporter: one node, its inputs and its outputs.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Sequence

ELEMENT = {"FP32": 1, "UINT8": 2, "INT32": 6, "INT64": 7, "BYTES": 8, "BOOL": 9, "FP16": 10, "FP64": 11, "BF16": 16}
Dims = Sequence[int | str]


def onnx_file(operator: str, inputs: dict[str, tuple[str, Dims]], outputs: dict[str, tuple[str, Dims]]) -> bytes:
    """A model of one operator. Tensors are name -> (data type, dims); a dim that is text has any size."""
    node = b"".join([*(_bytes(1, name.encode()) for name in inputs), *(_bytes(2, name.encode()) for name in outputs)])
    graph = [_bytes(1, node + _bytes(4, operator.encode())), _bytes(2, b"graph")]
    graph += [_bytes(11, _value(name, *tensor)) for name, tensor in inputs.items()]
    graph += [_bytes(12, _value(name, *tensor)) for name, tensor in outputs.items()]
    return _number(1, 8) + _bytes(7, b"".join(graph)) + _bytes(8, _bytes(1, b"") + _number(2, 17))


def _value(name: str, datatype: str, dims: Dims) -> bytes:
    shape = b"".join(_bytes(1, _bytes(2, dim.encode()) if isinstance(dim, str) else _number(1, dim)) for dim in dims)
    tensor = _number(1, ELEMENT[datatype]) + _bytes(2, shape)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*octets, value])
