"""aiohttp's server side, imported in the way that costs least. Knows nothing of what is served with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["HttpVersion11", "web"]


@contextmanager
def _no_system_trust() -> Iterator[None]:
    """OpenSSL finds no system-wide CAs in here."""
    names = ("SSL_CERT_FILE", "SSL_CERT_DIR")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ |= dict.fromkeys(names, os.devnull)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ |= before


# aiohttp makes a TLS context for its client when imported. With the system's CAs in it, which nothing here trusts or
# uses, that takes 2 MB and 70 ms.
with _no_system_trust():
    from aiohttp import HttpVersion11, web
