"""The metrics page, read by the parser of `prometheus_client`."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.http2 import guards
from proxy.inference import calls, status
from proxy.inference.status import Code
from proxy.telemetry.metrics import DURATION_BOUNDS, HANDSHAKE_RESULTS, Counters, GateCollector, Route

INFER = "/inference.GRPCInferenceService/ModelInfer"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Page:
    """A gate's numbers, and the page that is made of them."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.upstreams: list[tuple[str, int, int]] = []
        self.expiries: dict[str, float] = {}
        self.registry = CollectorRegistry()
        self.registry.register(
            GateCollector(self.counters, lambda: 3, lambda: 2, lambda: self.upstreams, lambda: self.expiries)
        )

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def samples(self) -> Samples:
        found: Samples = {}
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in found, "a sample comes twice"
                found[key] = sample.value
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, frozenset(labels.items())))


@pytest.fixture
def page() -> Page:
    return Page()


def test_calls_by_method_and_code(page: Page) -> None:
    routes = page.counters.routes
    routes[INFER].add(Code.OK, 0.1)
    routes[INFER].add(Code.OK, 0.2)
    routes[INFER].add(Code.UNAVAILABLE, 5.0)
    routes["other"].add(Code.UNIMPLEMENTED, 0.001)
    name = "tensorgate_requests_total"
    assert page.value(name, protocol="grpc", method=INFER, code="OK") == 2
    assert page.value(name, protocol="grpc", method=INFER, code="UNAVAILABLE") == 1
    assert page.value(name, protocol="grpc", method="other", code="UNIMPLEMENTED") == 1
    assert len([key for key in page.samples() if key[0] == name]) == 3, "only what has happened has a sample"


@pytest.mark.parametrize("code", list(Code))
def test_every_code_has_its_name(page: Page, code: Code) -> None:
    page.counters.routes[INFER].add(code, 0.0)
    assert page.value("tensorgate_requests_total", protocol="grpc", method=INFER, code=code.name) == 1


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.00051, 0.099, 0.1, 0.1001, 120.0, 121.0, 1e6])
def test_durations_are_counted_in_every_bucket_that_holds_them(page: Page, seconds: float) -> None:
    page.counters.routes[INFER].add(Code.OK, seconds)
    name = "tensorgate_request_duration_seconds"
    for bound in DURATION_BOUNDS:
        expected = 1 if seconds <= bound else 0
        assert page.value(f"{name}_bucket", protocol="grpc", method=INFER, le=str(bound)) == expected
    assert page.value(f"{name}_bucket", protocol="grpc", method=INFER, le="+Inf") == 1
    assert page.value(f"{name}_count", protocol="grpc", method=INFER) == 1
    assert page.value(f"{name}_sum", protocol="grpc", method=INFER) == pytest.approx(seconds)


def test_durations_add_up(page: Page) -> None:
    for seconds in (0.01, 0.02, 3.0):
        page.counters.routes[INFER].add(Code.OK, seconds)
    name = "tensorgate_request_duration_seconds"
    assert page.value(f"{name}_sum", protocol="grpc", method=INFER) == pytest.approx(3.03)
    assert page.value(f"{name}_count", protocol="grpc", method=INFER) == 3
    assert page.value(f"{name}_bucket", protocol="grpc", method=INFER, le="0.025") == 2


def test_connections_and_bytes(page: Page) -> None:
    counters = page.counters
    counters.connections_total = 10
    counters.connections_refused["connections_per_address"] = 4
    counters.downstream_received, counters.downstream_sent = 100, 200
    counters.upstream_received, counters.upstream_sent = 300, 400
    assert page.value("tensorgate_streams_open") == 3
    assert page.value("tensorgate_connections_open") == 2
    assert page.value("tensorgate_connections_total") == 10
    assert page.value("tensorgate_connections_refused_total", limit="connections_per_address") == 4
    assert page.value("tensorgate_connections_refused_total", limit="connections") == 0
    assert page.value("tensorgate_downstream_received_bytes_total") == 100
    assert page.value("tensorgate_downstream_sent_bytes_total") == 200
    assert page.value("tensorgate_upstream_received_bytes_total") == 300
    assert page.value("tensorgate_upstream_sent_bytes_total") == 400


def test_every_result_of_a_handshake_is_there_from_the_start(page: Page) -> None:
    for result in HANDSHAKE_RESULTS:
        assert page.value("tensorgate_handshakes_total", result=result) == 0
    page.counters.handshakes["unknown_ca"] += 1
    assert page.value("tensorgate_handshakes_total", result="unknown_ca") == 1


def test_upstreams(page: Page) -> None:
    page.upstreams = [("127.0.0.1:9001", 2, 1), ("unix:/run/b.sock", 0, 1)]
    assert page.value("tensorgate_upstream_connections", upstream="127.0.0.1:9001", state="connected") == 2
    assert page.value("tensorgate_upstream_connections", upstream="127.0.0.1:9001", state="connecting") == 1
    assert page.value("tensorgate_upstream_connections", upstream="unix:/run/b.sock", state="connected") == 0
    assert page.value("tensorgate_upstream_up", upstream="127.0.0.1:9001") == 1
    assert page.value("tensorgate_upstream_up", upstream="unix:/run/b.sock") == 0


def test_certificates(page: Page) -> None:
    page.expiries = {"server": 1_900_000_000.0, "ca": 2_000_000_000.5}
    name = "tensorgate_certificate_expiry_timestamp_seconds"
    assert page.value(name, certificate="server") == 1_900_000_000
    assert page.value(name, certificate="ca") == 2_000_000_000.5


def test_a_page_without_any_call_can_be_read(page: Page) -> None:
    names = {family.name for family in text_string_to_metric_families(page.text())}
    assert all(name.startswith("tensorgate_") for name in names)
    assert {"tensorgate_requests", "tensorgate_request_duration_seconds", "tensorgate_upstream_up"} <= names


def test_every_metric_is_described(page: Page) -> None:
    for family in text_string_to_metric_families(page.text()):
        assert family.documentation.endswith("."), family.name


# -- labels are bounded in number and can't break the page


def test_a_method_is_learned(page: Page) -> None:
    route = page.counters.learn("/echo.Echo/Echo")
    assert page.counters.learn("/echo.Echo/Echo") is route
    assert page.counters.learn(INFER) is page.counters.routes[INFER]
    route.add(Code.OK, 0.0)
    assert page.value("tensorgate_requests_total", protocol="grpc", method="/echo.Echo/Echo", code="OK") == 1


def test_methods_are_learned_in_bounded_number(page: Page) -> None:
    counters = page.counters
    first = counters.learn("/a/0")
    for number in range(1000):
        counters.learn(f"/a/{number}").add(Code.OK, 0.0)
    assert len(counters.routes) == len(calls.KNOWN_METHODS) + 1 + 100
    assert counters.learn("/a/0") is first
    assert counters.learn("/a/999") is counters.routes["other"]
    assert page.value("tensorgate_requests_total", protocol="grpc", method="other", code="OK") == 900


def test_long_methods_are_not_learned(page: Page) -> None:
    assert page.counters.learn("/" + "a" * 128) is page.counters.routes["other"]
    assert page.counters.learn("/" + "a" * 127).method == "/" + "a" * 127


@pytest.mark.parametrize("path", ['/a"b', "/a\\b", "/a\\nb", '/a"} 1\\n', "/\xe4\xff", "/a b{c}"])
def test_odd_methods_do_not_break_the_page(page: Page, path: str) -> None:
    page.counters.learn(path).add(Code.OK, 0.0)
    page.counters.routes[INFER].add(Code.OK, 0.0)
    assert page.value("tensorgate_requests_total", protocol="grpc", method=path, code="OK") == 1
    assert page.value("tensorgate_requests_total", protocol="grpc", method=INFER, code="OK") == 1


def test_a_route_has_a_number_for_every_code() -> None:
    route = Route("x")
    assert len(route.codes) == len(status.NAMES)
    assert len(route.buckets) == len(DURATION_BOUNDS) + 1


def test_every_kind_of_abuse_is_there_from_the_start(page: Page) -> None:
    for kind in guards.KINDS:
        assert page.value("tensorgate_connection_abuse_total", kind=kind) == 0
    page.counters.abuse[guards.RESET] += 1
    assert page.value("tensorgate_connection_abuse_total", kind=guards.RESET) == 1
