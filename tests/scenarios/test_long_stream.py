"""Promise: a bidirectional stream carries 10,000 messages both ways, all of them, in order, at the same time."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.echo import echo_stub
from tests.support.gate import Gate
from tests.support.rawh2 import Connect, grpc_headers, grpc_message

MESSAGES = 10_000


def message(n: int) -> bytes:
    return n.to_bytes(4, "big") + bytes(n % 300)


def test_10000_messages_through_grpcio(echo_gate: Gate) -> None:
    def messages() -> Iterator[bytes]:
        yield from map(message, range(MESSAGES))

    count = 0
    with echo_gate.channel() as channel:
        for count, answer in enumerate(echo_stub(channel).bidi(messages(), timeout=120), start=1):
            assert answer == message(count - 1)
    assert count == MESSAGES


def test_1000_messages_each_after_the_answer_to_the_one_before(echo_gate: Gate, connect: Connect) -> None:
    client = connect(echo_gate)
    stream = client.request(grpc_headers("/test.Echo/Bidi"), end=False)
    reply = client.replies[stream]
    for n in range(1000):
        reply.body.clear()
        client.h2.send_data(stream, grpc_message(message(n)))
        client.flush()
        expected = grpc_message(message(n))
        client.pump(lambda e=expected: bytes(reply.body) == e, f"the echo of message {n}")
    client.h2.end_stream(stream)
    client.flush()
    assert client.finish(stream).grpc_status == "0"
