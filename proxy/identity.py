"""Who a client is: its certificate as an Identity. No I/O.

The certificate was verified against the CA by the TLS layer; nothing here decides whether to trust it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_MAX_NAMES = 64  # a certificate may carry thousands of names; nobody's identity needs them


@dataclass(frozen=True, slots=True)
class Identity:
    """`common_name` of the subject, or ""; DNS and URI names; SHA-256 of the certificate's DER in hex."""

    common_name: str
    dns_names: tuple[str, ...]
    uris: tuple[str, ...]
    fingerprint: str

    def __str__(self) -> str:
        """The shortest name that tells who it is."""
        if self.uris:
            return f"uri:{self.uris[0]}"
        if self.common_name:
            return f"cn:{self.common_name}"
        return f"dns:{self.dns_names[0]}" if self.dns_names else f"sha256:{self.fingerprint}"


def prepare() -> None:
    """Load what reads certificates, 7 MB, at the start and not while the first client waits.

    A gate that asks for no certificates never needs it.
    """
    from cryptography import x509  # noqa: F401


def from_certificate(der: bytes) -> Identity:
    """Read a DER certificate. ValueError where it can't be parsed: the caller must refuse such a client."""
    from cryptography import x509

    try:
        return _read(der)
    except (x509.UnsupportedGeneralNameType, x509.DuplicateExtension, x509.InvalidVersion, TypeError) as error:
        raise ValueError(str(error)) from None


def _read(der: bytes) -> Identity:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    certificate = x509.load_der_x509_certificate(der)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    dns: list[str] = []
    uris: list[str] = []
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = alternative.get_values_for_type(x509.DNSName)
        uris = alternative.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        pass
    return Identity(
        common_name=str(names[0].value) if names else "",
        dns_names=tuple(dns[:_MAX_NAMES]),
        uris=tuple(uris[:_MAX_NAMES]),
        fingerprint=hashlib.sha256(der).hexdigest(),
    )
