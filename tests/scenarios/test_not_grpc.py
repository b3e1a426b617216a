"""Promise: what is not gRPC on the gRPC port gets an HTTP answer that says so, and curl can read it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import peers
from tests.support.certs import Authority
from tests.support.gate import Gate
from tests.support.processes import LIVENESS
from tests.support.rawh2 import Connect, grpc_headers, grpc_message


def with_content_type(value: str | None) -> list[tuple[str, str]]:
    headers = [(name, text) for name, text in grpc_headers("/test.Echo/Unary") if name != "content-type"]
    return headers if value is None else [*headers, ("content-type", value)]


@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain", "application/grpc-web", "application/grpcx", None]
)
def test_other_content_types(echo_gate: Gate, connect: Connect, content_type: str | None) -> None:
    client = connect(echo_gate)
    reply = client.finish(client.request(with_content_type(content_type), grpc_message(b"hello")))
    assert reply.headers[":status"] == "415"
    assert "grpc-status" not in reply.headers or reply.headers["grpc-status"] != "0"
    # The connection is still good.
    reply = client.finish(client.request(grpc_headers("/test.Echo/Unary"), grpc_message(b"hello")))
    assert bytes(reply.body) == grpc_message(b"hello")


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto"])
def test_grpc_content_types(echo_gate: Gate, connect: Connect, content_type: str) -> None:
    client = connect(echo_gate)
    reply = client.finish(client.request(with_content_type(content_type), grpc_message(b"hello")))
    assert reply.grpc_status == "0"


def curl(gate: Gate, authority: Authority, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = peers.require_tool("curl", "apt-get install curl")
    argv = [command, "--silent", "--show-error", "--include", "--cacert", str(authority.ca_file), *arguments]
    return subprocess.run(
        [*argv, f"https://{gate.target}/v2/health/ready"], capture_output=True, text=True, timeout=LIVENESS
    )


def test_a_get_with_curl(echo_gate: Gate, authority: Authority) -> None:
    done = curl(echo_gate, authority)
    assert done.returncode == 0, done.stderr
    # A call is a POST with a content type of gRPC: either fault may be named first.
    assert re.match("HTTP/2 (405|415) ", done.stdout)


def test_a_post_with_curl(echo_gate: Gate, authority: Authority) -> None:
    done = curl(echo_gate, authority, "-d", "", "-H", "content-type: application/json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("HTTP/2 415 ")
    assert "application/grpc" in done.stdout


@pytest.mark.parametrize("size", [20, 10_000_000])
def test_a_post_with_a_body_with_curl_ends(echo_gate: Gate, authority: Authority, folder: Path, size: int) -> None:
    body = folder / "body"
    body.write_bytes(bytes(size))
    before = echo_gate.metric("downstream_received_bytes_total")
    done = curl(echo_gate, authority, "--data-binary", f"@{body}", "-H", "content-type: application/octet-stream")
    # The answer ends with RST_STREAM(NO_ERROR), which asks for no more of the body (RFC 9113 section 8.1). Older
    # versions of curl take that for error 92 and do not show the answer.
    assert done.stdout.startswith("HTTP/2 415 ") or done.returncode == 92, done
    assert echo_gate.metric("downstream_received_bytes_total") - before < 5_000_000


def test_curl_with_http_1_only(echo_gate: Gate, authority: Authority) -> None:
    mark = echo_gate.process.mark()
    done = curl(echo_gate, authority, "--http1.1")
    assert done.returncode != 0
    echo_gate.wait_log(r"offer h2 by ALPN", since=mark)
