"""The load of the row of streams: one message there and back after another, on a bidirectional stream of grpcio's.

    python -m tests.bench.stream PORT --certificate FILE --seconds 2 --log FILE [--rate 500]

A process of its own, with grpcio because real streams come from it. With --rate, messages are due at even intervals
and latency counts from then; without, each goes out as soon as the one before has come back. It writes what `client`
writes, a line for each message.
"""

import argparse
import asyncio
import gc
import json
import sys
import time
from pathlib import Path

import grpc  # type: ignore[import-untyped]

from . import wire
from .client import write_log
from .connection import Call, Problem

MESSAGE_SECONDS = 10.0


async def run(options: argparse.Namespace, done: list[Call]) -> None:
    """Add each message that came back to `done`; Problem, or grpc's error, where one did not."""
    credentials = grpc.ssl_channel_credentials(options.certificate.read_bytes())
    body = wire.message(options.body)[wire.GRPC_PREFIX.size :]
    async with grpc.aio.secure_channel(f"localhost:{options.port}", credentials, _OPTIONS) as channel:
        call = channel.stream_stream(wire.STREAM_METHOD)(timeout=options.seconds + MESSAGE_SECONDS)
        began = time.time()
        now = began
        while now < began + options.seconds:
            due = now
            if options.rate:
                due = began + len(done) / options.rate
                if due > now:
                    await asyncio.sleep(due - now)
            await call.write(body)
            if await call.read() != body:
                raise Problem("an answer isn't an echo")
            now = time.time()
            done.append((due, now))
        await call.done_writing()
        if await call.read() is not grpc.aio.EOF or await call.code() != grpc.StatusCode.OK:
            raise Problem(f"the stream ended with {await call.code()}: {await call.details()}")


# The name stands in /etc/hosts, which grpc's own resolver reads no slower; but a proxy of the environment's must not be
# used.
_OPTIONS = (("grpc.enable_http_proxy", 0),)


def main() -> int:
    parser = argparse.ArgumentParser(description="One run of messages on a stream.")
    parser.add_argument("port", type=int)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--body", type=int, default=205)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    gc.disable()
    done: list[Call] = []
    problem = ""
    try:
        asyncio.run(run(options, done))
    except (Problem, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    except grpc.aio.AioRpcError as error:
        problem = f"{error.code()}: {error.details()}"
    if options.log:
        write_log(options.log, done)
    print(json.dumps({"answers": len(done), "problem": problem}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
