"""Promise: a call that the upstream says it has not processed is made again by the gate, and its client never knows;
one that may have been processed is not."""

from __future__ import annotations

import grpc
import pytest

from tests.support.gate import GateMaker
from tests.support.h2_upstream import Call, Script
from tests.support.processes import wait_for
from tests.support.rawh2 import Connect, grpc_headers, grpc_message

REFUSED_STREAM = 7
CALLS = 20


@pytest.mark.parametrize("how", ["GOAWAY", "REFUSED_STREAM"])
def test_calls_of_grpcio_survive_an_upstream_that_refuses_them(make_gate: GateMaker, script: Script, how: str) -> None:
    def refuse_the_first_connection(call: Call) -> None:
        if call.connection is not upstream.connections[0]:
            call.answer(bytes(call.body))
        elif how == "REFUSED_STREAM":
            call.send_reset(REFUSED_STREAM)
        elif not gone:
            gone.append(call)
            call.connection.go_away(last_stream=0)

    gone: list[Call] = []
    upstream = script(on_end=refuse_the_first_connection)
    gate = make_gate(upstream.address)
    with gate.channel() as channel:
        method = channel.unary_unary("/any/Method")
        pending = [method.future(b"%d" % n, timeout=30, metadata=(("x-id", f"{n}"),)) for n in range(CALLS)]
        for n, call in enumerate(pending):
            assert call.result() == b"%d" % n
    gate.wait_metric("requests_total", CALLS, code="OK")
    assert gate.metric("requests_total") == CALLS
    answered = [call for call in upstream.calls if call.connection is not upstream.connections[0]]
    assert sorted(call.headers["x-id"] for call in answered) == sorted(f"{n}" for n in range(CALLS))


def test_a_long_request_goes_on_where_it_was_refused(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    def refuse_the_first(call: Call) -> None:
        if call.connection is upstream.connections[0]:
            call.connection.go_away(last_stream=0)

    upstream = script(on_request=refuse_the_first, on_end=lambda call: call.answer(bytes(call.body)[-5:]))
    client = connect(make_gate(upstream.address))
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b"first"), end=False)
    again = upstream.wait_call(1)
    client.send_all(stream, bytes(200_000) + grpc_message(b""))
    reply = client.finish(stream)
    assert reply.grpc_status == "0"
    assert again.ended
    assert bytes(again.body) == grpc_message(b"first") + bytes(200_000) + grpc_message(b"")


def test_a_call_that_is_refused_everywhere_fails_with_words(
    make_gate: GateMaker, script: Script, connect: Connect
) -> None:
    upstream = script(on_end=lambda call: call.send_reset(REFUSED_STREAM))
    client = connect(make_gate(upstream.address))
    reply = client.finish(client.request(grpc_headers("/any/Method"), grpc_message(b"request")))
    assert reply.grpc_status == "14"
    assert upstream.address in reply.headers["grpc-message"]
    assert "REFUSED_STREAM" in reply.headers["grpc-message"]
    assert len(upstream.calls) == 2
    assert upstream.calls[0].connection is not upstream.calls[1].connection


def test_a_call_whose_connection_dies_is_made_once(make_gate: GateMaker, script: Script) -> None:
    """It may have changed something."""

    def die_the_first_time(call: Call) -> None:
        if call.connection is upstream.connections[0]:
            call.connection.abort()
        else:
            call.answer(bytes(call.body))

    upstream = script(on_end=die_the_first_time)
    gate = make_gate(upstream.address)
    with gate.channel() as channel:
        method = channel.unary_unary("/any/Method")
        with pytest.raises(grpc.RpcError) as raised:
            method(b"once", timeout=30)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        wait_for(lambda: gate.metric("upstream_up") == 1, "the gate to be connected again")
        assert method(b"another", timeout=30) == b"another"
    assert [bytes(call.body)[5:] for call in upstream.calls] == [b"once", b"another"]
