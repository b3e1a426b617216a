"""What Triton serves and the embedded server refuses: shared memory, traces, and the settings of the log.

The embedded server has no access to a client's memory, and its log is the operator's: each method is unimplemented,
and the error says what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import shared_memory
from typing import Any

import pytest

from tests.parity.clients import Client, covers, mentions


@pytest.fixture
def region() -> Iterator[str]:
    """The key of 64 bytes of shared memory."""
    memory = shared_memory.SharedMemory(create=True, size=64)
    yield f"/{memory.name.lstrip('/')}"
    memory.close()
    memory.unlink()


async def refused(client: Client, name: str, subject: str, *args: Any, **kwargs: Any) -> None:
    """Assert that the embedded server refuses this, names the subject, and says what to do instead."""
    text = await client.refused("UNIMPLEMENTED", name, *args, **kwargs)
    mentions(text.lower(), subject)
    what, _, remedy = text.partition(";")
    assert what.strip(), text
    assert remedy.strip(), text


async def answer_or_refusal(client: Client, subject: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """What Triton answers; None from the embedded server, which has to refuse."""
    if client.server.is_triton:
        return await client.told(name, *args, **kwargs)
    return await refused(client, name, subject, *args, **kwargs)


@covers(
    "register_system_shared_memory", "get_system_shared_memory_status", "unregister_system_shared_memory"
)
async def test_system_shared_memory(client: Client, region: str) -> None:
    if not client.server.is_triton:
        await refused(client, "register_system_shared_memory", "shared memory", "r", region, 64)
        await refused(client, "get_system_shared_memory_status", "shared memory")
        await refused(client, "unregister_system_shared_memory", "shared memory", "r")
        return
    await client("register_system_shared_memory", "r", region, 64)
    told = await client.told("get_system_shared_memory_status", "r")
    [status] = told if client.is_http else told["regions"].values()
    assert (status["name"], status["key"], status["byte_size"]) == ("r", region, 64)
    await client("unregister_system_shared_memory", "r")
    told = await client.told("get_system_shared_memory_status")
    assert not (told if client.is_http else told.get("regions"))
    mentions(await client.refused("NOT_FOUND", "get_system_shared_memory_status", "r"), "'r'")


@covers("register_cuda_shared_memory", "get_cuda_shared_memory_status", "unregister_cuda_shared_memory")
async def test_cuda_shared_memory(client: Client) -> None:
    handle = b"AAAA"
    if not client.server.is_triton:
        await refused(client, "register_cuda_shared_memory", "shared memory", "r", handle, 0, 64)
        await refused(client, "get_cuda_shared_memory_status", "shared memory")
        await refused(client, "unregister_cuda_shared_memory", "shared memory", "r")
        return
    await client.refused("INVALID_ARGUMENT", "register_cuda_shared_memory", "r", handle, 0, 64)
    told = await client.told("get_cuda_shared_memory_status")
    assert not (told if client.is_http else told.get("regions"))
    await client("unregister_cuda_shared_memory", "r")


@covers("get_trace_settings", "update_trace_settings")
async def test_trace_settings(client: Client) -> None:
    told = await answer_or_refusal(client, "trac", "get_trace_settings", "simple")
    made = await answer_or_refusal(client, "trac", "update_trace_settings", "simple", {"trace_rate": "7"})
    back = await answer_or_refusal(client, "trac", "update_trace_settings", "simple", {"trace_rate": None})
    if client.server.is_triton:
        assert [_trace_rate(client, settings) for settings in (told, made, back)] == [1000, 7, 1000]


@covers("get_log_settings", "update_log_settings")
async def test_log_settings(client: Client) -> None:
    told = await answer_or_refusal(client, "log", "get_log_settings")
    made = await answer_or_refusal(client, "log", "update_log_settings", {"log_verbose_level": 1})
    back = await answer_or_refusal(client, "log", "update_log_settings", {"log_verbose_level": 0})
    if client.server.is_triton:
        assert [_verbosity(client, settings) for settings in (told, made, back)] == [0, 1, 0]


def _trace_rate(client: Client, settings: dict[str, Any]) -> Any:
    return settings["trace_rate"] if client.is_http else settings["settings"]["trace_rate"]["value"][0]


def _verbosity(client: Client, settings: dict[str, Any]) -> Any:
    if client.is_http:
        return settings["log_verbose_level"]
    return settings["settings"]["log_verbose_level"]["uint32_param"]
