"""Promise: Triton's streaming client (`start_stream`, `async_stream_infer`) works through the gate unchanged."""

from __future__ import annotations

import queue
from typing import Any

import tritonclient.grpc as triton

from tests.support.certs import Authority
from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays, add_sub_inputs, check_add_sub
from tests.support.processes import LIVENESS

Answers = queue.Queue[tuple[Any, Any]]


def test_a_stream_of_inferences(inference_gate: Gate, authority: Authority) -> None:
    answers: Answers = queue.Queue()
    asked = {f"s{seed}": add_sub_arrays(seed) for seed in range(200)}
    ca_file = str(authority.ca_file)
    with triton.InferenceServerClient(inference_gate.target, ssl=True, root_certificates=ca_file) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for name, (left, right) in asked.items():
            client.async_stream_infer("simple", add_sub_inputs(left, right), request_id=name)
        for _ in range(len(asked)):
            result, error = answers.get(timeout=LIVENESS)
            assert error is None
            check_add_sub(result, *asked.pop(result.get_response().id))
        client.stop_stream()
    assert not asked


def test_an_error_inside_the_stream_leaves_it_open(inference_gate: Gate, authority: Authority) -> None:
    answers: Answers = queue.Queue()
    left, right = add_sub_arrays()
    ca_file = str(authority.ca_file)
    with triton.InferenceServerClient(inference_gate.target, ssl=True, root_certificates=ca_file) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("no-such-model", add_sub_inputs(left, right))
        _, error = answers.get(timeout=LIVENESS)
        assert "no-such-model" in error.message()
        client.async_stream_infer("simple", add_sub_inputs(left, right))
        result, error = answers.get(timeout=LIVENESS)
        assert error is None
        check_add_sub(result, left, right)
        client.stop_stream()
