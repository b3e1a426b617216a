"""Promise: a bare HTTP/2 client on `h2`, which checks every frame it gets against RFC 9113, works through the gate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays, add_sub_request, check_add_sub_response
from tests.support.rawh2 import H2Client, grpc_headers, grpc_message, tls_context, tls_socket


@pytest.fixture
def client(inference_gate: Gate) -> Iterator[H2Client]:
    client = H2Client(tls_socket(inference_gate.port, tls_context(inference_gate.root)))
    yield client
    client.close()


def test_interleaved_calls_on_one_connection(client: H2Client) -> None:
    asked = {}
    for seed in range(20):
        arrays = add_sub_arrays(seed)
        body = grpc_message(add_sub_request(*arrays).SerializeToString())
        asked[client.request(grpc_headers("/inference.GRPCInferenceService/ModelInfer"), body)] = arrays
    for stream, arrays in asked.items():
        reply = client.finish(stream)
        assert reply.headers[":status"] == "200"
        assert reply.headers["content-type"].startswith("application/grpc")
        assert reply.trailers["grpc-status"] == "0"
        check_add_sub_response(service_pb2.ModelInferResponse.FromString(bytes(reply.body[5:])), *arrays)


def test_a_request_in_many_small_frames(client: H2Client) -> None:
    left, right = add_sub_arrays()
    body = grpc_message(add_sub_request(left, right).SerializeToString())
    stream = client.request(grpc_headers("/inference.GRPCInferenceService/ModelInfer"), end=False)
    for start in range(0, len(body), 7):
        client.h2.send_data(stream, body[start : start + 7], pad_length=start % 3 or None)
        client.flush()
    client.h2.end_stream(stream)
    client.flush()
    reply = client.finish(stream)
    check_add_sub_response(service_pb2.ModelInferResponse.FromString(bytes(reply.body[5:])), left, right)


def test_pings_are_answered(client: H2Client) -> None:
    for _ in range(3):
        client.settle()
    assert client.pongs == [b"settle.."] * 3


def test_own_window_is_obeyed(client: H2Client) -> None:
    # h2 raises FlowControlError when the peer sends more than the windows allow: 65,535 bytes at first.
    body = grpc_message(bytes(np.random.default_rng(0).bytes(1000)))
    stream = client.request(grpc_headers("/no.such.Service/Method"), body)
    assert client.finish(stream).grpc_status == "12"
