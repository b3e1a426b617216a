"""Whether the addresses that the gate is to listen on are free, tried by binding them."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from proxy.config.model import Settings

_EVERY = ("0.0.0.0", "::")  # noqa: S104  (the public side listens on every address unless `host` says otherwise)


def port_faults(settings: Settings) -> list[str]:
    """One line for each listening address that cannot be bound now; [] when all can. Nothing stays bound."""
    admin, metrics = settings.admin.address, settings.backend.metrics
    hosts = [settings.host] if settings.host else list(_EVERY)
    faults = _tcp_faults("grpc_port", "host", hosts, settings.grpc_port, "--grpc-port N")
    if admin.is_unix:
        faults += _unix_faults("admin.address", Path(admin.path))
    else:
        key, flag = "admin.address", "--admin-address HOST:PORT"
        faults += _tcp_faults(key, key, [admin.host], admin.port, flag)
    if metrics is not None:
        key = "backend.metrics"
        faults += _tcp_faults(key, key, [metrics.host], metrics.port, "")
    return faults


def _tcp_faults(key: str, host_key: str, hosts: list[str], port: int, flag: str) -> list[str]:
    faults: list[str] = []
    for host in hosts:
        for family, address in _resolved(host_key, host, port, faults):
            error = _bind_error(family, address)
            if error is None or (len(hosts) > 1 and error.errno in _NO_SUCH_FAMILY):
                continue
            faults.append(_bind_fault(key, host_key, address[0], port, flag, error))
    return _one_per_port(faults)


# Without IPv6 (or IPv4) in the kernel "every address" just means the other family.
_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def _resolved(key: str, host: str, port: int, faults: list[str]) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        faults.append(f"{key}: {host} cannot be resolved ({reason}); give an address of this machine")
        return []
    return list(dict.fromkeys((family, (str(address[0]), port)) for family, _, _, _, address in found))


def _bind_error(family: int, address: tuple[str, int]) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the real listener does: connections left over in TIME_WAIT do not count as "in use".
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _bind_fault(key: str, host_key: str, host: str, port: int, flag: str, error: OSError) -> str:
    choice = f"{key} or {flag}" if flag else key
    if error.errno == errno.EADDRINUSE:
        return f"{key}: port {port} is in use; stop what listens there, or choose another with {choice}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"{key}: port {port} needs privileges (below 1024); choose another with {choice}, "
            "or give the process CAP_NET_BIND_SERVICE"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host_key}: {host} is not an address of this machine; give one that is"
    return f"{key}: {host} port {port} cannot be listened on ({(error.strerror or str(error)).lower()})"


def _one_per_port(faults: list[str]) -> list[str]:
    # A port that is taken on IPv4 and IPv6 alike is one fault for the reader.
    return list(dict.fromkeys(faults))


def _unix_faults(key: str, path: Path) -> list[str]:
    if not path.parent.is_dir():
        return [f"{key}: the folder {path.parent} does not exist; make it, or choose another path"]
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return [f"{key}: user {os.geteuid()} may not create a socket in {path.parent}; change its mode or the path"]
    try:
        mode = path.lstat().st_mode
    except OSError:
        return []
    if not stat.S_ISSOCK(mode):
        return [f"{key}: {path} exists and is not a socket; remove it, or choose another path"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            return [f"{key}: another process listens on {path}; stop it, or choose another path"]
    return []
