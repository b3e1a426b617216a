"""A folder of files for settings to name: good certificates and keys, and one of each kind of bad."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from proxy.tls import pki

PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
PKCS8 = serialization.PrivateFormat.PKCS8


def furnish(folder: Path) -> Path:
    """Fill `folder` with what the settings of the tests name; returns it."""
    (folder / "models/simple").mkdir(parents=True)
    pki.init(folder)
    pki.issue(folder, "server", "server")
    pki.issue(folder, "other", "server")
    pki.issue(folder, "alice", "client")
    authority = pki.load_authority(folder)
    _dated(folder, authority, "expired", -30, -3)
    _dated(folder, authority, "future", 3, 30)
    _dated(folder, authority, "soon", -30, 5)
    _bundles(folder)
    _odd_keys(folder)
    _odd_files(folder)
    return folder


def _dated(folder: Path, authority: pki.Pair, name: str, start: int, end: int) -> None:
    now = datetime.now(UTC)
    # Half a day past the full days, so that "3 days ago" stays true however long the tests take.
    half = timedelta(hours=12)
    first, last = now + timedelta(days=start), now + timedelta(days=end) + (half if end > 0 else -half)
    names = pki.default_server_sans()
    pki.write_pair(folder, name, pki.make_leaf(authority, name, "server", names, first, last))


def _bundles(folder: Path) -> None:
    server, ca = (folder / "server.pem").read_bytes(), (folder / "ca.pem").read_bytes()
    (folder / "chain.pem").write_bytes(server + ca)
    (folder / "wrong-order.pem").write_bytes(ca + server)
    (folder / "both.pem").write_bytes((folder / "server.key").read_bytes() + server)


def _odd_keys(folder: Path) -> None:
    key = pki.load_authority(folder).key
    secret = serialization.BestAvailableEncryption(b"hunter2")
    (folder / "encrypted.key").write_bytes(key.private_bytes(PEM, PKCS8, secret))
    legacy = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / "encrypted-legacy.key").write_bytes(key.private_bytes(PEM, legacy, secret))
    text = (folder / "server.key").read_text().splitlines()
    (folder / "damaged.key").write_text("\n".join([text[0], "x" + text[1][1:], *text[2:]]))
    (folder / "cut.key").write_text("\n".join(text[:2]))
    server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    (folder / "server.der").write_bytes(server.public_bytes(DER))
    (folder / "key.der").write_bytes(key.private_bytes(DER, PKCS8, serialization.NoEncryption()))
    _small_rsa(folder)


def _small_rsa(folder: Path) -> None:
    key = rsa.generate_private_key(65537, 1024)  # what OpenSSL refuses
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "small")])
    now, end = datetime.now(UTC), datetime.now(UTC) + timedelta(days=30)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "small.pem").write_bytes(certificate.public_bytes(PEM))
    (folder / "small.key").write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    for path in folder.glob("*.key"):
        path.chmod(0o600)


def _odd_files(folder: Path) -> None:
    (folder / "empty.pem").write_bytes(b"\n")
    (folder / "text.pem").write_text("this is no certificate\n")
    body = (folder / "server.pem").read_text().splitlines()
    (folder / "damaged.pem").write_text("\n".join([body[0], body[1][::-1], *body[2:]]))
    (folder / "half.pem").write_text("\n".join(body[:4]))
    (folder / "huge.pem").write_bytes(b"#" * (1024 * 1024 + 1))
    (folder / "loop.pem").symlink_to("loop.pem")
    (folder / "dangling.pem").symlink_to("gone.pem")
    (folder / "no-models").mkdir()
    (folder / "a-file").write_text("no folder\n")


@contextmanager
def unprivileged() -> Iterator[int]:
    """The user id to expect in messages; root, who may read everything, becomes nobody meanwhile."""
    if os.geteuid() != 0:
        yield os.geteuid()
        return
    os.seteuid(65534)
    try:
        yield 65534
    finally:
        os.seteuid(0)
