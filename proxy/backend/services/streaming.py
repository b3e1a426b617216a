"""ModelStreamInfer: many requests over one call, answered as they are ready.

What is wrong with one request is told in a message of its own, and the stream goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from proxy.backend.errors import InferenceError
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.repository import Repository
from proxy.backend.services.call import Call
from proxy.backend.services.messages import Head, Heads
from proxy.backend.services.parameters import FINAL_RESPONSE
from proxy.backend.services.wire import as_field
from proxy.backend.spec import ModelSpec
from proxy.backend.tensors import Buffer
from proxy.spawn import spawn

MOST_IN_FLIGHT = 256  # requests of one stream that are worked on; the next one waits, and the client with it

_LONGEST_TEXT = 1024  # characters of an error

_RESPONSE_FIELD = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER


class StreamInfer:
    """The method over a repository; `heads` are those that it shares with ModelInfer."""

    def __init__(self, repository: Repository, heads: Heads) -> None:
        self._repository = repository
        self._heads = heads

    async def serve(self, call: Call) -> None:
        room = asyncio.Semaphore(MOST_IN_FLIGHT)
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                await room.acquire()
                payload = await call.receive()
                if payload is None:
                    break
                task = spawn(self._answer(payload, call.message_size, call), "request of a stream")
                del payload
                running.add(task)
                task.add_done_callback(running.discard)
                task.add_done_callback(lambda _: room.release())
            while running:
                await asyncio.wait(running)
        finally:
            for task in running:
                task.cancel()

    async def _answer(self, payload: Buffer, size: int, call: Call) -> None:
        """Answer one request, for which the call holds so many bytes."""
        request_id = ""

        def hold(more: int) -> None:
            nonlocal size
            call.hold(more)
            size += more

        try:
            head, raw = await self._heads.parse(payload, hold)
            request_id = head.id
            del payload
            await self._infer(head, raw, call)
        except InferenceError as error:
            await self._tell(pb.ModelInferResponse(id=request_id), error, call)
        finally:
            call.give(size)

    async def _tell(self, response: pb.ModelInferResponse, error: InferenceError, call: Call) -> None:
        """A request has failed: that is its last response."""
        told = pb.ModelStreamInferResponse(error_message=str(error)[:_LONGEST_TEXT], infer_response=response)
        try:
            await call.send((told.SerializeToString(),))
        except InferenceError as full:  # not even for that is room; who waits for an answer must not do so for ever
            call.end(full.code, str(full))
            call.stop()

    async def _infer(self, head: Head, raw: Sequence[Buffer], call: Call) -> None:
        loaded = self._repository.find(head.model_name, head.model_version)
        spec = loaded.spec
        wanted = head.asked(spec, raw, call.deadline)
        empty_final = head.wants_empty_final_response
        del raw
        try:
            async with contextlib.aclosing(loaded.stream(wanted)) as answers:
                del wanted
                async for outputs in answers:
                    pieces = head.answer(spec, outputs, final=not spec.decoupled)
                    del outputs
                    await call.send(as_field(_RESPONSE_FIELD, pieces))
                    del pieces
        except InferenceError as error:
            # Unlike a fault of the request: who counts on the final response gets it here.
            await self._tell(_empty_final(spec, head.id), error, call)
            return
        if spec.decoupled and empty_final:
            await call.send(as_field(_RESPONSE_FIELD, [_empty_final(spec, head.id).SerializeToString()]))


def _empty_final(spec: ModelSpec, request_id: str) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=spec.name, id=request_id)
    response.parameters[FINAL_RESPONSE].bool_param = True
    return response
