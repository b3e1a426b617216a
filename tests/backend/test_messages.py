"""Promise: a request whose head is remembered means what it means when it is parsed as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.backend.dataplane import Request
from proxy.backend.errors import InferenceError
from proxy.backend.execution import Output
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.services.messages import Head, Heads
from proxy.backend.spec import ModelSpec, TensorSpec
from proxy.backend.tensors import DATATYPES, Buffer

SPEC = ModelSpec(
    name="m",
    version=3,
    directory=Path("m/3"),
    max_batch_size=0,
    inputs=tuple(TensorSpec(name, DATATYPES["INT32"], (-1,)) for name in "ABC"),
    outputs=(TensorSpec("OUT", DATATYPES["INT32"], (-1,)),),
    parameters={},
)


def understood(heads: Heads, data: bytes) -> tuple[Head, Sequence[Buffer]]:
    return asyncio.run(heads.parse(data, lambda size: None))


def message(*raw: bytes, request_id: str = "", **more: int) -> bytes:
    request = pb.ModelInferRequest(model_name="m", id=request_id, raw_input_contents=raw)
    for name, contents in zip("ABC", raw, strict=False):
        request.inputs.add(name=name, datatype="INT32", shape=[len(contents) // 4])
    for name, value in more.items():
        request.parameters[name].int64_param = value
    return request.SerializeToString()


def meaning(parsed: tuple[Head, object]) -> tuple[object, ...]:
    head, raw = parsed
    asked: Request = head.asked(SPEC, raw, 5.0)  # type: ignore[arg-type]
    inputs = [(one.name, one.datatype, one.shape, one.raw and bytes(one.raw), one.values) for one in asked.inputs]
    return head.model_name, head.id, inputs, asked.outputs, asked.priority, asked.queue_timeout, asked.deadline


def test_a_head_is_remembered_when_it_comes_again() -> None:
    heads = Heads()
    found = [understood(heads, message(bytes(8), bytes([number] * 4)))[0] for number in range(4)]
    assert found[0] is not found[1]
    assert found[2] is found[3]
    assert understood(heads, message(bytes(4), bytes(4)))[0] is not found[3]


def test_contents_are_those_of_each_request() -> None:
    heads = Heads()
    for number in range(5):
        data = message(bytes([number] * 8), bytes([9 - number] * 4), priority=2, timeout=7)
        assert meaning(understood(heads, data)) == meaning(understood(Heads(), data))
        assert meaning(understood(heads, data))[4:6] == (2, 7000)


ODD = {
    "nothing behind the head": lambda head, raw: head,
    "fewer contents": lambda head, raw: head + raw,
    "more contents": lambda head, raw: head + raw * 3,
    "very many contents": lambda head, raw: head + b"\x3a\0" * 5000,
    "another field behind": lambda head, raw: head + raw * 2 + b"\x1a\1z",
    "another field between": lambda head, raw: head + raw + b"\x1a\1z" + raw,
    "cut off": lambda head, raw: head + raw + raw[:-1],
    "cut in a length": lambda head, raw: head + raw + b"\x3a\xff",
    "a length of too many bytes": lambda head, raw: head + b"\x3a" + b"\x80" * 11 + b"\0",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_odd_messages_with_a_head_that_is_known(odd: object) -> None:
    heads = Heads()
    usual = message(bytes(8), bytes(8))
    for _ in range(3):
        understood(heads, usual)
    raw = b"\x3a\x08" + bytes(8)
    data = odd(usual[: -2 * len(raw)], raw)  # type: ignore[operator]

    def outcome(parser: Heads) -> object:
        try:
            return meaning(understood(parser, data))
        except InferenceError as error:
            return type(error), str(error)

    assert outcome(heads) == outcome(Heads())
    assert meaning(understood(heads, usual)) == meaning(understood(Heads(), usual))


def test_what_only_looks_like_contents_is_no_head() -> None:
    """A field of another number whose contents are those of a raw tensor's field, behind that field itself."""
    raw = b"\x3a\x04abcd"
    data = b"\x0a\1m" + raw + b"\x7a" + bytes((len(raw),)) + raw
    heads = Heads()
    for _ in range(4):
        head, found = understood(heads, data)
        assert ([bytes(one) for one in found], head.model_name) == ([b"abcd"], "m")


INPUT = b"\x2a\x06\x0a\x01A\x1a\x01\x01"
fields = st.sampled_from(
    [b"\x0a\1m", b"\x1a\1i", b"\x3a\x04abcd", b"\x3a\x00", INPUT, b"\x7a\x06\x3a\x04wxyz", b"\x10\x01"]
)


@settings(deadline=None)
@given(st.lists(st.lists(fields, max_size=6).map(b"".join), min_size=1, max_size=4), st.data())
@example([b"\x0a\1m\x3a\x04abcd"], None)
def test_any_sequence_of_messages(messages: list[bytes], data: st.DataObject | None) -> None:
    heads = Heads()
    for _ in range(3):
        for one in messages:
            head, raw = understood(heads, one)
            request = pb.ModelInferRequest.FromString(one)
            assert [bytes(contents) for contents in raw] == list(request.raw_input_contents)
            assert (head.model_name, head.id, head.inputs) == (request.model_name, request.id, len(request.inputs))


def test_an_answer_is_what_protobuf_would_write() -> None:
    head = understood(Heads(), message(bytes(4), request_id="x", priority=1))[0]
    head.asked(SPEC, [bytes(4)], None)
    for shape, final in (((1,), None), ((2,), None), ((1,), True), ((1,), None)):
        outputs = [Output("OUT", "INT32", shape, bytes(4 * shape[0]))]
        response = pb.ModelInferResponse.FromString(b"".join(head.answer(SPEC, outputs, final)))
        assert (response.model_name, response.model_version, response.id) == ("m", "3", "x")
        assert (list(response.outputs[0].shape), response.raw_output_contents[0]) == (list(shape), outputs[0].data)
        assert [(name, value.bool_param) for name, value in response.parameters.items()] == (
            [] if final is None else [("triton_final_response", final)]
        )
