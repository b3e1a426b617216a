"""Promise: cutting tensors out of a message by hand gives what protobuf gives."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.backend.errors import Code, InferenceError
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.services import wire

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


def cut(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """The same by parse_request."""
    try:
        request, raw = wire.parse_request(data)
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
@example(b"\x10\x01" * 40000 + b"\x3a\x01a")
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
    request, raw = wire.parse_request(data)
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
        (b"\x0a\x80\x80\x80\x10" + bytes(32 * MANY), "33554437 bytes besides raw_input_contents, more than 33554432"),
    ],
)
def test_what_costs_more_to_parse_than_to_send_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(InferenceError, match=says) as refused:
        wire.parse_request(data)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED


def test_what_cannot_be_cut_and_is_large_is_refused() -> None:
    """A group, which is valid and in no message here, must not open the way for what the cutting would refuse."""
    with pytest.raises(DecodeError):
        wire.parse_request(b"\x7b\x7c" + b"\x2a\x00" * MANY)


@pytest.mark.parametrize("data", [LARGE, b"\x0a\xff" + LARGE, b"\x3a\x80\x80\x80\x80\x01" + LARGE])
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        wire.parse_request(data)
