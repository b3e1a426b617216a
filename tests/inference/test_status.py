"""gRPC statuses: read from trailers, made of HTTP's and of resets, written as trailers."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import grpc
import pytest

from proxy.inference import status
from proxy.inference.status import Code


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_codes_are_those_of_grpc(code: grpc.StatusCode) -> None:
    number, _ = code.value
    assert Code(number).name == code.name
    assert status.NAMES[number] == code.name
    assert len(Code) == len(grpc.StatusCode)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"0", Code.OK),
        (b"5", Code.NOT_FOUND),
        (b"16", Code.UNAUTHENTICATED),
        (b"05", Code.NOT_FOUND),
        (b"17", Code.UNKNOWN),
        (b"99", Code.UNKNOWN),
        (b"005", Code.UNKNOWN),
        (b"", Code.UNKNOWN),
        (b"-1", Code.UNKNOWN),
        (b"OK", Code.UNKNOWN),
    ],
)
def test_read(value: bytes, code: Code) -> None:
    assert status.read([(b"x", b"1"), (b"grpc-status", value), (b"grpc-status", b"3")]) is code


def test_read_without_a_status() -> None:
    assert status.read([(b"grpc-message", b"hm")]) is None
    assert status.read([]) is None


@pytest.mark.parametrize(
    ("http", "code"),
    [
        (400, Code.INTERNAL),
        (401, Code.UNAUTHENTICATED),
        (403, Code.PERMISSION_DENIED),
        (404, Code.UNIMPLEMENTED),
        (429, Code.UNAVAILABLE),
        (502, Code.UNAVAILABLE),
        (503, Code.UNAVAILABLE),
        (504, Code.UNAVAILABLE),
        (200, Code.UNKNOWN),
        (500, Code.UNKNOWN),
        (302, Code.UNKNOWN),
    ],
)
def test_http_statuses_as_grpc_maps_them(http: int, code: Code) -> None:
    assert status.from_http(http) is code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (0x0, Code.INTERNAL),
        (0x1, Code.INTERNAL),
        (0x2, Code.INTERNAL),
        (0x5, Code.INTERNAL),
        (0x7, Code.UNAVAILABLE),
        (0x8, Code.CANCELLED),
        (0xB, Code.RESOURCE_EXHAUSTED),
        (0xC, Code.PERMISSION_DENIED),
        (0xDEAD, Code.INTERNAL),
    ],
)
def test_resets_as_grpc_maps_them(error: int, code: Code) -> None:
    assert status.from_reset(error) is code


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("plain ~ text!", b"plain ~ text!"),
        ("100%", b"100%25"),
        ("a\nb\tc\0", b"a%0Ab%09c%00"),
        ("\x7f", b"%7F"),
        ("größe", b"gr%C3%B6%C3%9Fe"),
        ("\U0001f600", b"%F0%9F%98%80"),
        ("\udcff", b"?"),
        ("", b""),
    ],
)
def test_messages_are_percent_encoded(text: str, encoded: bytes) -> None:
    assert status.encode_message(text) == encoded


def test_a_long_message_is_cut() -> None:
    assert status.encode_message("x" * 5000) == b"x" * 1021 + b"..."
    assert unquote_to_bytes(status.encode_message("\u20ac" * 5000)).decode() == "\u20ac" * 340 + "..."


def test_trailers() -> None:
    assert status.trailers(Code.UNAVAILABLE, "no\nluck") == [(b"grpc-status", b"14"), (b"grpc-message", b"no%0Aluck")]


def test_an_answer_in_one_header_section() -> None:
    assert status.trailers_only(Code.OK, "fine") == [
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"0"),
        (b"grpc-message", b"fine"),
    ]
