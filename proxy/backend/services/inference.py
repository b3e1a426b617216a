"""inference.GRPCInferenceService: messages <-> what the repository and the dataplane understand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import invalid
from proxy.backend.execution import Output
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.repository import Repository
from proxy.backend.services.description import model_metadata, server_metadata, statistics
from proxy.backend.services.parameters import (
    MOST_PARAMETERS,
    Parameters,
    Value,
    check_input,
    classes,
    returned,
    scheduling,
)
from proxy.backend.services.rpc import LARGEST_MESSAGE, Call, Method, unary, unimplemented
from proxy.backend.services.wire import parse_request, response_pieces
from proxy.backend.spec import ModelSpec
from proxy.backend.tensors import Buffer

SERVICE = "inference.GRPCInferenceService"
_MOST_DIMS = 64
_MOST_OUTPUTS = 1024
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
_Answer = Callable[[Any], Message]


class InferenceService:
    """The RPCs of the service over a repository. `stopping` makes ServerReady say no."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.stopping = False

    @property
    def ready(self) -> bool:
        return self._repository.loaded and not self.stopping

    def methods(self) -> Mapping[bytes, Method]:
        """Every RPC of the service by its path; those that aren't served say so."""
        simple: dict[str, _Answer] = {
            "ServerLive": lambda _: pb.ServerLiveResponse(live=True),
            "ServerReady": lambda _: pb.ServerReadyResponse(ready=self.ready),
            "ServerMetadata": lambda _: server_metadata(),
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
        }
        found: dict[bytes, Method] = {}
        for rpc in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
            path = f"/{SERVICE}/{rpc.name}"
            if rpc.name == "ModelInfer":
                method = unary(parse_request, self._infer, rpc.input_type.full_name, LARGEST_MESSAGE)
            elif rpc.name in simple:
                parse = GetMessageClass(rpc.input_type).FromString
                method = unary(parse, _serialized(simple[rpc.name]), rpc.input_type.full_name)
            else:
                method = unimplemented(path)
            found[path.encode()] = method
        return found

    def _model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._repository.is_ready(request.name, request.version))

    def _model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        return model_metadata(self._repository, request.name, request.version)

    def _model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=self._repository.find(request.name, request.version).config)

    def _model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        return statistics(self._repository, request.name, request.version)

    async def _infer(self, parsed: tuple[pb.ModelInferRequest, Sequence[Buffer]], call: Call) -> Sequence[Buffer]:
        request, raw = parsed
        loaded = self._repository.find(request.model_name, request.model_version)
        _check_counts(request, loaded.spec)
        asked, parameters = _asked(request, raw, call.deadline)
        outputs = await loaded.infer(asked)
        return response_pieces(_response(loaded.spec, request.id, parameters, outputs), [one.data for one in outputs])


def _serialized(answer: _Answer) -> Callable[[Any, Call], Awaitable[Sequence[Buffer]]]:
    async def serve(request: Any, call: Call) -> Sequence[Buffer]:
        return (answer(request).SerializeToString(),)

    return serve


def _check_counts(request: pb.ModelInferRequest, spec: ModelSpec) -> None:
    """Before anything walks through what the client sent: it may hold millions of inputs or dimensions."""
    if len(request.inputs) > len(spec.inputs):
        raise invalid(f"model '{spec.name}' takes {len(spec.inputs)} inputs, got {len(request.inputs)}")
    if len(request.outputs) > _MOST_OUTPUTS:
        raise invalid(f"request names {len(request.outputs)} outputs, more than {_MOST_OUTPUTS}")
    for tensor in request.inputs:
        if len(tensor.shape) > _MOST_DIMS:
            given = len(tensor.shape)
            raise invalid(f"input '{tensor.name}': shape has {given} dimensions, more than {_MOST_DIMS}")


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


def _asked(request: pb.ModelInferRequest, raw: Sequence[Buffer], deadline: float | None) -> tuple[Request, Parameters]:
    """(what is asked of the model, the request's parameters). Raises InferenceError."""
    for tensor in request.inputs:
        if tensor.parameters:
            check_input(tensor.name, _plain(tensor.parameters, f"input '{tensor.name}'"))
    asked = Request(_inputs(request, raw), _outputs(request), deadline=deadline)
    if not request.parameters:
        return asked, {}
    parameters = _plain(request.parameters, "request")
    asked.priority, asked.queue_timeout = scheduling(parameters)
    return asked, parameters


def _inputs(request: pb.ModelInferRequest, raw: Sequence[Buffer]) -> list[InputTensor]:
    inputs = request.inputs
    if not raw:
        return [InputTensor(t.name, t.datatype, tuple(t.shape), values=_values(t)) for t in inputs]
    if len(raw) != len(inputs):
        raise invalid(f"raw_input_contents has {len(raw)} entries for {len(inputs)} inputs; each input needs one")
    tensors = []
    for tensor, data in zip(inputs, raw, strict=True):
        if tensor.HasField("contents"):
            raise invalid(f"input '{tensor.name}': contents must be empty when raw_input_contents is used")
        tensors.append(InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), raw=data))
    return tensors


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


def _response(
    spec: ModelSpec, request_id: str, parameters: Parameters, outputs: Sequence[Output]
) -> pb.ModelInferResponse:
    """The response without the tensors' contents."""
    response = pb.ModelInferResponse(model_name=spec.name, model_version=str(spec.version), id=request_id)
    for name, value in returned(parameters).items():
        _put(response.parameters[name], value)
    for output in outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    return response


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
