"""What Triton's clients keep to themselves: the messages of a stream as they are, and requests that they don't make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from tests.parity.clients import mentions
from tests.parity.servers import Server

_RAW = np.arange(16, dtype=np.int32).tobytes()


@pytest.fixture
def stub(server: Server) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


def simple(request_id: str = "", raw: Sequence[bytes] = (_RAW, _RAW)) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="simple", id=request_id, raw_input_contents=raw)
    for number in (0, 1):
        request.inputs.add(name=f"INPUT{number}", datatype="INT32", shape=[1, 16])
    return request


def number(model: str, value: int, request_id: str = "", empty_final: bool = False) -> pb.ModelInferRequest:
    """For a model with one input, which is an INT32."""
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    name = "COUNT" if model == "repeat" else "IN"
    request.inputs.add(name=name, datatype="INT32", shape=[1]).contents.int_contents.append(value)
    if empty_final:
        request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def streamed(stub: GRPCInferenceServiceStub, *requests: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    return list(stub.ModelStreamInfer(iter(requests), timeout=30))


def by_id(messages: Sequence[pb.ModelStreamInferResponse]) -> dict[str, pb.ModelStreamInferResponse]:
    """What came, whatever the order, one message for each request."""
    found = {message.infer_response.id: message for message in messages}
    assert len(found) == len(messages)
    return found


def told_final(message: pb.ModelStreamInferResponse) -> bool | None:
    """What a message says of being its request's last one; None if it doesn't."""
    parameters = message.infer_response.parameters
    return bool(parameters["triton_final_response"].bool_param) if "triton_final_response" in parameters else None


def test_a_fault_in_a_stream_has_the_id_of_its_request(stub: GRPCInferenceServiceStub) -> None:
    unknown = pb.ModelInferRequest(model_name="nope", id="a")
    answers = by_id(streamed(stub, unknown, simple("b")))
    mentions(answers["a"].error_message, "'nope'")
    assert answers["a"].infer_response == pb.ModelInferResponse(id="a")
    assert answers["b"].error_message == ""


def test_a_failure_in_a_stream_says_that_it_is_the_last_response(stub: GRPCInferenceServiceStub) -> None:
    [failed] = streamed(stub, number("fails", 5, "a"))
    mentions(failed.error_message, "boom at 5")
    assert (failed.infer_response.model_name, failed.infer_response.id) == ("fails", "a")
    assert told_final(failed) is True


@pytest.mark.parametrize("empty_final", [False, True])
def test_a_failure_after_responses_is_the_last_response(stub: GRPCInferenceServiceStub, empty_final: bool) -> None:
    messages = streamed(stub, number("repeat", -2, "a", empty_final))
    assert [message.infer_response.id for message in messages] == ["a"] * 3
    assert [bool(message.error_message) for message in messages] == [False, False, True]
    assert [told_final(message) for message in messages] == [False, False, True]


def test_the_order_of_answers(server: Server, stub: GRPCInferenceServiceStub) -> None:
    slow = number("fails", 300, "a")
    requests = [slow, simple("b"), pb.ModelInferRequest(model_name="nope", id="c"), simple("d")]
    ids = [message.infer_response.id for message in streamed(stub, *requests)]
    # Those of the embedded server come as they are ready, from models that aren't decoupled too; Triton's wait for
    # those before them.
    assert (ids if server.is_triton else sorted(ids)) == ["a", "b", "c", "d"]


def test_a_stream_without_requests_ends(stub: GRPCInferenceServiceStub) -> None:
    assert streamed(stub) == []


def _spoilt(spoil: Callable[[pb.ModelInferRequest], Any]) -> pb.ModelInferRequest:
    request = simple()
    spoil(request)
    return request


def _contents(request: pb.ModelInferRequest) -> None:
    request.inputs[0].contents.int_contents.extend(range(16))


def _wrong_field(request: pb.ModelInferRequest) -> None:
    del request.raw_input_contents[:]
    for tensor in request.inputs:
        tensor.contents.fp32_contents.extend([0.0] * 16)


MALFORMED: dict[str, tuple[pb.ModelInferRequest, tuple[str, ...]]] = {
    "bytes for one input only": (simple(raw=[_RAW]), ("input",)),
    "bytes and contents": (_spoilt(_contents), ("INPUT0", "contents", "raw_input_contents")),
    "contents of another type": (_spoilt(_wrong_field), ("INPUT0", "INT32")),
    "too few bytes": (simple(raw=[_RAW[:60], _RAW]), ("INPUT0", "64", "60")),
    "too many bytes": (simple(raw=[_RAW + b"abcd", _RAW]), ("INPUT0", "64", "68")),
    "no datatype": (_spoilt(lambda request: request.inputs[0].ClearField("datatype")), ("INPUT0", "INT32")),
    "a negative dimension": (_spoilt(lambda request: request.inputs[0].shape.__setitem__(0, -1)), ("INPUT0",)),
    "a huge dimension": (_spoilt(lambda request: request.inputs[0].shape.__setitem__(0, 2**62)), ("INPUT0",)),
    "a parameter without value": (_spoilt(lambda request: request.parameters["foo"].SetInParent()), ("foo",)),
    "a reserved parameter": (
        _spoilt(lambda request: setattr(request.parameters["triton_foo"], "int64_param", 1)), ("triton_",),
    ),
    "a negative priority": (
        _spoilt(lambda request: setattr(request.parameters["priority"], "int64_param", -1)), ("priority",),
    ),
    "a timeout of text": (
        _spoilt(lambda request: setattr(request.parameters["timeout"], "string_param", "x")), ("timeout",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", MALFORMED)
def test_a_malformed_request_is_an_invalid_argument(stub: GRPCInferenceServiceStub, label: str) -> None:
    request, words = MALFORMED[label]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    mentions(caught.value.details(), *words)


@pytest.mark.parametrize("label", MALFORMED)
def test_a_malformed_request_in_a_stream_ends_nothing(stub: GRPCInferenceServiceStub, label: str) -> None:
    request, words = MALFORMED[label]
    answers = by_id(streamed(stub, request, simple("after")))
    mentions(answers[""].error_message, *words)
    assert answers["after"].error_message == ""


@pytest.mark.parametrize("method", ["ModelInfer", "ServerLive", "RepositoryIndex"])
def test_what_is_no_message_at_all(server: Server, method: str) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff", timeout=20)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details()


@pytest.mark.parametrize("path", ["/inference.GRPCInferenceService/Nothing", "/no.Service/Infer"])
def test_what_is_no_method(server: Server, path: str) -> None:
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
