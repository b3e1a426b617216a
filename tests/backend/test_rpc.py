"""Promise: the call layer answers every odd request with a gRPC status, and a connection outlives what is odd on it."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import zlib
from collections.abc import Iterator

import h2.settings
import pytest
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.exceptions import GRPCError
from hyperframe.frame import GoAwayFrame
from tritonclient.grpc import service_pb2

from proxy.backend.services.call import LARGEST_QUESTION
from proxy.backend.services.call import gathered as gathered_pieces
from proxy.backend.services.compression import LARGEST_INFLATED
from proxy.backend.services.http2 import MOST_STREAMS
from tests.backend import rendezvous
from tests.backend.conftest import Local, Running
from tests.support.processes import LIVENESS
from tests.support.rawh2 import H2Client, Reply, grpc_headers, grpc_message

LIVE = "/inference.GRPCInferenceService/ServerLive"
READY = "/inference.GRPCInferenceService/ModelReady"
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def client(backend: Running) -> Iterator[H2Client]:
    host, _, port = backend.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LIVENESS) as sock:
        yield H2Client(sock, validate=False)


def assert_alive(client: H2Client) -> None:
    reply = client.finish(client.request(grpc_headers(LIVE), grpc_message(b"")))
    assert (reply.grpc_status, bytes(reply.body)) == ("0", grpc_message(b"\x08\x01"))


def failed(reply: Reply) -> tuple[int, str]:
    assert reply.grpc_status is not None
    assert reply.headers[":status"] == "200"
    assert not reply.body
    return int(reply.grpc_status), reply.grpc_message


def with_encoding(name: str) -> list[tuple[str, str]]:
    return grpc_headers(READY, ("grpc-encoding", name))


def compressed(payload: bytes) -> bytes:
    return b"\1" + struct.pack(">I", len(payload)) + payload


SIMPLE = service_pb2.ModelReadyRequest(name="simple").SerializeToString()
DEFLATED = zlib.compress(SIMPLE)
CUT_OFF = gzip.compress(SIMPLE)[:-9]

ODD = {
    "unknown method": (grpc_headers("/inference.GRPCInferenceService/Nope"), grpc_message(b""), 12, "unknown method"),
    "no method": (grpc_headers("/"), grpc_message(b""), 12, "unknown method /"),
    "no message": (grpc_headers(LIVE), b"", 13, "request has no message; a inference.ServerLiveRequest is expected"),
    "prefix cut off": (grpc_headers(LIVE), b"\0\0", 13, "request ended in the middle of a message"),
    "message cut off": (grpc_headers(LIVE), b"\0\0\0\0\x09abc", 13, "request ended in the middle of a message"),
    "2 GiB announced": (grpc_headers(LIVE), b"\0\x80\0\0\0", 8, "2147483648 bytes is larger than 65536"),
    "2 GiB of tensors": (grpc_headers(INFER), b"\0\x80\0\0\0", 8, "2147483648 bytes is larger than 2147483647"),
    "nonsense": (grpc_headers(INFER), grpc_message(b"\xff" * 9), 13, "cannot be parsed as inference.ModelInferRequest"),
    "much nonsense": (grpc_headers(INFER), grpc_message(b"\xff" * 40000), 13, "cannot be parsed as inference.Model"),
    "unknown encoding": (with_encoding("snappy"), compressed(b"x"), 12, "grpc-encoding 'snappy' is not supported"),
    "no encoding": (grpc_headers(READY), compressed(b"x"), 13, "marked as compressed, but grpc-encoding names no"),
    "not gzip": (with_encoding("gzip"), compressed(DEFLATED), 13, "message cannot be decompressed"),
    "gzip cut off": (with_encoding("gzip"), compressed(CUT_OFF), 13, "it is cut off"),
    "odd timeout": (grpc_headers(LIVE, ("grpc-timeout", "1x")), grpc_message(b""), 3, "grpc-timeout is '1x'"),
    "long timeout": (grpc_headers(LIVE, ("grpc-timeout", "123456789S")), grpc_message(b""), 3, "'123456789S'"),
}


@pytest.mark.parametrize("case", ODD.values(), ids=list(ODD))
def test_an_odd_request(client: H2Client, case: tuple[list[tuple[str, str]], bytes, int, str]) -> None:
    headers, body, code, says = case
    stream = client.request(headers, end=not body)
    client.send_all(stream, body)
    got, message = failed(client.finish(stream))
    assert (got, says in message) == (code, True), message
    assert_alive(client)


@pytest.mark.parametrize(("name", "data"), [("gzip", gzip.compress(SIMPLE)), ("deflate", DEFLATED)])
def test_compressed_messages(client: H2Client, name: str, data: bytes) -> None:
    reply = client.finish(client.request(with_encoding(name), compressed(data)))
    assert (reply.grpc_status, bytes(reply.body)) == ("0", grpc_message(b"\x08\x01"))


def test_a_message_that_inflates_without_end(client: H2Client) -> None:
    for path, most in ((INFER, LARGEST_INFLATED), (READY, LARGEST_QUESTION)):
        stream = client.request(grpc_headers(path, ("grpc-encoding", "deflate")), end=False)
        client.send_all(stream, compressed(zlib.compress(bytes(most + 1))))
        code, message = failed(client.finish(stream))
        assert (code, f"{most} bytes when decompressed" in message) == (8, True), message
        assert_alive(client)


@pytest.mark.parametrize(
    ("header", "value"),
    [(":method", "GET"), *(("content-type", kind) for kind in ("application/json", "application/grpc-web", ""))],
)
def test_what_is_no_grpc_gets_415(client: H2Client, header: str, value: str) -> None:
    headers = [(name, value if name == header else usual) for name, usual in grpc_headers(LIVE)]
    reply = client.finish(client.request(headers, grpc_message(b"")))
    assert reply.headers[":status"] == "415"
    assert_alive(client)


@pytest.mark.parametrize("kind", ["application/grpc+proto", "application/grpc;charset=utf-8"])
def test_other_spellings_of_grpc(client: H2Client, kind: str) -> None:
    headers = [(name, kind if name == "content-type" else value) for name, value in grpc_headers(LIVE)]
    assert client.finish(client.request(headers, grpc_message(b""))).grpc_status == "0"


def test_headers_that_are_not_ascii(client: H2Client) -> None:
    reply = client.finish(client.request(grpc_headers(LIVE, ("x-name", "naïve")), grpc_message(b"")))
    assert reply.grpc_status == "0"


def test_frames_without_data_are_no_end(client: H2Client) -> None:
    stream = client.request(grpc_headers(READY), end=False)
    message = grpc_message(SIMPLE)
    for part in (b"", message[:3], b"", message[3:9], b"", message[9:]):
        client.h2.send_data(stream, part, end_stream=False)
        client.flush()
        client.settle()
    client.h2.end_stream(stream)
    client.flush()
    assert bytes(client.finish(stream).body) == grpc_message(b"\x08\x01")


def test_as_many_headers_as_a_gate_may_let_through(client: H2Client) -> None:
    """`limits.header_list_bytes` goes up to a MiB, and the connection carries other calls."""
    many = [(f"x-{number}", "y" * 8000) for number in range(126)]
    assert client.finish(client.request(grpc_headers(LIVE, *many), grpc_message(b""))).grpc_status == "0"
    assert_alive(client)


def test_frames_of_unknown_type_are_ignored(client: H2Client) -> None:
    client.sock.sendall(b"\0\0\x04\xee\0\0\0\0\0abcd")
    assert_alive(client)


def test_a_stream_reset_before_its_request_is_whole(client: H2Client) -> None:
    stream = client.request(grpc_headers(INFER), b"\0\0\0\1\0", end=False)
    client.h2.reset_stream(stream, 8)
    client.flush()
    client.settle()
    assert_alive(client)


def test_an_error_stops_a_client_that_still_sends(client: H2Client) -> None:
    stream = client.request(grpc_headers("/nope/nope"), b"\0\0\0\1\0", end=False)
    reply = client.finish(stream)
    assert failed(reply)[0] == 12
    client.pump(lambda: reply.reset is not None, "RST_STREAM")
    assert reply.reset == 0
    assert_alive(client)


def test_an_answer_waits_for_the_clients_window(backend: Running) -> None:
    host, _, port = backend.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LIVENESS) as sock:
        client = H2Client(sock)
        client.credit = False
        client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
        client.flush()
        client.settle()
        values = bytes(range(250)) * 40
        request = service_pb2.ModelInferRequest(model_name="echo", outputs=[{"name": "OUT_UINT8"}])
        request.inputs.add(name="IN_UINT8", datatype="UINT8", shape=[len(values)])
        request.raw_input_contents.append(values)
        stream = client.request(grpc_headers(INFER), grpc_message(request.SerializeToString()))
        reply = client.replies[stream]
        client.pump(lambda: len(reply.body) >= 1000, "the first thousand bytes")
        assert_alive(client)
        assert len(reply.body) == 1000
        client.credit = True
        client.acknowledge(stream, 1000)
        client.finish(stream)
        answer = service_pb2.ModelInferResponse.FromString(bytes(reply.body[5:]))
        assert answer.raw_output_contents[0] == values


def test_many_streams_are_announced(client: H2Client) -> None:
    client.settle()
    assert client.h2.remote_settings.max_concurrent_streams == MOST_STREAMS


def test_a_long_message_fits_into_a_header(client: H2Client) -> None:
    request = service_pb2.ModelInferRequest(model_name="x" * 100_000).SerializeToString()
    stream = client.request(grpc_headers(INFER), end=False)
    client.send_all(stream, grpc_message(request))
    code, message = failed(client.finish(stream))
    assert (code, len(message)) == (5, 1024)


def test_a_large_response_leaves_uncopied() -> None:
    large = memoryview(bytes(100_000))
    gathered = gathered_pieces([b"a", b"b", large, b"c", large, large])
    assert [bytes(piece[:1]) for piece in gathered] == [b"a", b"\0", b"c", b"\0", b"\0"]
    assert sum(isinstance(piece, memoryview) and piece.obj is large.obj for piece in gathered) == 3


async def test_grpclib_client(backend: Running) -> None:
    host, _, port = backend.target.rpartition(":")
    async with Channel(host, int(port)) as channel:
        live = UnaryUnaryMethod(channel, LIVE, service_pb2.ServerLiveRequest, service_pb2.ServerLiveResponse)
        assert (await live(service_pb2.ServerLiveRequest())).live
        infer = UnaryUnaryMethod(channel, INFER, service_pb2.ModelInferRequest, service_pb2.ModelInferResponse)
        with pytest.raises(GRPCError, match="unknown model: 'näme'"):
            await infer(service_pb2.ModelInferRequest(model_name="näme"))


async def test_stopping_says_goaway_and_takes_no_new_connection(local: Local) -> None:
    host, _, port = local.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LIVENESS) as sock:
        client = await asyncio.to_thread(H2Client, sock)
        await asyncio.to_thread(client.settle)
        await local.backend.stop(grace=5)
        await asyncio.to_thread(client.wait_closed)
        assert [event.last_stream_id for event in client.goaways][:1] == [2**31 - 1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=LIVENESS)
    assert rendezvous.finalized == ["waits"]


def test_goaway_of_the_client_ends_the_connection(client: H2Client) -> None:
    assert_alive(client)
    client.sock.sendall(GoAwayFrame(0, last_stream_id=0).serialize())
    client.wait_closed()
