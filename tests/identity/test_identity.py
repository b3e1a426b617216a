"""Certificates as identities."""

from __future__ import annotations

import datetime
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

from proxy.identity import Identity, from_certificate

KEY = ec.generate_private_key(ec.SECP256R1())
DAY = datetime.timedelta(days=1)


def certificate(
    subject: list[tuple[x509.ObjectIdentifier, str]] | None = None,
    names: list[x509.GeneralName] | None = None,
    raw_names: bytes | None = None,
) -> bytes:
    """A certificate in DER with this subject and these alternative names."""
    pairs = [(NameOID.COMMON_NAME, "alice")] if subject is None else subject
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in pairs])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]))
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if raw_names is not None:
        extension = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, raw_names)
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_a_certificate_with_all_kinds_of_names() -> None:
    der = certificate(
        names=[
            x509.DNSName("alice.example.com"),
            x509.UniformResourceIdentifier("spiffe://prod/alice"),
            x509.DNSName("*.example.com"),
            x509.RFC822Name("alice@example.com"),
        ]
    )
    assert from_certificate(der) == Identity(
        common_name="alice",
        dns_names=("alice.example.com", "*.example.com"),
        uris=("spiffe://prod/alice",),
        fingerprint=hashlib.sha256(der).hexdigest(),
    )


def test_a_certificate_without_alternative_names() -> None:
    identity = from_certificate(certificate())
    assert (identity.common_name, identity.dns_names, identity.uris) == ("alice", (), ())


def test_the_first_common_name_counts() -> None:
    subject = [(NameOID.ORGANIZATION_NAME, "org"), (NameOID.COMMON_NAME, "a"), (NameOID.COMMON_NAME, "b")]
    assert from_certificate(certificate(subject)).common_name == "a"


def test_a_certificate_without_a_common_name() -> None:
    assert from_certificate(certificate([(NameOID.ORGANIZATION_NAME, "org")])).common_name == ""
    assert from_certificate(certificate([])).common_name == ""


def test_the_number_of_names_is_bounded() -> None:
    names: list[x509.GeneralName] = [x509.DNSName(f"h{number}.example.com") for number in range(500)]
    names += [x509.UniformResourceIdentifier(f"spiffe://prod/{number}") for number in range(500)]
    identity = from_certificate(certificate(names=names))
    assert identity.dns_names == tuple(f"h{number}.example.com" for number in range(64))
    assert identity.uris == tuple(f"spiffe://prod/{number}" for number in range(64))


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (Identity("alice", ("alice.example.com",), ("spiffe://a", "spiffe://b"), "00ff"), "uri:spiffe://a"),
        (Identity("alice", ("alice.example.com",), (), "00ff"), "cn:alice"),
        (Identity("", ("alice.example.com", "b"), (), "00ff"), "dns:alice.example.com"),
        (Identity("", (), (), "00ff"), "sha256:00ff"),
    ],
)
def test_the_shortest_name_that_tells_who_it_is(identity: Identity, text: str) -> None:
    assert str(identity) == text


def test_an_identity_can_be_a_key_and_cannot_be_changed() -> None:
    one, two = from_certificate(certificate()), from_certificate(certificate())
    assert len({one, two, Identity("x", (), (), "")}) == len({one.fingerprint, two.fingerprint, ""})
    with pytest.raises(AttributeError):
        one.common_name = "root"  # type: ignore[misc]


# -- what can't be read must be refused, and nothing but ValueError says so

_DIRECTORY = bytes.fromhex("3007 a505 0c03 616263")  # ediPartyName
_X400 = bytes.fromhex("3005 a303 0c01 61")  # x400Address


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"not a certificate",
        certificate()[:-1],
        certificate()[:100],
        certificate(raw_names=b"\xff\xff"),
        certificate(raw_names=b""),
        certificate(raw_names=_DIRECTORY),
        certificate(raw_names=_X400),
    ],
    ids=["empty", "text", "cut", "cut short", "names are junk", "names are empty", "ediPartyName", "x400Address"],
)
def test_what_cant_be_read_is_a_value_error(der: bytes) -> None:
    with pytest.raises(ValueError):
        from_certificate(der)


@pytest.mark.parametrize(
    ("honest", "changed"),
    [
        (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09"),
        (b"\x55\x04\x03\x0c\x05alice", b"\x55\x04\x03\x03\x05alice"),
    ],
    ids=["version", "the common name is a bit string"],
)
def test_what_only_a_careless_ca_signs_is_a_value_error(honest: bytes, changed: bytes) -> None:
    der = certificate()
    assert der.count(honest) == 1
    with pytest.raises(ValueError):
        from_certificate(der.replace(honest, changed))


def test_an_extension_that_comes_twice_is_a_value_error() -> None:
    """As it can't be made by honest means, by hand: another extension gets the identifier of the names'."""
    with pytest.raises(ValueError):
        from_certificate(_with_two_extensions())


def _with_two_extensions() -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    first = x509.ObjectIdentifier("2.5.29.99")
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("a.example.com")]), critical=False)
        .add_extension(x509.UnrecognizedExtension(first, b"\x30\x00"), critical=False)
        .sign(KEY, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    assert made.count(b"\x06\x03\x55\x1d\x63") == 1
    return made.replace(b"\x06\x03\x55\x1d\x63", b"\x06\x03\x55\x1d\x11")
