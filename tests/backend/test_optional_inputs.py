"""Promise: requests that leave out different optional inputs run apart, and one without any is one row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from proxy.backend.batching import MOST_SHAPES
from tests.backend import rendezvous
from tests.backend.serving import (
    Array,
    Start,
    answer,
    message,
    starting,
)
from tests.support.processes import LIVENESS, wait_for

BATCHING = "dynamic_batching {}"

OPTIONAL = """
max_batch_size: 8
input { name: "A" data_type: TYPE_INT32 dims: 1 optional: true }
input { name: "B" data_type: TYPE_INT32 dims: 1 optional: true }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
"""
SUMS = """
import numpy as np
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        if batch and any((array == -1).any() for array in batch.values()):
            rendezvous.execute(-1)
        else:
            rendezvous.ran.append(("".join(sorted(batch)), max(map(len, batch.values()), default=0)))
        if not batch:
            return {"OUT": np.full((1, 1), 77, np.int32)}
        return {"OUT": sum(array * (10 if name == "B" else 1) for name, array in batch.items())}
"""


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    with starting(folder) as start:
        yield start


def column(*values: int) -> Array:
    return np.array(values, np.int32).reshape(-1, 1)


def test_requests_with_other_inputs_left_out_are_not_joined(start: Start) -> None:
    served = start(OPTIONAL + BATCHING, SUMS)
    busy = served.stub.ModelInfer.future(message("m", A=column(-1)), timeout=LIVENESS)
    assert rendezvous.running.acquire(timeout=LIVENESS)
    asked = [
        {"A": column(1)}, {"B": column(2)}, {"A": column(3), "B": column(4)}, {"A": column(5, 6)},
        {"B": column(7), "A": column(8)}, {"B": column(9)},
    ]  # fmt: skip
    calls = [served.stub.ModelInfer.future(message("m", **arrays), timeout=LIVENESS) for arrays in asked]
    served.until_waiting("m", len(asked))
    rendezvous.release.set()
    assert answer(busy.result()).tolist() == [[-1]]
    assert [answer(call.result()).ravel().tolist() for call in calls] == [[1], [20], [43], [5, 6], [78], [90]]
    assert sorted(ran for ran in rendezvous.ran if ran != -1) == [("A", 3), ("AB", 2), ("B", 2)]
    served.until_idle()


@pytest.mark.parametrize("batching", ["", BATCHING], ids=["alone", "batched"])
def test_a_request_without_any_input_is_one_row(start: Start, batching: str) -> None:
    served = start(OPTIONAL + batching, SUMS)
    metadata = served.stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="m"))
    assert list(metadata.outputs[0].shape) == [-1, 1]
    calls = [served.stub.ModelInfer.future(message("m"), timeout=LIVENESS) for _ in range(5)]
    assert [answer(call.result()).tolist() for call in calls] == [[[77]]] * 5
    assert rendezvous.ran == [("", 0)] * 5
    served.until_idle()


def test_requests_without_any_input_wait_as_others_do(start: Start) -> None:
    served = start(OPTIONAL + BATCHING, SUMS)
    busy = served.stub.ModelInfer.future(message("m", A=column(-1)), timeout=LIVENESS)
    assert rendezvous.running.acquire(timeout=LIVENESS)
    calls = [served.stub.ModelInfer.future(message("m"), timeout=LIVENESS) for _ in range(MOST_SHAPES + 1)]
    wait_for(
        lambda: served.loaded("m").scheduler.waiting + sum(call.done() for call in calls) == len(calls), "them to come"
    )
    rendezvous.release.set()
    busy.result()
    assert [call.details() for call in calls if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED] == []
