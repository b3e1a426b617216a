"""ModelInferRequest -> what is asked of a model, and its answer -> the bytes of ModelInferResponse.

Clients send the same message again and again but for the tensors' contents, which every serializer puts last. What
comes before them, the head, is understood once and found again by its bytes; so is the head of the response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import invalid
from proxy.backend.execution import Output
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.services import wire
from proxy.backend.services.parameters import (
    EMPTY_FINAL_RESPONSE,
    FINAL_RESPONSE,
    MOST_DIMS,
    MOST_OUTPUTS,
    MOST_PARAMETERS,
    Parameters,
    Value,
    check_input,
    check_names,
    classes,
    returned,
    scheduling,
    wants_empty_final_response,
)
from proxy.backend.services.rpc import cannot_be_parsed
from proxy.backend.spec import ModelSpec
from proxy.backend.tensors import Buffer
from proxy.backend.threads import turn

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_HEADS = 256  # that are remembered
_LONGEST_HEAD = 4096  # bytes
_LENGTHS = 8  # of heads, that are tried
_SEEN = 1024
_ANSWERS = 8  # heads of responses that are remembered for each of those


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a head says. inputs: name, data type and shape of each. typed: the first one that has its contents here."""

    inputs: Sequence[tuple[str, str, tuple[int, ...]]]
    typed: str | None
    wanted: Mapping[str, int]
    priority: int
    queue_timeout: int
    parameters: Parameters


class Head:
    """A request without raw_input_contents."""

    __slots__ = ("_answers", "_plan", "_request", "id", "model_name", "model_version")

    def __init__(self, request: pb.ModelInferRequest) -> None:
        self._request = request
        self._plan: _Plan | None = None
        self._answers: dict[tuple[object, ...], bytes] = {}
        self.model_name = request.model_name
        self.model_version = request.model_version
        self.id = request.id

    def asked(self, spec: ModelSpec, raw: Sequence[Buffer], deadline: float | None) -> Request:
        """What is asked of the model with these contents. Raises InferenceError."""
        plan = self._plan
        if plan is None:
            _check_counts(self._request, spec)
            plan = self._plan = _plan(self._request)
        if raw:
            if len(raw) != len(plan.inputs):
                given, wanted = len(raw), len(plan.inputs)
                raise invalid(f"raw_input_contents has {given} entries for {wanted} inputs; each input needs one")
            if plan.typed is not None:
                raise invalid(f"input '{plan.typed}': contents must be empty when raw_input_contents is used")
            tensors = [InputTensor(*one, contents) for one, contents in zip(plan.inputs, raw, strict=True)]
        else:
            tensors = [
                InputTensor(*one, None, _values(tensor))
                for one, tensor in zip(plan.inputs, self._request.inputs, strict=True)
            ]
        return Request(tensors, plan.wanted, plan.priority, plan.queue_timeout, deadline)

    @property
    def wants_empty_final_response(self) -> bool:
        """Whether a stream of a decoupled model is to end with a message of its own. Raises InferenceError."""
        return self._plan is not None and wants_empty_final_response(self._plan.parameters)

    def answer(self, spec: ModelSpec, outputs: Sequence[Output], final: bool | None = None) -> list[Buffer]:
        """The bytes of the response, in pieces. final: whether it is the last one of a stream."""
        key = (spec.name, spec.version, final, *[(output.name, output.datatype, output.shape) for output in outputs])
        head = self._answers.get(key)
        if head is None:
            head = self._answer_head(spec, outputs, final)
            if len(self._answers) >= _ANSWERS:
                self._answers.clear()
            self._answers[key] = head
        return wire.with_contents(head, [output.data for output in outputs])

    def _answer_head(self, spec: ModelSpec, outputs: Sequence[Output], final: bool | None) -> bytes:
        response = pb.ModelInferResponse(model_name=spec.name, model_version=str(spec.version), id=self.id)
        if self._plan is not None:
            for name, value in returned(self._plan.parameters).items():
                _put(response.parameters[name], value)
        if final is not None:
            response.parameters[FINAL_RESPONSE].bool_param = final
        for output in outputs:
            response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        return response.SerializeToString()

    @property
    def inputs(self) -> int:
        """How many it has."""
        return len(self._request.inputs)


class Heads:
    """Those that came lately."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self._lengths: dict[int, None] = {}
        self._seen: set[int] = set()  # hashes of heads that came once

    async def parse(self, data: Buffer, hold: Callable[[int], None]) -> tuple[Head, Sequence[Buffer]]:
        """(head, raw_input_contents, which may be views of `data`). Raises InferenceError.

        hold: is told of bytes that the request takes besides its own.
        """
        for length in self._lengths:
            known = self._known.get(bytes(data[:length]))
            if known is not None and (found := wire.contents_behind(data, length, known.inputs)) is not None:
                return known, found
        try:
            request, raw = await _parsed(data, hold)
        except DecodeError:
            raise cannot_be_parsed(pb.ModelInferRequest.DESCRIPTOR.full_name) from None
        if raw:
            self._remember(data, raw)
        return Head(request), raw

    def _remember(self, data: Buffer, raw: Sequence[Buffer]) -> None:
        """A head is worth it when it comes for the second time: with an id in it, it never does."""
        length = wire.length_of_head(data, raw)
        if not 0 < length <= _LONGEST_HEAD:
            return
        begin = bytes(data[:length])
        mark = hash(begin)
        if mark not in self._seen:
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen.add(mark)
            return
        if len(self._known) >= _HEADS or len(self._lengths) >= _LENGTHS:
            self._known.clear()
            self._lengths.clear()
        try:
            request = pb.ModelInferRequest.FromString(begin)
        except DecodeError:
            return  # what looks like contents is something else's
        # A message is the same as its parts, parsed one after the other, so that this is what a head is.
        if not request.raw_input_contents:
            self._known[begin] = Head(request)
            self._lengths[length] = None


async def _parsed(data: Buffer, hold: Callable[[int], None]) -> tuple[pb.ModelInferRequest, Sequence[Buffer]]:
    if not wire.is_long(data):
        return wire.parse_short(data)
    rest, raw = wire.cut(data)
    if wire.is_long(rest):
        # Where tensors are not raw; to go through them takes a while, and packed numbers grow.
        async with turn() as run:
            hold(wire.MOST_GROWTH * len(rest))
            request = await run(lambda: wire.parse_rest(rest))
    else:
        request = wire.parse_rest(rest)
    return request, request.raw_input_contents if raw is None else raw


def _plan(request: pb.ModelInferRequest) -> _Plan:
    for tensor in request.inputs:
        if tensor.parameters:
            check_input(tensor.name, _plain(tensor.parameters, f"input '{tensor.name}'"))
    parameters: Parameters = {}
    if request.parameters:
        parameters = _plain(request.parameters, "request")
        check_names(parameters, EMPTY_FINAL_RESPONSE)
    priority, queue_timeout = scheduling(parameters)
    inputs = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in request.inputs]
    typed = next((tensor.name for tensor in request.inputs if tensor.HasField("contents")), None)
    return _Plan(inputs, typed, _outputs(request), priority, queue_timeout, parameters)


def _check_counts(request: pb.ModelInferRequest, spec: ModelSpec) -> None:
    """Before anything walks through what the client sent: it may hold millions of inputs or dimensions."""
    if len(request.inputs) > len(spec.inputs):
        raise invalid(f"model '{spec.name}' takes {len(spec.inputs)} inputs, got {len(request.inputs)}")
    if len(request.outputs) > MOST_OUTPUTS:
        raise invalid(f"request names {len(request.outputs)} outputs, more than {MOST_OUTPUTS}")
    for tensor in request.inputs:
        if len(tensor.shape) > MOST_DIMS:
            given = len(tensor.shape)
            raise invalid(f"input '{tensor.name}': shape has {given} dimensions, more than {MOST_DIMS}")


def _plain(parameters: Mapping[str, pb.InferParameter], label: str) -> Parameters:
    """As plain values. Raises InferenceError."""
    if len(parameters) > MOST_PARAMETERS:
        raise invalid(f"{label} has {len(parameters)} parameters, more than {MOST_PARAMETERS}")
    plain: dict[str, Value] = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise invalid(f"{label}: parameter '{name}' has no value")
        plain[name] = getattr(value, kind)
    return plain


def _outputs(request: pb.ModelInferRequest) -> dict[str, int]:
    wanted: dict[str, int] = {}
    for output in request.outputs:
        parameters = output.parameters
        label = f"output '{output.name}'"
        wanted[output.name] = classes(output.name, _plain(parameters, label)) if parameters else 0
    return wanted


def _values(tensor: pb.ModelInferRequest.InferInputTensor) -> Sequence[Any]:
    label = f"input '{tensor.name}'"
    field = _CONTENTS.get(tensor.datatype)
    if field is None and tensor.datatype in ("FP16", "BF16"):
        raise invalid(f"{label}: {tensor.datatype} can only be sent in raw_input_contents")
    for found, _ in tensor.contents.ListFields():
        if found.name != field and field is not None:
            raise invalid(f"{label}: contents has {found.name}, but {tensor.datatype} goes into {field}")
    # A datatype that doesn't exist is the dataplane's to refuse.
    values: Sequence[Any] = getattr(tensor.contents, field) if field else ()
    return values


def _put(parameter: pb.InferParameter, value: Value) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        if value < 2**63:
            parameter.int64_param = value
        else:
            parameter.uint64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value
