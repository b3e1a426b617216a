"""Promise: whoever is joined with whom, each gets the answer to its own rows, once, and in order where asked."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.loaded import Loaded
from proxy.backend.repository import Repository
from tests.backend.models import write_model
from tests.support.processes import LIVENESS

CONFIG = """
max_batch_size: 8
input {{ name: "IN" data_type: TYPE_INT32 dims: -1 }}
output {{ name: "OUT" data_type: TYPE_INT32 dims: -1 }}
instance_group {{ count: 3 }}
dynamic_batching {{
  preserve_ordering: {ordered}
  max_queue_delay_microseconds: {delay}
  preferred_batch_size: 3
}}
"""
DOUBLES = """
class Model:
    def execute(self, batch):
        return {"OUT": batch["IN"] * 2}
"""
# Rows, columns, and whether the event loop has a turn before the next one comes.
requests = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3), st.booleans()), min_size=1, max_size=25)


async def _ask(loaded: Loaded, number: int, rows: int, columns: int, ended: list[int]) -> None:
    array = np.full((rows, columns), number, np.int32)
    (output,) = await loaded.infer(Request([InputTensor("IN", "INT32", array.shape, raw=array.tobytes())]))
    ended.append(number)
    assert (output.shape, bytes(output.data)) == (array.shape, (array * 2).tobytes())


async def _ask_all(asked: Sequence[tuple[int, int, bool]], folder: Path) -> list[int]:
    """The numbers of the requests in the order of their answers."""
    repository = Repository(folder)
    await repository.load()
    loaded, ended = repository.find("m", ""), list[int]()
    tasks = []
    for number, (rows, columns, turn) in enumerate(asked):
        tasks.append(asyncio.ensure_future(_ask(loaded, number, rows, columns, ended)))
        if turn:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    await asyncio.to_thread(repository.close, 5)
    return ended


@settings(max_examples=40, deadline=None)
@given(requests, st.booleans(), st.sampled_from([0, 2000]))
def test_each_gets_its_own_rows(asked: list[tuple[int, int, bool]], ordered: bool, delay: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG.format(ordered=str(ordered).lower(), delay=delay)
        write_model(Path(folder), "m", config, {"1/model.py": DOUBLES})
        ended = asyncio.run(_ask_all(asked, Path(folder)))
    assert sorted(ended) == list(range(len(asked)))
    if ordered:
        assert ended == sorted(ended)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_contents_come_back_over_grpc(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, data: st.DataObject
) -> None:
    """`grid` takes FP32 of [-1, 2] and gives it back; what has another shape, or other bytes, is refused."""
    shape = data.draw(st.lists(st.integers(-1, 5), max_size=3))
    size = data.draw(st.integers(0, 48))
    raw = data.draw(st.binary(min_size=size, max_size=size))
    request = service_pb2.ModelInferRequest(model_name="grid", raw_input_contents=[raw])
    request.inputs.add(name="IN", datatype="FP32", shape=shape)
    fits = len(shape) == 2 and shape[0] >= 0 and shape[1] == 2 and len(raw) == 8 * shape[0]
    if fits:
        answer = stub.ModelInfer(request, timeout=LIVENESS)
        assert (list(answer.outputs[0].shape), answer.raw_output_contents[0]) == (shape, raw)
        return
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(request, timeout=LIVENESS)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.data())
def test_what_fits_comes_back_over_grpc(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, rows: int, data: st.DataObject
) -> None:
    raw = data.draw(st.binary(min_size=8 * rows, max_size=8 * rows))
    request = service_pb2.ModelInferRequest(model_name="grid", raw_input_contents=[raw])
    request.inputs.add(name="IN", datatype="FP32", shape=[rows, 2])
    answer = stub.ModelInfer(request, timeout=LIVENESS)
    assert (list(answer.outputs[0].shape), answer.raw_output_contents[0]) == ([rows, 2], raw)
