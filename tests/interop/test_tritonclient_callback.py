"""Promise: Triton's callback client (`async_infer`) works through the gate unchanged."""

from __future__ import annotations

import queue
from typing import Any

import tritonclient.grpc as triton

from tests.support.certs import Authority
from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays, add_sub_inputs, check_add_sub
from tests.support.processes import LIVENESS


def test_many_at_once(inference_gate: Gate, authority: Authority) -> None:
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    asked = {seed: add_sub_arrays(seed) for seed in range(100)}
    with triton.InferenceServerClient(
        inference_gate.target, ssl=True, root_certificates=str(authority.ca_file)
    ) as client:
        for seed, (left, right) in asked.items():
            client.async_infer(
                "simple",
                add_sub_inputs(left, right),
                lambda result, error, seed=seed: answers.put((seed, result, error)),
            )
        for _ in range(len(asked)):
            seed, result, error = answers.get(timeout=LIVENESS)
            assert error is None
            check_add_sub(result, *asked.pop(seed))
    assert not asked


def test_an_error_reaches_the_callback(inference_gate: Gate, authority: Authority) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(
        inference_gate.target, ssl=True, root_certificates=str(authority.ca_file)
    ) as client:
        inputs = add_sub_inputs(*add_sub_arrays())
        client.async_infer("no-such-model", inputs, lambda result, error: answers.put((result, error)))
        result, error = answers.get(timeout=LIVENESS)
    assert result is None
    assert error.status() == "StatusCode.NOT_FOUND"
