"""All that isn't inference: health, metadata, configuration, statistics, the repository; and what isn't served."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from proxy.backend.errors import Code, InferenceError, invalid
from proxy.backend.repository import Repository
from proxy.backend.services.description import model_metadata, server_metadata, statistics
from proxy.backend.services.inference import not_served
from proxy.backend.services.rest.exchange import Exchange
from proxy.backend.services.rest.faults import HttpError
from proxy.backend.services.rest.jsontext import LONG_TO_PARSE, dumps, loads, named, weigh
from proxy.backend.services.rest.messages import plain
from proxy.backend.services.rest.routes import Endpoint, Route
from proxy.backend.threads import in_thread, turn
from proxy.web import web

_MOST_ASKED = 64 * 2**10  # bytes of a question about the repository
_MOST_LOADED = 64 * 2**20  # bytes of a request to load a model, which may hold its files
_MOST_SHOWN = 8  # large configurations whose JSON is kept
_PART = 256 * 2**10  # characters of base64 that one call decodes, with the interpreter's lock; a multiple of 4
_FILE = "file:"
_JSON = {"Content-Type": "application/json"}


class Control:
    """The endpoints over a repository. ready: whether the server is."""

    def __init__(self, repository: Repository, ready: Callable[[], bool]) -> None:
        self._repository = repository
        self._ready = ready
        self._shown: dict[int, bytes] = {}  # by the number of the version's scheduler, which no other will have

    def fixed(self) -> Mapping[str, Route]:
        """By path."""
        routes: dict[str, Route] = {
            "/v2": {"GET": _shown(lambda model, version: server_metadata())},
            "/v2/health/live": {"GET": self._live},
            "/v2/health/ready": {"GET": self._server_ready},
            "/v2/models/stats": {"GET": _shown(lambda model, version: statistics(self._repository, "", ""))},
            "/v2/repository/index": {"POST": self._index},
            "/v2/logging": _unserved("LogSettings", "GET", "POST"),
            "/v2/trace/setting": _unserved("TraceSetting", "GET", "POST"),
        }
        for kind in ("systemsharedmemory", "cudasharedmemory"):
            for action, method in (("status", "GET"), ("register", "POST"), ("unregister", "POST")):
                routes[f"/v2/{kind}/{action}"] = _unserved("SharedMemory", method)
        return routes

    def of_model(self) -> Mapping[str, Route]:
        """By what follows the model and its version."""
        return {
            "": {"GET": _shown(lambda model, version: model_metadata(self._repository, model, version))},
            "ready": {"GET": self._model_ready},
            "config": {"GET": self._config},
            "stats": {"GET": _shown(lambda model, version: statistics(self._repository, model, version))},
            "trace/setting": _unserved("TraceSetting", "GET", "POST"),
        }

    def of_repository(self) -> Mapping[str, Route]:
        """By what follows the model's name in the repository."""
        return {"load": {"POST": self._load}, "unload": {"POST": self._unload}}

    async def _live(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        return exchange.empty()

    async def _server_ready(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        return exchange.empty() if self._ready() else exchange.empty(400)

    async def _model_ready(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        try:
            self._repository.find(model, version)
        except InferenceError as error:
            raise HttpError(400, str(error)) from None  # whatever the reason, as in Triton
        return exchange.empty()

    async def _index(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        asked = await _asked(exchange, _MOST_ASKED)
        ready = asked.get("ready", False)
        if not isinstance(ready, bool):
            raise invalid(f"'ready' is {named(ready)}; it must be true or false")
        await self._repository.refresh()
        listed = []
        for entry in self._repository.index(ready):
            shown = {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
            listed.append({key: value for key, value in shown.items() if value})
        # A line has a reason of 2000 characters at most.
        return await _sent(exchange, listed, 100 * len(listed) + sum(len(entry.get("reason", "")) for entry in listed))

    async def _config(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        loaded = self._repository.find(model, version)
        size = loaded.config.ByteSize()
        if size < LONG_TO_PARSE:
            return await _sent(exchange, plain(loaded.config))
        number = loaded.scheduler.number
        if number not in self._shown:
            async with turn() as run:
                if number not in self._shown:  # others may have waited for the same
                    made = await run(lambda: dumps(plain(loaded.config)))
                    if len(self._shown) >= _MOST_SHOWN:
                        self._shown.clear()
                    self._shown[number] = made
        return await exchange.send(_JSON, [self._shown[number]])

    async def _load(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        self._repository.check_explicit()  # before anything is made of what may be large
        config, files = await _override_asked(exchange)
        await self._repository.load_model(model, config, files or None)
        return exchange.empty()

    async def _unload(self, exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        # The body can only say unload_dependents, which changes nothing without ensembles; Triton doesn't read it.
        await self._repository.unload_model(model)
        return exchange.empty()


def _shown(answer: Callable[[str, str], Message]) -> Endpoint:
    async def serve(exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        message = answer(model, version)
        return await _sent(exchange, message, message.ByteSize())

    return serve


async def _sent(exchange: Exchange, value: Any, size: int = 0) -> web.StreamResponse:
    """A message, or any value of JSON, as the response; made outside the event loop if so many bytes are many."""

    def write() -> bytes:
        return dumps(plain(value) if isinstance(value, Message) else value)

    return await exchange.send(_JSON, [await in_thread(write) if size >= LONG_TO_PARSE else write()])


def _unserved(rpc: str, *methods: str) -> Route:
    async def serve(exchange: Exchange, model: str, version: str) -> web.StreamResponse:
        raise InferenceError(Code.UNIMPLEMENTED, not_served(rpc))

    return dict.fromkeys(methods, serve)


async def _asked(exchange: Exchange, most: int) -> Mapping[str, Any]:
    """The request's object, empty where there is no body. Raises InferenceError."""
    body = await exchange.body(most)
    return _object(loads(body)) if body else {}


def _object(document: Any) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise invalid(f"request is {named(document)}; it must be an object")
    return document


async def _override_asked(exchange: Exchange) -> tuple[str | None, Mapping[str, bytes]]:
    body = await exchange.body(_MOST_LOADED, remedy="load large files over gRPC, or from the repository's folder")
    async with turn() as run:
        exchange.hold(3 * len(body))  # for its text, what is parsed of that, and the files
        if len(body) >= LONG_TO_PARSE:
            await run(lambda: weigh(body))
        return await run(lambda: _override_of(body))


def _override_of(body: memoryview) -> tuple[str | None, Mapping[str, bytes]]:
    return _override(_object(loads(body)) if body else {})


def _override(asked: Mapping[str, Any]) -> tuple[str | None, Mapping[str, bytes]]:
    """(configuration, path -> content) to load a model with. Raises InferenceError."""
    parameters = asked.get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid(f"'parameters' is {named(parameters)}; it must be an object")
    config: str | None = None
    files: dict[str, bytes] = {}
    for name, value in parameters.items():
        if name != "config" and not name.startswith(_FILE):
            raise invalid(f"parameter '{name:.100}' is not one of a load; there are config and file:<version>/<name>")
        if not isinstance(value, str):
            raise invalid(f"parameter '{name:.100}' is {named(value)}; it must be a string")
        if name == "config":
            config = value
        else:
            files[name.removeprefix(_FILE)] = _decoded(name, value)
    return config, files


def _decoded(name: str, value: str) -> bytes:
    try:
        return b"".join(_decoded_parts(value))
    except (binascii.Error, ValueError):
        raise invalid(f"parameter '{name:.100}' is not base64") from None


def _decoded_parts(value: str) -> Iterator[bytes]:
    for at in range(0, len(value), _PART):
        part = value[at : at + _PART]
        if part[-1] == "=" and at + _PART < len(value):
            raise ValueError("padding before the end")
        yield base64.b64decode(part, validate=True)
