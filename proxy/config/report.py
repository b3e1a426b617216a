"""What `tensorgate check` says of settings that are right: each key, its origin and meaning, and the sum of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from proxy.config import pem
from proxy.config.load import Loaded
from proxy.config.model import Settings, flatten, leaves, value_text

_VALUE_WIDTH = 24  # a longer value, a path most likely, shifts its own line only


def lines(path: Path, loaded: Loaded, warnings: list[str], now: datetime | None = None) -> list[str]:
    """The report, line by line; the last line is the verdict."""
    settings = loaded.settings
    text = [f"{path}: these settings are right.", "", *_keys(loaded), ""]
    text += _certificates(settings, now or datetime.now(UTC))
    if warnings:
        count = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
        text += ["", f"{count}:", *(f"  {line}" for line in warnings)]
    return [*text, "", verdict(settings)]


def verdict(settings: Settings) -> str:
    """One line: what would listen where, for whom, and what is behind it."""
    host = settings.host or "every address"
    port = f"port {settings.grpc_port}" if settings.grpc_port else "a free port"
    clients = {
        "none": "clients need no certificate",
        "optional": "client certificates are checked when given",
        "require": "clients need a certificate",
    }[settings.tls.client_auth]
    behind = (
        f"the server at {settings.upstream.grpc}"
        if settings.upstream is not None
        else f"the embedded backend with {settings.model_repository_path}"
    )
    return f"ready to serve: gRPC over TLS on {host}, {port} ({clients}), in front of {behind}"


def _keys(loaded: Loaded) -> list[str]:
    values = flatten(loaded.settings)
    meanings = {leaf.key: leaf.field.description for leaf in leaves()}
    rows = [(key, value_text(values[key]), loaded.origins.get(key, "default")) for key in meanings if key in values]
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    second = min(second, _VALUE_WIDTH)
    return [f"  {key:<{first}}  {value:<{second}}  {origin:<{third}}  {meanings[key]}" for key, value, origin in rows]


def _certificates(settings: Settings, now: datetime) -> list[str]:
    text = ["  server certificate", *_certificate(settings.tls.cert_file, now)]
    if settings.tls.ca_file is not None:
        used = " (not used: tls.client_auth is none)" if settings.tls.client_auth == "none" else ""
        text += [f"  CA of the clients{used}", *_certificate(settings.tls.ca_file, now)]
    return text


def _certificate(path: Path, now: datetime) -> list[str]:
    certificates = pem.read_certificates(path)
    first = certificates[0]
    rows = [
        ("subject", pem.subject_text(first.subject)),
        ("issuer", pem.subject_text(first.issuer)),
        ("names", ", ".join(pem.sans(first)) or "none"),
        ("valid", pem.validity_text(first, now)),
        ("key", pem.key_type(first.public_key())),
    ]
    if len(certificates) > 1:
        rows.append(("and", f"{len(certificates) - 1} more in the file"))
    return [f"    {label:<8}{value}" for label, value in rows]
