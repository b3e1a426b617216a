"""Why a handshake failed, in words and as a metric label. No I/O.

OpenSSL tells it by a reason name; alerts that the client sent arrive as reasons too ("..._ALERT_...").
"""

from __future__ import annotations

import ssl

_TELL_CLIENT = "the client refused our certificate: "

_BY_REASON = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (
        "no_certificate",
        "the client sent no certificate, and tls.client_auth is require",
    ),
    "TLSV1_ALERT_UNKNOWN_CA": (
        "client_rejected_unknown_ca",
        _TELL_CLIENT + "unknown CA; give it the CA of tls.cert_file as its root certificates",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "client_rejected_expired",
        _TELL_CLIENT + "it has expired; renew tls.cert_file",
    ),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": (
        "client_rejected",
        _TELL_CLIENT + "certificate unknown (unknown CA, expired, or not for this host name)",
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": ("client_rejected", _TELL_CLIENT + "bad certificate"),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": ("client_rejected", _TELL_CLIENT + "revoked"),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": ("client_rejected", _TELL_CLIENT + "unsupported certificate"),
    "UNSUPPORTED_PROTOCOL": ("unsupported_version", "the client offers no TLS version from 1.2 on"),
    "VERSION_TOO_LOW": ("unsupported_version", "the client offers no TLS version from 1.2 on"),
    "TLSV1_ALERT_PROTOCOL_VERSION": ("unsupported_version", "the client takes none of TLS 1.2 and 1.3"),
    "NO_SHARED_CIPHER": ("no_shared_cipher", "the client offers no cipher suite that is allowed here"),
    "NO_SUITABLE_KEY_SHARE": ("no_shared_cipher", "the client offers no key exchange that is allowed here"),
    "NO_SHARED_GROUP": ("no_shared_cipher", "the client offers no key exchange that is allowed here"),
    "NO_SUITABLE_SIGNATURE_ALGORITHM": (
        "no_shared_cipher",
        "the client offers no signature algorithm that fits tls.key_file",
    ),
}

# X509_V_ERR_... of OpenSSL
_CERT_EXPIRED = {10, 9}
_UNKNOWN_ISSUER = {2, 18, 19, 20, 21}

Reason = tuple[str, str]

CLOSED_BY_CLIENT: Reason = (
    "closed_by_client",
    "the client closed the connection in the handshake without an alert; gRPC clients do that when they don't trust "
    "the CA of tls.cert_file",
)
NO_PREFACE: Reason = (
    "no_preface",
    "the client finished the handshake and closed without a byte of HTTP/2; gRPC clients do that when the "
    "certificate isn't for the host name that they called",
)
EXPIRED: Reason = (
    "client_rejected_expired",
    "the client closed the connection in the handshake without an alert, and our certificate has expired; "
    "renew tls.cert_file",
)
TIMEOUT: Reason = ("timeout", "the handshake took longer than timeouts.handshake (HTTP/2's preface is part of it)")
PLAINTEXT_H2C: Reason = ("plaintext_h2c", "plaintext HTTP/2 (h2c) on a TLS port; the client must use a secure channel")
PLAINTEXT_HTTP: Reason = ("plaintext_http", "plaintext HTTP on a TLS port; the client must use https")
NOT_TLS: Reason = ("other", "what the client sent is not TLS")
HELLO_TOO_LONG: Reason = ("hello_too_long", "the client's first message has more than 8 KiB; usual ones have 0.5 to 2")
NO_ALPN: Reason = ("no_alpn", "the client didn't offer h2 by ALPN; this port speaks HTTP/2 only")
BAD_IDENTITY: Reason = ("certificate_invalid", "the client's certificate can't be read")


def of_error(error: ssl.SSLError) -> Reason:
    """(metric label, words) for what OpenSSL raised in a handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_verification(error)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return CLOSED_BY_CLIENT
    reason = error.reason or ""
    known = _BY_REASON.get(reason)
    if known is not None:
        return known
    words = reason.lower().replace("_", " ") or str(error)
    if "ALERT" in reason:
        return "client_rejected", f"the client ended the handshake: {words}"
    return "other", f"the handshake failed: {words}"


def _of_verification(error: ssl.SSLCertVerificationError) -> Reason:
    if error.verify_code in _UNKNOWN_ISSUER:
        return "unknown_ca", "the client's certificate is not from the CA in tls.ca_file"
    if error.verify_code in _CERT_EXPIRED:
        return "certificate_expired", "the client's certificate has expired or is not yet valid"
    return "certificate_invalid", f"the client's certificate is not accepted: {error.verify_message}"


_METHODS = (b"GET ", b"POST", b"HEAD", b"PUT ", b"DELE", b"OPTI", b"PATC", b"CONN", b"TRAC")
_HANDSHAKE_RECORD = 0x16
# ClientHellos take some 500 bytes, 2,000 with post-quantum keys, 6,000 with large tickets. They wait whole for a turn.
MAX_HELLO = 8192

_TELL = b"this port speaks TLS: use https"
# Sent in the clear. None for plaintext HTTP/2: a gRPC client that gets GOAWAY there tries again until its deadline,
# one whose connection is closed reports UNAVAILABLE at once.
ANSWERS = {
    "hello_too_long": b"\x15\x03\x03\x00\x02\x02\x16",  # a fatal alert: record_overflow
    "plaintext_http": (
        b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: "
        b"%d\r\n\r\n%s\n" % (len(_TELL) + 1, _TELL)
    ),
}


def of_start(start: bytes) -> Reason | None:
    """What the first bytes of a connection are that don't begin a TLS handshake; None if they do or may."""
    if not start:
        return None
    if start[0] == _HANDSHAKE_RECORD:
        if start[1:2] not in (b"", b"\x03"):  # the version of all that is called TLS begins so
            return NOT_TLS
        return HELLO_TOO_LONG if len(start) >= 5 and _record(start) > MAX_HELLO else None
    if len(start) < 4 and any(known.startswith(start) for known in (b"PRI ", *_METHODS)):
        return None
    if start[:4] == b"PRI ":
        return PLAINTEXT_H2C
    return PLAINTEXT_HTTP if start[:4] in _METHODS else NOT_TLS


def is_whole_hello(start: bytes) -> bool:
    """Whether the first record of a handshake is there."""
    return len(start) >= 5 and start[0] == _HANDSHAKE_RECORD and len(start) >= 5 + _record(start)


def _record(start: bytes) -> int:
    """The length of a record's payload (RFC 8446 section 5.1)."""
    return int.from_bytes(start[3:5], "big")
