"""inference.GRPCInferenceService: messages <-> what the repository and the dataplane understand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from proxy import __version__
from proxy.backend.dataplane import InputTensor
from proxy.backend.errors import Code, InferenceError, invalid
from proxy.backend.execution import Output
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.repository import Loaded, Repository
from proxy.backend.services.rpc import LARGEST_MESSAGE, Call, Method, unary, unimplemented
from proxy.backend.services.wire import parse_request, response_pieces
from proxy.backend.spec import ModelSpec, TensorSpec
from proxy.backend.statistics import Duration
from proxy.backend.tensors import Buffer

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ("model_configuration", "statistics")
"""Those of https://docs.nvidia.com/deeplearning/triton-inference-server/ that are served in full."""

_MOST_DIMS = 64
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
            "ServerMetadata": _server_metadata,
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
        loaded = self._repository.find(request.name, request.version)
        spec = loaded.spec
        return pb.ModelMetadataResponse(
            name=spec.name,
            versions=[str(version.number) for version in self._repository.models[spec.name].ready()],
            platform=loaded.config.platform or loaded.config.backend,
            inputs=[_tensor_metadata(spec, tensor) for tensor in spec.inputs],
            outputs=[_tensor_metadata(spec, tensor) for tensor in spec.outputs],
        )

    def _model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=self._repository.find(request.name, request.version).config)

    def _model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Of all versions that are ready; of one model, or of one version, if it is named."""
        if request.version:
            found = [self._repository.find(request.name, request.version)]
        elif request.name:
            self._repository.find(request.name, "")  # or says why not
            found = [one.loaded for one in self._repository.models[request.name].ready() if one.loaded]
        else:
            found = [
                one.loaded for model in self._repository.models.values() for one in model.ready() if one.loaded
            ]
        return pb.ModelStatisticsResponse(model_stats=[_statistics(loaded) for loaded in found])

    async def _infer(self, parsed: tuple[pb.ModelInferRequest, Sequence[Buffer]], call: Call) -> Sequence[Buffer]:
        request, raw = parsed
        loaded = self._repository.find(request.model_name, request.model_version)
        _check_counts(request, loaded.spec)
        _check_parameters(request)
        wanted = [output.name for output in request.outputs]
        priority, timeout = _scheduling(request)
        outputs = await loaded.infer(_inputs(request, raw), wanted, call.deadline, priority, timeout)
        return _response(loaded.spec, request.id, outputs)


def _serialized(answer: _Answer) -> Callable[[Any, Call], Awaitable[Sequence[Buffer]]]:
    async def serve(request: Any, call: Call) -> Sequence[Buffer]:
        return (answer(request).SerializeToString(),)

    return serve


def _server_metadata(_: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name="tensorgate", version=__version__, extensions=EXTENSIONS)


def _statistics(loaded: Loaded) -> pb.ModelStatistics:
    made = loaded.scheduler.statistics
    stats = pb.ModelStatistics(
        name=loaded.spec.name,
        version=str(loaded.spec.version),
        last_inference=made.last_inference,
        inference_count=made.inference_count,
        execution_count=made.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(made.success),
            fail=_duration(made.fail),
            queue=_duration(made.queue),
            compute_input=_duration(made.compute_input),
            compute_infer=_duration(made.compute_infer),
            compute_output=_duration(made.compute_output),
            cache_hit=pb.StatisticDuration(),
            cache_miss=pb.StatisticDuration(),
        ),
    )
    for rows, batch in sorted(made.batches.items()):
        stats.batch_stats.add(
            batch_size=rows,
            compute_input=_duration(batch.compute_input),
            compute_infer=_duration(batch.compute_infer),
            compute_output=_duration(batch.compute_output),
        )
    return stats


def _duration(made: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=made.count, ns=made.ns)


def _tensor_metadata(spec: ModelSpec, tensor: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    shape = (-1, *tensor.dims) if spec.max_batch_size else tensor.dims
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype.name, shape=shape)


def _check_counts(request: pb.ModelInferRequest, spec: ModelSpec) -> None:
    """Before anything walks through what the client sent: it may hold millions of inputs or dimensions."""
    if len(request.inputs) > len(spec.inputs):
        raise invalid(f"model '{spec.name}' takes {len(spec.inputs)} inputs, got {len(request.inputs)}")
    for tensor in request.inputs:
        if len(tensor.shape) > _MOST_DIMS:
            given = len(tensor.shape)
            raise invalid(f"input '{tensor.name}': shape has {given} dimensions, more than {_MOST_DIMS}")


def _check_parameters(request: pb.ModelInferRequest) -> None:
    """Parameters that would change the meaning of the request are refused; a model sees none of the others."""
    for tensor in request.inputs:
        if tensor.parameters:
            _refuse(tensor.parameters, f"input '{tensor.name}'", "shared_memory_region")
    for output in request.outputs:
        if output.parameters:
            _refuse(output.parameters, f"output '{output.name}'", "shared_memory_region", "classification")
    for name, value in request.parameters.items():
        if value.WhichOneof("parameter_choice") is None:
            raise invalid(f"parameter '{name}' has no value")


def _scheduling(request: pb.ModelInferRequest) -> tuple[int, int]:
    """(priority, time in the queue in ns) that a request asks for, 0 where it doesn't: Triton's parameters."""
    values = []
    for name in ("priority", "timeout"):
        if name not in request.parameters:
            values.append(0)
            continue
        given = request.parameters[name]
        kind = given.WhichOneof("parameter_choice")
        if kind not in ("int64_param", "uint64_param"):
            raise invalid(f"parameter '{name}' is a {kind}; it must be an integer, int64_param or uint64_param")
        value = int(getattr(given, kind))
        if value < 0:
            raise invalid(f"parameter '{name}' is {value}; it must not be negative")
        values.append(value)
    return values[0], values[1] * 1000  # microseconds


def _refuse(parameters: Mapping[str, pb.InferParameter], label: str, *names: str) -> None:
    for name in names:
        if name in parameters:
            raise InferenceError(Code.UNIMPLEMENTED, f"{label}: parameter '{name}' is not supported by this server")


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


def _response(spec: ModelSpec, request_id: str, outputs: Sequence[Output]) -> list[Buffer]:
    response = pb.ModelInferResponse(model_name=spec.name, model_version=str(spec.version), id=request_id)
    for output in outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    return response_pieces(response, [output.data for output in outputs])
