"""Paths -> endpoints. Names of models are percent-decoded; a query is ignored, as by Triton."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

from proxy.backend.services.rest.exchange import Exchange
from proxy.backend.services.rest.faults import HttpError
from proxy.web import web

Endpoint = Callable[[Exchange, str, str], Awaitable[web.StreamResponse]]
"""(exchange, model, version): the names are "" where the path has none."""
Route = Mapping[str, Endpoint]
"""By method."""


class Routes:
    """fixed: by whole path. of_model: by what follows the model, and its version if there is one, "" for nothing.

    of_repository: by what follows the model's name in the repository.
    """

    def __init__(
        self, fixed: Mapping[str, Route], of_model: Mapping[str, Route], of_repository: Mapping[str, Route]
    ) -> None:
        self._fixed = fixed
        self._of_model = of_model
        self._of_repository = of_repository

    def find(self, method: str, target: str) -> tuple[Endpoint, str, str]:
        """(endpoint, model, version). Raises HttpError."""
        path = target.partition("?")[0]
        if not path.startswith("/"):
            path = _of_absolute(path)
        route, model, version = self._route(path)
        if route is None:
            raise HttpError(404, f"'{path[:200]}' is not a path of this server; see KServe v2's and Triton's protocols")
        endpoint = route.get(method)
        if endpoint is None:
            allowed = ", ".join(route)
            raise HttpError(405, f"'{path[:200]}' takes {allowed}, not {method[:40]}", {"Allow": allowed})
        return endpoint, model, version

    def _route(self, path: str) -> tuple[Route | None, str, str]:
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed, "", ""
        parts = path.split("/")
        if len(parts) < 4 or parts[0] or parts[1] != "v2":
            return None, "", ""
        if parts[2] == "models" and parts[3]:
            return self._in_models(parts[3], parts[4:])
        if parts[2] == "repository":
            return self._in_repository(parts[3:])
        if parts[2] in ("systemsharedmemory", "cudasharedmemory") and parts[3] == "region" and len(parts) == 6:
            return self._fixed.get(f"/v2/{parts[2]}/{parts[5]}"), "", ""
        return None, "", ""

    def _in_models(self, model: str, rest: list[str]) -> tuple[Route | None, str, str]:
        version = ""
        if len(rest) > 1 and rest[0] == "versions":
            version, rest = rest[1], rest[2:]
            if not (version.isascii() and version.isdigit()):
                return None, "", ""
        if rest and not rest[-1]:
            return None, "", ""
        return self._of_model.get("/".join(rest)), unquote(model) if "%" in model else model, version

    def _in_repository(self, rest: list[str]) -> tuple[Route | None, str, str]:
        # Any repository may be named in front; there is one.
        if rest[-1] == "index":
            return self._fixed.get("/v2/repository/index") if len(rest) == 2 else None, "", ""
        if len(rest) == 4:
            rest = rest[1:]
        if len(rest) != 3 or rest[0] != "models":
            return None, "", ""
        return self._of_repository.get(rest[2]), unquote(rest[1]), ""


def _of_absolute(target: str) -> str:
    """The path of an absolute URL, which a server has to take for one (RFC 9112, 3.2.2)."""
    scheme, found, rest = target.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        return target
    return "/" + rest.partition("/")[2]
