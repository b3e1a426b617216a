"""inference.GRPCInferenceService: messages <-> what the repository and the dataplane understand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from proxy.backend.errors import Code, InferenceError, invalid
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.repository import Repository
from proxy.backend.services.description import model_metadata, server_metadata, statistics
from proxy.backend.services.messages import Heads
from proxy.backend.services.rpc import LARGEST_MESSAGE, Call, Method, cannot_be_parsed, unary, unimplemented
from proxy.backend.services.streaming import StreamInfer
from proxy.backend.services.wire import check_fields
from proxy.backend.tensors import Buffer
from proxy.backend.threads import turn

SERVICE = "inference.GRPCInferenceService"
_Answer = Callable[[Any], Message]


class InferenceService:
    """The RPCs of the service over a repository. `stopping` makes ServerReady say no."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._heads = Heads()
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
        longer: dict[str, Callable[[Any, Call], Awaitable[Sequence[Buffer]]]] = {
            "RepositoryIndex": self._index,
            "RepositoryModelUnload": self._unload,
        }
        found: dict[bytes, Method] = {}
        for rpc in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
            path, kind = f"/{SERVICE}/{rpc.name}", rpc.input_type.full_name
            parse = GetMessageClass(rpc.input_type).FromString
            if rpc.name == "ModelInfer":
                method = unary(_as_it_is, self._infer, kind, LARGEST_MESSAGE)
            elif rpc.name == "ModelStreamInfer":
                method = Method(StreamInfer(self._repository, self._heads).serve, LARGEST_MESSAGE, streams=True)
            elif rpc.name in simple:
                method = unary(parse, _serialized(simple[rpc.name]), kind)
            elif rpc.name == "RepositoryModelLoad":
                method = Method(self._load, LARGEST_MESSAGE)
            elif rpc.name in longer:
                method = unary(parse, longer[rpc.name], kind)
            else:
                method = unimplemented(path, not_served(rpc.name))
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

    async def _infer(self, payload: Buffer, call: Call) -> Sequence[Buffer]:
        head, raw = await self._heads.parse(payload, call.hold)
        del payload
        loaded = self._repository.find(head.model_name, head.model_version)
        outputs = await loaded.infer(head.asked(loaded.spec, raw, call.deadline))
        return head.answer(loaded.spec, outputs)

    async def _index(self, request: pb.RepositoryIndexRequest, call: Call) -> Sequence[Buffer]:
        _check_repository(request.repository_name)
        await self._repository.refresh()
        response = pb.RepositoryIndexResponse()
        for entry in self._repository.index(request.ready):
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return (response.SerializeToString(),)

    async def _load(self, call: Call) -> None:
        await self._load_as(await self._load_asked(call))
        call.write((b"",))

    async def _load_asked(self, call: Call) -> pb.RepositoryModelLoadRequest:
        payload = await call.receive()
        self._repository.check_explicit()  # before anything is made of what may be large
        if payload is None:
            raise InferenceError(Code.INTERNAL, "request has no message; a RepositoryModelLoadRequest is expected")
        async with turn() as run:
            call.hold(2 * len(payload))  # for the copy that protobuf reads, and for the files that it makes of it
            return await run(lambda: _load_request(payload))

    async def _load_as(self, request: pb.RepositoryModelLoadRequest) -> None:
        _check_repository(request.repository_name)
        config: str | None = None
        files: dict[str, bytes] = {}
        for name, value in request.parameters.items():
            if name == "config":
                config = _parameter(name, value, "string_param")
            elif name.startswith("file:"):
                files[name.removeprefix("file:")] = _parameter(name, value, "bytes_param")
            else:
                raise invalid(f"unrecognized load parameter '{name:.100}'; there are 'config' and 'file:<path>'")
        await self._repository.load_model(request.model_name, config, files)

    async def _unload(self, request: pb.RepositoryModelUnloadRequest, call: Call) -> Sequence[Buffer]:
        _check_repository(request.repository_name)
        if "unload_dependents" in request.parameters:  # there are no ensembles, and so no dependents
            _parameter("unload_dependents", request.parameters["unload_dependents"], "bool_param")
        await self._repository.unload_model(request.model_name)
        return (b"",)


def not_served(name: str) -> str:
    """Why an RPC of the service, or its REST counterpart, isn't served, and what to do instead."""
    if "SharedMemory" in name:
        return "this server has no shared memory; send tensors in the request (raw_input_contents, binary data)"
    if name == "TraceSetting":
        return "this server has no tracing; the access log and the metrics of the gate in front tell of each call"
    if name == "LogSettings":
        return "the log cannot be set up over the network; start the server with --log-level"
    return "it is not part of this server"


def _as_it_is(payload: Buffer) -> Buffer:
    return payload


def _load_request(payload: Buffer) -> pb.RepositoryModelLoadRequest:
    check_fields(payload)
    try:
        return pb.RepositoryModelLoadRequest.FromString(bytes(payload))
    except DecodeError:
        raise cannot_be_parsed(pb.RepositoryModelLoadRequest.DESCRIPTOR.full_name) from None


def _check_repository(name: str) -> None:
    if name:
        raise InferenceError(
            Code.UNIMPLEMENTED, "'repository_name' specification is not supported: there is one; leave it empty"
        )


def _parameter(name: str, value: pb.ModelRepositoryParameter, kind: str) -> Any:
    if value.WhichOneof("parameter_choice") != kind:
        raise invalid(f"invalid value type for parameter '{name:.100}', expected {kind}")
    return getattr(value, kind)


def _serialized(answer: _Answer) -> Callable[[Any, Call], Awaitable[Sequence[Buffer]]]:
    async def serve(request: Any, call: Call) -> Sequence[Buffer]:
        return (answer(request).SerializeToString(),)

    return serve


