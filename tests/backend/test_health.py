"""Promise: grpc.health.v1 says when the server takes requests, and tells those who watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from grpclib.client import Channel
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from proxy.backend.server import Backend
from proxy.config.model import Address
from tests.backend.conftest import Local, Running
from tests.backend.models import NUMBER_TO_NUMBER, write_model
from tests.support.processes import LIVENESS

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
CHECK = "/grpc.health.v1.Health/Check"


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService"])
async def test_check_by_another_implementation(backend: Running, service: str) -> None:
    host, _, port = backend.target.rpartition(":")
    async with Channel(host, int(port)) as channel:
        answer = await HealthStub(channel).Check(HealthCheckRequest(service=service))
    assert answer.status == SERVING


def watch(channel: grpc.aio.Channel, service: str) -> AsyncIterator[HealthCheckResponse]:
    call = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )
    return aiter(call(HealthCheckRequest(service=service), timeout=LIVENESS))


async def test_a_service_that_is_unknown(backend: Running) -> None:
    async with grpc.aio.insecure_channel(backend.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="unknown service 'nope'") as failed:
            await channel.unary_unary(CHECK)(b"\x0a\x04nope")
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND
        assert (await anext(watch(channel, "nope"))).status == HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_nonsense(backend: Running, method: str) -> None:
    async with grpc.aio.insecure_channel(backend.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be parsed") as failed:
            await channel.unary_unary(f"/grpc.health.v1.Health/{method}")(b"\xff\xff")
        assert failed.value.code() is grpc.StatusCode.INTERNAL


LOADS_ON_DEMAND = """
import pathlib, time

while not pathlib.Path(__file__).with_name("go").exists():
    time.sleep(0.01)

class Model:
    def execute(self, batch):
        return {}
"""


async def test_watch_from_loading_to_the_end(folder: Path) -> None:
    model = write_model(folder / "models", "slow", NUMBER_TO_NUMBER, {"1/model.py": LOADS_ON_DEMAND})
    backend = Backend(folder / "models")
    address = await backend.start(Address("127.0.0.1", 0, ""))
    loading = asyncio.ensure_future(backend.load())
    async with grpc.aio.insecure_channel(str(address)) as channel:
        states = watch(channel, "")
        assert (await anext(states)).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError, match=r"model 'slow' .*is being loaded") as failed:
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\x0a\x04slow")
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"") == b""
        (model / "1/go").touch()
        await loading
        assert (await anext(states)).status == SERVING
        assert await channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"") == b"\x08\x01"
        stopping = asyncio.ensure_future(backend.stop(grace=LIVENESS))
        assert (await anext(states)).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as ended:
            await anext(states)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        await stopping


async def test_a_watcher_that_leaves(local: Local) -> None:
    async with grpc.aio.insecure_channel(local.target) as channel:
        assert (await anext(watch(channel, ""))).status == SERVING
    async with asyncio.timeout(LIVENESS):
        while local.backend.running():
            await asyncio.sleep(0.01)
