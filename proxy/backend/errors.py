"""The one error that a client sees: a code and a sentence. Protocol-independent; services translate it."""

from proxy.inference.status import Code

__all__ = ["Code", "InferenceError", "LoadError", "description", "invalid"]


class InferenceError(Exception):
    """A request fails with this code, and with `str(error)` as the message for its client."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class LoadError(Exception):
    """A model can't be served; `str(error)` says why and what would help."""


def description(error: BaseException) -> str:
    """`ValueError: text`, of an exception that is somebody else's: even its text may raise."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001  (whoever calls this must go on: a thread, a model's load)
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def invalid(message: str) -> InferenceError:
    """The client's fault: the same request will fail again."""
    return InferenceError(Code.INVALID_ARGUMENT, message)
