"""Promise: where a client says why it refuses the gate, or where the two have nothing in common, the counter and the
log name that reason exactly."""

from __future__ import annotations

import socket
import ssl
import warnings
from collections.abc import Callable

import pytest

from tests.support.certs import Authority
from tests.support.echo import Echo
from tests.support.gate import Gate, GateMaker
from tests.support.processes import LIVENESS, wait_for
from tests.support.rawh2 import H2Client, grpc_headers, grpc_message, tls_context, tls_socket


@pytest.fixture(scope="module")
def gate(echo: Echo, shared_gates: GateMaker) -> Gate:
    """A gate of this module's own, with a short time for handshakes."""
    return shared_gates(echo.address, timeouts={"handshake": 1})


def is_counted(gate: Gate, act: Callable[[], None], result: str, log: str) -> None:
    """`act` makes one handshake that ends as `result`."""
    before, mark = gate.handshakes(), gate.process.mark()
    act()
    gate.wait_log(log, since=mark)
    wait_for(lambda: gate.handshakes() != before, "the handshake to be counted")
    after = gate.handshakes()
    assert {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)} == {result: 1}


def fails(gate: Gate, context: ssl.SSLContext, reason: str, host: str = "localhost") -> None:
    # With TLS 1.3 a refusal may come only after the client has finished its own part.
    with pytest.raises(ssl.SSLError) as raised, tls_socket(gate.port, context, host) as tls:
        tls.recv(1)
    assert reason in str(raised.value)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_with_alpn_h2(gate: Gate, version: ssl.TLSVersion) -> None:
    context = tls_context(gate.root, ("http/1.1", "h2"))
    context.minimum_version = context.maximum_version = version
    client = H2Client(tls_socket(gate.port, context))
    assert isinstance(client.sock, ssl.SSLSocket)
    assert client.sock.version() == version.name.replace("_", ".")
    assert client.sock.selected_alpn_protocol() == "h2"
    reply = client.finish(client.request(grpc_headers("/test.Echo/Unary"), grpc_message(b"hello")))
    assert bytes(reply.body) == grpc_message(b"hello")
    client.close()


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_older_versions_are_refused(gate: Gate, version: str) -> None:
    context = tls_context(gate.root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.set_ciphers("ALL:@SECLEVEL=0")
    is_counted(
        gate,
        lambda: fails(gate, context, "TLSV1_ALERT_PROTOCOL_VERSION"),
        "unsupported_version",
        r"offers no TLS version from 1\.2 on",
    )


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_that_does_not_know_the_ca(gate: Gate, other_authority: Authority, version: ssl.TLSVersion) -> None:
    context = tls_context(other_authority.pem)
    context.minimum_version = context.maximum_version = version
    is_counted(
        gate,
        lambda: fails(gate, context, "CERTIFICATE_VERIFY_FAILED"),
        "client_rejected_unknown_ca",
        r"client refused our certificate: unknown CA",
    )


def test_a_client_that_sees_the_certificate_expired(make_gate: GateMaker, echo: Echo, authority: Authority) -> None:
    gate = make_gate(echo.address, server=authority.server("has-expired", expired=True))
    is_counted(
        gate,
        lambda: fails(gate, tls_context(gate.root), "certificate has expired"),
        "client_rejected_expired",
        r"client refused our certificate: it has expired",
    )


def test_a_client_that_sees_another_host_name(gate: Gate) -> None:
    is_counted(
        gate,
        lambda: fails(gate, tls_context(gate.root), "Hostname mismatch", "other.example"),
        "client_rejected",
        r"client refused our certificate: bad certificate",
    )


def test_no_cipher_in_common(gate: Gate) -> None:
    context = tls_context(gate.root)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")  # the gate's certificate is an ECDSA one
    is_counted(gate, lambda: fails(gate, context, "HANDSHAKE_FAILURE"), "no_shared_cipher", r"no cipher suite")


def close_quietly(gate: Gate, alpn: tuple[str, ...]) -> None:
    try:
        with tls_socket(gate.port, tls_context(gate.root, alpn)) as tls:
            assert tls.recv(1) == b""
    except OSError:
        pass


@pytest.mark.parametrize("alpn", [(), ("http/1.1",), ("spdy/3", "acme-tls/1")], ids=["none", "http/1.1", "unknown"])
def test_no_h2_in_alpn(gate: Gate, alpn: tuple[str, ...]) -> None:
    is_counted(gate, lambda: close_quietly(gate, alpn), "no_alpn", r"offer h2 by ALPN")


def test_a_client_that_closes_before_it_begins(gate: Gate) -> None:
    def begin_and_close() -> None:
        with socket.create_connection(("127.0.0.1", gate.port)) as plain:
            plain.sendall(b"\x16\x03\x01\x02\x00\x01")

    is_counted(gate, begin_and_close, "closed_by_client", r"client closed the connection in the handshake")


def test_a_client_that_closes_after_the_handshake(gate: Gate) -> None:
    def shake_hands_and_close() -> None:
        tls_socket(gate.port, tls_context(gate.root)).close()

    is_counted(gate, shake_hands_and_close, "no_preface", r"closed without a byte of HTTP/2")


def test_a_client_that_says_nothing(gate: Gate) -> None:
    def connect_and_wait() -> None:
        with socket.create_connection(("127.0.0.1", gate.port), timeout=LIVENESS) as plain:
            assert plain.recv(1) == b""

    is_counted(gate, connect_and_wait, "timeout", r"handshake took longer than timeouts\.handshake")


def test_a_client_that_trickles_its_hello(gate: Gate) -> None:
    def trickle() -> None:
        with socket.create_connection(("127.0.0.1", gate.port), timeout=LIVENESS) as plain:
            plain.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")
            assert plain.recv(1) == b""

    is_counted(gate, trickle, "timeout", r"handshake took longer than timeouts\.handshake")


def test_something_that_is_not_tls(gate: Gate) -> None:
    def talk_nonsense() -> None:
        with socket.create_connection(("127.0.0.1", gate.port), timeout=LIVENESS) as plain:
            plain.sendall(b"\x00\x01\x02\x03 SSH-2.0-nothing of the kind\r\n")
            while plain.recv(1000):
                pass

    is_counted(gate, talk_nonsense, "other", r"not TLS")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_ending_is_answered_with_close_notify(gate: Gate, version: ssl.TLSVersion) -> None:
    context = tls_context(gate.root)
    context.minimum_version = context.maximum_version = version
    client = H2Client(tls_socket(gate.port, context))
    client.settle()
    # An HTTP/2 error of ours, which the gate answers with GOAWAY: WINDOW_UPDATE by 0 on the connection.
    client.sock.sendall(bytes.fromhex("000004080000000000 00000000"))
    client.wait_closed()
    assert [int(goaway.error_code) for goaway in client.goaways] == [1]
    assert client.close_notify
    client.close()


def test_a_clients_own_ending_is_answered_with_close_notify(gate: Gate) -> None:
    client = H2Client(tls_socket(gate.port, tls_context(gate.root)))
    client.settle()
    assert isinstance(client.sock, ssl.SSLSocket)
    client.sock.settimeout(LIVENESS)
    # unwrap() sends close_notify and reads until the other's; what HTTP/2 still says before it is skipped.
    plain = None
    for _ in range(10):
        try:
            plain = client.sock.unwrap()
            break
        except ssl.SSLError as data_in_between:
            if data_in_between.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
                raise
            client.sock.recv(1000)
    assert plain is not None
    plain.close()
