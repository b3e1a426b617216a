"""Promise: grpclib's client (pure Python, on h2) works through the gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpclib
import pytest
from grpclib.client import Channel, UnaryUnaryMethod
from tritonclient.grpc import service_pb2

from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays, add_sub_request, check_add_sub_response
from tests.support.rawh2 import tls_context

SERVICE = "/inference.GRPCInferenceService"


@asynccontextmanager
async def open_channel(gate: Gate) -> AsyncIterator[Channel]:
    channel = Channel("127.0.0.1", gate.port, ssl=tls_context(gate.root))
    protocol = await channel.__connect__()
    lost = asyncio.Event()
    tell_grpclib = protocol.connection_lost

    def connection_lost(error: BaseException | None) -> None:
        tell_grpclib(error)
        lost.set()

    protocol.connection_lost = connection_lost  # type: ignore[method-assign]
    try:
        yield channel
    finally:
        # close() only begins to close: a loop that ended now would leave the socket open.
        channel.close()
        await lost.wait()


async def test_many_at_once(inference_gate: Gate) -> None:
    async with open_channel(inference_gate) as channel:
        infer = UnaryUnaryMethod(
            channel, f"{SERVICE}/ModelInfer", service_pb2.ModelInferRequest, service_pb2.ModelInferResponse
        )
        asked = [add_sub_arrays(seed) for seed in range(50)]
        answers = await asyncio.gather(*(infer(add_sub_request(*arrays), timeout=30) for arrays in asked))
    for response, arrays in zip(answers, asked, strict=True):
        check_add_sub_response(response, *arrays)


async def test_an_error(inference_gate: Gate) -> None:
    async with open_channel(inference_gate) as channel:
        metadata = UnaryUnaryMethod(
            channel, f"{SERVICE}/ModelMetadata", service_pb2.ModelMetadataRequest, service_pb2.ModelMetadataResponse
        )
        with pytest.raises(grpclib.GRPCError) as raised:
            await metadata(service_pb2.ModelMetadataRequest(name="no-such-model"))
    assert raised.value.status is grpclib.const.Status.NOT_FOUND
