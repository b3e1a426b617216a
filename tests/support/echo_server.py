"""A gRPC server for the tests' upstream, on grpcio: whatever comes in goes out again, seen and told.

Run as `python -m tests.support.echo_server --listen HOST:PORT|unix:PATH`. Messages are plain bytes, so that no schema
is needed. What happens to the calls that take long is printed, one line an event: `started ID`, `cancelled ID`,
`finished ID`, with ID the call's `x-id` metadata.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

SERVICE = "test.Echo"
Context = grpc.aio.ServicerContext


async def unary(request: bytes, context: Context) -> bytes:
    """The request; its `my-` metadata comes back as initial metadata and again, prefixed `t-`, as trailers."""
    await _mirror_metadata(context)
    return request


async def client_stream(requests: AsyncIterator[bytes], context: Context) -> bytes:
    """The number of messages and their joined length, as JSON."""
    await _mirror_metadata(context)
    lengths = [len(message) async for message in requests]
    return json.dumps({"messages": len(lengths), "bytes": sum(lengths)}).encode()


async def server_stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """`{"messages": N, "bytes": M}` asks for N messages of M bytes; the first four bytes of each are its number."""
    wanted = json.loads(request)
    await _mirror_metadata(context)
    for number in range(wanted["messages"]):
        yield number.to_bytes(4, "big") + bytes(wanted["bytes"] - 4)


async def bidi(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    """Each message back as it comes."""
    await _mirror_metadata(context)
    async for message in requests:
        yield message


async def fail(request: bytes, context: Context) -> bytes:
    """A trailers-only answer: NOT_FOUND, a message with characters that must be escaped, details and own trailers."""
    context.set_trailing_metadata(_failure_trailers(request))
    await context.abort(grpc.StatusCode.NOT_FOUND, "no model «ünicode» 100%\nsecond line")
    raise AssertionError("unreachable")


async def fail_late(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """Three messages, then DATA_LOSS with details and own trailers."""
    for _ in range(3):
        yield request
    context.set_trailing_metadata(_failure_trailers(request))
    await context.abort(grpc.StatusCode.DATA_LOSS, "lost after three")


async def sleep(request: bytes, context: Context) -> bytes:
    """Waits as many seconds as the request says."""
    await _watched(context, asyncio.sleep(float(request)))
    return b"slept"


async def sleep_stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """One message at once, the next after as many seconds as the request says."""
    yield b"first"
    await _watched(context, asyncio.sleep(float(request)))
    yield b"second"


async def sleep_bidi(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    """The first message back, and then nothing."""
    async for message in requests:
        yield message
        break
    await _watched(context, asyncio.sleep(3600))


async def _watched(context: Context, work: Awaitable[None]) -> None:
    identifier = _identifier(context)
    print("started", identifier, flush=True)
    try:
        await work
    except asyncio.CancelledError:
        print("cancelled", identifier, flush=True)
        raise
    print("finished", identifier, flush=True)


def _identifier(context: Context) -> str:
    return str(dict(context.invocation_metadata() or ()).get("x-id", "?"))


async def _mirror_metadata(context: Context) -> None:
    own = tuple((key, value) for key, value in context.invocation_metadata() or () if key.startswith("my-"))
    context.set_trailing_metadata(tuple((f"t-{key}", value) for key, value in own))
    await context.send_initial_metadata(own)


def _failure_trailers(request: bytes) -> tuple[tuple[str, str | bytes], ...]:
    return (("grpc-status-details-bin", request), ("x-why", "tested"), ("x-why-bin", bytes(range(256))))


HANDLERS: dict[str, tuple[Callable[..., grpc.RpcMethodHandler], Callable[..., Any]]] = {
    "Unary": (grpc.unary_unary_rpc_method_handler, unary),
    "ClientStream": (grpc.stream_unary_rpc_method_handler, client_stream),
    "ServerStream": (grpc.unary_stream_rpc_method_handler, server_stream),
    "Bidi": (grpc.stream_stream_rpc_method_handler, bidi),
    "Fail": (grpc.unary_unary_rpc_method_handler, fail),
    "FailLate": (grpc.unary_stream_rpc_method_handler, fail_late),
    "Sleep": (grpc.unary_unary_rpc_method_handler, sleep),
    "SleepStream": (grpc.unary_stream_rpc_method_handler, sleep_stream),
    "SleepBidi": (grpc.stream_stream_rpc_method_handler, sleep_bidi),
}


async def serve(address: str) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    methods = {name: handler(behaviour) for name, (handler, behaviour) in HANDLERS.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    server.add_insecure_port(address)
    await server.start()
    print("echo server listens on", address, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    asyncio.run(serve(parser.parse_args().listen))
