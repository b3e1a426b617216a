"""What a call is: its method as a label, its content type, its deadline."""

from __future__ import annotations

import pytest

from proxy.inference import calls


@pytest.mark.parametrize("method", calls.KNOWN_METHODS)
def test_methods_of_the_protocol_are_labels_of_their_own(method: str) -> None:
    assert calls.method_label(method.encode()) == method


@pytest.mark.parametrize(
    "path",
    [b"", b"/", b"/inference.GRPCInferenceService/Nope", b"/inference.GRPCInferenceService/ModelInfer/", b"/\xff"],
)
def test_whatever_else_is_called_has_one_label(path: bytes) -> None:
    assert calls.method_label(path) == "other"


def test_all_methods_of_both_services_are_known() -> None:
    assert len(calls.KNOWN_METHODS) == len(set(calls.KNOWN_METHODS)) == 22
    for name in ("ModelInfer", "ModelStreamInfer", "ServerLive", "RepositoryModelLoad", "CudaSharedMemoryStatus"):
        assert f"/inference.GRPCInferenceService/{name}" in calls.KNOWN_METHODS
    assert "/grpc.health.v1.Health/Check" in calls.KNOWN_METHODS
    assert "/grpc.health.v1.Health/Watch" in calls.KNOWN_METHODS


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc+json", True),
        (b"application/grpc;charset=utf-8", True),
        (b"application/grpc ; charset=utf-8", True),
        (b"Application/GRPC+proto", True),
        (b"application /grpc", False),
        (b"application/grpc-web", False),
        (b"application/grpc-web+proto", False),
        (b"application/grpcx", False),
        (b"application/json", False),
        (b"", False),
    ],
)
def test_is_grpc(content_type: bytes, expected: bool) -> None:
    assert calls.is_grpc(content_type) is expected


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"2H", 7200.0),
        (b"3M", 180.0),
        (b"10S", 10.0),
        (b"250m", 0.25),
        (b"5u", 5e-6),
        (b"7n", 7e-9),
        (b"0S", 0.0),
        (b"00000001S", 1.0),
        (b"99999999H", 99_999_999 * 3600.0),
    ],
)
def test_timeouts(value: bytes, seconds: float) -> None:
    assert calls.parse_timeout(value) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "value",
    [b"", b"S", b"1", b"10", b"1s", b"1h", b"-1S", b"+1S", b"1.5S", b" 1S", b"1 S", b"100000000S", b"1SS", b"\xb2S"],
)
def test_timeouts_that_are_none(value: bytes) -> None:
    with pytest.raises(ValueError, match="one to eight digits") as error:
        calls.parse_timeout(value)
    assert f"'{value.decode('latin-1')}'" in str(error.value)


def test_the_error_of_a_long_timeout_is_short() -> None:
    with pytest.raises(ValueError) as error:
        calls.parse_timeout(b"9" * 10_000 + b"S")
    assert len(str(error.value)) < 150
