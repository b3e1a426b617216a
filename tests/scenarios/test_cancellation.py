"""Promise: a call that its client gives up stops the work at the backend: cancelled, reset, or the client gone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as tritonclient

from tests.support.certs import Authority
from tests.support.echo import Echo, echo_stub
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import Script
from tests.support.infer import infer_input
from tests.support.rawh2 import Connect, grpc_headers, grpc_message
from tests.support.triton import Triton

_identifiers = itertools.count()
CANCEL, REFUSED_STREAM, ENHANCE_YOUR_CALM = 8, 7, 11
FOREVER = b"3600"


@pytest.fixture
def identifier() -> str:
    return f"cancel-{next(_identifiers)}"


@pytest.fixture
def channel(echo_gate: Gate) -> Iterator[grpc.Channel]:
    with echo_gate.channel() as channel:
        yield channel


def test_a_unary_call(channel: grpc.Channel, echo: Echo, echo_gate: Gate, identifier: str) -> None:
    cancelled = echo_gate.metric("requests_total", code="CANCELLED")
    call = echo_stub(channel).sleep.future(FOREVER, metadata=(("x-id", identifier),))
    echo.process.wait_log(f"started {identifier}\n")
    call.cancel()
    echo.process.wait_log(f"cancelled {identifier}\n")
    echo_gate.wait_metric("requests_total", cancelled + 1, code="CANCELLED")


def test_a_server_streaming_call(channel: grpc.Channel, echo: Echo, identifier: str) -> None:
    call = echo_stub(channel).sleep_stream(FOREVER, metadata=(("x-id", identifier),))
    assert next(call) == b"first"
    echo.process.wait_log(f"started {identifier}\n")
    call.cancel()
    echo.process.wait_log(f"cancelled {identifier}\n")


def test_a_bidirectional_call(channel: grpc.Channel, echo: Echo, identifier: str) -> None:
    over = threading.Event()

    def messages() -> Iterator[bytes]:
        yield b"one"
        over.wait()

    call = echo_stub(channel).sleep_bidi(messages(), metadata=(("x-id", identifier),))
    assert next(call) == b"one"
    call.cancel()
    echo.process.wait_log(f"cancelled {identifier}\n")
    over.set()


def test_a_call_beside_others_is_cancelled_alone(channel: grpc.Channel, echo: Echo, identifier: str) -> None:
    stub = echo_stub(channel)
    others = [stub.sleep.future(b"1", metadata=(("x-id", f"{identifier}-other-{n}"),)) for n in range(5)]
    call = stub.sleep.future(FOREVER, metadata=(("x-id", identifier),))
    echo.process.wait_log(f"started {identifier}\n")
    call.cancel()
    echo.process.wait_log(f"cancelled {identifier}\n")
    assert [other.result() for other in others] == [b"slept"] * 5


def test_a_client_that_closes_its_channel(echo_gate: Gate, echo: Echo, identifier: str) -> None:
    channel = echo_gate.channel()
    call = echo_stub(channel).sleep.future(FOREVER, metadata=(("x-id", identifier),))
    echo.process.wait_log(f"started {identifier}\n")
    channel.close()
    echo.process.wait_log(f"cancelled {identifier}\n")
    assert call.code() is grpc.StatusCode.CANCELLED


def test_a_client_that_is_gone(echo_gate: Gate, echo: Echo, connect: Connect, identifier: str) -> None:
    open_before = echo_gate.metric("streams_open")
    client = connect(echo_gate)
    names = [f"{identifier}-{n}" for n in range(10)]
    for name in names:
        client.request(grpc_headers("/test.Echo/Sleep", ("x-id", name)), grpc_message(FOREVER))
    for name in names:
        echo.process.wait_log(f"started {name}\n")
    client.sock.close()  # without close_notify, as when a process dies
    for name in names:
        echo.process.wait_log(f"cancelled {name}\n")
    echo_gate.wait_metric("streams_open", open_before)


def test_a_stream_that_is_reset(echo_gate: Gate, echo: Echo, connect: Connect, identifier: str) -> None:
    client = connect(echo_gate)
    stream = client.request(grpc_headers("/test.Echo/Sleep", ("x-id", identifier)), grpc_message(FOREVER))
    echo.process.wait_log(f"started {identifier}\n")
    client.h2.reset_stream(stream, CANCEL)
    client.flush()
    echo.process.wait_log(f"cancelled {identifier}\n")
    # The connection goes on.
    reply = client.finish(client.request(grpc_headers("/test.Echo/Unary"), grpc_message(b"after")))
    assert bytes(reply.body) == grpc_message(b"after")


@pytest.mark.triton
def test_a_model_of_a_real_triton(triton_gate: Gate, triton: Triton, authority: Authority, identifier: str) -> None:
    seconds = infer_input("SECONDS", np.array([3600], np.float32), "FP32")
    client = open_triton_client(triton_gate, authority)
    with client:
        call = client.async_infer("patience", [seconds], lambda result, error: None, request_id=identifier)
        triton.process.wait_log(f"patience {identifier} started")
        call.cancel()
        triton.process.wait_log(f"patience {identifier} cancelled")


def open_triton_client(gate: Gate, authority: Authority) -> tritonclient.InferenceServerClient:
    return tritonclient.InferenceServerClient(gate.target, ssl=True, root_certificates=str(authority.ca_file))


@pytest.mark.parametrize("code", [CANCEL, REFUSED_STREAM, ENHANCE_YOUR_CALM])
def test_a_reset_by_the_client_reaches_the_upstream(
    make_gate: GateMaker, script: Script, connect: Connect, code: int
) -> None:
    upstream = script()
    gate = make_gate(upstream.address)
    client = connect(gate)
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b"request"), end=False)
    call = upstream.wait_call()
    client.h2.reset_stream(stream, code)
    client.flush()
    assert call.wait_reset() in (code, CANCEL)


@pytest.mark.parametrize("code", [CANCEL, REFUSED_STREAM, ENHANCE_YOUR_CALM, 2])
def test_a_reset_by_the_upstream_reaches_the_client(
    make_gate: GateMaker, script: Script, connect: Connect, code: int
) -> None:
    upstream = script(on_end=lambda call: call.send_reset(code))
    gate = make_gate(upstream.address)
    reply = connect(gate)
    stream = reply.request(grpc_headers("/any/Method"), grpc_message(b"request"))
    answer = reply.finish(stream)
    # As a status that gRPC has for it (its table of HTTP/2 error codes), or as the reset itself.
    status = {CANCEL: "1", REFUSED_STREAM: "14", ENHANCE_YOUR_CALM: "8", 2: "13"}[code]
    assert answer.grpc_status == status or answer.reset == code


def test_a_reset_in_the_middle_of_an_answer_is_a_reset(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    upstream = script()
    gate = make_gate(upstream.address)
    client = connect(gate)
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b"request"))
    call = upstream.wait_call()
    call.send_headers()
    call.send_data(grpc_message(bytes(1000))[:500])
    client.pump(lambda: len(client.replies[stream].body) == 500, "the first half")
    call.send_reset(2)
    answer = client.finish(stream)
    # Half a message must not look like a whole answer.
    assert answer.reset is not None or answer.grpc_status not in (None, "0")
