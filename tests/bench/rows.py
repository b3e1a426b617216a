"""The rows of the benchmark: what load each is, how it is driven, and what it should come to."""

from dataclasses import dataclass
from typing import Literal, Protocol

from . import load
from .load import Aim, Job, Shape

SMALL = 205

CPU, RATE, BUSY, P50, P99, IDLE, START, END = "cpu_us", "rate", "busy", "p50", "p99", "idle_kib", "start_mb", "end_mb"
MEMORY = "memory"  # the row of what the processes hold; it is measured in every run, and not by a load

Site = Literal["echo", "stream", "fresh"]  # proxies before nghttpd; before the stream upstream; started for each run


@dataclass(frozen=True)
class Target:
    """The gate's `metric` is to be at most `limit` times that of `peer`, or at most `limit` where there is no peer."""

    metric: str
    limit: float
    peer: str | None = None


class Kind(Protocol):
    """How a load is made: in a closed loop for so long, after a warm-up of its own that has no figures, and at an even
    rate, where latency is looked at. `exact` is a short run before these, whose answers are looked at most closely."""

    def exact(self, aim: Aim) -> Job | None: ...

    def closed(self, aim: Aim, seconds: float, warm_up: float) -> Job: ...

    def even(self, aim: Aim, seconds: float, rate: float) -> Job | None: ...


@dataclass(frozen=True)
class Echo:
    """Unary calls, the same header fields on each. h2load goes as fast as it can, our client at an even rate."""

    shape: Shape

    def exact(self, aim: Aim) -> Job:
        return load.h2load_exact(self.shape, aim, self.shape.whole(max(4 * self.shape.in_flight, 16)))

    def closed(self, aim: Aim, seconds: float, warm_up: float) -> Job:
        return load.h2load_timed(self.shape, aim, warm_up, seconds)

    def even(self, aim: Aim, seconds: float, rate: float) -> Job:
        return load.client(self.shape, "constant", aim, seconds, rate)


@dataclass(frozen=True)
class Varied:
    """Unary calls with header values that are new on each, encoded as one kind of client does it."""

    shape: Shape
    style: str

    def exact(self, aim: Aim) -> Job:
        return load.client(self.shape, self.style, aim, 0.2)

    def closed(self, aim: Aim, seconds: float, warm_up: float) -> Job:
        return load.client(self.shape, self.style, aim, seconds)

    def even(self, aim: Aim, seconds: float, rate: float) -> Job:
        return load.client(self.shape, self.style, aim, seconds, rate)


@dataclass(frozen=True)
class Stream:
    """Messages there and back, one at a time, on a bidirectional stream of grpcio's."""

    shape: Shape

    def exact(self, aim: Aim) -> Job:
        return self._job(aim, 0.2)

    def closed(self, aim: Aim, seconds: float, warm_up: float) -> Job:
        return self._job(aim, seconds)

    def even(self, aim: Aim, seconds: float, rate: float) -> Job:
        return self._job(aim, seconds, "--rate", str(rate))

    def _job(self, aim: Aim, seconds: float, *more: str) -> Job:
        fixed = ("--certificate", str(aim.certificate), "--body", str(self.shape.body_bytes))
        return load.own("stream", aim, *fixed, "--seconds", str(seconds), *more)


@dataclass(frozen=True)
class Handshake:
    """A new connection for each call. No latency: the generator's own part in a handshake is as long as the proxy's."""

    resumed: bool

    def exact(self, aim: Aim) -> Job:
        return self.closed(aim, 0.2, 0.0)

    def closed(self, aim: Aim, seconds: float, warm_up: float) -> Job:
        return load.own("handshakes", aim, *(["--resumed"] if self.resumed else []), "--seconds", str(seconds))

    def even(self, aim: Aim, seconds: float, rate: float) -> None:
        return None


@dataclass(frozen=True)
class Idle:
    """So many connections with HTTP/2 set up and no call, on a proxy that has served nothing before."""

    connections: int

    def exact(self, aim: Aim) -> None:
        return None

    def closed(self, aim: Aim, seconds: float, warm_up: float) -> Job:
        """Says "ready" when all are open, and closes them at the end of its input."""
        return load.own("handshakes", aim, "--idle", str(self.connections))

    def even(self, aim: Aim, seconds: float, rate: float) -> None:
        return None


@dataclass(frozen=True)
class Row:
    """`unit` is what its CPU time and its rate are of; `short` stands beside its name in the chart."""

    name: str
    title: str
    short: str
    kind: Kind
    targets: tuple[Target, ...] = ()
    site: Site = "echo"
    unit: str = "RPC"


P99_TARGET = Target(P99, 0.9, "envoy")
WIDE = (Target(CPU, 0.6, "envoy"), Target(CPU, 1.2, "haproxy"), P99_TARGET)
NARROW = (Target(CPU, 0.7, "envoy"), Target(CPU, 0.95, "nginx"), Target(CPU, 0.95, "haproxy"), P99_TARGET)
LARGE = (Target(CPU, 1.0, "envoy"), P99_TARGET)
UNIQUE = (Target(CPU, 0.9, "envoy"), P99_TARGET)
FULL_HANDSHAKE = (Target(CPU, 1.8, "envoy"), Target(CPU, 1.4, "nginx"))
MEMORY_TARGETS = (Target(START, 60.0),)


def _echo(name: str, shape: Shape, targets: tuple[Target, ...]) -> Row:
    return Row(name, f"{shape.title()}, echo", shape.title(), Echo(shape), targets)


def _varied(name: str, style: str, like: str, targets: tuple[Target, ...]) -> Row:
    shape = Shape(SMALL, 4, 16)
    title = f"{shape.title()}, unique traceparent, x-request-id and grpc-timeout, encoded as {like} does"
    return Row(name, title, f"unique header values, as {like}", Varied(shape, style), targets)


_ALL = (
    _echo("1x1", Shape(SMALL, 1, 1), NARROW),
    _echo("4x1", Shape(SMALL, 4, 1), NARROW),
    _echo("4x16", Shape(SMALL, 4, 16), WIDE),
    _echo("1x100", Shape(SMALL, 1, 100), WIDE),
    _echo("64x1", Shape(SMALL, 64, 1), NARROW),
    _echo("1000x1", Shape(SMALL, 1000, 1), NARROW),
    _echo("64k-4x4", Shape(64 << 10, 4, 4), LARGE),
    _echo("600k-4x2", Shape(600 << 10, 4, 2), LARGE),
    _echo("4m-2x2", Shape(4 << 20, 2, 2), LARGE),
    _varied("unique", "grpcio", "grpcio", UNIQUE),
    _varied("unique-go", "go", "grpc-go", ()),
    Row(
        "stream",
        f"{SMALL} B messages there and back, one at a time, on one bidirectional stream (grpcio)",
        "one bidirectional stream, ping-pong",
        Stream(Shape(SMALL, 1, 1)),
        site="stream",
        unit="message",
    ),
    Row(
        "handshake",
        "a new connection with a full TLS 1.3 handshake, and one RPC on it",
        "full TLS 1.3 handshake and one RPC",
        Handshake(resumed=False),
        FULL_HANDSHAKE,
        unit="handshake",
    ),
    Row(
        "resumed",
        "a new connection with a resumed TLS 1.3 session, and one RPC on it",
        "resumed TLS 1.3 session and one RPC",
        Handshake(resumed=True),
        unit="handshake",
    ),
    Row(
        "idle",
        "1000 idle connections on a proxy that has served nothing before",
        "KiB for each idle connection",
        Idle(1000),
        (Target(IDLE, 28.0),),
        site="fresh",
    ),
)
ROWS = {row.name: row for row in _ALL}
