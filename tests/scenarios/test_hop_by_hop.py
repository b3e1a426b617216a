"""Promise: what belongs to a connection ends at the gate, and what belongs to a call passes it untouched."""

from __future__ import annotations

import pytest

from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import ANSWER, H2Upstream, Script
from tests.support.rawh2 import Connect, grpc_headers, grpc_message


@pytest.fixture
def upstream(script: Script) -> H2Upstream:
    return script()


@pytest.fixture
def gate(upstream: H2Upstream, make_gate: GateMaker) -> Gate:
    return make_gate(upstream.address)


def test_pings_are_answered_by_the_gate(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    client = connect(gate)
    client.request(grpc_headers("/any/Method"), grpc_message(b"running"))
    upstream.wait_call()
    for _ in range(20):
        client.settle()
    assert sum(connection.pings for connection in upstream.connections) == 0


def test_many_clients_share_few_upstream_connections(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    upstream.on_end = lambda call: call.answer(bytes(call.body))
    clients = [connect(gate) for _ in range(20)]
    streams = [client.request(grpc_headers("/any/Method"), grpc_message(b"%d" % n)) for n, client in enumerate(clients)]
    for n, (client, stream) in enumerate(zip(clients, streams, strict=True)):
        assert bytes(client.finish(stream).body) == grpc_message(b"%d" % n)
    assert len(upstream.connections) < len(clients)
    # Each stream has an id of its own upstream, though every client called its own stream 1.
    assert set(streams) == {1}
    identities = {(id(call.connection), call.stream) for call in upstream.calls}
    assert len(identities) == len(upstream.calls) == 20


def test_a_slow_call_is_not_held_up_by_ids_that_finish_first(
    gate: Gate, upstream: H2Upstream, connect: Connect
) -> None:
    clients = [connect(gate) for _ in range(3)]
    streams = [client.request(grpc_headers("/any/Method"), grpc_message(b"%d" % n)) for n, client in enumerate(clients)]
    for n in range(3):
        upstream.wait_call(n).wait_ended()
    calls = {bytes(call.body): call for call in upstream.calls}
    for n in (2, 0, 1):
        calls[grpc_message(b"%d" % n)].answer(grpc_message(b"answer %d" % n))
        assert bytes(clients[n].finish(streams[n]).body) == grpc_message(b"answer %d" % n)


def test_the_request_as_the_upstream_sees_it(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    upstream.on_end = lambda call: call.answer()
    client = connect(gate)
    headers = grpc_headers(
        "/inference.GRPCInferenceService/ModelInfer",
        ("user-agent", "tests"),
        ("grpc-encoding", "identity"),
        ("grpc-accept-encoding", "identity,gzip"),
        ("x-custom", "kept"),
        ("x-custom-bin", "AAECAw"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        authority="models.example:8001",
    )
    assert client.finish(client.request(headers, grpc_message(b""))).grpc_status == "0"
    seen = upstream.calls[0].headers
    assert seen[":method"] == "POST"
    assert seen[":path"] == "/inference.GRPCInferenceService/ModelInfer"
    assert seen[":authority"] == "models.example:8001"
    # The upstream's connection is plaintext.
    assert seen[":scheme"] == "http"
    for name, value in headers:
        if not name.startswith(":"):
            assert seen[name] == value


def test_an_informational_answer_comes_first(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    client = connect(gate)
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b""))
    call = upstream.wait_call()
    call.wait_ended()
    call.send_headers(((":status", "103"), ("link", "</a>; rel=preload")))
    call.answer(grpc_message(b"answer"))
    reply = client.finish(stream)
    assert reply.informational == [{":status": "103", "link": "</a>; rel=preload"}]
    assert reply.headers[":status"] == "200"
    assert bytes(reply.body) == grpc_message(b"answer")


def test_a_trailers_only_answer_is_one_frame(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    client = connect(gate)
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b""))
    call = upstream.wait_call()
    call.send_headers((*ANSWER, ("grpc-status", "5"), ("grpc-message", "no%20such"), ("x-own", "kept")), end=True)
    reply = client.finish(stream)
    assert reply.headers["grpc-status"] == "5"
    assert reply.headers["grpc-message"] == "no%20such"
    assert reply.headers["x-own"] == "kept"
    assert reply.trailers == {}
    assert not reply.body


def test_an_answer_before_the_request_has_ended(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    client = connect(gate)
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b"begun"), end=False)
    call = upstream.wait_call()
    call.answer(grpc_message(b"enough"), trailers=(("grpc-status", "9"),))
    reply = client.finish(stream)
    assert bytes(reply.body) == grpc_message(b"enough")
    assert reply.grpc_status == "9"


def test_trailers_with_repeated_and_long_values(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    long = "v" * 30_000
    client = connect(gate)
    client.h2.decoder.max_header_list_size = 2**20
    stream = client.request(grpc_headers("/any/Method"), grpc_message(b""))
    call = upstream.wait_call()
    call.wait_ended()
    call.answer(
        grpc_message(b"x"), trailers=(("grpc-status", "0"), ("x-long", long), ("grpc-status-details-bin", "AAECAw"))
    )
    reply = client.finish(stream)
    assert reply.trailers == {"grpc-status": "0", "x-long": long, "grpc-status-details-bin": "AAECAw"}


def test_padding_and_empty_frames(gate: Gate, upstream: H2Upstream, connect: Connect) -> None:
    upstream.on_end = lambda call: call.answer(bytes(call.body))
    client = connect(gate)
    stream = client.request(grpc_headers("/any/Method"), end=False)
    message = grpc_message(b"in pieces")
    for n, start in enumerate(range(0, len(message), 3)):
        client.h2.send_data(stream, message[start : start + 3], pad_length=n * 40)
        client.h2.send_data(stream, b"")
    client.h2.end_stream(stream)
    client.flush()
    assert bytes(client.finish(stream).body) == message
