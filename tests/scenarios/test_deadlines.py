"""Promise: a deadline that has passed ends the call, at the client, in the gate, and at the backend."""

from __future__ import annotations

import itertools

import grpc
import pytest

from tests.support.echo import Echo, echo_stub
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import H2Upstream, Script
from tests.support.rawh2 import Connect, grpc_headers, grpc_message

_identifiers = itertools.count()
FOREVER = b"3600"
DEADLINE_EXCEEDED = "4"


@pytest.fixture
def identifier() -> str:
    return f"deadline-{next(_identifiers)}"


def test_a_unary_call_of_grpcio(echo_gate: Gate, echo: Echo, identifier: str) -> None:
    with echo_gate.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        echo_stub(channel).sleep(FOREVER, metadata=(("x-id", identifier),), timeout=0.5)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    echo.process.wait_log(f"cancelled {identifier}\n")


def test_a_streaming_call_of_grpcio(echo_gate: Gate, echo: Echo, identifier: str) -> None:
    with echo_gate.channel() as channel:
        call = echo_stub(channel).sleep_stream(FOREVER, metadata=(("x-id", identifier),), timeout=0.5)
        assert next(call) == b"first"
        with pytest.raises(grpc.RpcError) as raised:
            next(call)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    echo.process.wait_log(f"cancelled {identifier}\n")


def test_the_timeout_goes_on_to_the_upstream(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    upstream = script(on_end=lambda call: call.answer())
    client = connect(make_gate(upstream.address))
    reply = client.finish(client.request(grpc_headers("/any/Method", ("grpc-timeout", "30S")), grpc_message(b"")))
    assert reply.grpc_status == "0"
    assert upstream.calls[0].headers["grpc-timeout"]


class TestEnforcedByTheGate:
    """Neither the client here nor the upstream knows about deadlines."""

    @pytest.fixture
    def upstream(self, script: Script) -> H2Upstream:
        return script()

    @pytest.fixture
    def gate(self, upstream: H2Upstream, make_gate: GateMaker) -> Gate:
        return make_gate(upstream.address)

    @pytest.mark.parametrize("timeout", ["1S", "300m", "300000u", "30000000n"])
    def test_before_an_answer(self, gate: Gate, upstream: H2Upstream, connect: Connect, timeout: str) -> None:
        client = connect(gate)
        stream = client.request(grpc_headers("/any/Method", ("grpc-timeout", timeout)), grpc_message(b"request"))
        call = upstream.wait_call()
        reply = client.finish(stream)
        assert reply.headers[":status"] == "200"
        assert reply.headers["content-type"] == "application/grpc"
        assert reply.grpc_status == DEADLINE_EXCEEDED
        assert reply.grpc_message
        assert call.wait_reset() == 8
        gate.wait_metric("requests_total", 1, code="DEADLINE_EXCEEDED")

    def test_in_the_middle_of_the_request(self, gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
        client = connect(gate)
        headers = grpc_headers("/any/Method", ("grpc-timeout", "300m"))
        stream = client.request(headers, grpc_message(bytes(100))[:50], end=False)
        call = upstream.wait_call()
        assert client.finish(stream).grpc_status == DEADLINE_EXCEEDED
        assert call.wait_reset() == 8

    def test_between_two_messages_of_the_answer(self, gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
        client = connect(gate)
        stream = client.request(grpc_headers("/any/Method", ("grpc-timeout", "1S")), grpc_message(b"request"))
        call = upstream.wait_call()
        call.send_headers()
        call.send_data(grpc_message(b"first"))
        reply = client.finish(stream)
        assert bytes(reply.body) == grpc_message(b"first")
        assert reply.trailers["grpc-status"] == DEADLINE_EXCEEDED
        assert call.wait_reset() == 8

    def test_while_the_client_takes_no_data(self, gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
        client = connect(gate)
        client.credit = False
        stream = client.request(grpc_headers("/any/Method", ("grpc-timeout", "1S")), grpc_message(b"request"))
        call = upstream.wait_call()
        call.send_headers()
        call.send_data(bytes(300_000))  # more than the client's window: some of it waits in the gate
        reply = client.finish(stream)
        assert reply.trailers.get("grpc-status") == DEADLINE_EXCEEDED or reply.reset is not None
        assert call.wait_reset() == 8

    def test_others_on_the_connection_go_on(self, gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
        client = connect(gate)
        patient = client.request(grpc_headers("/any/Method"), grpc_message(b"patient"))
        hasty = client.request(grpc_headers("/any/Method", ("grpc-timeout", "200m")), grpc_message(b"hasty"))
        assert client.finish(hasty).grpc_status == DEADLINE_EXCEEDED
        waiting = next(call for call in upstream.calls if "grpc-timeout" not in call.headers)
        waiting.answer(grpc_message(b"at last"))
        reply = client.finish(patient)
        assert bytes(reply.body) == grpc_message(b"at last")
        assert reply.grpc_status == "0"


def test_while_waiting_for_an_upstream(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    """All that the upstream carries is in use; the deadline of what waits passes before its turn."""
    upstream = script()
    limits = {"upstream_connections": 1, "streams_per_upstream_connection": 1}
    gate = make_gate(upstream.address, limits=limits, timeouts={"connect": 60})
    client = connect(gate)
    client.request(grpc_headers("/any/Method"), grpc_message(b"running"))
    upstream.wait_call()
    waiting = client.request(grpc_headers("/any/Method", ("grpc-timeout", "300m")), grpc_message(b"waiting"))
    assert client.finish(waiting).grpc_status == DEADLINE_EXCEEDED
    assert len(upstream.calls) == 1
