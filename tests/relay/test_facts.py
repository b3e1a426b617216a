"""What the relay derives from a request's header block."""

from __future__ import annotations

import pytest

from proxy.http2 import HeaderBlock, RequestHead
from proxy.http2.hpack import Sensitive
from proxy.inference.status import Code
from proxy.relay.facts import Facts
from proxy.telemetry.metrics import Counters, Route

INFER = b"/inference.GRPCInferenceService/ModelInfer"


def head(
    *extra: tuple[bytes, bytes], method: bytes = b"POST", path: bytes = INFER, kind: bytes = b"application/grpc"
) -> RequestHead:
    fields = [(b":method", method), (b":scheme", b"https"), (b":path", path), (b":authority", b"localhost")]
    content = [(b"content-type", kind)] if kind else []
    made = RequestHead([*fields, *content, *extra])
    assert made.error is None
    return made


@pytest.fixture
def routes() -> dict[str, Route]:
    return Counters().routes


def test_a_call_is_forwarded_with_all_its_fields_in_order(routes: dict[str, Route]) -> None:
    request = head((b"te", b"trailers"), (b"x-b", b"1"), (b"x-a", b"2"), (b"x-b", b"3"))
    facts = Facts(request, routes)
    assert facts.refusal is None
    assert facts.forward.error is None
    assert facts.forward.fields == (request.fields[0], (b":scheme", b"http"), *request.fields[2:])


def test_what_was_sensitive_stays_so(routes: dict[str, Route]) -> None:
    facts = Facts(head(Sensitive((b"authorization", b"Bearer 1"))), routes)
    assert type(facts.forward.fields[-1]) is Sensitive


@pytest.mark.parametrize(
    ("path", "route", "text"),
    [
        (INFER, INFER.decode(), INFER.decode()),
        (b"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Check"),
        (b"/echo.Echo/Echo", "other", "/echo.Echo/Echo"),
        (b"/\xff\xfe", "other", "/\xff\xfe"),
    ],
)
def test_the_route_and_the_path(routes: dict[str, Route], path: bytes, route: str, text: str) -> None:
    facts = Facts(head(path=path), routes)
    assert facts.route is routes[route]
    assert facts.path == text


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (b"250m", 0.25),
        (b"10S", 10.0),
        (b"0n", 0.0),
        (b"99999999H", 315_360_000.0),
    ],
)
def test_a_deadline(routes: dict[str, Route], timeout: bytes, seconds: float) -> None:
    facts = Facts(head((b"grpc-timeout", timeout)), routes)
    assert facts.timeout == pytest.approx(seconds)
    assert facts.refusal is None


def test_no_deadline(routes: dict[str, Route]) -> None:
    assert Facts(head(), routes).timeout is None


@pytest.mark.parametrize("timeout", [b"", b"10", b"ten S", b"123456789S"])
def test_a_timeout_that_is_none_is_refused_in_words(routes: dict[str, Route], timeout: bytes) -> None:
    facts = Facts(head((b"grpc-timeout", timeout)), routes)
    assert facts.refusal is not None
    assert facts.refusal_code == Code.INTERNAL
    assert facts.refusal_body == b""
    assert facts.refusal.get(b":status") == b"200"
    assert facts.refusal.get(b"grpc-status") == b"13"
    assert b"grpc-timeout" in (facts.refusal.get(b"grpc-message") or b"")
    assert facts.timeout is None


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"DELETE", b"OPTIONS"])
def test_another_method_than_post_is_refused(routes: dict[str, Route], method: bytes) -> None:
    facts = Facts(head(method=method), routes)
    refused(facts, b"405")
    assert facts.refusal is not None
    assert facts.refusal.get(b"allow") == b"POST"


def test_connect_is_refused(routes: dict[str, Route]) -> None:
    refused(Facts(RequestHead([(b":method", b"CONNECT"), (b":authority", b"a:443")]), routes), b"405")


def test_a_head_request_is_refused_without_a_body(routes: dict[str, Route]) -> None:
    facts = Facts(head(method=b"HEAD"), routes)
    assert facts.refusal is not None
    assert facts.refusal.get(b":status") == b"405"
    assert facts.refusal_body == b""


@pytest.mark.parametrize("kind", [b"", b"application/json", b"application/grpc-web", b"text/html"])
def test_another_content_type_is_refused_as_grpc_asks(routes: dict[str, Route], kind: bytes) -> None:
    facts = Facts(head(kind=kind), routes)
    refused(facts, b"415")
    assert facts.refusal is not None
    assert facts.refusal.get(b"accept") == b"application/grpc"


def refused(facts: Facts, status: bytes) -> None:
    refusal = facts.refusal
    assert refusal is not None
    assert facts.refusal_code == Code.UNKNOWN
    assert refusal.get(b":status") == status
    assert refusal.get(b"content-length") == b"%d" % len(facts.refusal_body)
    assert b"gRPC" in facts.refusal_body
    assert HeaderBlock(refusal.fields[1:]).error is None
