"""Requests that can't be served: the same code or status, and a text that names the same things."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.parity.clients import Client, covers, mentions


@dataclass(frozen=True)
class Fault:
    """An inference request; `inputs` are (name, array, shape that is told in place of the array's own)."""

    label: str
    inputs: tuple[tuple[str, np.ndarray, tuple[int, ...] | None], ...]
    code: str = "INVALID_ARGUMENT"
    names: tuple[str, ...] = ()
    model: str = "simple"
    version: str = ""
    outputs: dict[str, int] = field(default_factory=dict)
    """Names, and how many classes are asked for."""


def _rows(name: str, rows: int = 1, columns: int = 16, dtype: Any = np.int32) -> tuple[str, np.ndarray, None]:
    return name, np.zeros((rows, columns), dtype), None


_NUMBER = (("IN", np.array([5], np.int32), None),)
_FINE = (_rows("INPUT0"), _rows("INPUT1"))
_NOT_FOUND = "NOT_FOUND"

FAULTS = (
    Fault("unknown model", _FINE, _NOT_FOUND, ("'nope'",), model="nope"),
    Fault("unknown version", _FINE, _NOT_FOUND, ("'simple'", "9"), version="9"),
    Fault("model that was never loaded", _NUMBER, _NOT_FOUND, ("'idle'",), model="idle"),
    Fault("decoupled model", _NUMBER, "UNIMPLEMENTED", ("decoupled",), model="repeat"),
    Fault("model that raises", _NUMBER, "INTERNAL", ("ValueError: boom at 5",), model="fails"),
    Fault("no inputs", (), names=("'simple'", "'INPUT0'")),
    Fault("missing input", _FINE[:1], names=("'simple'", "'INPUT1'")),
    Fault("one input too many", (*_FINE, _rows("FOO")), names=("'simple'", "2", "3")),
    Fault("unknown input", (_FINE[0], _rows("FOO")), names=("'simple'", "'FOO'")),
    Fault("same input twice", (_FINE[0], _FINE[0]), names=("'INPUT0'",)),
    Fault("wrong datatype", (_rows("INPUT0", dtype=np.float32), _FINE[1]), names=("'INPUT0'", "FP32", "INT32")),
    Fault("wrong shape", (_rows("INPUT0", columns=15), _FINE[1]), names=("'INPUT0'", "'simple'", "15]", "16]")),
    Fault("one dimension too many", (("INPUT0", np.zeros((1, 1, 16), np.int32), None), _FINE[1]), names=("'INPUT0'",)),
    Fault("no batch dimension", tuple((f"INPUT{one}", np.zeros(16, np.int32), None) for one in (0, 1))),
    Fault("batches that differ", (_rows("INPUT0", 2), _FINE[1]), names=("INPUT", "batch")),
    Fault("too large a batch", (_rows("INPUT0", 9), _rows("INPUT1", 9)), names=("'simple'", "8", "batch")),
    Fault(
        "too few bytes",
        tuple((f"INPUT{one}", np.zeros((1, 16), np.int32), (2, 16)) for one in (0, 1)),
        names=("'INPUT", "128", "64"),
    ),
    Fault(
        "too many strings",
        (("IN_BYTES", np.array([b"ab", b"cd"], object), (1,)),),
        names=("'IN_BYTES'", "1"),
        model="identity",
        outputs={"OUT_BYTES": 0},
    ),
    Fault("unknown output", _FINE, names=("'simple'", "'NOPE'"), outputs={"NOPE": 0}),
)


@covers("infer")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.label)
async def test_a_fault_has_its_code_and_names_what_is_wrong(client: Client, fault: Fault) -> None:
    inputs = []
    for name, array, shape in fault.inputs:
        tensor = client.input(name, array)
        if shape is not None:
            tensor.set_shape(list(shape))
        inputs.append(tensor)
    outputs = [client.output(name, classes) for name, classes in fault.outputs.items()] or None
    text = await client.refused(
        fault.code, "infer", fault.model, inputs, model_version=fault.version, outputs=outputs
    )
    mentions(text, *fault.names)
