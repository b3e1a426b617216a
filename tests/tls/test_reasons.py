"""Why a handshake failed: by real handshakes in memory where one can be had, by OpenSSL's reason names else."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from proxy.telemetry.metrics import HANDSHAKE_RESULTS
from proxy.tls import reasons
from tests.support.certs import Authority, KeyPair

# -- plaintext


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"", None),
        (b"\x16", None),
        (b"\x16\x03\x01\x02\x00\x01", None),
        (b"\x16garbage", reasons.NOT_TLS),
        (b"P", None),
        (b"PR", None),
        (b"PRI", None),
        (b"PRI ", reasons.PLAINTEXT_H2C),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", reasons.PLAINTEXT_H2C),
        (b"G", None),
        (b"GE", None),
        (b"GET", None),
        (b"GET ", reasons.PLAINTEXT_HTTP),
        (b"GET / HTTP/1.1\r\n", reasons.PLAINTEXT_HTTP),
        (b"POST / HTTP/1.1\r\n", reasons.PLAINTEXT_HTTP),
        (b"PUT /", reasons.PLAINTEXT_HTTP),
        (b"PATCH /", reasons.PLAINTEXT_HTTP),
        (b"HEAD /", reasons.PLAINTEXT_HTTP),
        (b"DELETE /", reasons.PLAINTEXT_HTTP),
        (b"OPTIONS *", reasons.PLAINTEXT_HTTP),
        (b"CONNECT a:1", reasons.PLAINTEXT_HTTP),
        (b"TRACE /", reasons.PLAINTEXT_HTTP),
        (b"PO", None),
        (b"GETS", reasons.NOT_TLS),
        (b"get ", reasons.NOT_TLS),
        (b"PRIX", reasons.NOT_TLS),
        (b"\x00", reasons.NOT_TLS),
        (b"\x15\x03\x03\x00\x02", reasons.NOT_TLS),
        (b"SSH-2.0-OpenSSH", reasons.NOT_TLS),
        (b"X", reasons.NOT_TLS),
        (b"\x80\x2e\x01", reasons.NOT_TLS),
    ],
)
def test_the_first_bytes_of_a_connection(start: bytes, reason: reasons.Reason | None) -> None:
    assert reasons.of_start(start) == reason


def test_every_result_is_a_label_of_the_metric() -> None:
    """Whatever is told must be counted."""
    constants = [value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, tuple)]
    told = [value for value in constants if len(value) == 2 and all(isinstance(part, str) for part in value)]
    assert len(told) >= 8
    assert {label for label, _ in told} <= set(HANDSHAKE_RESULTS)


# -- real handshakes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("handshakes")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Authority:
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def foreign(folder: Path) -> Authority:
    return Authority(folder, "foreign")


@pytest.fixture(scope="module")
def pair(ours: Authority) -> KeyPair:
    return ours.server()


def server(pair: KeyPair, clients_of: Authority | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    if clients_of is not None:
        context.load_verify_locations(clients_of.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client(trusts: Authority, pair: KeyPair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(trusts.ca_file))
    if pair is not None:
        context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> reasons.Reason | None:
    """Why it failed at the server, or None when it didn't."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = server.wrap_bio(to_server, to_client, server_side=True)
    there = client.wrap_bio(to_client, to_server, server_hostname=host)
    for _ in range(5):
        for side in (there, here):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                if side is here:
                    return reasons.of_error(error)
    try:
        here.read(1)  # in TLS 1.3 the server is done before the client has judged it
    except ssl.SSLWantReadError:
        return None
    except ssl.SSLError as error:
        return reasons.of_error(error)
    return None


def test_a_good_handshake(ours: Authority, pair: KeyPair) -> None:
    assert handshake(server(pair, ours), client(ours, ours.client())) is None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_client_certificate(ours: Authority, pair: KeyPair, version: ssl.TLSVersion) -> None:
    context = server(pair, ours)
    context.maximum_version = version
    label, words = handshake(context, client(ours)) or ("", "")
    assert label == "no_certificate"
    assert "tls.client_auth" in words


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_of_another_ca(ours: Authority, foreign: Authority, pair: KeyPair, version: ssl.TLSVersion) -> None:
    context = server(pair, ours)
    context.maximum_version = version
    label, words = handshake(context, client(ours, foreign.client())) or ("", "")
    assert label == "unknown_ca"
    assert "tls.ca_file" in words


def test_an_expired_client(ours: Authority, pair: KeyPair) -> None:
    label, words = handshake(server(pair, ours), client(ours, ours.client("late", expired=True))) or ("", "")
    assert label == "certificate_expired"
    assert "expired" in words


def test_a_certificate_for_another_purpose(ours: Authority, pair: KeyPair) -> None:
    label, words = handshake(server(pair, ours), client(ours, ours.server("as-client"))) or ("", "")
    assert label == "certificate_invalid"
    assert "purpose" in words


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_that_does_not_know_our_ca(foreign: Authority, pair: KeyPair, version: ssl.TLSVersion) -> None:
    context = server(pair)
    context.maximum_version = version
    label, words = handshake(context, client(foreign)) or ("", "")
    assert label == "client_rejected_unknown_ca"
    assert "tls.cert_file" in words


def test_a_client_that_finds_our_certificate_expired(ours: Authority) -> None:
    label, words = handshake(server(ours.server("old", expired=True)), client(ours)) or ("", "")
    assert label == "client_rejected_expired"
    assert "renew" in words


def test_a_client_that_called_another_name(ours: Authority, pair: KeyPair) -> None:
    label, _ = handshake(server(pair), client(ours), "elsewhere.example.com") or ("", "")
    assert label == "client_rejected"


def test_no_common_version(ours: Authority, pair: KeyPair) -> None:
    old, new = client(ours), server(pair)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    new.minimum_version = ssl.TLSVersion.TLSv1_3
    label, words = handshake(new, old) or ("", "")
    assert label == "unsupported_version"
    assert "TLS" in words


def test_no_common_cipher(ours: Authority, pair: KeyPair) -> None:
    few, other = client(ours), server(pair)
    few.maximum_version = ssl.TLSVersion.TLSv1_2
    few.set_ciphers("ECDHE+AESGCM")
    other.set_ciphers("ECDHE+CHACHA20")
    assert (handshake(other, few) or ("",))[0] == "no_shared_cipher"


def test_a_record_that_is_no_client_hello(pair: KeyPair) -> None:
    incoming = ssl.MemoryBIO()
    here = server(pair).wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(b"\x16\x03\x01\x00\x05hello")
    with pytest.raises(ssl.SSLError) as error:
        here.do_handshake()
    label, words = reasons.of_error(error.value)
    assert label == "other"
    assert words.startswith("the handshake failed: ")


def test_the_end_of_the_connection(pair: KeyPair) -> None:
    incoming = ssl.MemoryBIO()
    here = server(pair).wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write_eof()
    with pytest.raises(ssl.SSLError) as error:
        here.do_handshake()
    assert reasons.of_error(error.value) is reasons.CLOSED_BY_CLIENT


# -- what no client here can be made to say


def named(reason: str | None, text: str = "") -> ssl.SSLError:
    error = ssl.SSLError(1, text)
    error.reason = reason  # type: ignore[assignment]
    return error


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("SSLV3_ALERT_CERTIFICATE_UNKNOWN", "client_rejected"),
        ("SSLV3_ALERT_CERTIFICATE_REVOKED", "client_rejected"),
        ("SSLV3_ALERT_UNSUPPORTED_CERTIFICATE", "client_rejected"),
        ("VERSION_TOO_LOW", "unsupported_version"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "unsupported_version"),
        ("NO_SUITABLE_KEY_SHARE", "no_shared_cipher"),
        ("NO_SHARED_GROUP", "no_shared_cipher"),
        ("NO_SUITABLE_SIGNATURE_ALGORITHM", "no_shared_cipher"),
        ("TLSV1_ALERT_DECRYPT_ERROR", "client_rejected"),
        ("BAD_EXTENSION", "other"),
    ],
)
def test_other_reasons_of_openssl(reason: str, label: str) -> None:
    told, words = reasons.of_error(named(reason))
    assert told == label
    assert words
    assert told in HANDSHAKE_RESULTS


def test_an_alert_without_words_of_its_own_is_told_as_openssl_calls_it() -> None:
    assert reasons.of_error(named("TLSV1_ALERT_DECRYPT_ERROR"))[1] == (
        "the client ended the handshake: tlsv1 alert decrypt error"
    )


def test_an_error_without_a_reason_is_told_by_its_text() -> None:
    label, words = reasons.of_error(named(None, "something odd"))
    assert label == "other"
    assert "something odd" in words


@pytest.mark.parametrize("error", [ssl.SSLEOFError(8, "eof"), ssl.SSLZeroReturnError(6, "closed")])
def test_an_end_is_told_as_such(error: ssl.SSLError) -> None:
    assert reasons.of_error(error) is reasons.CLOSED_BY_CLIENT
