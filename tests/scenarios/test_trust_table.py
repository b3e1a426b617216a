"""Promise: who trusts whom decides who gets in; a refused client sees the documented error, and the gate's log and
counter name the reason.

The clients are grpcio's. It sends no TLS alert when it refuses the server's certificate, it just closes: unless the
gate can see for itself what is wrong, it can only say that the client closed in the handshake. Clients that do send the
alert are in `test_tls_alerts.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import grpc
import pytest

from tests.support.certs import Authority, KeyPair, self_signed
from tests.support.echo import Echo, echo_stub
from tests.support.gate import Gate, GateMaker
from tests.support.processes import wait_for

ClientCertificate = Literal["none", "right", "other ca", "expired", "for servers"]

# The second where the gate sends the CA's certificate along with its own.
UNTRUSTED = (
    "CERTIFICATE_VERIFY_FAILED: (unable to get local issuer certificate|self.signed certificate in certificate chain)"
)
# With TLS 1.3 the client has finished its handshake when the server refuses its certificate; grpcio reports that so.
REFUSED = "Unwrap failed|Socket closed|Connection reset"


@dataclass(frozen=True)
class ServerSide:
    """A gate, and the root certificates that its clients are right to trust."""

    gate: Gate
    root: bytes


@dataclass(frozen=True)
class Refusal:
    details: str
    result: str
    log: str


class Gates:
    """The gates of the table, each started when a case first needs it."""

    def __init__(self, upstream: str, gates: GateMaker, authority: Authority) -> None:
        self.upstream, self.gates, self.authority = upstream, gates, authority
        self.started: dict[str, ServerSide] = {}

    def __call__(self, name: str) -> ServerSide:
        if name not in self.started:
            self.started[name] = getattr(self, f"_{name}")()
        return self.started[name]

    def _start(self, server: KeyPair, root: bytes, client_auth: str = "none") -> ServerSide:
        tls = {"client_auth": client_auth, "ca_file": str(self.authority.ca_file)}
        return ServerSide(self.gates(self.upstream, server=server, root=root, tls=tls, log={"access": True}), root)

    def _none(self) -> ServerSide:
        return self._start(self.authority.server("table"), self.authority.pem)

    def _optional(self) -> ServerSide:
        return self._start(self.authority.server("optional"), self.authority.pem, "optional")

    def _require(self) -> ServerSide:
        return self._start(self.authority.server("require"), self.authority.pem, "require")

    def _expired(self) -> ServerSide:
        return self._start(self.authority.server("expired", expired=True), self.authority.pem)

    def _other_host(self) -> ServerSide:
        return self._start(self.authority.server("other-host", ("gate.example",)), self.authority.pem)

    def _self_signed(self) -> ServerSide:
        pair = self_signed(self.authority.folder)
        return self._start(pair, pair.cert)


@pytest.fixture(scope="module")
def gates(echo: Echo, shared_gates: GateMaker, authority: Authority) -> Gates:
    return Gates(echo.address, shared_gates, authority)


@pytest.fixture(scope="module")
def client_certificates(authority: Authority, other_authority: Authority) -> dict[ClientCertificate, KeyPair | None]:
    return {
        "none": None,
        "right": authority.client("alice"),
        "other ca": other_authority.client("mallory"),
        "expired": authority.client("late", expired=True),
        "for servers": authority.server("not-a-client"),
    }


def credentials(root: bytes | None, pair: KeyPair | None) -> grpc.ChannelCredentials:
    if pair is None:
        return grpc.ssl_channel_credentials(root_certificates=root)
    return grpc.ssl_channel_credentials(root_certificates=root, private_key=pair.key, certificate_chain=pair.cert)


def call(gate: Gate, creds: grpc.ChannelCredentials) -> bytes:
    with grpc.secure_channel(gate.target, creds, options=gate.options()) as channel:
        answer: bytes = echo_stub(channel).unary(b"hello", timeout=20)
        return answer


def refused(gate: Gate, creds: grpc.ChannelCredentials, refusal: Refusal) -> None:
    before, mark = gate.handshakes(), gate.process.mark()
    with pytest.raises(grpc.RpcError) as raised:
        call(gate, creds)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert re.search(refusal.details, raised.value.details()), raised.value.details()
    gate.wait_log(refusal.log, since=mark)
    wait_for(lambda: counted(gate, before), "the handshake to be counted")
    assert set(counted(gate, before)) == {refusal.result}


def counted(gate: Gate, before: dict[str, float]) -> dict[str, float]:
    """What was counted since, by result."""
    after = gate.handshakes()
    return {result: count - before.get(result, 0) for result, count in after.items() if count != before.get(result, 0)}


@pytest.mark.parametrize(
    ("server", "certificate"),
    [
        ("none", "none"),
        ("none", "right"),
        ("none", "other ca"),
        ("self_signed", "none"),
        ("optional", "none"),
        ("optional", "right"),
        ("require", "right"),
    ],
)
def test_let_in(
    gates: Gates,
    client_certificates: dict[ClientCertificate, KeyPair | None],
    server: str,
    certificate: ClientCertificate,
) -> None:
    side = gates(server)
    before = side.gate.handshakes()
    assert call(side.gate, credentials(side.root, client_certificates[certificate])) == b"hello"
    assert counted(side.gate, before) == {"ok": 1}


CLOSED = Refusal(UNTRUSTED, "closed_by_client", r"client closed the connection in the handshake")


def test_no_root_certificates(gates: Gates) -> None:
    refused(gates("none").gate, credentials(None, None), CLOSED)


def test_root_certificates_of_another_ca(gates: Gates, other_authority: Authority) -> None:
    refused(gates("none").gate, credentials(other_authority.pem, None), CLOSED)


def test_self_signed_without_being_trusted(gates: Gates) -> None:
    refusal = Refusal("CERTIFICATE_VERIFY_FAILED: self.signed certificate", CLOSED.result, CLOSED.log)
    refused(gates("self_signed").gate, credentials(None, None), refusal)


def test_expired_server_certificate(gates: Gates, authority: Authority) -> None:
    side = gates("expired")
    refusal = Refusal(
        "CERTIFICATE_VERIFY_FAILED: certificate has expired", "client_rejected_expired", r"certificate.* expired"
    )
    refused(side.gate, credentials(side.root, None), refusal)


def test_wrong_host_name(gates: Gates) -> None:
    side = gates("other_host")
    refusal = Refusal("Hostname Verification Check failed", "no_preface", r"closed without a byte.*host name")
    refused(side.gate, credentials(side.root, None), refusal)


@pytest.mark.parametrize("server", ["optional", "require"])
@pytest.mark.parametrize(
    ("certificate", "result", "log"),
    [
        ("other ca", "unknown_ca", r"client's certificate is not from the CA in tls\.ca_file"),
        ("expired", "certificate_expired", r"client's certificate has expired"),
        ("for servers", "certificate_invalid", r"client's certificate is not accepted: unsuitable certificate purpose"),
    ],
)
def test_a_client_certificate_that_is_not_accepted(
    gates: Gates,
    client_certificates: dict[ClientCertificate, KeyPair | None],
    server: str,
    certificate: ClientCertificate,
    result: str,
    log: str,
) -> None:
    side = gates(server)
    refused(side.gate, credentials(side.root, client_certificates[certificate]), Refusal(REFUSED, result, log))


def test_no_client_certificate_where_one_is_required(gates: Gates) -> None:
    side = gates("require")
    refusal = Refusal(REFUSED, "no_certificate", r"client sent no certificate.*client_auth is require")
    refused(side.gate, credentials(side.root, None), refusal)


def test_the_names_in_the_log_are_the_clients(
    gates: Gates, client_certificates: dict[ClientCertificate, KeyPair | None]
) -> None:
    side = gates("require")
    mark = side.gate.process.mark()
    call(side.gate, credentials(side.root, client_certificates["right"]))
    side.gate.wait_log(r"/test\.Echo/Unary .* cn:alice", since=mark)
