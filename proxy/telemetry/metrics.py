"""What is counted, as plain numbers on the hot path, and the collector that hands them to prometheus_client.

Nothing here may take a lock or build a label while a call is under way: a call adds to numbers of its Route, and
labels are made when the page is scraped. Every label has a fixed set of values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.http2 import guards
from proxy.inference import calls, status

# Seconds. From the cost of a hop to that of a long generation.
DURATION_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip

_LEARNED_METHODS = 100
_MAX_METHOD = 128

HANDSHAKE_RESULTS = (
    "ok", "no_certificate", "unknown_ca", "certificate_expired", "certificate_invalid", "client_rejected_unknown_ca",
    "client_rejected_expired", "client_rejected", "closed_by_client", "no_preface", "plaintext_http", "plaintext_h2c",
    "unsupported_version", "no_shared_cipher", "no_alpn", "hello_too_long", "timeout", "other",
)  # fmt: skip

# Kinds of abuse besides those of http2.guards.
STALLED_HANDSHAKE = "stalled_handshake"
UNREAD_OUTPUT = "unread_output"
EMPTY_RECORDS = "empty_records"  # TLS records without data, such as key updates

# What a connection may be refused for: a key of `limits`, or the files that the process may have open.
CONNECTION_LIMITS = ("connections", "connections_per_address", "open_files")


class Route:
    """The numbers of one method."""

    __slots__ = ("buckets", "codes", "method", "seconds")

    def __init__(self, method: str) -> None:
        self.method = method
        self.codes = [0] * len(status.NAMES)
        self.buckets = [0] * (len(DURATION_BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, code: int, seconds: float) -> None:
        """One call has ended."""
        self.codes[code] += 1
        self.seconds += seconds
        self.buckets[bisect_left(DURATION_BOUNDS, seconds)] += 1


class Counters:
    """All numbers of the process."""

    def __init__(self) -> None:
        self.routes = {method: Route(method) for method in (*calls.KNOWN_METHODS, calls.OTHER_METHOD)}
        self._most_routes = len(self.routes) + _LEARNED_METHODS
        self.abuse = dict.fromkeys((*guards.KINDS, STALLED_HANDSHAKE, UNREAD_OUTPUT, EMPTY_RECORDS), 0)
        self.handshakes = dict.fromkeys(HANDSHAKE_RESULTS, 0)
        self.connections_total = 0
        self.connections_refused = dict.fromkeys(CONNECTION_LIMITS, 0)
        self.downstream_received = 0
        self.downstream_sent = 0
        self.upstream_received = 0
        self.upstream_sent = 0


    def learn(self, path: str) -> Route:
        """The route of a method that isn't of the inference protocol, but that the upstream has answered with OK.

        Paths that no server knows stay "other", and so does everything from some number on: what labels there are
        is the upstream's choice and bounded, whatever clients send.
        """
        route = self.routes.get(path)
        if route is None:
            if len(self.routes) >= self._most_routes or len(path) > _MAX_METHOD:
                return self.routes[calls.OTHER_METHOD]
            route = self.routes[path] = Route(path)
        return route


class GateCollector(Collector):
    """Turns the numbers into metrics when scraped; what is only known then comes from the callables.

    upstreams: () -> [(name, connected, connecting)]; expiries: () -> {certificate: timestamp in seconds}.
    """

    def __init__(
        self,
        counters: Counters,
        streams_open: Callable[[], int],
        connections_open: Callable[[], int],
        upstreams: Callable[[], list[tuple[str, int, int]]],
        expiries: Callable[[], Mapping[str, float]],
    ) -> None:
        self._counters = counters
        self._streams_open = streams_open
        self._connections_open = connections_open
        self._upstreams = upstreams
        self._expiries = expiries

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._connections()
        yield from self._bytes()
        yield from self._upstream_state()
        expiry = GaugeMetricFamily(
            "tensorgate_certificate_expiry_timestamp_seconds",
            "When a certificate in use expires, in seconds since 1970.",
            labels=["certificate"],
        )
        for name, when in self._expiries().items():
            expiry.add_metric([name], when)
        yield expiry

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "tensorgate_requests", "Calls that have ended, by gRPC code.", labels=["protocol", "method", "code"]
        )
        durations = HistogramMetricFamily(
            "tensorgate_request_duration_seconds",
            "From the request's head to the end of the response.",
            labels=["protocol", "method"],
        )
        for route in self._counters.routes.values():
            if not any(route.codes):
                continue
            for code, count in enumerate(route.codes):
                if count:
                    requests.add_metric(["grpc", route.method, status.NAMES[code]], count)
            durations.add_metric(["grpc", route.method], _cumulative(route.buckets), route.seconds)
        yield requests
        yield durations

    def _connections(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("tensorgate_streams_open", "Client calls under way.", self._streams_open())
        yield GaugeMetricFamily("tensorgate_connections_open", "Client connections.", self._connections_open())
        counters = self._counters
        yield CounterMetricFamily("tensorgate_connections", "Accepted connections.", counters.connections_total)
        refused = CounterMetricFamily(
            "tensorgate_connections_refused", "Connections closed at once, by the limit.", labels=["limit"]
        )
        for limit, count in counters.connections_refused.items():
            refused.add_metric([limit], count)
        yield refused
        handshakes = CounterMetricFamily("tensorgate_handshakes", "TLS handshakes by result.", labels=["result"])
        for result, count in counters.handshakes.items():
            handshakes.add_metric([result], count)
        yield handshakes
        abuse = CounterMetricFamily(
            "tensorgate_connection_abuse",
            "Connections ended by the gate for what was too much.",
            labels=["kind"],
        )
        for kind, count in counters.abuse.items():
            abuse.add_metric([kind], count)
        yield abuse

    def _bytes(self) -> Iterator[Metric]:
        counters = self._counters
        for side, received, sent in (
            ("downstream", counters.downstream_received, counters.downstream_sent),
            ("upstream", counters.upstream_received, counters.upstream_sent),
        ):
            yield CounterMetricFamily(f"tensorgate_{side}_received_bytes", f"Bytes read, {side} side.", received)
            yield CounterMetricFamily(f"tensorgate_{side}_sent_bytes", f"Bytes written, {side} side.", sent)

    def _upstream_state(self) -> Iterator[Metric]:
        connections = GaugeMetricFamily(
            "tensorgate_upstream_connections", "Connections to an upstream.", labels=["upstream", "state"]
        )
        up = GaugeMetricFamily("tensorgate_upstream_up", "1 while an upstream is connected.", labels=["upstream"])
        for name, connected, connecting in self._upstreams():
            connections.add_metric([name, "connected"], connected)
            connections.add_metric([name, "connecting"], connecting)
            up.add_metric([name], 1 if connected else 0)
        yield connections
        yield up


def _cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    total = 0
    result = []
    for bound, count in zip((*DURATION_BOUNDS, float("inf")), buckets, strict=True):
        total += count
        result.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return result
