"""The rows of the comparison of inference servers: who makes which calls, and what the ratios should come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .inference_calls import Protocol
from .inference_servers import (
    ADD_SUB,
    CONVNET,
    CONVNET_BATCHED,
    DELAY_MICROSECONDS,
    DIGITS,
    DIGITS_BATCHED,
    EMBEDDED,
    MLSERVER,
    TRITON,
)
from .load import Shape
from .rows import CPU, P99, RATE


@dataclass(frozen=True)
class Contestant:
    """A model on a server, called over a protocol; `name` is what the table calls it.

    paced: called evenly, at half of the rate that the contestant of that name just came to, instead of in a closed
    loop.
    """

    name: str
    server: str
    protocol: Protocol
    model: str
    paced: str = ""


@dataclass(frozen=True)
class Goal:
    """A figure of `ours`, divided by that of `theirs`, is to be at least (or at most) `limit`."""

    metric: str
    ours: str
    theirs: str
    limit: float
    least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    shape: Shape
    contestants: Sequence[Contestant]
    goals: Sequence[Goal]


OURS = Contestant("embedded, digits", EMBEDDED, "grpc", DIGITS)
OURS_BATCHED = Contestant("embedded, digits, batching", EMBEDDED, "grpc", DIGITS_BATCHED)
OURS_ADD_SUB = Contestant("embedded, add_sub", EMBEDDED, "grpc", ADD_SUB)
MLSERVER_BATCHED = Contestant("MLServer, digits, batching", MLSERVER, "grpc", DIGITS_BATCHED)
MLSERVER_SINGLE = Contestant("MLServer, digits", MLSERVER, "grpc", DIGITS)
TRITON_ADD_SUB = Contestant("Triton (Python), add_sub", TRITON, "grpc", ADD_SUB)
GRPC = (
    OURS,
    OURS_BATCHED,
    MLSERVER_BATCHED,
    MLSERVER_SINGLE,
    OURS_ADD_SUB,
    TRITON_ADD_SUB,
)
GRPC_GOALS = (
    Goal(RATE, OURS_BATCHED.name, MLSERVER_BATCHED.name, 5),
    Goal(RATE, OURS.name, MLSERVER_SINGLE.name, 5),
    Goal(CPU, OURS_BATCHED.name, TRITON_ADD_SUB.name, 1, least=False),
    Goal(CPU, OURS.name, TRITON_ADD_SUB.name, 1, least=False),
    Goal(CPU, OURS_ADD_SUB.name, TRITON_ADD_SUB.name, 1, least=False),
)

JSON = Contestant("embedded, JSON", EMBEDDED, "json", DIGITS)
JSON_BATCHED = Contestant("embedded, JSON, batching", EMBEDDED, "json", DIGITS_BATCHED)
BINARY_BATCHED = Contestant("embedded, binary, batching", EMBEDDED, "binary", DIGITS_BATCHED)
MLSERVER_JSON_BATCHED = Contestant("MLServer, JSON, batching", MLSERVER, "json", DIGITS_BATCHED)
MLSERVER_JSON = Contestant("MLServer, JSON", MLSERVER, "json", DIGITS)
REST_GOALS = (
    Goal(RATE, JSON_BATCHED.name, MLSERVER_JSON_BATCHED.name, 3),
    Goal(RATE, JSON.name, MLSERVER_JSON.name, 3),
    Goal(RATE, BINARY_BATCHED.name, MLSERVER_JSON_BATCHED.name, 3),
)

ONE_BY_ONE = Contestant("one by one", EMBEDDED, "grpc", CONVNET)
BATCHED = Contestant("batching", EMBEDDED, "grpc", CONVNET_BATCHED)
# In a closed loop the callers fill the batch that runs and the one after it: the time to wait is theirs to choose.
PACED = Contestant("batching, half the rate", EMBEDDED, "grpc", CONVNET_BATCHED, paced=BATCHED.name)
BOUND = f"{DELAY_MICROSECONDS} us + a batch"  # no contestant: the delay, and the time of a full batch without a server
BATCHING_GOALS = (
    Goal(RATE, BATCHED.name, ONE_BY_ONE.name, 3),
    Goal(P99, PACED.name, BOUND, 1, least=False),
)

ROWS = {
    row.name: row
    for row in (
        Row("grpc-4x16", "gRPC, one row a call, 4 connections x 16 streams", Shape(0, 4, 16), GRPC, GRPC_GOALS),
        Row("grpc-4x1", "gRPC, one row a call, 4 connections x 1 stream", Shape(0, 4, 1), GRPC, GRPC_GOALS),
        Row("rest-16", "REST, one row a call, 16 connections that are kept", Shape(0, 16, 1),
            (JSON, JSON_BATCHED, BINARY_BATCHED, MLSERVER_JSON_BATCHED, MLSERVER_JSON), REST_GOALS),
        Row("batching", f"a network of 52 MB, gRPC, 64 callers; batches of 64 at most, delay {DELAY_MICROSECONDS} us",
            Shape(0, 4, 16), (ONE_BY_ONE, BATCHED, PACED), BATCHING_GOALS),
    )
}  # fmt: skip
