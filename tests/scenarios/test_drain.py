"""Promise: TERM ends the gate without failing a call: what runs finishes, what is new goes elsewhere, within bounds."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import grpc
import pytest

from tests.conftest import SAMPLES
from tests.support.echo import Echo, echo_stub
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import H2Upstream, Script
from tests.support.processes import port_answers, wait_for
from tests.support.rawh2 import Connect, grpc_headers, grpc_message


@pytest.fixture
def upstream(script: Script) -> Iterator[H2Upstream]:
    """Answers when the test tells it to."""
    return script()


def is_ready(gate: Gate) -> int:
    return gate.get("/readyz")[0]


def test_a_running_call_finishes(make_gate: GateMaker, upstream: H2Upstream) -> None:
    gate = make_gate(upstream.address, drain={"delay": 0, "timeout": 60})
    wait_for(lambda: is_ready(gate) == 200, "the gate to be ready")
    with gate.channel() as channel:
        call = channel.unary_unary("/any/Method").future(b"running", timeout=60)
        running = upstream.wait_call()
        gate.process.signal(signal.SIGTERM)
        wait_for(lambda: is_ready(gate) == 503, "/readyz to say that it is not ready any more")
        assert gate.get("/livez")[0] == 200
        assert gate.process.popen.poll() is None
        running.wait_ended()
        running.answer(grpc_message(b"finished"))
        assert call.result() == b"finished"
    assert gate.process.wait() == 0


def test_clients_are_told_to_go_away(make_gate: GateMaker, upstream: H2Upstream, connect: Connect) -> None:
    gate = make_gate(upstream.address, drain={"delay": 0, "timeout": 60})
    busy, idle = connect(gate), connect(gate)
    idle.settle()
    stream = busy.request(grpc_headers("/any/Method"), grpc_message(b"running"))
    running = upstream.wait_call()
    gate.process.signal(signal.SIGTERM)
    # Nothing runs on the idle connection: it is closed, as cleanly as can be.
    idle.wait_closed()
    assert idle.goaways
    assert idle.goaways[-1].error_code == 0
    assert idle.close_notify
    busy.pump(lambda: bool(busy.goaways), "GOAWAY")
    assert all(goaway.error_code == 0 for goaway in busy.goaways)
    assert busy.goaways[-1].last_stream_id >= stream
    running.wait_ended()
    running.answer(grpc_message(b"finished"))
    reply = busy.finish(stream)
    assert bytes(reply.body) == grpc_message(b"finished")
    assert reply.grpc_status == "0"
    busy.wait_closed()
    assert busy.close_notify
    assert gate.process.wait() == 0


def test_a_stream_finishes(make_gate: GateMaker, echo: Echo) -> None:
    gate = make_gate(echo.address, drain={"delay": 0, "timeout": 60})

    def messages() -> Iterator[bytes]:
        yield b"before"
        gate.process.signal(signal.SIGTERM)
        wait_for(lambda: is_ready(gate) == 503, "the drain to begin")
        for n in range(100):
            yield b"%d" % n

    with gate.channel() as channel:
        answers = list(echo_stub(channel).bidi(messages(), timeout=60))
    assert answers == [b"before", *(b"%d" % n for n in range(100))]
    assert gate.process.wait() == 0


def test_it_goes_on_taking_calls_while_load_balancers_notice(make_gate: GateMaker, echo: Echo) -> None:
    gate = make_gate(echo.address, drain={"delay": 3600, "timeout": 60})
    wait_for(lambda: is_ready(gate) == 200, "the gate to be ready")
    gate.process.signal(signal.SIGTERM)
    wait_for(lambda: is_ready(gate) == 503, "/readyz to say that it is not ready any more")
    with gate.channel() as channel:
        assert echo_stub(channel).unary(b"still here", timeout=30) == b"still here"
    gate.process.signal(signal.SIGTERM)
    gate.process.wait()


def test_new_connections_are_refused_in_a_drain(make_gate: GateMaker, upstream: H2Upstream) -> None:
    gate = make_gate(upstream.address, drain={"delay": 0, "timeout": 60})
    with gate.channel() as channel:
        call = channel.unary_unary("/any/Method").future(b"running", timeout=60)
        running = upstream.wait_call()
        gate.process.signal(signal.SIGTERM)
        wait_for(lambda: not port_answers(gate.port), "the port to be closed")
        with gate.channel() as late, pytest.raises(grpc.RpcError) as raised:
            echo_stub(late).unary(b"too late", timeout=30)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        running.wait_ended()
        running.answer(grpc_message(b"finished"))
        assert call.result() == b"finished"
    assert gate.process.wait() == 0


def test_a_second_term_ends_at_once(make_gate: GateMaker, upstream: H2Upstream) -> None:
    gate = make_gate(upstream.address, drain={"delay": 0, "timeout": 3600})
    with gate.channel() as channel:
        call = channel.unary_unary("/any/Method").future(b"running", timeout=60)
        upstream.wait_call()
        gate.process.signal(signal.SIGTERM)
        wait_for(lambda: is_ready(gate) == 503, "the drain to begin")
        gate.process.signal(signal.SIGTERM)
        gate.process.wait()
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_the_drain_is_bounded(make_gate: GateMaker, upstream: H2Upstream) -> None:
    gate = make_gate(upstream.address, drain={"delay": 0, "timeout": 1})
    with gate.channel() as channel:
        call = channel.unary_unary("/any/Method").future(b"running", timeout=60)
        upstream.wait_call()
        gate.process.signal(signal.SIGTERM)
        began = time.monotonic()
        gate.process.wait()
        assert time.monotonic() - began >= 1
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_the_embedded_backend_ends_with_the_gate(make_gate: GateMaker) -> None:
    gate = make_gate(None, model_repository_path=str(SAMPLES))
    children = gate.process.children()
    assert children
    gate.process.signal(signal.SIGTERM)
    assert gate.process.wait() == 0
    wait_for(lambda: not any(child.is_running() for child in children), "the backend to end")


def test_the_embedded_backend_ends_when_the_gate_is_killed(make_gate: GateMaker) -> None:
    gate = make_gate(None, model_repository_path=str(SAMPLES))
    children = gate.process.children()
    assert children
    gate.process.signal(signal.SIGKILL)
    gate.process.wait()
    wait_for(lambda: not any(child.is_running() for child in children), "the backend to end")
