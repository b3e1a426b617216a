"""ModelInferRequest -> what is asked of a model, and its answer -> ModelInferResponse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import invalid
from proxy.backend.execution import Output
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.services.parameters import (
    EMPTY_FINAL_RESPONSE,
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
)
from proxy.backend.spec import ModelSpec
from proxy.backend.tensors import Buffer

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


def check_counts(request: pb.ModelInferRequest, spec: ModelSpec) -> None:
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


def asked(
    request: pb.ModelInferRequest, raw: Sequence[Buffer], deadline: float | None
) -> tuple[Request, Parameters]:
    """(what is asked of the model, the request's parameters). Raises InferenceError."""
    for tensor in request.inputs:
        if tensor.parameters:
            check_input(tensor.name, _plain(tensor.parameters, f"input '{tensor.name}'"))
    wanted = Request(_inputs(request, raw), _outputs(request), deadline=deadline)
    if not request.parameters:
        return wanted, {}
    parameters = _plain(request.parameters, "request")
    check_names(parameters, EMPTY_FINAL_RESPONSE)
    wanted.priority, wanted.queue_timeout = scheduling(parameters)
    return wanted, parameters


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


def response_of(
    spec: ModelSpec, request_id: str, parameters: Parameters, outputs: Sequence[Output]
) -> pb.ModelInferResponse:
    """The response without the tensors' contents."""
    response = pb.ModelInferResponse(model_name=spec.name, model_version=str(spec.version), id=request_id)
    for name, value in returned(parameters).items():
        put(response.parameters[name], value)
    for output in outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    return response


def put(parameter: pb.InferParameter, value: Value) -> None:
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
