"""Promise: unary, client-, server- and bidirectional streaming pass; metadata and errors arrive as they left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tests.support.echo import Echo, echo_stub, start_echo
from tests.support.gate import Gate, GateMaker

METADATA = (
    ("my-text", "plain, with spaces; and = signs"),
    ("my-twice", "one"),
    ("my-twice", "two"),
    ("my-empty", ""),
    ("my-long", "v" * 4000),
    ("my-all-bin", bytes(range(256))),
    ("my-empty-bin", b""),
    ("my-zero-bin", b"\0\0"),
)


@pytest.fixture(scope="module")
def unix_gate(run_folder: Path, shared_gates: GateMaker) -> Iterator[Gate]:
    server = start_echo(run_folder, f"unix:{run_folder}/echo.sock", name="unix-echo")
    yield shared_gates(server.address)
    server.stop()


@pytest.fixture(params=["tcp", "unix"])
def stub(request: pytest.FixtureRequest, echo: Echo) -> Iterator[SimpleNamespace]:
    gate: Gate = request.getfixturevalue("echo_gate" if request.param == "tcp" else "unix_gate")
    with gate.channel() as channel:
        yield echo_stub(channel)


def own(metadata: Any, prefix: str = "my-") -> list[tuple[str, str | bytes]]:
    return sorted((key, value) for key, value in metadata if key.startswith(prefix))


def check_metadata(call: Any) -> None:
    assert own(call.initial_metadata()) == sorted(METADATA)
    assert own(call.trailing_metadata(), "t-") == sorted((f"t-{key}", value) for key, value in METADATA)


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 70_000, 3_000_000])
def test_unary(stub: SimpleNamespace, size: int) -> None:
    payload = bytes(n % 251 for n in range(size))
    answer, call = stub.unary.with_call(payload, metadata=METADATA, timeout=30)
    assert answer == payload
    assert call.code() is grpc.StatusCode.OK
    check_metadata(call)


def test_client_streaming(stub: SimpleNamespace) -> None:
    messages = [bytes(n * 1000) for n in range(50)]
    answer, call = stub.client_stream.with_call(iter(messages), metadata=METADATA, timeout=30)
    assert json.loads(answer) == {"messages": 50, "bytes": sum(map(len, messages))}
    check_metadata(call)


def test_server_streaming(stub: SimpleNamespace) -> None:
    wanted = json.dumps({"messages": 50, "bytes": 20_000}).encode()
    call = stub.server_stream(wanted, metadata=METADATA, timeout=30)
    assert list(call) == [n.to_bytes(4, "big") + bytes(19_996) for n in range(50)]
    assert call.code() is grpc.StatusCode.OK
    check_metadata(call)


def test_bidirectional_streaming(stub: SimpleNamespace) -> None:
    messages = [bytes([n]) * (n * 100) for n in range(100)]
    call = stub.bidi(iter(messages), metadata=METADATA, timeout=30)
    assert list(call) == messages
    check_metadata(call)


def test_streams_without_a_message(stub: SimpleNamespace) -> None:
    assert list(stub.bidi(iter([]), timeout=30)) == []
    assert json.loads(stub.client_stream(iter([]), timeout=30)) == {"messages": 0, "bytes": 0}
    assert list(stub.server_stream(b'{"messages": 0, "bytes": 4}', timeout=30)) == []


def test_initial_metadata_arrives_before_the_first_message(stub: SimpleNamespace) -> None:
    answers = []

    def messages() -> Iterator[bytes]:
        # The one message is sent only after the server's headers are here.
        assert ("my-early", "yes") in own(call_box[0].initial_metadata())
        answers.append("headers came first")
        yield b"message"

    call_box: list[Any] = [None]

    def later() -> Iterator[bytes]:
        while call_box[0] is None:
            pass
        yield from messages()

    call_box[0] = stub.bidi(later(), metadata=(("my-early", "yes"),), timeout=30)
    assert list(call_box[0]) == [b"message"]
    assert answers == ["headers came first"]


def test_a_trailers_only_error(stub: SimpleNamespace) -> None:
    details = bytes(range(255, -1, -1)) * 2
    with pytest.raises(grpc.RpcError) as raised:
        stub.fail(details, timeout=30)
    error = raised.value
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "no model «ünicode» 100%\nsecond line"
    trailers = dict(error.trailing_metadata())
    assert trailers["grpc-status-details-bin"] == details
    assert trailers["x-why"] == "tested"
    assert trailers["x-why-bin"] == bytes(range(256))


def test_an_error_after_messages(stub: SimpleNamespace) -> None:
    call = stub.fail_late(b"payload", timeout=30)
    answers = []
    with pytest.raises(grpc.RpcError) as raised:
        answers.extend(answer for answer in call)
    error = raised.value
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert error.details() == "lost after three"
    trailers = dict(error.trailing_metadata())
    assert trailers["grpc-status-details-bin"] == b"payload"
    assert trailers["x-why-bin"] == bytes(range(256))


def test_each_message_before_a_late_error_arrives(stub: SimpleNamespace) -> None:
    call = stub.fail_late(b"payload", timeout=30)
    assert [next(call) for _ in range(3)] == [b"payload"] * 3
    with pytest.raises(grpc.RpcError):
        next(call)


async def test_asyncio_clients_see_the_same(echo_gate: Gate) -> None:
    async with echo_gate.aio_channel() as channel:
        stub = echo_stub(channel)
        call = stub.bidi(metadata=METADATA, timeout=30)
        for n in range(10):
            await call.write(b"%d" % n)
            assert await call.read() == b"%d" % n
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert own(await call.trailing_metadata(), "t-") == sorted((f"t-{key}", value) for key, value in METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.fail(b"details", timeout=30)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert dict(raised.value.trailing_metadata())["grpc-status-details-bin"] == b"details"
