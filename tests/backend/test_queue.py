"""Promise: work that nobody waits for any more never runs, and what runs doesn't hold up anything else."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.backend import rendezvous
from tests.backend.conftest import Local
from tests.support.processes import LIVENESS

Stub = service_pb2_grpc.GRPCInferenceServiceStub


def numbered(value: int) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="waits", raw_input_contents=[value.to_bytes(4, "little")])
    request.inputs.add(name="IN", datatype="INT32", shape=[1])
    return request


async def model_runs() -> None:
    assert await asyncio.to_thread(rendezvous.running.acquire, timeout=LIVENESS), "the model was never called"


async def until_waiting(local: Local, count: int) -> None:
    async with asyncio.timeout(LIVENESS):
        while local.waiting != count:
            await asyncio.sleep(0.01)


async def tasks_end(local: Local, count: int) -> None:
    """Until the server has so many calls left."""
    async with asyncio.timeout(LIVENESS):
        while len(local.backend.running()) != count:
            await asyncio.sleep(0.01)


async def test_a_call_cancelled_in_the_queue_never_runs(local: Local) -> None:
    async with grpc.aio.insecure_channel(local.target) as channel:
        stub = Stub(channel)
        first = stub.ModelInfer(numbered(1))
        await model_runs()
        second, third = stub.ModelInfer(numbered(2)), stub.ModelInfer(numbered(3))
        await until_waiting(local, 2)
        second.cancel()
        await tasks_end(local, 2)
        rendezvous.release.set()
        assert (await first).model_name == (await third).model_name == "waits"
    assert rendezvous.ran == [1, 3]


async def test_a_call_whose_deadline_passes_in_the_queue_never_runs(local: Local) -> None:
    async with grpc.aio.insecure_channel(local.target) as channel:
        stub = Stub(channel)
        first = stub.ModelInfer(numbered(1))
        await model_runs()
        second, third = stub.ModelInfer(numbered(2), timeout=0.2), stub.ModelInfer(numbered(3))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await second
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await tasks_end(local, 2)
        rendezvous.release.set()
        await first
        await third
    assert rendezvous.ran == [1, 3]


async def test_a_connection_lost_takes_its_queued_calls_along(local: Local) -> None:
    staying, leaving = grpc.aio.insecure_channel(local.target), grpc.aio.insecure_channel(
        local.target, options=[("grpc.use_local_subchannel_pool", 1)]
    )
    first = Stub(staying).ModelInfer(numbered(1))
    await model_runs()
    second = Stub(leaving).ModelInfer(numbered(2))
    await until_waiting(local, 1)
    await leaving.close(grace=None)
    with pytest.raises(asyncio.CancelledError):
        await second
    await tasks_end(local, 1)
    rendezvous.release.set()
    await first
    await staying.close()
    assert rendezvous.ran == [1]


async def test_a_busy_model_does_not_hold_up_the_server(local: Local) -> None:
    async with grpc.aio.insecure_channel(local.target) as channel:
        stub = Stub(channel)
        busy = stub.ModelInfer(numbered(1))
        await model_runs()
        assert (await stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=LIVENESS)).live
        assert (await stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="waits"), timeout=LIVENESS)).name
        rendezvous.release.set()
        await busy


async def test_running_calls_end_and_the_model_is_finalized_on_stop(local: Local) -> None:
    async with grpc.aio.insecure_channel(local.target) as channel:
        running = Stub(channel).ModelInfer(numbered(1))
        await model_runs()
        stopping = asyncio.ensure_future(local.backend.stop(grace=LIVENESS))
        await asyncio.sleep(0)
        assert not stopping.done()
        rendezvous.release.set()
        assert (await running).model_name == "waits"
        await stopping
    assert (rendezvous.ran, rendezvous.finalized) == ([1], ["waits"])


async def test_calls_that_outlast_the_grace_are_cut_off(local: Local) -> None:
    async with grpc.aio.insecure_channel(local.target) as channel:
        running = Stub(channel).ModelInfer(numbered(1))
        await model_runs()
        stopping = asyncio.ensure_future(local.backend.stop(grace=0.1))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        rendezvous.release.set()
        await stopping
