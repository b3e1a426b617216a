"""What the clients ask a server about itself and its models."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.clients import COVERED, GRPC, HTTP, KINDS, Client, client_class, covers, mentions
from tests.parity.models import LOADED
from tests.parity.waiting import eventually

# Of those that Triton names: what a client of the embedded server may rely on, and what it must not.
SERVED = {"classification", "model_configuration", "model_repository", "statistics", "binary_tensor_data", "parameters"}
UNSERVED = {"system_shared_memory", "cuda_shared_memory", "trace", "logging"}
TRITON = SERVED | UNSERVED | {"sequence", "schedule_policy", "model_repository(unload_dependents)"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_public_method_of_the_client_is_called_by_a_test(kind: str) -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"tests.parity.{module.name}")
    methods = {name for name, _ in inspect.getmembers(client_class(kind), callable) if not name.startswith("_")}
    assert COVERED[kind] == methods


@covers("is_server_live", "is_server_ready")
async def test_the_server_is_live_and_ready(client: Client) -> None:
    assert await client("is_server_live") is True
    await eventually(lambda: client("is_server_ready"))


@covers("is_model_ready")
async def test_a_model_is_ready_if_it_is_loaded(client: Client) -> None:
    ready = {
        ("simple",): True, ("simple", "1"): True, ("simple", "9"): False, ("idle",): False, ("nope",): False,
    }  # fmt: skip
    assert {asked: await client("is_model_ready", *asked) for asked in ready} == ready


@covers("is_model_ready", "get_model_metadata", kinds=GRPC)
async def test_a_version_that_is_no_number_is_an_invalid_argument(client: Client) -> None:
    for method in ("is_model_ready", "get_model_metadata"):
        mentions(await client.refused("INVALID_ARGUMENT", method, "simple", "x"), "version", "'x'")


@covers("is_model_ready", "get_model_metadata", kinds=HTTP)
async def test_a_version_that_is_no_number_is_no_path(client: Client) -> None:
    assert await client("is_model_ready", "simple", "x") is False
    await client.refused("NOT_FOUND", "get_model_metadata", "simple", "x")


@covers("get_server_metadata")
async def test_server_metadata_names_what_is_served(client: Client) -> None:
    told = await client.told("get_server_metadata")
    extensions = set(told["extensions"])
    assert told["name"] == ("triton" if client.server.is_triton else "tensorgate")
    assert told["version"]
    if client.server.is_triton:
        assert extensions == TRITON
    else:
        assert extensions >= SERVED
        assert not extensions & UNSERVED


@covers("get_model_metadata")
async def test_model_metadata(client: Client) -> None:
    def tensor(name: str, datatype: str, *shape: int) -> dict[str, object]:
        return {"name": name, "datatype": datatype, "shape": list(shape)}

    told = await client.told("get_model_metadata", "simple", "1")
    told.pop("platform")  # the one thing that differs: what runs the model
    assert told == {
        "name": "simple",
        "versions": [1],
        "inputs": [tensor(f"INPUT{number}", "INT32", -1, 16) for number in (0, 1)],
        "outputs": [tensor(f"OUTPUT{number}", "INT32", -1, 16) for number in (0, 1)],
    }
    told = await client.told("get_model_metadata", "repeat")
    assert told["inputs"] == [tensor("COUNT", "INT32", 1)]


@covers("get_model_config")
async def test_model_config_is_completed(client: Client) -> None:
    told = await client.config("simple")
    assert (told["name"], told["max_batch_size"]) == ("simple", 8)
    assert told["version_policy"] == {"latest": {"num_versions": 1}}
    assert "dynamic_batching" in told
    group = told["instance_group"][0]
    assert (group["name"], group["kind"], group["count"]) == ("simple_0", "KIND_CPU", 1)
    assert told["default_model_filename"] == "model.py"
    for kind in ("input", "output"):
        described = [(tensor["name"], tensor["data_type"], tensor["dims"]) for tensor in told[kind]]
        assert described == [(f"{kind.upper()}{number}", "TYPE_INT32", [16]) for number in (0, 1)]
    assert (await client.config("repeat"))["model_transaction_policy"] == {"decoupled": True}
    assert (await client.config("scores"))["output"][0]["label_filename"] == "labels.txt"


@covers("get_model_metadata", "get_model_config")
async def test_metadata_and_config_of_what_is_not_there(client: Client) -> None:
    for method in ("get_model_metadata", "get_model_config"):
        mentions(await client.refused("NOT_FOUND", method, "nope"), "'nope'")
        mentions(await client.refused("NOT_FOUND", method, "idle"), "'idle'")
        mentions(await client.refused("NOT_FOUND", method, "simple", "9"), "'simple'", "9")


@covers("get_inference_statistics", "infer")
async def test_statistics_count_requests_rows_and_executions(client: Client) -> None:
    async def counts() -> dict[str, int]:
        told = (await client.told("get_inference_statistics", "simple", "1"))["model_stats"]
        assert [(stats["name"], stats["version"]) for stats in told] == [("simple", 1)]
        stats = told[0]
        found = {name: stats["inference_stats"][name].get("count", 0) for name in ("success", "fail", "queue")}
        of_three = [batch for batch in stats.get("batch_stats", []) if batch["batch_size"] == 3]
        found["of_three"] = of_three[0]["compute_infer"]["count"] if of_three else 0
        return found | {name: stats.get(name, 0) for name in ("inference_count", "execution_count")}

    before = await counts()
    rows = np.zeros((3, 16), np.int32)
    await client("infer", "simple", [client.input("INPUT0", rows), client.input("INPUT1", rows)])
    wanted = {"success": 1, "fail": 0, "queue": 1, "of_three": 1, "inference_count": 3, "execution_count": 1}

    async def counted() -> bool:
        after = await counts()
        return {name: after[name] - before[name] for name in wanted} == wanted

    await eventually(counted)


@covers("get_inference_statistics", "infer")
async def test_statistics_count_failures(client: Client) -> None:
    async def counts() -> tuple[int, int]:
        stats = (await client.told("get_inference_statistics", "fails"))["model_stats"][0]["inference_stats"]
        return stats["success"].get("count", 0), stats["fail"].get("count", 0)

    successes, failures = await counts()
    await client.refused("INTERNAL", "infer", "fails", [client.input("IN", np.array([1], np.int32))])

    async def counted() -> bool:
        return await counts() == (successes, failures + 1)

    await eventually(counted)


@covers("get_inference_statistics")
async def test_statistics_of_all_models_and_of_none(client: Client) -> None:
    told = (await client.told("get_inference_statistics"))["model_stats"]
    assert {stats["name"] for stats in told} >= set(LOADED)
    assert "idle" not in {stats["name"] for stats in told}
    mentions(await client.refused("INVALID_ARGUMENT", "get_inference_statistics", "nope"), "'nope'")
    mentions(await client.refused("INVALID_ARGUMENT", "get_inference_statistics", "simple", "9"), "'simple'")


@covers("register_plugin", "plugin", "unregister_plugin", "is_server_live")
async def test_a_plugin_is_called_for_each_request(client: Client) -> None:
    class Plugin(client.library.InferenceServerClientPlugin):  # type: ignore[misc, name-defined]
        calls = 0

        def __call__(self, request: Any) -> None:
            request.headers["x-plugin"] = "here"
            self.calls += 1

    plugin = Plugin()
    client.method("register_plugin")(plugin)
    assert client.method("plugin")() is plugin
    assert await client("is_server_live") is True
    client.method("unregister_plugin")()
    assert client.method("plugin")() is None
    await client("is_server_live")
    assert plugin.calls == 1


@covers("close", "is_server_live")
async def test_a_closed_client_is_closed(client: Client) -> None:
    await client("is_server_live")
    await client("close")
    with pytest.raises(Exception):  # noqa: B017
        await client("is_server_live")
