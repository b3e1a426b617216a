"""The TLS contexts of the public side, built from files. Says who may connect, not what they may do."""

from __future__ import annotations

import ssl

from proxy.config.model import Tls

# RFC 9113 section 9.2.2 forbids TLS 1.2 cipher suites without forward secrecy and AEAD; TLS 1.3 has no others.
_TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_CLIENT_AUTH = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "require": ssl.CERT_REQUIRED}


def server_context(settings: Tls) -> ssl.SSLContext:
    """A context for TLS 1.2 and 1.3 with ALPN h2. ssl.SSLError or OSError where the files don't do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_TLS12_CIPHERS)
    # A client that renegotiates makes the server do handshakes for nothing; compression leaks (CRIME).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # All suites left are strong ones. gRPC's clients put AES-128 first, OpenSSL AES-256, which costs a quarter more.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    # A ticket for a client that comes again, which gets a new one then; a second one costs 25 us for nothing.
    context.num_tickets = 1
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(settings.cert_file, settings.key_file)
    if settings.ca_file is not None:
        context.load_verify_locations(settings.ca_file)
    context.verify_mode = _CLIENT_AUTH[settings.client_auth]
    if context.verify_mode != ssl.CERT_NONE:
        # A CA that is itself an intermediate is enough to trust what it has issued.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
