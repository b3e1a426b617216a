"""Triton's four clients behind one way to call them, and the record of what the tests call."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.parity.servers import Server

KINDS = ("grpc", "grpc.aio", "http", "http.aio")
GRPC = ("grpc", "grpc.aio")
HTTP = ("http", "http.aio")
STATUS = {
    "INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "INTERNAL": 500, "UNIMPLEMENTED": 501, "UNAVAILABLE": 503,
}  # fmt: skip
"""The HTTP status that Triton answers with where gRPC has this code."""

COVERED: dict[str, set[str]] = {kind: set() for kind in KINDS}
"""The methods of each client that the tests say they call (and `covers` checks that they do)."""

_Test = Callable[..., Awaitable[None]]


class Client:
    """One InferenceServerClient: `await client("method", ...)`, whether the method is a coroutine or not."""

    def __init__(self, kind: str, server: Server) -> None:
        self.kind = kind
        self.server = server
        self.is_http = kind in HTTP
        self.library = tritonclient.http if self.is_http else tritonclient.grpc
        self.called: set[str] = set()
        self._client = client_class(kind)(server.http if self.is_http else server.grpc)

    def method(self, name: str) -> Any:
        """The method itself, for what isn't called and awaited once."""
        self.called.add(name)
        return getattr(self._client, name)

    async def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        result = self.method(name)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    async def told(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a method answers, as the same plain dicts and lists from either protocol; all numbers as integers."""
        if not self.is_http:
            kwargs["as_json"] = True
        return _plain(await self(name, *args, **kwargs))

    async def index(self) -> dict[str, dict[str, Any]]:
        """The repository's index by the models' names."""
        answer = await self.told("get_model_repository_index")
        return {entry["name"]: entry for entry in (answer if self.is_http else answer["models"])}

    async def config(self, *args: str) -> dict[str, Any]:
        answer = await self.told("get_model_config", *args)
        return dict(answer if self.is_http else answer["config"])

    async def close(self) -> None:
        await self("close")

    @property
    def encodings(self) -> tuple[bool, ...]:
        """The values that `json` can have in what follows."""
        return (False, True) if self.is_http else (False,)

    def input(self, name: str, array: np.ndarray, datatype: str = "", json: bool = False) -> Any:
        """A tensor to send; `json` has an effect over HTTP only."""
        tensor = self.library.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, **({"binary_data": not json} if self.is_http else {}))
        return tensor

    def output(self, name: str, classes: int = 0, json: bool = False) -> Any:
        """A tensor to ask for; `json` has an effect over HTTP only."""
        more = {"binary_data": not json} if self.is_http else {}
        return self.library.InferRequestedOutput(name, class_count=classes, **more)

    async def refused(self, code: str, name: str, *args: Any, **kwargs: Any) -> str:
        """Call what is to fail with the gRPC code, or the HTTP status that belongs to it; returns the error's text."""
        with pytest.raises(InferenceServerException) as caught:
            await self(name, *args, **kwargs)
        assert caught.value.status() == (str(STATUS[code]) if self.is_http else f"StatusCode.{code}"), caught.value
        return str(caught.value.message())


def client_class(kind: str) -> type:
    return importlib.import_module(f"tritonclient.{kind}").InferenceServerClient  # type: ignore[no-any-return]


def covers(*methods: str, kinds: tuple[str, ...] = KINDS) -> Callable[[_Test], _Test]:
    """Run a test with each of the clients, and check that it really called these methods."""

    def mark(test: _Test) -> _Test:
        for kind in kinds:
            COVERED[kind].update(methods)

        @functools.wraps(test)
        async def run(client: Client, **fixtures: Any) -> None:
            await test(client=client, **fixtures)
            assert not set(methods) - client.called, "the test says that it calls these"

        return pytest.mark.parametrize("client", kinds, indirect=True)(run)

    return mark


def mentions(text: str, *words: object) -> None:
    """Assert that an error names these names and values."""
    assert not [word for word in words if str(word) not in text], text


def _plain(value: Any) -> Any:
    # JSON of a protobuf message has its 64 bit integers as strings.
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value
