"""What the settings name on this machine: are the files there, do they parse, fit together, and are they valid today.

Faults keep the gate from starting; warnings are for the reader. Neither ever holds any part of a private key.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509

from proxy.config import pem
from proxy.config.model import Settings

_EXPIRES_SOON = timedelta(days=14)
_Read = TypeVar("_Read")


def file_faults(values: Mapping[str, Any]) -> list[str]:
    """Faults of the files and folders named in `values`, {dotted key: typed value}; absent keys are skipped."""
    faults: list[str] = []
    repository = values.get("model_repository_path")
    if repository is not None:
        faults += _repository_faults(repository)
    certificates = _read("tls.cert_file", pem.read_certificates, values, faults)
    key = _read("tls.key_file", pem.read_private_key, values, faults)
    if certificates and key and not pem.belongs(key, certificates[0]):
        faults.append(_mismatch(values, certificates, [pem.belongs(key, other) for other in certificates[1:]]))
    elif certificates and key:
        faults += _context_faults(values["tls.cert_file"], values["tls.key_file"])
    _read("tls.ca_file", pem.read_certificates, values, faults)
    return faults


def _read(key: str, read: Callable[[Path], _Read], values: Mapping[str, Any], faults: list[str]) -> _Read | None:
    path = values.get(key)
    if path is None:
        return None
    try:
        return read(path)
    except pem.PemError as fault:
        faults.append(f"{key}: {path} {fault}")
        return None


def _mismatch(values: Mapping[str, Any], certificates: list[x509.Certificate], later: list[bool]) -> str:
    place, cert_file = f"tls.key_file: {values['tls.key_file']}", values["tls.cert_file"]
    if any(later):
        return (
            f"{place} belongs to certificate number {later.index(True) + 2} in tls.cert_file {cert_file}; "
            "put the server's own certificate first, then the intermediate ones"
        )
    subject = pem.subject_text(certificates[0].subject)
    return (
        f"{place} does not belong to the certificate in tls.cert_file {cert_file} ({subject}); "
        "give the key that the certificate was issued for"
    )


def _context_faults(cert_file: Path, key_file: Path) -> list[str]:
    # OpenSSL has the last word: keys too small for its security level, algorithms that it lacks.
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=lambda: b"")
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        remedy = "use a key of ECDSA P-256, or of RSA with 2048 bits or more"
        return [f"tls.cert_file: {cert_file} is refused by OpenSSL ({reason}); {remedy}"]
    except OSError as error:  # replaced by another process since it was read
        return [f"tls.cert_file: {cert_file} cannot be read ({(error.strerror or str(error)).lower()})"]
    return []


def _repository_faults(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            next(entries, None)
    except FileNotFoundError:
        return [f"model_repository_path: {path} does not exist; give a folder with one folder per model"]
    except NotADirectoryError:
        return [f"model_repository_path: {path} is not a folder; give a folder with one folder per model"]
    except PermissionError:
        return [f"model_repository_path: {path} cannot be read by user {os.geteuid()}; change its owner or mode"]
    except OSError as error:
        return [f"model_repository_path: {path} cannot be read ({(error.strerror or str(error)).lower()})"]
    return []


def warnings(settings: Settings, now: datetime | None = None) -> list[str]:
    """One line for each thing that is allowed but probably not meant, 'key: what, and the remedy'. Raises PemError only
    when a file has changed since it was checked."""
    now = now or datetime.now(UTC)
    found = _server_certificate_warnings(settings.tls.cert_file, now)
    found += _key_mode_warnings(settings.tls.key_file)
    if settings.tls.ca_file is not None:
        for certificate in pem.read_certificates(settings.tls.ca_file):
            found += _expiry_warnings("tls.ca_file", "CA", certificate, now)
    if settings.model_repository_path is not None:
        found += _repository_warnings(settings.model_repository_path, settings)
    if settings.http_port is not None:
        found.append(f"http_port: {settings.http_port} is not served in this version; gRPC on grpc_port is")
    if settings.upstream is not None and settings.upstream.http is not None:
        found.append(f"upstream.http: {settings.upstream.http} is not used in this version; upstream.grpc is")
    return found


def expiries(settings: Settings) -> dict[str, float]:
    """When the certificates in use expire. A CA file may hold several: the first to expire counts."""
    found = {"server": pem.read_certificates(settings.tls.cert_file)[:1]}
    if settings.tls.ca_file is not None:
        found["ca"] = pem.read_certificates(settings.tls.ca_file)
    return {
        name: min(certificate.not_valid_after_utc.timestamp() for certificate in certificates)
        for name, certificates in found.items()
    }


def _server_certificate_warnings(path: Path, now: datetime) -> list[str]:
    chain = pem.read_certificates(path)
    leaf = chain[0]
    found = _expiry_warnings("tls.cert_file", "server", leaf, now)
    for other in chain[1:]:
        found += _expiry_warnings("tls.cert_file", "intermediate", other, now)
    if not any(name.startswith(("dns:", "ip:")) for name in pem.sans(leaf)):
        found.append(
            "tls.cert_file: the certificate names no host (no DNS or IP subject alternative name), so gRPC clients "
            "refuse it; issue one with --san dns:NAME"
        )
    allowed = pem.usages(leaf)
    if allowed and "serverAuth" not in allowed and "any" not in allowed:
        found.append(
            f"tls.cert_file: the certificate is for {', '.join(allowed)} only, so clients refuse it; "
            "issue one with --server"
        )
    return found


def _expiry_warnings(key: str, what: str, certificate: x509.Certificate, now: datetime) -> list[str]:
    subject = pem.subject_text(certificate.subject)
    if now < certificate.not_valid_before_utc:
        start = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        return [f"{key}: the {what} certificate {subject} is not valid before {start}; is the clock right?"]
    end = certificate.not_valid_after_utc
    if end - now > _EXPIRES_SOON:
        return []
    verb = "expired" if end < now else "expires"
    remaining = pem.remaining_text(certificate, now)
    return [f"{key}: the {what} certificate {subject} {verb} on {end:%Y-%m-%d %H:%M} UTC ({remaining}); replace it"]


def _repository_warnings(path: Path, settings: Settings) -> list[str]:
    found = []
    if not _has_folder(path):
        found.append(f"model_repository_path: {path} holds no model; each model is a folder in it")
    found += [
        f"backend.load_models: {name} is not a folder in {path}, so it is not loaded; add it, or remove the name"
        for name in settings.backend.load_models
        if name != "*" and not os.path.isdir(path / name)  # also where the name is too long for a file
    ]
    if settings.backend.model_control_mode == "explicit" and settings.tls.client_auth != "require":
        found.append(
            "backend.model_control_mode: explicit lets clients load and unload models, also from files that they send, "
            f"with code that is run; tls.client_auth is {settings.tls.client_auth}, so anybody can: set it to require"
        )
    return found


def _key_mode_warnings(path: Path) -> list[str]:
    mode = path.stat().st_mode & 0o777
    if mode & 0o007:
        return [f"tls.key_file: {path} is open to every user of this machine (mode {mode:o}); chmod 600 it"]
    return []


def _has_folder(path: Path) -> bool:
    return any(entry.is_dir() for entry in path.iterdir() if not entry.name.startswith("."))
