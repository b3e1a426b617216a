"""A model version that runs: what every protocol asks, in one place. Requests are checked here, then scheduled."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from time import monotonic_ns

from proxy.backend.cache import ResponseCache, key_of
from proxy.backend.dataplane import Request, check
from proxy.backend.errors import Code, InferenceError
from proxy.backend.execution import Output
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.scheduler import Scheduler
from proxy.backend.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Loaded:
    """`config` is complete, as ModelConfig shows it. cache: where its responses are kept, if they are. Methods are for
    the event loop."""

    spec: ModelSpec
    config: pb.ModelConfig
    scheduler: Scheduler
    shared_outputs: bool
    cache: ResponseCache | None = None

    async def infer(self, request: Request) -> Sequence[Output]:
        """The one answer to a request. Raises InferenceError, also for a decoupled model."""
        if self.spec.decoupled:
            raise InferenceError(
                Code.UNIMPLEMENTED,
                f"model '{self.spec.name}' is decoupled: a request has any number of answers, which this call doesn't "
                "support; use ModelStreamInfer, or generate_stream over HTTP",
            )
        if self.cache is not None:
            return await self._infer_cached(request, self.cache)
        return await self._run(request)

    async def _run(self, request: Request) -> Sequence[Output]:
        # Without a name for the task: a failed call's traceback holds this frame, and would hold its tensors.
        return await self.scheduler.submit(
            check(self.spec, request, shared_outputs=self.shared_outputs),
            request.deadline,
            request.priority,
            request.queue_timeout,
        )

    async def _infer_cached(self, request: Request, cache: ResponseCache) -> Sequence[Output]:
        began = monotonic_ns()
        check(self.spec, request, shared_outputs=self.shared_outputs)  # a wrong request is answered as such each time
        key = await key_of(self.scheduler.number, request)
        found = cache.get(key) if key is not None else None
        looked = monotonic_ns()
        if found is not None:
            self.scheduler.statistics.answered_from_cache(looked - began)
            return found
        self.scheduler.statistics.cache_miss.add(looked - began)
        outputs = await self._run(request)
        if key is not None and not self.scheduler.ended:
            cache.put(key, outputs)
        return outputs

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
