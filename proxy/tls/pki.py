"""A development CA: makes certificates to try the gate with, and shows what is in a certificate file.

ECDSA P-256 throughout. Keys lie unencrypted in files that only their owner can read: right for development, not for
production. Never replaces a key unless told to: a lost CA key makes every certificate it signed useless.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.config import pem

Usage = Literal["server", "client"]

CA_DAYS = 3650
LEAF_DAYS = 365
_BACKDATED = timedelta(minutes=10)  # so that a peer whose clock is a little behind accepts a fresh certificate
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,63}")  # a CN has at most 64 characters (RFC 5280, ub-common-name)
_DNS = re.compile(r"(\*\.)?(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")
_DNS_MAX = 253  # characters, RFC 1035


class PkiError(Exception):
    """A certificate cannot be made, written or read; one line that names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, in memory."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Files:
    """Where a pair lies: PEM, mode 0600 each."""

    cert_file: Path
    key_file: Path


def init(folder: Path, days: int = CA_DAYS, force: bool = False) -> Files:
    """Make a CA as ca.pem and ca.key in `folder` (made if need be, mode 0700). Raises PkiError."""
    pair = make_authority(days)
    return _save(folder, "ca", pair, force, "issue certificates from it, or replace it with --force")


def issue(
    folder: Path,
    name: str,
    usage: Usage,
    sans: Sequence[str] = (),
    days: int = LEAF_DAYS,
    force: bool = False,
) -> Files:
    """Issue NAME.pem and NAME.key from the CA in `folder`, with `name` as CN.

    `sans` are "dns:x", "ip:y", "uri:z"; a server without any gets `default_server_sans`. Never outlives the CA.
    Raises PkiError.
    """
    _check_name(name)
    names = [parse_san(text) for text in sans]
    if not names and usage == "server":
        names = default_server_sans(name)
    authority = load_authority(folder)
    now = datetime.now(UTC)
    pair = make_leaf(authority, name, usage, names, now - _BACKDATED, now + timedelta(days=_checked_days(days)))
    return _save(folder, name, pair, force, "replace it with --force, or choose another name")


def make_authority(days: int = CA_DAYS, common_name: str = "Tensorgate development CA") -> Pair:
    """A self-signed CA. Part of the key's hash is added to its CN, so that two development CAs can be told apart."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    subject = _subject(f"{common_name} {identifier.digest.hex()[:8]}")
    now = datetime.now(UTC)
    certificate = (
        _builder(subject, subject, key.public_key(), now - _BACKDATED, now + timedelta(days=_checked_days(days)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Pair(certificate, key)


def make_leaf(
    authority: Pair,
    name: str,
    usage: Usage,
    sans: Sequence[x509.GeneralName],
    not_before: datetime,
    not_after: datetime,
) -> Pair:
    """A certificate signed by `authority`, in memory. The times are aware; the end is cut to the authority's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    issuer_identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if usage == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    end = min(not_after, issuer.not_valid_after_utc)
    builder = (
        _builder(_subject(name), issuer.subject, key.public_key(), not_before, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
        )
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def load_authority(folder: Path) -> Pair:
    """The CA that `init` made in `folder`. Raises PkiError."""
    cert_file, key_file = folder / "ca.pem", folder / "ca.key"
    if not cert_file.exists() and not key_file.exists():
        raise PkiError(f"{folder}: holds no CA; make one: tensorgate certs init {folder}")
    try:
        certificate = pem.read_certificates(cert_file)[0]
    except pem.PemError as fault:
        raise PkiError(f"{cert_file}: {fault}") from None
    try:
        key = pem.read_private_key(key_file)
    except pem.PemError as fault:
        raise PkiError(f"{key_file}: {fault}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not pem.belongs(key, certificate):
        raise PkiError(f"{key_file}: is not the ECDSA key of {cert_file}; make a new CA with certs init --force")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise PkiError(f"{cert_file}: the CA has expired; make a new one with certs init --force")
    return Pair(certificate, key)


def parse_san(text: str) -> x509.GeneralName:
    """"dns:x", "ip:y" or "uri:z" as a name for a certificate. Raises PkiError."""
    kind, _, value = text.partition(":")
    if kind == "dns" and _DNS.fullmatch(value) and len(value) <= _DNS_MAX:
        return x509.DNSName(value.lower())
    if kind == "uri" and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[\x21-\x7e]+", value):
        return x509.UniformResourceIdentifier(value)
    if kind == "ip":
        with suppress(ValueError):
            return x509.IPAddress(ipaddress.ip_address(value.strip("[]")))
    raise PkiError(f"--san {text}: is none of dns:NAME, ip:ADDRESS, uri:URI (as in dns:gate.example.com, ip:10.0.0.1)")


def default_server_sans(name: str = "") -> list[x509.GeneralName]:
    """localhost, this host's name, 127.0.0.1 and ::1; and `name` when it is an address or a name with a dot."""
    hosts = ["localhost", socket.gethostname().lower()]
    addresses = ["127.0.0.1", "::1"]
    try:
        addresses.append(str(ipaddress.ip_address(name)))
    except ValueError:
        if "." in name:
            hosts.append(name.lower())
    names: list[x509.GeneralName] = [x509.DNSName(host) for host in dict.fromkeys(hosts) if _DNS.fullmatch(host)]
    return names + [x509.IPAddress(ipaddress.ip_address(address)) for address in dict.fromkeys(addresses)]


def describe(path: Path, now: datetime | None = None) -> list[str]:
    """Lines that say what each certificate of a file is. Raises PkiError; a private key is never shown."""
    try:
        certificates = pem.read_certificates(path)
    except pem.PemError as fault:
        raise PkiError(f"{path}: {fault}") from None
    lines: list[str] = []
    for number, certificate in enumerate(certificates, 1):
        head = str(path) if len(certificates) == 1 else f"{path} ({number} of {len(certificates)})"
        lines += [head, *_described(certificate, now or datetime.now(UTC))]
    return lines


def _described(certificate: x509.Certificate, now: datetime) -> list[str]:
    rows = [
        ("subject", pem.subject_text(certificate.subject)),
        ("issuer", pem.subject_text(certificate.issuer)),
        ("names", ", ".join(pem.sans(certificate)) or "none"),
        ("valid", pem.validity_text(certificate, now)),
        ("key", pem.key_type(certificate.public_key())),
        ("usage", ", ".join(pem.usages(certificate)) or "any"),
        ("CA", "yes" if pem.is_authority(certificate) else "no"),
        ("serial", f"{certificate.serial_number:x}"),
        ("sha256", pem.fingerprint(certificate)),
    ]
    return [f"  {label:<9}{value}" for label, value in rows]


def write_pair(folder: Path, name: str, pair: Pair, force: bool = False) -> Files:
    """Write NAME.pem and NAME.key, mode 0600, each whole or not at all. Raises PkiError, also when one is there."""
    return _save(folder, name, pair, force, "replace it with --force")


def _save(folder: Path, name: str, pair: Pair, force: bool, remedy: str) -> Files:
    files = Files(folder / f"{name}.pem", folder / f"{name}.key")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not force:
            for path in (files.key_file, files.cert_file):
                if path.exists():
                    raise PkiError(f"{path}: exists already and is left as it is; {remedy}")
        # The key first: a certificate without its key would look usable and is not.
        _write(files.key_file, _key_text(pair.key), force)
        _write(files.cert_file, pair.certificate.public_bytes(serialization.Encoding.PEM), force)
    except FileExistsError as error:
        raise PkiError(f"{error.filename2 or error.filename}: exists already and is left as it is; {remedy}") from None
    except OSError as error:
        raise PkiError(f"{error.filename or folder}: cannot be written ({(error.strerror or '').lower()})") from None
    return files


def _write(path: Path, content: bytes, force: bool) -> None:
    """Write by way of a temporary file beside it, so that nobody ever reads a half-written one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if force:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # unlike a rename it fails when the name is taken, even by a racing process
    except OSError as error:
        error.filename = str(path)  # it named the temporary file, which nobody knows of
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _key_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise PkiError(f"{name!r}: is no name for a certificate; use up to 64 letters, digits and . _ - @ :")
    if name == "ca":
        raise PkiError("ca: is the CA's own name here; choose another")


def _checked_days(days: int) -> int:
    if not 1 <= days <= 36_500:
        raise PkiError(f"--days {days}: is out of range; give a whole number from 1 to 36500")
    return days


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
