"""gRPC's call layer: which method serves a request, what its header section asks for, how its task ends.

The messages themselves are the business of `call`, the bytes that of the wire core (proxy.http2).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from proxy.backend.errors import Code, InferenceError
from proxy.backend.services.call import LARGEST_MESSAGE, LARGEST_QUESTION, Call
from proxy.backend.tensors import Buffer
from proxy.http2 import HeaderBlock, Passing, RequestHead, ResponseHead
from proxy.inference import calls

__all__ = ["LARGEST_MESSAGE", "LARGEST_QUESTION", "Call", "Facts", "Method", "serve", "unary", "unimplemented"]

_log = logging.getLogger("tensorgate.backend")
_LONGEST_PATH = 200  # characters that are told
_LONGEST_TIMEOUT = 10 * 365 * 86_400.0  # seconds; an event loop has no timers beyond
_UNSUPPORTED_MEDIA = ResponseHead(
    [(b":status", b"415"), (b"grpc-status", b"2"), (b"grpc-message", b"not a gRPC request")], checked=True
)


@dataclass(frozen=True, slots=True)
class Method:
    """What serves a path. `serve` sends the messages; the status is sent after it returns or raises InferenceError.

    most: bytes of a request message. streams: it is called with the first message, or without one, not with the end of
    the request.
    """

    serve: Callable[[Call], Awaitable[None]]
    most: int = LARGEST_QUESTION
    streams: bool = False


def unary(
    parse: Callable[[Any], Any],
    answer: Callable[[Any, Call], Awaitable[Sequence[Buffer]]],
    name: str,
    most: int = LARGEST_QUESTION,
) -> Method:
    """A method with one request, at most so many bytes, and one response.

    `parse` may raise DecodeError and InferenceError; `name` is the request's type.
    """

    async def request(call: Call) -> Any:
        payload = await call.receive()
        if payload is None:
            raise InferenceError(Code.INTERNAL, f"request has no message; a {name} is expected")
        try:
            return parse(payload)
        except DecodeError:
            raise cannot_be_parsed(name) from None

    async def serve(call: Call) -> None:
        # No name holds the request while the response is sent, which may take long: it can be as large.
        call.write(await answer(await request(call), call))

    return Method(serve, most)


def cannot_be_parsed(name: str) -> InferenceError:
    """Of a request message; `name` is its type."""
    return InferenceError(Code.INTERNAL, f"request message cannot be parsed as {name}")


def unimplemented(path: str, why: str = "it is not part of this server") -> Method:
    """A method that is part of the service's definition, but not served here."""

    async def serve(call: Call) -> None:
        raise InferenceError(Code.UNIMPLEMENTED, f"{path} is not implemented: {why}")

    return Method(serve)


class Facts:
    """What is derived from a request's header section, once for all requests that have the same.

    `refusal` answers what is no gRPC, `fault` what is none that can be served.
    """

    __slots__ = ("encoding", "fault", "method", "path", "refusal", "timeout")

    def __init__(self, head: RequestHead, methods: Mapping[bytes, Method]) -> None:
        self.path = head.path[:_LONGEST_PATH].decode("ascii", "replace")
        self.refusal: HeaderBlock | None = None
        self.fault: InferenceError | None = None
        self.encoding = (head.get(b"grpc-encoding") or b"identity")[:_LONGEST_PATH].decode("ascii", "replace")
        self.timeout = head.get(b"grpc-timeout")
        method = methods.get(head.path)
        if head.method != b"POST" or not calls.is_grpc(head.get(b"content-type", b"") or b""):
            self.refusal = _UNSUPPORTED_MEDIA
        elif method is None:
            self.fault = InferenceError(Code.UNIMPLEMENTED, f"unknown method {self.path}")
        self.method = method or _NONE


async def _no_method(call: Call) -> None:
    raise AssertionError("refused before")


_NONE = Method(_no_method)


def timeout(facts: Facts, passing: Passing | None) -> float | None:
    """The call's grpc-timeout in seconds. Raises InferenceError."""
    text = facts.timeout if passing is None else passing.get(b"grpc-timeout") or facts.timeout
    if text is None:
        return None
    try:
        return min(calls.parse_timeout(text), _LONGEST_TIMEOUT)
    except ValueError as error:
        raise InferenceError(Code.INVALID_ARGUMENT, str(error)) from None


async def serve(call: Call) -> None:
    """The task of a call."""
    try:
        await call.facts.method.serve(call)
    except InferenceError as error:
        call.end(error.code, str(error))
    except Exception:  # noqa: BLE001  (a fault of ours fails one call, not the connection's others)
        _log.exception("%s failed", call.facts.path)
        call.end(Code.INTERNAL, "internal error; see the log of the server")
    else:
        call.end()
    finally:
        call.task = None
