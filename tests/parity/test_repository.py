"""Loading and unloading on demand, with a model's files from the repository and from the client."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.parity.clients import Client, covers, mentions
from tests.parity.models import LOADED, override, source, times
from tests.parity.waiting import eventually

_FIVE = np.array([5], np.int32)


async def product(client: Client, array: np.ndarray = _FIVE) -> list[Any]:
    result = await client("infer", "times", [client.input("IN", array)])
    return list(result.as_numpy("OUT").ravel().tolist())


@covers("get_model_repository_index")
async def test_the_index_lists_all_models(client: Client) -> None:
    index = await client.index()
    assert set(index) >= {*LOADED, "times", "idle", "broken"}
    for name in LOADED:
        assert index[name] == {"name": name, "version": 1, "state": "READY"}
    assert index["idle"] == {"name": "idle"}  # never loaded: no version, no state


@covers("load_model", "unload_model", "get_model_repository_index", kinds=("grpc", "http"))
async def test_a_model_is_loaded_from_the_repository(client: Client) -> None:
    await client("load_model", "times")
    assert (await client.index())["times"] == {"name": "times", "version": 1, "state": "READY"}
    assert await product(client) == [5]
    await client("load_model", "times")  # once more does no harm
    assert await product(client) == [5]
    await client("unload_model", "times")
    assert not await client("is_model_ready", "times")


@covers("load_model", "unload_model", "is_model_ready", "get_model_config", "infer")
async def test_a_model_is_loaded_from_what_the_client_sends_and_unloaded(client: Client) -> None:
    server = client.server.name
    files = {"file:1/model.py": times(7, server).encode()}
    await client("load_model", "times", config=override(server, 4), files=files)
    assert await client("is_model_ready", "times")
    assert (await client.config("times"))["max_batch_size"] == 4
    assert await product(client, np.array([[1], [2]], np.int32)) == [7, 14]
    await client("unload_model", "times", unload_dependents=True)
    assert not await client("is_model_ready", "times")
    for code, asked in (("NOT_FOUND", {}), ("UNAVAILABLE", {"model_version": "1"})):
        text = await client.refused(code, "infer", "times", [client.input("IN", _FIVE)], **asked)
        mentions(text, "'times'")
    mentions(await client.refused("NOT_FOUND", "get_model_metadata", "times"), "'times'")


@covers("load_model", "is_model_ready", "get_model_repository_index")
async def test_loads_that_cannot_be(client: Client) -> None:
    mentions(await client.refused("INTERNAL", "load_model", "nope"), "'nope'")
    mentions(await client.refused("INTERNAL", "load_model", "simple", config="{not JSON"), "'simple'")
    mentions(await client.refused("INTERNAL", "load_model", "simple", config='{"no_such_field": 1}'), "'simple'")
    files = {"file:1/model.py": b""}
    text = await client.refused("INTERNAL", "load_model", "simple", files=files)
    mentions(text, "'simple'" if client.server.is_triton else "config")
    # A refused load leaves what was there.
    assert await client("is_model_ready", "simple")
    entry = (await client.index())["simple"]
    # The embedded server says beside it why the load was refused, for who didn't ask for it; Triton forgets.
    assert ("reason" in entry) is not client.server.is_triton
    mentions(entry.pop("reason", "'simple'"), "'simple'")
    assert entry == {"name": "simple", "version": 1, "state": "READY"}
    await client("load_model", "simple")
    assert (await client.index())["simple"] == {"name": "simple", "version": 1, "state": "READY"}


@covers("load_model", "unload_model", "is_server_ready", "get_model_repository_index", kinds=("grpc", "http"))
async def test_a_broken_model_says_why(client: Client) -> None:
    text = await client.refused("INVALID_ARGUMENT", "load_model", "broken")
    mentions(text, "broken", "ModuleNotFoundError: No module named 'no_such_module'")
    entry = (await client.index())["broken"]
    assert (entry["version"], entry["state"]) == (1, "UNAVAILABLE")
    mentions(entry["reason"], "ModuleNotFoundError: No module named 'no_such_module'")
    assert not await client("is_model_ready", "broken")
    # Readiness is each model's own in the embedded server: a broken one takes no traffic from the others.
    assert await client("is_server_ready") is not client.server.is_triton
    await mend(client)
    await client("unload_model", "broken")

    async def gone() -> bool:
        return (await client.index())["broken"]["state"] != "UNLOADING"

    await eventually(gone)
    assert (await client.index())["broken"] == {
        "name": "broken", "version": 1, "state": "UNAVAILABLE", "reason": "unloaded",
    }  # fmt: skip
    mentions(await client.refused("INVALID_ARGUMENT", "get_inference_statistics", "broken"), "'broken'")
    await eventually(lambda: client("is_server_ready"))


async def mend(client: Client) -> None:
    """Load `broken` with other code."""
    server = client.server.name
    files = {"file:1/model.py": source("times", server).encode()}
    await client("load_model", "broken", config=override(server, 0), files=files)
    assert await client("is_model_ready", "broken")


@covers("unload_model")
async def test_what_is_not_loaded_can_be_unloaded(client: Client) -> None:
    for name in ("idle", "nope"):
        await client("unload_model", name)
        assert not await client("is_model_ready", name)
