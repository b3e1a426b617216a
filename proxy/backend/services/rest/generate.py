"""POST /v2/models/M/generate and generate_stream: plain JSON objects for models of text, as in Triton.

A request's keys that are inputs become tensors, the others are parameters; an answer's outputs become keys. The answers
of generate_stream are server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import Code, InferenceError, invalid
from proxy.backend.execution import Output
from proxy.backend.repository import Repository
from proxy.backend.services.parameters import MOST_PARAMETERS
from proxy.backend.services.rest.asked import Asked, check_parameter, deduced, parsed, request_id_of
from proxy.backend.services.rest.exchange import Exchange
from proxy.backend.services.rest.faults import HttpError, status_of, text_of
from proxy.backend.services.rest.jsontensors import check_sendable, check_size, to_list, to_tensor, to_written
from proxy.backend.services.rest.jsontext import LONG_TO_PARSE, MOST_PARSED, dumps, dumps_in_pieces, named
from proxy.backend.spec import ModelSpec, TensorSpec
from proxy.backend.tensors import Buffer
from proxy.backend.threads import turn
from proxy.web import web

_JSON = {"Content-Type": "application/json"}
_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
_REMEDY = "use infer, with binary_data"
_FAILED = 400
"""The status of what a model itself raises, here alone, as in Triton: infer answers 500."""


class Generate:
    """Both endpoints: `once` and `stream`."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def once(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        """The one answer. Raises InferenceError."""
        asked, spec, answers = await self._begin(exchange, model, version)
        made: Sequence[Buffer] | None = None
        count = 0
        try:
            async with aclosing(answers):
                async for outputs in answers:
                    count += 1
                    if count > 1:
                        break  # the model stops, too
                    made = await _as_json(exchange, spec, asked.id, outputs)
        except InferenceError as error:
            raise _of_model(error) from None
        if made is None or count > 1:
            # Triton says 200 to that, with an error in the body: a client would take it for an answer.
            raise invalid(
                f"model '{spec.name}' gave {'more than one answer' if count else 'no answer'}; generate is for models "
                "that give exactly one, use generate_stream for others"
            )
        return await exchange.send(_JSON, made)

    async def stream(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        """All answers, as they come. Raises InferenceError for what is wrong before the first."""
        asked, spec, answers = await self._begin(exchange, model, version)
        response: web.StreamResponse | None = None
        # A client that leaves cancels this; the model then stops with it.
        async with aclosing(answers):
            try:
                async for outputs in answers:
                    before = exchange.held
                    event = await _as_json(exchange, spec, asked.id, outputs)
                    exchange.hold(sum(map(len, event)))
                    response = response or await exchange.begin(200, _EVENTS)
                    await exchange.write(response, b"data: ", *event, b"\n\n")
                    exchange.release(exchange.held - before)
            except InferenceError as error:
                if response is None and error.code is not Code.INTERNAL:
                    raise  # wrong from the start: the model had no part in it
                failed = _of_model(error)
                response = response or await exchange.begin(status_of(failed), _EVENTS)
                await exchange.write(response, b"data: " + dumps({"error": text_of(failed)}) + b"\n\n")
            response = response or await exchange.begin(200, _EVENTS)
        await response.write_eof()
        return response

    async def _begin(
        self, exchange: Exchange, model: str, version: str
    ) -> tuple[Asked, ModelSpec, AsyncGenerator[Sequence[Output], None]]:
        self._repository.find(model, version)  # or says why not, before the body is read
        body = await exchange.body(MOST_PARSED, remedy=_REMEDY)
        spec = self._repository.find(model, version).spec
        asked = await parsed(exchange, body, body[:0], lambda document, _: _asked(document, spec))
        loaded = self._repository.find(model, version)  # once more: models come and go while a body is read
        spec = loaded.spec
        for output in spec.outputs:
            check_sendable(f"output '{output.name}'", output.datatype, _REMEDY)
        return asked, spec, loaded.stream(asked.request)


def _of_model(error: InferenceError) -> InferenceError:
    return HttpError(_FAILED, str(error)) if error.code is Code.INTERNAL else error


def _asked(document: Any, spec: ModelSpec) -> Asked:
    """Raises InferenceError."""
    if not isinstance(document, dict):
        raise invalid(f"request is {named(document)}; it must be an object")
    inputs: list[InputTensor] = []
    parameters: dict[str, Any] = {}
    _sort(document, spec, inputs, parameters)
    nested = parameters.pop("parameters", {})
    if not isinstance(nested, dict):
        raise invalid(f"'parameters' is {named(nested)}; it must be an object")
    parameters.update(nested)
    if len(parameters) > MOST_PARAMETERS:
        raise invalid(f"request has {len(parameters)} parameters, more than {MOST_PARAMETERS}")
    for name, value in parameters.items():
        check_parameter("request", name, value)
    # priority, timeout and the like are the model's own words here, as in Triton: nothing of the server's is meant.
    return Asked(Request(inputs), "" if "id" in spec.input_named else request_id_of(document))


def _sort(
    document: Mapping[str, Any], spec: ModelSpec, inputs: list[InputTensor], parameters: dict[str, Any]
) -> None:
    for key, value in document.items():
        expected = spec.input_named.get(key)
        if expected is not None:
            inputs.append(_input(spec, expected, value))
        elif key != "id":
            parameters[key] = value


def _input(spec: ModelSpec, expected: TensorSpec, value: Any) -> InputTensor:
    label = f"input '{expected.name}'"
    data = value if isinstance(value, list) else [value]
    shape = deduced(expected.dims, len(data))
    if shape is None:
        given = "1 element doesn't" if len(data) == 1 else f"{len(data)} elements don't"
        raise invalid(f"{label}: {given} fill the shape that model '{spec.name}' expects, {list(expected.dims)}")
    if spec.max_batch_size:
        shape = (1, *shape)
    raw, values = to_tensor(label, expected.datatype.name, shape, data)
    return InputTensor(expected.name, expected.datatype.name, shape, raw, values)


async def _as_json(
    exchange: Exchange, spec: ModelSpec, request_id: str, outputs: Sequence[Output]
) -> Sequence[Buffer]:
    cost = check_size(outputs, _REMEDY)
    if cost < LONG_TO_PARSE:
        return [dumps(_document(spec, request_id, outputs, _value))]
    async with turn() as run:
        exchange.hold(cost)
        return await run(lambda: list(dumps_in_pieces(_document(spec, request_id, outputs, _written))))


def _document(
    spec: ModelSpec, request_id: str, outputs: Sequence[Output], value: Callable[[Output], Any]
) -> Mapping[str, Any]:
    values: dict[str, Any] = {"model_name": spec.name, "model_version": str(spec.version)}
    for output in outputs:
        values[output.name] = value(output)
    answer: dict[str, Any] = {"id": request_id} if request_id else {}
    return {**answer, **dict(sorted(values.items()))}


def _value(output: Output) -> Any:
    elements = to_list(output, _REMEDY)
    return elements[0] if len(elements) == 1 else elements


def _written(output: Output) -> Any:
    return to_written(output, _REMEDY, bare=math.prod(output.shape) == 1)
