"""Promise: what clients can make the backend hold is bounded, and what is over is given back."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from proxy.backend import budget, scheduler
from proxy.backend.dataplane import Inference
from proxy.backend.server import Backend
from proxy.config.model import Address
from tests.backend import rendezvous
from tests.backend.conftest import UNLIMITED, Local
from tests.backend.models import write_model
from tests.backend.test_queue import Stub, model_runs, numbered, tasks_end, until_waiting
from tests.support.processes import LIVENESS
from tests.support.rawh2 import H2Client, grpc_headers

LIMIT = 1_000_000
INFER = "/inference.GRPCInferenceService/ModelInfer"
VECTOR = """
input { name: "IN" data_type: TYPE_INT32 dims: -1 }
output { name: "OUT" data_type: TYPE_INT32 dims: -1 }
"""
WAITS = """
import numpy as np
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        number = int(batch["IN"][0])
        if number == 7:
            raise ValueError("seven")
        rendezvous.execute(number)
        return {"OUT": np.zeros(10**6, np.int32) if number == 6 else batch["IN"]}
"""


def vector(value: int, length: int) -> service_pb2.ModelInferRequest:
    """A request of `length` numbers (4 bytes each), the first being `value`."""
    raw = value.to_bytes(4, "little") + bytes(4 * (length - 1))
    request = service_pb2.ModelInferRequest(model_name="vector", raw_input_contents=[raw])
    request.inputs.add(name="IN", datatype="INT32", shape=[length])
    return request


@pytest.fixture
async def small(folder: Path) -> AsyncIterator[Local]:
    """A backend that holds a million bytes, with a model that waits."""
    rendezvous.reset()
    write_model(folder / "models", "vector", VECTOR, {"1/model.py": WAITS})
    backend = Backend(folder / "models", most_bytes=LIMIT)
    address = await backend.start(Address("127.0.0.1", 0, ""))
    await backend.load()
    yield Local(backend, str(address))
    rendezvous.release.set()
    await backend.stop(grace=5)


def channel_to(local: Local) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(local.target, options=UNLIMITED)


async def refused(call: grpc.aio.UnaryUnaryCall[object, object]) -> str:
    """The message of a call that goes over a limit."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return str(failed.value.details())


async def test_the_queue_of_a_model_is_bounded(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MOST_WAITING", 2)
    async with channel_to(local) as channel:
        stub = Stub(channel)
        first = stub.ModelInfer(numbered(1))
        await model_runs()
        waiting = [stub.ModelInfer(numbered(number)) for number in (2, 3)]
        await until_waiting(local, 2)
        said = await refused(stub.ModelInfer(numbered(4)))
        assert said == "model 'waits' is busy: 2 requests wait for it, which is the limit; try again later"
        rendezvous.release.set()
        for call in (first, *waiting):
            assert (await call).model_name == "waits"
        assert (await stub.ModelInfer(numbered(5))).model_name == "waits"
    assert rendezvous.ran == [1, 2, 3, 5]


async def test_the_bytes_of_requests_are_bounded_for_all_together(small: Local) -> None:
    async with channel_to(small) as channel, channel_to(small) as other:
        first = Stub(channel).ModelInfer(vector(1, 150_000))
        await model_runs()
        said = await refused(Stub(other).ModelInfer(vector(2, 150_000)))
        assert f"would exceed its limit of {LIMIT}" in said
        rendezvous.release.set()
        assert (await first).model_name == "vector"
        await tasks_end(small, 0)
        assert small.backend.budget.held == 0
        assert (await Stub(other).ModelInfer(vector(3, 150_000))).model_name == "vector"
    assert rendezvous.ran == [1, 3]


async def test_what_is_announced_and_never_sent_takes_nothing(small: Local) -> None:
    rendezvous.release.set()
    host, _, port = small.target.rpartition(":")

    def announce() -> H2Client:
        client = H2Client(socket.create_connection((host, int(port)), timeout=LIVENESS))
        client.request(grpc_headers(INFER), b"\0\x7f\xff\xff\xff", end=False)
        client.settle()
        return client

    client = await asyncio.to_thread(announce)
    async with channel_to(small) as channel:
        assert (await Stub(channel).ModelInfer(vector(1, 200_000))).model_name == "vector"
    await tasks_end(small, 1)
    assert small.backend.budget.held == 5
    client.sock.close()
    await tasks_end(small, 0)
    assert small.backend.budget.held == 0


async def test_a_message_larger_than_all_that_may_be_held_is_refused_and_its_connection_goes_on(small: Local) -> None:
    rendezvous.release.set()
    async with channel_to(small) as channel:
        for _ in range(3):
            assert str(LIMIT) in await refused(Stub(channel).ModelInfer(vector(1, 10_000_000)))
        assert (await Stub(channel).ModelInfer(vector(2, 10))).model_name == "vector"
    await tasks_end(small, 0)
    assert (rendezvous.ran, small.backend.budget.held) == ([2], 0)


async def test_what_a_compressed_message_grows_to_counts(small: Local) -> None:
    async with channel_to(small) as channel:
        compressed = Stub(channel).ModelInfer(vector(1, 300_000), compression=grpc.Compression.Gzip)
        assert f"would exceed its limit of {LIMIT}" in await refused(compressed)
    await tasks_end(small, 0)
    assert small.backend.budget.held == 0


async def test_answers_count_too(small: Local) -> None:
    rendezvous.release.set()
    async with channel_to(small) as channel:
        assert str(LIMIT) in await refused(Stub(channel).ModelInfer(vector(6, 10)))
        assert (await Stub(channel).ModelInfer(vector(1, 10))).model_name == "vector"
    await tasks_end(small, 0)
    assert small.backend.budget.held == 0


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What a reference cycle keeps stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def inferences() -> int:
    return sum(isinstance(kept, Inference) for kept in gc.get_objects())


@pytest.mark.usefixtures("_no_collector")
async def test_tensors_are_gone_with_their_call_however_it_ends(
    small: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler._log, "disabled", True)  # pytest keeps log records, with their tracebacks
    before = inferences()
    async with channel_to(small) as channel:
        stub = Stub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="seven"):
            await stub.ModelInfer(vector(7, 10))
        await tasks_end(small, 0)
        assert inferences() == before
        first = stub.ModelInfer(vector(1, 10))
        await model_runs()
        queued = [stub.ModelInfer(vector(2, 10)), stub.ModelInfer(vector(3, 10), timeout=0.2)]
        with pytest.raises(grpc.aio.AioRpcError, match=r"(?i)deadline"):
            await queued[1]
        queued[0].cancel()
        await tasks_end(small, 1)
        assert inferences() == before + 1  # the one that runs
        rendezvous.release.set()
        await first
        await tasks_end(small, 0)
        assert inferences() == before


async def test_a_model_that_fails_does_not_fill_the_log(
    small: Local, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.5, 5.0, 5.1, 5.2, 6.1])
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    small.backend.repository.find("vector", "").scheduler._quiet_until = 1.0
    async with channel_to(small) as channel:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError, match="seven"):
                await Stub(channel).ModelInfer(vector(7, 10))
    assert [record.getMessage() for record in caplog.records if "failed" in record.getMessage()] == [
        "model vector version 1 failed",  # the first of its kind
        "model vector version 1 failed",
        "model vector version 1 failed (2 more failures before this one were not logged)",
    ]
    monkeypatch.undo()


def test_the_limit_is_a_share_of_the_machine_s_memory_or_of_the_container_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = tmp_path / "memory.max"
    monkeypatch.setattr(budget, "_CONTAINER", (str(container),))
    whole = budget.default_limit()
    assert whole > 0
    container.write_text("max\n")
    assert budget.default_limit() == whole
    container.write_text("4194304\n")
    assert budget.default_limit() == 2**20


def test_a_budget() -> None:
    held = budget.Budget(10)
    held.take(10)
    with pytest.raises(budget.InferenceError, match="holds 10 bytes of messages; 1 more would exceed its limit of 10"):
        held.take(1)
    held.give(4)
    held.take(4)
    assert held.held == 10
