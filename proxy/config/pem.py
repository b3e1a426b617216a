"""Certificates and private keys in PEM files: read them, and say in words what is in them or what is wrong.

Knows no settings and no sockets. What it says of a private key never holds any part of the key.
"""

from __future__ import annotations

import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_SIZE_MAX = 1024 * 1024
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_CERTIFICATE_LABELS = (b"CERTIFICATE", b"X509 CERTIFICATE", b"TRUSTED CERTIFICATE")
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_USAGES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "any",
}


class PemError(ValueError):
    """What is wrong with a file, as a predicate ("does not exist; …"); the path itself is not in it."""


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most 1 MiB that is not empty. Raises PemError."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PemError("is not a regular file; give the path of a file")
            content = file.read(_SIZE_MAX + 1)
    except FileNotFoundError:
        raise PemError("does not exist; give the path of a file that does") from None
    except IsADirectoryError:
        raise PemError("is a folder; give the path of a file") from None
    except PermissionError:
        raise PemError(f"cannot be read by user {os.geteuid()}; change its owner or mode") from None
    except OSError as error:
        raise PemError(f"cannot be read ({(error.strerror or str(error)).lower()})") from None
    if not content.strip():
        raise PemError("is empty")
    if len(content) > _SIZE_MAX:
        raise PemError("is larger than 1 MiB; give a PEM file")
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    # A FIFO without a writer would block the open for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _blocks(content: bytes) -> list[tuple[bytes, bytes]]:
    """(label, whole block) of each PEM block, in order."""
    return [(match.group(1), match.group(0)) for match in _BLOCK.finditer(content)]


def read_certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a file, at least one, in the file's order. Raises PemError."""
    content = read_file(path)
    blocks = _blocks(content)
    found = [block for label, block in blocks if label in _CERTIFICATE_LABELS]
    if not found:
        raise PemError(_lacks(content, blocks, "certificate", "openssl x509 -inform der"))
    certificates = []
    for number, block in enumerate(found, 1):
        try:
            certificate = x509.load_pem_x509_certificate(block)
            certificate.extensions  # noqa: B018  (decoded only when asked for, and may be malformed)
            certificates.append(certificate)
        except (ValueError, x509.DuplicateExtension):
            which = "a certificate" if len(found) == 1 else f"a certificate (number {number} of {len(found)})"
            raise PemError(f"holds {which} that cannot be decoded; the file may be cut off or damaged") from None
    return certificates


def read_private_key(path: Path) -> PrivateKeyTypes:
    """The first private key of a file. Raises PemError, also for an encrypted key."""
    content = read_file(path)
    blocks = _blocks(content)
    found = [(label, block) for label, block in blocks if label.endswith(b"PRIVATE KEY")]
    if not found:
        raise PemError(_lacks(content, blocks, "private key", "openssl pkey -inform der"))
    label, block = found[0]
    if label.startswith(b"ENCRYPTED") or b"Proc-Type: 4,ENCRYPTED" in block:
        raise PemError("is encrypted; decrypt it, as a passphrase cannot be asked for: openssl pkey -in IN -out OUT")
    try:
        return serialization.load_pem_private_key(block, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The cause is left out on purpose: it could quote what it could not decode.
        raise PemError("holds a private key that cannot be decoded; the file may be cut off or damaged") from None


def _lacks(content: bytes, blocks: list[tuple[bytes, bytes]], wanted: str, convert: str) -> str:
    if content[:1] == b"\x30":
        return f"is binary (DER or PKCS#12), not PEM; convert it: {convert} -in IN -out OUT"
    labels = sorted({label.decode().lower() for label, _ in blocks})
    if labels:
        return f"holds no {wanted}, only: {', '.join(labels)}; were two files exchanged?"
    if b"-----BEGIN" in content:
        return f"holds no whole {wanted}: a BEGIN line has no END line; the file may be cut off"
    return f"holds no {wanted} in PEM (-----BEGIN …-----)"


def belongs(key: PrivateKeyTypes, certificate: x509.Certificate) -> bool:
    """True when the certificate was issued for this key."""
    return public_bytes(key.public_key()) == public_bytes(certificate.public_key())


def public_bytes(key: PublicKeyTypes) -> bytes:
    """The SubjectPublicKeyInfo in DER: equal for equal keys of whatever type."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def subject_text(name: x509.Name) -> str:
    """A distinguished name in one line, "CN=alice"; "(empty)" when there is nothing in it."""
    return name.rfc4514_string() or "(empty)"


def common_name(certificate: x509.Certificate) -> str:
    """The subject's CN, "" when there is none."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def sans(certificate: x509.Certificate) -> list[str]:
    """Subject alternative names as "dns:x", "ip:y", "uri:z", "email:w"; other kinds are left out."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    kinds: list[tuple[str, type[x509.GeneralName]]] = [
        ("dns", x509.DNSName),
        ("ip", x509.IPAddress),
        ("uri", x509.UniformResourceIdentifier),
        ("email", x509.RFC822Name),
    ]
    return [f"{label}:{name.value}" for name in names for label, kind in kinds if isinstance(name, kind)]


def usages(certificate: x509.Certificate) -> list[str]:
    """Extended key usages by name ("serverAuth"), others as dotted OIDs; empty when it may be used for anything."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return []
    return [_USAGES.get(oid, oid.dotted_string) for oid in extension]


def is_authority(certificate: x509.Certificate) -> bool:
    """True when it may sign certificates (basicConstraints CA)."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def key_type(key: PublicKeyTypes) -> str:
    """"ECDSA P-256", "RSA 2048 bits", "Ed25519", …"""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"ECDSA {_CURVES.get(key.curve.name, key.curve.name)}"
    if isinstance(key, (rsa.RSAPublicKey, dsa.DSAPublicKey)):
        return f"{'RSA' if isinstance(key, rsa.RSAPublicKey) else 'DSA'} {key.key_size} bits"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "Ed25519"
    return "Ed448" if isinstance(key, ed448.Ed448PublicKey) else type(key).__name__


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the DER, as 64 lower-case hex digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def validity_text(certificate: x509.Certificate, now: datetime | None = None) -> str:
    """"2026-01-01 to 2027-01-01 UTC (364 days left)", or "(EXPIRED 3 days ago)", or "(not valid yet)"."""
    now = now or datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC ({remaining_text(certificate, now)})"


def remaining_text(certificate: x509.Certificate, now: datetime) -> str:
    """"364 days left", "5 hours left", "expired 3 days ago" or "not valid yet"."""
    if now < certificate.not_valid_before_utc:
        return "not valid yet"
    left = certificate.not_valid_after_utc - now
    seconds = abs(left.total_seconds())
    count, unit = (seconds / 86_400, "day") if seconds >= 2 * 86_400 else (seconds / 3_600, "hour")
    amount = f"{int(count)} {unit}{'' if int(count) == 1 else 's'}"
    return f"expired {amount} ago" if left.total_seconds() < 0 else f"{amount} left"
