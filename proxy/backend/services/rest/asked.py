"""What an infer request asks for, out of its JSON and the bytes behind it: checked for what it is before it is used.

What it means to a model is the dataplane's to check.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import invalid
from proxy.backend.services.parameters import (
    MOST_DIMS,
    MOST_OUTPUTS,
    MOST_PARAMETERS,
    Parameters,
    Value,
    check_input,
    check_names,
    classes,
    scheduling,
)
from proxy.backend.services.rest.exchange import Exchange
from proxy.backend.services.rest.jsontensors import check_readable, to_tensor
from proxy.backend.services.rest.jsontext import LONG_TO_PARSE, check_size, is_unicode, loads, named, weigh
from proxy.backend.spec import ModelSpec
from proxy.backend.tensors import BYTES, Buffer
from proxy.backend.threads import turn

_LONGEST_ID = 4096  # characters; it comes back with the answer


@dataclass(slots=True)
class Asked:
    """What an infer request asks for. binary: the outputs to send as bytes, None for all of them."""

    request: Request
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    binary: Collection[str] | None = ()

    def is_binary(self, name: str) -> bool:
        return self.binary is None or name in self.binary


async def parsed(
    exchange: Exchange, text: memoryview, rest: memoryview, made: Callable[[Any, memoryview], Asked]
) -> Asked:
    """What is made of a document and of the bytes behind it; outside the event loop if it is large."""
    if len(text) < LONG_TO_PARSE:
        return made(loads(text), rest)
    check_size(len(text))
    async with turn() as run:
        cost = await run(lambda: weigh(text))
        exchange.hold(cost)
        try:
            return await run(lambda: made(loads(text), rest))
        finally:
            exchange.release(cost)


def raw(body: memoryview, spec: ModelSpec) -> Asked:
    """A body that is the one input's bytes and nothing else; its shape is deduced."""
    if len(spec.inputs) != 1:
        raise invalid(
            f"a raw binary request (Inference-Header-Content-Length: 0) needs a model with 1 input, '{spec.name}' has "
            f"{len(spec.inputs)}; describe the inputs in JSON"
        )
    (expected,) = spec.inputs
    data: Buffer = body
    count = 1
    if expected.datatype is BYTES:
        if abs(prod(expected.dims)) != 1:
            raise invalid(
                f"input '{expected.name}': a raw binary request is one string, model '{spec.name}' expects "
                f"{list(expected.dims)}; describe the inputs in JSON"
            )
        data = len(body).to_bytes(4, "little") + body
    else:
        count = len(body) // expected.datatype.size
    shape = deduced(expected.dims, count)
    if shape is None:
        raise invalid(
            f"input '{expected.name}': no shape like {list(expected.dims)} of {expected.datatype.name} takes "
            f"{len(body)} bytes; describe the inputs in JSON"
        )
    if spec.max_batch_size:
        shape = (1, *shape)
    return Asked(Request([InputTensor(expected.name, expected.datatype.name, shape, raw=data)]), binary=None)


def deduced(dims: Sequence[int], count: int) -> tuple[int, ...] | None:
    """`dims` with so many elements: the last -1 takes what the others leave, further ones are 1. None: can't be."""
    fixed = prod(dim for dim in dims if dim != -1)
    if -1 not in dims:
        return tuple(dims) if fixed == count else None
    if count % fixed:
        return None
    last = max(at for at, dim in enumerate(dims) if dim == -1)
    return tuple(count // fixed if at == last else 1 if dim == -1 else dim for at, dim in enumerate(dims))


def asked(document: Any, rest: memoryview, spec: ModelSpec) -> Asked:
    """Everything is checked for what it is before it is used. Raises InferenceError."""
    if not isinstance(document, dict):
        raise invalid(f"request is {named(document)}; it must be an object")
    if "inputs" not in document:
        raise invalid("request has no 'inputs'")
    listed = _list(document, "inputs")
    if len(listed) > len(spec.inputs):
        raise invalid(f"model '{spec.name}' takes {len(spec.inputs)} inputs, got {len(listed)}")
    parameters = plain_parameters(document.get("parameters"), "request")
    check_names(parameters)
    request_id = request_id_of(document)
    request = Request(_inputs(listed, rest, spec))
    all_binary = _flag(parameters, "binary_data_output", "request")
    binary: Collection[str] | None = ()
    if wanted := _list(document, "outputs"):
        request.outputs, binary = _outputs(wanted)
    elif all_binary:
        # Only where no outputs are named, as in Triton: each one's own binary_data says it otherwise.
        binary = None
    request.priority, request.queue_timeout = scheduling(parameters)
    return Asked(request, request_id, parameters, binary)


def request_id_of(document: Mapping[str, Any]) -> str:
    request_id = document.get("id", "")
    if not isinstance(request_id, str) or not is_unicode(request_id):
        raise invalid(f"'id' is {named(request_id)}; it must be a string")
    if len(request_id) > _LONGEST_ID:
        raise invalid(f"'id' has {len(request_id)} characters, more than {_LONGEST_ID}")
    return request_id


def _list(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key, [])
    if not isinstance(value, list):
        raise invalid(f"'{key}' is {named(value)}; it must be a list")
    return value


def plain_parameters(found: Any, label: str) -> Parameters:
    """Raises InferenceError for what no parameter can be."""
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise invalid(f"{label}: 'parameters' is {named(found)}; it must be an object")
    if len(found) > MOST_PARAMETERS:
        raise invalid(f"{label} has {len(found)} parameters, more than {MOST_PARAMETERS}")
    for name, value in found.items():
        check_parameter(label, name, value)
    return found


def check_parameter(label: str, name: str, value: Any) -> None:
    if not isinstance(value, Value) or not is_unicode(name):
        raise invalid(
            f"{label}: parameter '{name:.100}' is {named(value)}; it must be a number, true, false or a string"
        )
    if isinstance(value, str) and not is_unicode(value):
        raise invalid(f"{label}: parameter '{name:.100}' has half of a surrogate pair, which is no text")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise invalid(f"{label}: parameter '{name:.100}' is {named(value)}; an integer must be of 64 bits")


def _flag(parameters: Parameters, name: str, label: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise invalid(f"{label}: parameter '{name}' is {named(value)}; it must be true or false")
    return value


def _named_object(entry: Any, kind: str) -> tuple[str, str]:
    """(name, label) of an input or output."""
    if not isinstance(entry, dict):
        raise invalid(f"'{kind}s' has {named(entry)}; every {kind} must be an object")
    name = entry.get("name")
    if not isinstance(name, str):
        missing = "name" not in entry
        raise invalid(f"{kind} has no 'name'" if missing else f"{kind}: 'name' is {named(name)}; it must be a string")
    return name, f"{kind} '{name:.200}'"


def _inputs(listed: Sequence[Any], rest: memoryview, spec: ModelSpec) -> list[InputTensor]:
    tensors = []
    at = 0
    for entry in listed:
        name, label = _named_object(entry, "input")
        parameters = plain_parameters(entry.get("parameters"), label)
        check_input(name, parameters)
        datatype, shape = entry.get("datatype", ""), _shape(entry, label)
        if not isinstance(datatype, str):
            raise invalid(f"{label}: 'datatype' is {named(datatype)}; it must be a string")
        if "binary_data_size" not in parameters:
            if "data" not in entry:
                raise invalid(f"{label}: has no data; give 'data', or 'binary_data_size' in its parameters")
            check_readable(label, datatype)
            # What the dataplane will refuse for its type or shape is not worth to be read.
            fits = _fits(spec, name, datatype, shape)
            contents = to_tensor(label, datatype, shape, entry["data"]) if fits else (None, None)
            tensors.append(InputTensor(name, datatype, shape, *contents))
            continue
        if "data" in entry:
            raise invalid(f"{label}: has 'data' and 'binary_data_size'; give one of them")
        size = parameters["binary_data_size"]
        if type(size) is not int or size < 0:
            raise invalid(f"{label}: parameter 'binary_data_size' is {named(size)}; it must be a number of bytes")
        if size > len(rest) - at:
            raise invalid(f"{label}: binary_data_size is {size}, but only {len(rest) - at} bytes follow in the body")
        tensors.append(InputTensor(name, datatype, shape, raw=rest[at : at + size]))
        at += size
    if at != len(rest):
        raise invalid(f"body has {len(rest)} bytes of binary data, but the inputs' binary_data_size are {at} together")
    return tensors


def _fits(spec: ModelSpec, name: str, datatype: str, shape: Sequence[int]) -> bool:
    expected = spec.input_named.get(name)
    if expected is None or datatype != expected.datatype.name:
        return False
    dims = (-1, *expected.dims) if spec.max_batch_size else expected.dims
    return len(shape) == len(dims) and all(got >= 0 and dim in (-1, got) for got, dim in zip(shape, dims, strict=True))


def _shape(entry: Mapping[str, Any], label: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if "shape" not in entry:
        raise invalid(f"{label}: has no 'shape'")
    if not isinstance(shape, list):
        raise invalid(f"{label}: 'shape' is {named(shape)}; it must be a list")
    if len(shape) > MOST_DIMS:
        raise invalid(f"{label}: shape has {len(shape)} dimensions, more than {MOST_DIMS}")
    for dim in shape:
        if type(dim) is not int or not -(2**63) <= dim < 2**63:
            raise invalid(f"{label}: 'shape' has {named(dim)}; every dimension must be an integer of 64 bits")
    return tuple(shape)


def _outputs(listed: Sequence[Any]) -> tuple[Mapping[str, int], Collection[str]]:
    """(name -> number of classes, those to send as bytes). What is said last of a name counts, as in gRPC."""
    if len(listed) > MOST_OUTPUTS:
        raise invalid(f"request names {len(listed)} outputs, more than {MOST_OUTPUTS}")
    wanted: dict[str, int] = {}
    binary: set[str] = set()
    for entry in listed:
        name, label = _named_object(entry, "output")
        parameters = plain_parameters(entry.get("parameters"), label)
        wanted[name] = classes(name, parameters)
        (binary.add if _flag(parameters, "binary_data", label) else binary.discard)(name)
    return wanted, binary
