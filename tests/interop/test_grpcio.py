"""Promise: grpcio's clients, synchronous and asyncio, work through the gate with the plain generated stub."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays, add_sub_request, check_add_sub_response


def test_a_call(inference_gate: Gate) -> None:
    with inference_gate.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
        left, right = add_sub_arrays()
        for typed in (False, True):
            response = stub.ModelInfer(add_sub_request(left, right, typed=typed), timeout=30)
            check_add_sub_response(response, left, right)


def test_threads_that_share_a_channel(inference_gate: Gate) -> None:
    with inference_gate.channel() as channel, ThreadPoolExecutor(8) as threads:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asked = [add_sub_arrays(seed) for seed in range(100)]
        answers = list(threads.map(lambda arrays: stub.ModelInfer(add_sub_request(*arrays)), asked))
    for response, arrays in zip(answers, asked, strict=True):
        check_add_sub_response(response, *arrays)


async def test_asyncio(inference_gate: Gate) -> None:
    async with inference_gate.aio_channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asked = [add_sub_arrays(seed) for seed in range(100)]
        answers = await asyncio.gather(*(stub.ModelInfer(add_sub_request(*arrays)) for arrays in asked))
    for response, arrays in zip(answers, asked, strict=True):
        check_add_sub_response(response, *arrays)


def test_a_method_that_no_server_knows(inference_gate: Gate) -> None:
    with inference_gate.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/no.such.Service/Method")(b"", timeout=30)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_each_call_is_counted_by_method_and_code(echo_gate: Gate) -> None:
    method = "/test.Echo/Unary"
    before = echo_gate.metric("requests_total", protocol="grpc", method=method, code="OK")
    with echo_gate.channel() as channel:
        for _ in range(5):
            channel.unary_unary(method)(b"counted")
    echo_gate.wait_metric("requests_total", before + 5, protocol="grpc", method=method, code="OK")
