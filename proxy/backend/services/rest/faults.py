"""Errors as HTTP shows them: a status and {"error": text}."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.backend.errors import Code, InferenceError

_LONGEST_TEXT = 4000  # characters; names and values in it are the client's
# Those of Triton's server, of which clients know what they mean.
_STATUSES = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
_CLIENT_LEFT = 499


class HttpError(InferenceError):
    """An error with a status of its own, and with fields for the response's header."""

    def __init__(self, status: int, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(Code.INVALID_ARGUMENT, message)
        self.status = status
        self.fields = fields or {}


def too_large(message: str) -> HttpError:
    """A limit of one request, that waiting doesn't change: 413 and not 429."""
    return HttpError(413, message)


def status_of(error: InferenceError) -> int:
    if isinstance(error, HttpError):
        return error.status
    return _STATUSES.get(error.code, 500)


def reason_of(status: int) -> str | None:
    """The text of a status that HTTP doesn't know; None for its own."""
    return "Client Closed Request" if status == _CLIENT_LEFT else None


def text_of(error: InferenceError) -> str:
    """The message; what UTF-8 can't say (in a model's error, a client's name) is replaced."""
    text = str(error)
    if len(text) > _LONGEST_TEXT:
        text = text[: _LONGEST_TEXT - 3] + "..."
    return text.encode("utf-8", "replace").decode()
