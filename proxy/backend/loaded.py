"""A model version that runs: what every protocol asks, in one place. Requests are checked here, then scheduled."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from proxy.backend.dataplane import Request, check
from proxy.backend.errors import Code, InferenceError
from proxy.backend.execution import Output
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.scheduler import Scheduler
from proxy.backend.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Loaded:
    """`config` is complete, as ModelConfig shows it. Methods are for the event loop."""

    spec: ModelSpec
    config: pb.ModelConfig
    scheduler: Scheduler
    shared_outputs: bool

    async def infer(self, request: Request) -> Sequence[Output]:
        """The one answer to a request. Raises InferenceError, also for a decoupled model."""
        if self.spec.decoupled:
            raise InferenceError(
                Code.UNIMPLEMENTED,
                f"model '{self.spec.name}' is decoupled: a request has any number of answers, which this call doesn't "
                "support; use ModelStreamInfer, or generate_stream over HTTP",
            )
        # Without a name for the task: a failed call's traceback holds this frame, and would hold its tensors.
        return await self.scheduler.submit(
            check(self.spec, request, shared_outputs=self.shared_outputs),
            request.deadline,
            request.priority,
            request.queue_timeout,
        )

    async def stream(self, request: Request) -> AsyncGenerator[Sequence[Output], None]:
        """The answers to a request, any number of them for a decoupled model. Raises InferenceError, also between two.

        To be closed (`aclose`) by who stops before the end: the model then stops, too.
        """
        if not self.spec.decoupled:
            yield await self.infer(request)
            return
        answers = self.scheduler.submit_stream(
            check(self.spec, request, shared_outputs=self.shared_outputs),
            request.deadline,
            request.priority,
            request.queue_timeout,
        )
        try:
            async for outputs in answers:
                yield outputs
        finally:
            await answers.aclose()
