"""The classification extension: the largest elements of an output, each as `value:index:label`.

https://docs.nvidia.com/deeplearning/triton-inference-server/ calls it so; the texts are those of Triton, since clients
take them apart.
"""

from __future__ import annotations

import numpy as np

from proxy.backend.spec import TensorSpec
from proxy.backend.tensors import BF16, Array


def classify(array: Array, spec: TensorSpec, classes: int, *, batched: bool) -> Array:
    """The `classes` largest elements, or all if there are fewer, largest first: an array of bytes, [classes], or
    [rows, classes] where the first dimension is the batch. Equal ones keep their order; NaN comes last."""
    if spec.datatype is BF16 and array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    rows = array.reshape(array.shape[0] if batched else 1, -1)
    keys = rows if rows.dtype.kind in "iub" else -rows.astype(np.float64)
    # Descending and stable: integers and booleans can't all be negated, so those are turned round twice.
    if rows.dtype.kind in "iub":
        order = rows.shape[1] - 1 - np.argsort(keys[:, ::-1], axis=1, kind="stable")[:, ::-1]
    else:
        order = np.argsort(keys, axis=1, kind="stable")
    order = order[:, :classes]
    texts = [
        [_text(row[index], int(index), spec.labels) for index in chosen]
        for row, chosen in zip(rows, order, strict=True)
    ]
    named = np.empty(order.shape, object)
    named[:] = texts
    return named if batched else named.reshape(-1)


def _text(value: np.generic, index: int, labels: tuple[str, ...]) -> bytes:
    number = f"{float(value):f}" if value.dtype.kind == "f" else str(int(value))
    label = f":{labels[index]}" if index < len(labels) else ""
    return f"{number}:{index}{label}".encode()
