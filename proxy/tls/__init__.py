"""TLS: the server's context and handshakes, and a development CA (`pki`)."""
