"""The development CA, judged by OpenSSL: its strictest verification, and real handshakes."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from proxy.config import pem
from proxy.tls import pki

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA with a server's and a client's certificate; tests change nothing in it."""
    folder = tmp_path_factory.mktemp("pki") / "made"
    pki.init(folder)
    pki.issue(folder, "server", "server")
    pki.issue(folder, "alice", "client", ["uri:spiffe://prod/fraud/alice", "dns:alice.example.com", "ip:10.0.0.1"])
    return folder


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def openssl_verify(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    openssl = shutil.which("openssl")
    assert openssl, "these tests need the openssl command (Debian: openssl)"
    command = [openssl, "verify", "-x509_strict", "-check_ss_sig", "-CAfile", "ca.pem", *options, f"{name}.pem"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ca", ()),
        ("server", ("-purpose", "sslserver", "-verify_hostname", "localhost")),
        ("server", ("-purpose", "sslserver", "-verify_ip", "127.0.0.1")),
        ("server", ("-purpose", "sslserver", "-verify_ip", "::1")),
        ("alice", ("-purpose", "sslclient", "-verify_hostname", "alice.example.com")),
    ],
)
def test_openssl_accepts_it_in_strict_mode(folder: Path, name: str, options: tuple[str, ...]) -> None:
    done = openssl_verify(folder, name, *options)
    assert (done.returncode, done.stdout) == (0, f"{name}.pem: OK\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("server", ("-purpose", "sslclient"), "unsuitable certificate purpose"),
        ("alice", ("-purpose", "sslserver"), "unsuitable certificate purpose"),
        ("server", ("-verify_hostname", "example.com"), "hostname mismatch"),
    ],
)
def test_openssl_refuses_what_it_is_not_for(folder: Path, name: str, options: tuple[str, ...], reason: str) -> None:
    done = openssl_verify(folder, name, *options)
    assert done.returncode != 0
    assert reason in done.stderr.lower()


def test_a_leaf_cannot_sign_certificates(folder: Path, tmp_path: Path) -> None:
    """What alice signs with her key is not accepted, though its chain leads to the CA."""
    key = pem.read_private_key(folder / "alice.key")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    alice = pki.Pair(certificate(folder / "alice.pem"), key)
    now = datetime.now(UTC)
    pki.write_pair(tmp_path, "forged", pki.make_leaf(alice, "forged", "server", [], now - DAY, now + DAY))
    shutil.copy(folder / "ca.pem", tmp_path / "ca.pem")
    done = openssl_verify(tmp_path, "forged", "-untrusted", str(folder / "alice.pem"))
    assert done.returncode != 0
    assert "invalid ca certificate" in done.stderr.lower()


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after a TLS handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=name)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    open_ends = [one, other]
    for _ in range(10):
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not open_ends
    return one, other


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=folder / "ca.pem")
    client.load_cert_chain(folder / "alice.pem", folder / "alice.key")
    for context in (server, client):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    return server, client


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_both_sides_accept_each_other_in_a_handshake(folder: Path, name: str) -> None:
    client_end, server_end = handshake(*contexts(folder), name)
    assert client_end.version() == server_end.version() == "TLSv1.3"
    assert server_end.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert((folder / "alice.pem").read_text())


def test_a_certificate_of_another_ca_is_refused_in_a_handshake(folder: Path, tmp_path: Path) -> None:
    pki.init(tmp_path)
    pki.issue(tmp_path, "server", "server")
    _, client = contexts(folder)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(server, client, "localhost")


def test_extensions_are_as_rfc_5280_asks(folder: Path) -> None:
    for name, ca in (("ca", True), ("server", False), ("alice", False)):
        extensions = certificate(folder / f"{name}.pem").extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        assert (constraints.critical, constraints.value.ca) == (True, ca)
        assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, ca, not ca)
        extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)


def test_validity_starts_a_little_in_the_past_and_lasts_the_days(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    pki.init(tmp_path, days=30)
    pki.issue(tmp_path, "server", "server", days=7)
    after = datetime.now(UTC)
    issued = certificate(tmp_path / "server.pem")
    assert before - timedelta(hours=1) <= issued.not_valid_before_utc < before
    assert before + 7 * DAY <= issued.not_valid_after_utc <= after + 7 * DAY


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    pki.init(tmp_path, days=5)
    pki.issue(tmp_path, "server", "server", days=100)
    server, ca = certificate(tmp_path / "server.pem"), certificate(tmp_path / "ca.pem")
    assert server.not_valid_after_utc == ca.not_valid_after_utc


def test_names_and_serials(folder: Path) -> None:
    server, alice = certificate(folder / "server.pem"), certificate(folder / "alice.pem")
    assert {"dns:localhost", "ip:127.0.0.1", "ip:::1"} <= set(pem.sans(server))
    assert pem.sans(alice) == ["uri:spiffe://prod/fraud/alice", "dns:alice.example.com", "ip:10.0.0.1"]
    assert (pem.common_name(server), pem.common_name(alice)) == ("server", "alice")
    serials = {certificate(folder / f"{name}.pem").serial_number for name in ("ca", "server", "alice")}
    assert len(serials) == 3
    assert min(serial.bit_length() for serial in serials) > 64


def test_two_authorities_have_different_subjects(tmp_path: Path) -> None:
    pki.init(tmp_path / "one")
    pki.init(tmp_path / "two")
    assert certificate(tmp_path / "one/ca.pem").subject != certificate(tmp_path / "two/ca.pem").subject


def test_a_server_called_like_a_host_has_that_name_too(tmp_path: Path) -> None:
    pki.init(tmp_path)
    assert "dns:gate.example.com" in pem.sans(certificate(pki.issue(tmp_path, "gate.example.com", "server").cert_file))
    assert "ip:10.0.0.7" in pem.sans(certificate(pki.issue(tmp_path, "10.0.0.7", "server").cert_file))
    only = pki.issue(tmp_path, "two.example.com", "server", ["dns:x.example.com"])
    assert pem.sans(certificate(only.cert_file)) == ["dns:x.example.com"]


def test_files_and_folder_are_the_owner_s_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        pki.init(tmp_path / "deep/pki")
        pki.issue(tmp_path / "deep/pki", "server", "server")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "deep/pki").iterdir()}
    assert modes == dict.fromkeys(("ca.pem", "ca.key", "server.pem", "server.key"), 0o600)
    assert (tmp_path / "deep/pki").stat().st_mode & 0o777 == 0o700


def test_nothing_that_is_there_is_replaced_unless_forced(tmp_path: Path) -> None:
    pki.init(tmp_path)
    pki.issue(tmp_path, "server", "server")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(pki.PkiError, match=r"ca\.key: exists already and is left as it is; .*--force"):
        pki.init(tmp_path)
    with pytest.raises(pki.PkiError, match=r"server\.key: exists already and is left as it is; .*--force"):
        pki.issue(tmp_path, "server", "server")
    (tmp_path / "server.key").unlink()
    with pytest.raises(pki.PkiError, match=r"server\.pem: exists already"):
        pki.issue(tmp_path, "server", "server")
    del before[tmp_path / "server.key"]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    pki.issue(tmp_path, "server", "server", force=True)
    assert openssl_verify(tmp_path, "server").returncode == 0
    pki.init(tmp_path, force=True)
    assert openssl_verify(tmp_path, "server").returncode != 0


def test_a_key_with_its_certificate_gone_is_not_replaced_either(tmp_path: Path) -> None:
    pki.init(tmp_path)
    (tmp_path / "ca.pem").unlink()
    key = (tmp_path / "ca.key").read_bytes()
    with pytest.raises(pki.PkiError, match=r"ca\.key: exists already"):
        pki.init(tmp_path)
    assert (tmp_path / "ca.key").read_bytes() == key


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 65, "ca"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    pki.init(tmp_path)
    with pytest.raises(pki.PkiError):
        pki.issue(tmp_path, name, "client")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.key", "ca.pem"]


@pytest.mark.parametrize(
    "san",
    [
        "localhost", "dns:", "dns:-x", "dns:a b", "dns:a..b", "dns:" + ".".join(["a" * 63] * 4), "ip:300.1.1.1",
        "ip:x", "uri:nothing", "email:a@b",
    ],
)  # fmt: skip
def test_odd_alternative_names_are_refused(san: str) -> None:
    with pytest.raises(pki.PkiError, match="is none of dns:NAME, ip:ADDRESS, uri:URI"):
        pki.parse_san(san)


def test_what_cannot_be_written_is_named_as_it_would_be_called(tmp_path: Path) -> None:
    pki.init(tmp_path)
    (tmp_path / "alice.key").mkdir()
    with pytest.raises(pki.PkiError, match=r"/alice\.key: cannot be written \(is a directory\)"):
        pki.issue(tmp_path, "alice", "client", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice.key", "ca.key", "ca.pem"]


@pytest.mark.parametrize("days", [0, -1, 36_501])
def test_odd_numbers_of_days_are_refused(tmp_path: Path, days: int) -> None:
    with pytest.raises(pki.PkiError, match=f"--days {days}: is out of range; give a whole number from 1 to 36500"):
        pki.init(tmp_path, days=days)


def test_issuing_without_a_usable_ca_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(pki.PkiError, match=r"holds no CA; make one: tensorgate certs init"):
        pki.issue(tmp_path, "server", "server")
    pki.init(tmp_path)
    pki.init(tmp_path / "other")
    shutil.copy(tmp_path / "other/ca.key", tmp_path / "ca.key")
    with pytest.raises(pki.PkiError, match=r"ca\.key: is not the ECDSA key of .*ca\.pem"):
        pki.issue(tmp_path, "server", "server")
    (tmp_path / "ca.key").unlink()
    with pytest.raises(pki.PkiError, match=r"ca\.key: does not exist"):
        pki.issue(tmp_path, "server", "server")


def test_a_description_says_all_there_is_to_know(folder: Path) -> None:
    alice = certificate(folder / "alice.pem")
    ca = certificate(folder / "ca.pem")
    start, end = alice.not_valid_before_utc, alice.not_valid_after_utc
    assert pki.describe(folder / "alice.pem", now=end - 3 * DAY) == [
        str(folder / "alice.pem"),
        "  subject  CN=alice",
        f"  issuer   {ca.subject.rfc4514_string()}",
        "  names    uri:spiffe://prod/fraud/alice, dns:alice.example.com, ip:10.0.0.1",
        f"  valid    {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC (3 days left)",
        "  key      ECDSA P-256",
        "  usage    clientAuth",
        "  CA       no",
        f"  serial   {alice.serial_number:x}",
        f"  sha256   {pem.fingerprint(alice)}",
    ]


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        (-100 * DAY, "100 days left"),
        (timedelta(hours=-30), "30 hours left"),
        (timedelta(hours=-1, minutes=-5), "1 hour left"),
        (timedelta(hours=5), "expired 5 hours ago"),
        (3 * DAY, "expired 3 days ago"),
        (-366 * DAY, "not valid yet"),
    ],
)
def test_remaining_time_is_said_in_words(folder: Path, offset: timedelta, text: str) -> None:
    alice = certificate(folder / "alice.pem")
    assert pem.remaining_text(alice, alice.not_valid_after_utc + offset) == text


def test_keys_are_never_described(folder: Path) -> None:
    with pytest.raises(pki.PkiError, match=r"alice\.key: holds no certificate, only: private key"):
        pki.describe(folder / "alice.key")
