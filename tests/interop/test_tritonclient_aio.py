"""Promise: Triton's asyncio gRPC client works through the gate unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from tests.support.certs import Authority
from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays, add_sub_inputs, check_add_sub


async def test_many_at_once(inference_gate: Gate, authority: Authority) -> None:
    async with triton.InferenceServerClient(
        inference_gate.target, ssl=True, root_certificates=str(authority.ca_file)
    ) as client:
        assert await client.is_server_live()
        assert (await client.get_model_metadata("simple")).name == "simple"
        asked = [add_sub_arrays(seed) for seed in range(50)]
        answers = await asyncio.gather(*(client.infer("simple", add_sub_inputs(*arrays)) for arrays in asked))
    for result, arrays in zip(answers, asked, strict=True):
        check_add_sub(result, *arrays)


async def test_an_error(inference_gate: Gate, authority: Authority) -> None:
    async with triton.InferenceServerClient(
        inference_gate.target, ssl=True, root_certificates=str(authority.ca_file)
    ) as client:
        with pytest.raises(InferenceServerException) as raised:
            await client.infer("no-such-model", add_sub_inputs(*add_sub_arrays()))
    assert raised.value.status() == "StatusCode.NOT_FOUND"


async def test_a_stream_of_inferences(inference_gate: Gate, authority: Authority) -> None:
    asked = {f"s{seed}": add_sub_arrays(seed) for seed in range(50)}

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for name, arrays in list(asked.items()):
            yield {"model_name": "simple", "inputs": add_sub_inputs(*arrays), "request_id": name}

    async with triton.InferenceServerClient(
        inference_gate.target, ssl=True, root_certificates=str(authority.ca_file)
    ) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            check_add_sub(result, *asked.pop(result.get_response().id))
    assert not asked
