"""Promise: cutting tensors out of a message by hand gives what protobuf gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.backend.errors import Code, InferenceError
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.services import wire
from proxy.backend.tensors import Buffer

LARGE = bytes(range(256)) * 200
pieces = st.one_of(
    st.binary(max_size=40),
    st.just(LARGE),
    st.sampled_from([b"\x3a\x01a", b"\x0a\x02ab", b"\x3a\x00", b"\x08\x01", b"\x09" + bytes(8), b"\x0d" + bytes(4)]),
)


def whole(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """What protobuf makes of a message: (the message without raw contents, those contents); None if it refuses it."""
    try:
        request = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        return None
    raw = list(request.raw_input_contents)
    request.ClearField("raw_input_contents")
    return request.SerializeToString(deterministic=True), raw


def parsed(data: bytes) -> tuple[pb.ModelInferRequest, Sequence[Buffer]]:
    """The request and its raw contents, put together as services.messages does."""
    if not wire.is_long(data):
        return wire.parse_short(data)
    rest, raw = wire.cut(data)
    request = wire.parse_rest(rest)
    return request, request.raw_input_contents if raw is None else raw


def cut(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """The same by cutting."""
    try:
        request, raw = parsed(data)
    except DecodeError:
        return None
    contents = [bytes(element) for element in raw]
    request.ClearField("raw_input_contents")
    return request.SerializeToString(deterministic=True), contents


@settings(deadline=None)
@given(st.lists(pieces, max_size=6).map(b"".join))
@example(LARGE)
@example(b"\x3a\xff\xff\xff\xff\x0f" + LARGE)
@example(b"\x3a" + b"\x80" * 11 + LARGE)
@example(b"\x0b\x0c" + b"\x3a\x80\x90\x03" + LARGE[:51200])
@example(b"\x10\x01" * 20000 + b"\x3a\x01a")
def test_cut_is_what_protobuf_says(data: bytes) -> None:
    assert cut(data) == whole(data)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=100) | st.just(LARGE), max_size=4), st.text(max_size=20))
@example([LARGE, b"", b"x"], "id")
def test_a_request_survives(raw: list[bytes], name: str) -> None:
    request = pb.ModelInferRequest(model_name=name, id="7", raw_input_contents=raw)
    request.inputs.add(name="IN", datatype="BYTES", shape=[1, 2])
    data = request.SerializeToString()
    assert cut(data) == whole(data)
    assert cut(data) is not None


@settings(deadline=None)
@given(st.lists(st.binary(max_size=100) | st.just(LARGE), max_size=4))
@example([LARGE * 4, b"", b"x", LARGE])
def test_a_response_is_what_protobuf_would_write(raw: list[bytes]) -> None:
    response = pb.ModelInferResponse(model_name="m", id="7")
    response.outputs.add(name="OUT", datatype="BYTES", shape=[1])
    joined = b"".join(wire.with_contents(response.SerializeToString(), [memoryview(element) for element in raw]))
    parsed = pb.ModelInferResponse.FromString(joined)
    assert list(parsed.raw_output_contents) == raw
    assert (parsed.model_name, parsed.id, parsed.outputs[0].name) == ("m", "7", "OUT")


def test_a_large_tensor_is_a_view_of_the_message() -> None:
    data = pb.ModelInferRequest(model_name="m", raw_input_contents=[LARGE]).SerializeToString()
    request, raw = parsed(data)
    (element,) = raw
    assert isinstance(element, memoryview)
    assert element.obj is data
    assert not request.raw_input_contents


def test_a_large_output_is_sent_as_it_is() -> None:
    output = memoryview(LARGE)
    assert any(piece is output for piece in wire.with_contents(b"", [output]))


MANY = 2**20


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x2a\x00" * MANY, "more than 4096 fields"),
        (b"\x3a\x00" * MANY, "more than 4096 fields"),
        (b"\x0a\x80\x80\x80\x10" + bytes(32 * MANY), "33554437 bytes besides raw_input_contents, more than 16777216"),
    ],
)
def test_what_costs_more_to_parse_than_to_send_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(InferenceError, match=says) as refused:
        parsed(data)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED


INPUT = pb.ModelInferRequest.InferInputTensor
WORDS = INPUT(name="IN", contents={"bytes_contents": [b""] * 70_000})
FLOATS = INPUT(name="IN", contents={"fp32_contents": [1.0] * 200_000})
PARAMETERS = {str(number): pb.InferParameter(int64_param=1) for number in range(70_000)}


@pytest.mark.parametrize(
    "request_",
    [
        pb.ModelInferRequest(inputs=[WORDS]),
        pb.ModelInferRequest(inputs=[INPUT(name="IN", parameters=PARAMETERS)]),
        pb.ModelInferRequest(outputs=[{"name": "OUT", "parameters": PARAMETERS}]),
    ],
    ids=["elements", "parameters of an input", "parameters of an output"],
)
def test_what_is_many_within_a_field_is_refused(request_: pb.ModelInferRequest) -> None:
    with pytest.raises(InferenceError, match=r"more than 65536 elements or parameters; send .* raw_input_contents"):
        parsed(request_.SerializeToString())


def test_parameters_of_a_request_are_fields_of_it() -> None:
    with pytest.raises(InferenceError, match="more than 4096 fields"):
        parsed(pb.ModelInferRequest(parameters=PARAMETERS).SerializeToString())


def test_packed_numbers_are_one_field() -> None:
    request, _ = parsed(pb.ModelInferRequest(inputs=[FLOATS] * 3).SerializeToString())
    assert [len(tensor.contents.fp32_contents) for tensor in request.inputs] == [200_000] * 3


def test_fields_of_any_message_are_counted() -> None:
    load = pb.RepositoryModelLoadRequest(
        parameters={str(number): pb.ModelRepositoryParameter(string_param="x") for number in range(9000)}
    )
    with pytest.raises(InferenceError, match="more than 4096 fields"):
        wire.check_fields(load.SerializeToString())
    wire.check_fields(pb.RepositoryModelLoadRequest(model_name="m").SerializeToString())


def test_what_cannot_be_cut_and_is_large_is_refused() -> None:
    """A group, which is valid and in no message here, must not open the way for what the cutting would refuse."""
    with pytest.raises(DecodeError):
        parsed(b"\x7b\x7c" + b"\x2a\x00" * MANY)


@pytest.mark.parametrize("data", [LARGE, b"\x0a\xff" + LARGE, b"\x3a\x80\x80\x80\x80\x01" + LARGE])
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        parsed(data)
