"""grpc.health.v1.Health: whether the server takes requests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from google.protobuf.message import DecodeError

from proxy.backend.errors import Code, InferenceError
from proxy.backend.protos import health_pb2 as pb
from proxy.backend.services.rpc import Call, Method, unary
from proxy.backend.tensors import Buffer

SERVICE = "grpc.health.v1.Health"


class HealthService:
    """Health of `services`, who all share one state, and of the server as a whole (the empty name)."""

    def __init__(self, services: Sequence[str]) -> None:
        self._known = {"", *services}
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()

    def methods(self) -> Mapping[bytes, Method]:
        check = unary(pb.HealthCheckRequest.FromString, self._check, "grpc.health.v1.HealthCheckRequest")
        return {f"/{SERVICE}/Check".encode(): check, f"/{SERVICE}/Watch".encode(): Method(self._watch)}

    def set_serving(self, serving: bool) -> None:
        """Tell everyone who watches."""
        self._serving = serving
        self._wake()

    def close(self) -> None:
        """Say NOT_SERVING from now on and end what watches: such a call would otherwise never end."""
        self._closed = True
        self.set_serving(False)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self) -> pb.HealthCheckResponse.ServingStatus:
        return pb.HealthCheckResponse.SERVING if self._serving else pb.HealthCheckResponse.NOT_SERVING

    async def _check(self, request: pb.HealthCheckRequest, call: Call) -> Sequence[Buffer]:
        if request.service not in self._known:
            raise InferenceError(Code.NOT_FOUND, f"unknown service '{request.service}'")
        return (pb.HealthCheckResponse(status=self._status()).SerializeToString(),)

    async def _watch(self, call: Call) -> None:
        payload = await call.receive()
        try:
            request = pb.HealthCheckRequest.FromString(bytes(payload or b""))
        except DecodeError:
            raise InferenceError(Code.INTERNAL, "request message cannot be parsed as HealthCheckRequest") from None
        told = None
        while True:
            changed = self._changed  # before the status is read, lest a change in between goes unseen
            known = request.service in self._known
            status = self._status() if known else pb.HealthCheckResponse.SERVICE_UNKNOWN
            if status != told:
                await call.send((pb.HealthCheckResponse(status=status).SerializeToString(),))
                told = status
            elif self._closed:
                raise InferenceError(Code.UNAVAILABLE, "server is shutting down")
            else:
                await changed.wait()
