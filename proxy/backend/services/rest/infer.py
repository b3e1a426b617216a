"""POST /v2/models/M/infer: JSON, the binary tensor extension, and Triton's raw binary request.

https://docs.nvidia.com/deeplearning/triton-inference-server/ describes them. Binary inputs are views of the body;
binary outputs are sent from where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proxy.backend.dataplane import Request
from proxy.backend.errors import invalid
from proxy.backend.execution import Output
from proxy.backend.repository import Repository
from proxy.backend.services.compression import deflate
from proxy.backend.services.parameters import returned
from proxy.backend.services.rest.asked import Asked, asked, parsed, raw
from proxy.backend.services.rest.compression import accepted
from proxy.backend.services.rest.exchange import Exchange
from proxy.backend.services.rest.jsontensors import check_sendable, check_size, to_list, to_written
from proxy.backend.services.rest.jsontext import LONG_TO_PARSE, dumps, dumps_in_pieces
from proxy.backend.spec import ModelSpec
from proxy.backend.tensors import Buffer
from proxy.backend.threads import turn
from proxy.web import web

HEADER_LENGTH = "Inference-Header-Content-Length"
_REMEDY = "ask for the output with binary_data"


class Infer:
    """The endpoint."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def __call__(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        """Raises InferenceError."""
        loaded = self._repository.find(model, version)
        if loaded.spec.decoupled:
            await loaded.infer(Request(()))  # says why not, before the body is read
        # No name holds the request while the response is sent, which may take long: it can be as large.
        fields, pieces = await self._answer(exchange, model, version)
        return await exchange.send(fields, pieces)

    async def _answer(
        self, exchange: Exchange, model: str, version: str
    ) -> tuple[Mapping[str, str], Sequence[Buffer]]:
        header = _header_length(exchange.header(HEADER_LENGTH))
        body = await exchange.body(lead=header or 0)
        spec = self._repository.find(model, version).spec
        if header == 0:
            wanted = raw(body, spec)
        else:
            wanted = await parsed(exchange, *_parts(body, header), lambda document, rest: asked(document, rest, spec))
        loaded = self._repository.find(model, version)  # once more: models come and go while a body is read
        _check_outputs(loaded.spec, wanted)
        outputs = await loaded.infer(wanted.request)
        fields, pieces = await _response(exchange, loaded.spec, wanted, outputs)
        if coding := accepted(exchange.header("Accept-Encoding")):
            exchange.hold(sum(map(len, pieces)))
            return {**fields, "Content-Encoding": coding}, await deflate(pieces, coding, exchange.hold)
        return fields, pieces


def _header_length(text: str) -> int | None:
    """Bytes of the JSON; None where everything is. 0 is Triton's raw binary request. Raises InferenceError."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise invalid(f"{HEADER_LENGTH} is '{text:.40}'; it must be the number of bytes of the JSON")
    return int(text)


def _parts(body: memoryview, header: int | None) -> tuple[memoryview, memoryview]:
    header = len(body) if header is None else header
    if header > len(body):
        raise invalid(f"{HEADER_LENGTH} is {header}, but the body has {len(body)} bytes")
    return body[:header], body[header:]


def _check_outputs(spec: ModelSpec, request: Asked) -> None:
    """What can't be answered fails before the model is run for it."""
    wanted = request.request.outputs
    for output in spec.outputs:
        if (wanted and output.name not in wanted) or wanted.get(output.name) or request.is_binary(output.name):
            continue
        check_sendable(f"output '{output.name}'", output.datatype, _REMEDY)


async def _response(
    exchange: Exchange, spec: ModelSpec, request: Asked, outputs: Sequence[Output]
) -> tuple[Mapping[str, str], Sequence[Buffer]]:
    cost = check_size([output for output in outputs if not request.is_binary(output.name)], _REMEDY)
    head: Sequence[Buffer]
    if cost < LONG_TO_PARSE:
        head = [dumps(_head(spec, request, outputs, to_list))]
    else:
        async with turn() as run:
            exchange.hold(cost)
            head = await run(lambda: list(dumps_in_pieces(_head(spec, request, outputs, to_written))))
    binary = [output.data for output in outputs if request.is_binary(output.name)]
    if not binary:
        return {"Content-Type": "application/json"}, head
    length = sum(map(len, head))
    return {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(length)}, [*head, *binary]


def _head(
    spec: ModelSpec, request: Asked, outputs: Sequence[Output], data: Callable[[Output, str], Any]
) -> Mapping[str, Any]:
    head: dict[str, Any] = {"id": request.id} if request.id else {}
    head["model_name"] = spec.name
    head["model_version"] = str(spec.version)
    if back := returned(request.parameters):
        head["parameters"] = back
    listed = head["outputs"] = []
    for output in outputs:
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if request.is_binary(output.name):
            entry["parameters"] = {"binary_data_size": len(output.data)}
        else:
            entry["data"] = data(output, _REMEDY)
        listed.append(entry)
    return head
