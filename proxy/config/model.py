"""The settings of the gate as types: what may be set, its default, its range and its unit.

Does no I/O: whether a file exists or a port is free is the business of `check`, where values come from that of `load`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from proxy.config.fields import Bounds, Field, Key, Parse, Section, keys

_MODEL_NAME_MAX = 255
_UNIX_PATH_MAX = 107  # sockaddr_un.sun_path holds 108 bytes with the final zero
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen or to connect: `host` and `port`, or a unix socket when `path` is not empty.

    `host` has no brackets around an IPv6 address; `str()` writes them and is read back by `parse`.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "HOST:PORT", "[v6]:PORT" or "unix:/path". Raises ValueError that says the fault and the remedy."""
        if text.startswith("unix:"):
            return cls(path=_unix_path(text))
        if "://" in text:
            raise ValueError("is a URL; write HOST:PORT without a scheme, or unix:/path")
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError("has no port; write HOST:PORT, [IPV6]:PORT or unix:/path")
        return cls(host=_host(host), port=_port(port))

    @property
    def is_unix(self) -> bool:
        return self.path != ""

    @property
    def is_loopback(self) -> bool:
        """True when nothing outside this machine can reach it: a unix socket, localhost, 127.0.0.0/8 or ::1."""
        if self.path or self.host.rstrip(".").lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _unix_path(text: str) -> str:
    path = text.removeprefix("unix:")
    if path.startswith("//"):  # gRPC's own spelling, unix:///path
        path = path[2:]
    if not path.startswith("/") or path == "/" or "\0" in path:
        raise ValueError("needs an absolute path after unix:, as in unix:/run/triton.sock")
    if len(path.encode()) > _UNIX_PATH_MAX:
        raise ValueError(f"is too long: the path of a unix socket has at most {_UNIX_PATH_MAX} bytes")
    return path


def _host(text: str) -> str:
    if not text:
        raise ValueError("has no host; write 127.0.0.1:PORT, or 0.0.0.0:PORT for every address")
    if text.startswith("[") and text.endswith("]"):
        host = text[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("has no IPv6 address between [ and ]; write it as in [::1]:9090") from None
        return host
    if ":" in text:
        raise ValueError("has several colons; put an IPv6 address in brackets, as in [::1]:9090")
    if not _HOST_NAME.fullmatch(text):
        raise ValueError("has a host that is neither a name nor an IP address; write HOST:PORT")
    if re.fullmatch(r"[0-9.]+", text):
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            raise ValueError("has a host that is no IPv4 address; write it as in 127.0.0.1:9090") from None
    return text


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("has no port number after the last colon; give one from 0 to 65535")
    return int(text)


def _as_address(value: object) -> Address:
    if not isinstance(value, str):
        raise ValueError("is not an address; write HOST:PORT, [IPV6]:PORT or unix:/path")
    return Address.parse(value)


def _as_dialled_address(value: object) -> Address:
    address = _as_address(value)
    if not address.is_unix and address.port == 0:
        raise ValueError("has port 0, which cannot be connected to; give a port from 1 to 65535")
    return address


def _as_scraped_address(value: object) -> Address:
    address = _as_address(value)
    if address.is_unix:
        raise ValueError("is a unix socket, which Prometheus does not read; write HOST:PORT or [IPV6]:PORT")
    return address


def _as_host(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a host; give a name or an IP address in quotes, or '' for all")
    host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if host == "":
        return host
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if "://" in host or ":" in host:
        raise ValueError("is not a host; leave scheme and port out (the port is grpc_port)")
    if not _HOST_NAME.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
        raise ValueError("is neither a host name nor an IP address; '' means every address")
    return host


def _as_path(value: object) -> Path:
    if not isinstance(value, str):
        raise ValueError("is not a path; give the path of a file as text")
    if holds_key_material(value):
        raise ValueError("is the content of a file; write it to a file and give the path of that")
    if value == "" or "\0" in value or "\n" in value:
        raise ValueError("is not a path; give the path of a file")
    return Path(value)


def _as_model_name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a model's name; give a name as text, in quotes where it looks like a number")
    plain = value.isprintable() and "/" not in value and not value.startswith(".")
    if not plain or not 1 <= len(value) <= _MODEL_NAME_MAX or holds_key_material(value):
        raise ValueError("is not a model's name; give the name of its folder in model_repository_path, or '*' for all")
    return value


def holds_key_material(text: str) -> bool:
    """True for text that may itself be a key (PEM, or its base64) and so must not be repeated anywhere."""
    return "-----BEGIN" in text or re.fullmatch(r"\s*MI[A-Za-z0-9+/=\s]{60,}", text) is not None


ListenAddress = Annotated[Address, Parse(_as_address)]
ScrapedAddress = Annotated[Address, Parse(_as_scraped_address)]
DialAddress = Annotated[Address, Parse(_as_dialled_address)]
Host = Annotated[str, Parse(_as_host)]
FilePath = Annotated[Path, Parse(_as_path)]
ModelNames = Annotated[tuple[str, ...], Parse(_as_model_name, many=True)]
Count = int
Seconds = float
Port = Annotated[int, Bounds(ge=0, le=65535)]


class Backend(Section):
    """The embedded backend, which model_repository_path starts."""

    model_control_mode: Literal["none", "poll", "explicit"] = Field(
        default="none", description="models loaded: all at the start, as the folder changes, or as clients ask"
    )
    repository_poll: Seconds = Field(
        default=15.0, ge=0.1, le=86_400, description="seconds between two looks at the folder, in mode poll"
    )
    load_models: ModelNames = Field(default=(), description="loaded at the start in mode explicit; '*': all")
    metrics: ScrapedAddress | None = Field(default=None, description="HTTP: /metrics of the models, for Prometheus")
    memory_limit_bytes: Count | None = Field(
        default=None, ge=1_048_576, le=17_592_186_044_416, description="of messages held at once; default 1/4 of memory"
    )


class Upstream(Section):
    """An existing plaintext inference server behind the gate."""

    grpc: DialAddress = Field(description="gRPC address of the server behind (h2c)")
    http: DialAddress | None = Field(default=None, description="HTTP address of the server behind; not served yet")


class Tls(Section):
    """The public side's certificate, and what is asked of clients."""

    cert_file: FilePath = Field(description="PEM: the server certificate, then its intermediate certificates")
    key_file: FilePath = Field(description="PEM: the private key that belongs to it, unencrypted")
    ca_file: FilePath | None = Field(default=None, description="PEM: CAs that client certificates are checked against")
    client_auth: Literal["none", "optional", "require"] = Field(
        default="none", description="are clients asked for a certificate"
    )


class Admin(Section):
    """The plain HTTP listener for /metrics, /livez and /readyz."""

    address: ListenAddress = Field(default=Address("127.0.0.1", 9090), description="HTTP: /metrics, /livez, /readyz")


class Limits(Section):
    """Bounds on what clients can make the gate hold."""

    connections: Count = Field(default=10_000, ge=1, le=1_000_000, description="client connections open at once")
    connections_per_address: Count = Field(
        default=1_024, ge=0, le=1_000_000, description="of these from one IP address (IPv6: /64); 0: no limit"
    )
    streams_per_connection: Count = Field(default=256, ge=1, le=65_536, description="calls open at once per connection")
    header_list_bytes: Count = Field(default=65_536, ge=4_096, le=1_048_576, description="bytes of one header list")
    stream_window_bytes: Count = Field(
        default=1_048_576, ge=65_536, le=16_777_216, description="bytes of one call that may wait in the gate, each way"
    )
    upstream_connections: Count = Field(default=8, ge=1, le=1_024, description="connections to the server behind")
    streams_per_upstream_connection: Count = Field(
        default=256, ge=1, le=65_536, description="calls open at once on one of these"
    )
    pending_requests: Count = Field(default=4_096, ge=0, le=1_000_000, description="calls that may wait for one")
    pending_bytes: Count = Field(
        default=67_108_864, ge=0, le=68_719_476_736, description="bytes of messages that these may hold together"
    )
    waiting_bytes_per_connection: Count = Field(
        default=16_777_216, ge=1_048_576, le=68_719_476_736, description="bytes that may wait of one client, each way"
    )


class Timeouts(Section):
    """All in seconds."""

    handshake: Seconds = Field(default=10.0, gt=0, le=300, description="seconds for a TLS handshake")
    connect: Seconds = Field(default=5.0, gt=0, le=300, description="seconds a call waits for the server behind")
    unread: Seconds = Field(default=5.0, gt=0, le=3_600, description="seconds a client may leave its answers unread")
    idle: Seconds = Field(default=0.0, ge=0, le=86_400, description="seconds a connection may lie idle; 0: for ever")


class Drain(Section):
    """What happens between SIGTERM and the end; all in seconds."""

    delay: Seconds = Field(default=5.0, ge=0, le=3_600, description="seconds from not ready to closed, at the end")
    timeout: Seconds = Field(default=30.0, ge=0, le=86_400, description="seconds for open calls to finish, at the end")


class Log(Section):
    """The log on stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level written")
    format: Literal["text", "json"] = Field(default="text", description="of a log line")
    access: bool = Field(default=False, description="one line per call, at level info")


class Settings(Section):
    """Everything `tensorgate serve` needs to know. `proxy.config.load.load` builds it."""

    model_repository_path: FilePath | None = Field(default=None, description="models for the embedded backend")
    backend: Backend = Backend()
    upstream: Upstream | None = None
    host: Host = Field(default="", description="public address; empty: all, IPv4 and IPv6")
    grpc_port: Port = Field(default=8001, description="public port for gRPC over TLS; 0: any free one")
    http_port: Port | None = Field(default=None, description="public port for HTTP; not served yet")
    tls: Tls
    admin: Admin = Admin()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    drain: Drain = Drain()
    log: Log = Log()
    workers: Count = Field(default=1, ge=1, le=1024, description="worker processes")

    def __post_init__(self) -> None:
        faults = coherence_faults(flatten(self))
        if faults:
            raise ValueError("; ".join(faults))


class ConfigError(Exception):
    """The settings cannot be used. `faults` is one line for each reason, at least one."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Leaf:
    """One key that can be set: its dotted name, its field, and whether its section may be left out as a whole."""

    key: str
    field: Key
    optional_section: bool


def leaves(section: type[Section] = Settings, prefix: str = "", optional: bool = False) -> Iterator[Leaf]:
    """Every key that can be set, in the order of the file."""
    for name, field in keys(section).items():
        if field.section is None:
            yield Leaf(prefix + name, field, optional)
        else:
            yield from leaves(field.section, f"{prefix}{name}.", optional or field.nullable)


def flatten(section: Section, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a built section; keys of a section that is None are absent."""
    flat: dict[str, Any] = {}
    for name, field in keys(type(section)).items():
        value = getattr(section, name)
        if field.section is None:
            flat[prefix + name] = value
        elif value is not None:
            flat |= flatten(value, f"{prefix}{name}.")
    return flat


def value_text(value: object) -> str:
    """A typed value as it may be written in the file; "not set" for None."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(value) if str(value) else "''"


def coherence_faults(values: Mapping[str, Any], wrong: Container[str] = ()) -> list[str]:
    """Faults between keys that are each right by themselves.

    `values` is {dotted key: typed value}; keys whose value is wrong are left out of it and named in `wrong`.
    """
    return [
        *_backend_faults(values, wrong),
        *_embedded_faults(values, wrong),
        *_client_auth_faults(values),
        *_workers_faults(values),
        *_same_port_faults(values),
    ]


def _backend_faults(values: Mapping[str, Any], wrong: Container[str]) -> list[str]:
    repository = values.get("model_repository_path")
    upstream = values.get("upstream.grpc")
    if repository is not None and upstream is not None:
        return [
            f"upstream.grpc: {upstream} is given as well as model_repository_path {repository}; keep one of the two: "
            "model_repository_path starts the embedded backend, upstream fronts a running server"
        ]
    unset = repository is None and upstream is None
    if unset and "model_repository_path" not in wrong and "upstream.grpc" not in wrong:
        return [
            "model_repository_path: neither it nor upstream.grpc is set; give a folder of models to serve, "
            "or the address of a running server in upstream.grpc"
        ]
    return []


def _embedded_faults(values: Mapping[str, Any], wrong: Container[str]) -> list[str]:
    if values.get("model_repository_path") is None and "model_repository_path" not in wrong:
        # By value: a key that is given with its default asks for nothing.
        return [
            f"{leaf.key}: {value_text(values[leaf.key])} is for the embedded backend, which only model_repository_path "
            "starts; set that, or remove the key"
            for leaf in leaves(Backend, "backend.")
            if leaf.key in values and values[leaf.key] != leaf.field.get_default()
        ]
    names, mode = values.get("backend.load_models"), values.get("backend.model_control_mode", "explicit")
    if names and mode != "explicit":
        return [
            f"backend.load_models: {value_text(names)} is for backend.model_control_mode explicit, and that is {mode}; "
            "set it to explicit, or remove the key"
        ]
    return []


def _client_auth_faults(values: Mapping[str, Any]) -> list[str]:
    mode = values.get("tls.client_auth", "none")
    if mode == "none" or "tls.ca_file" not in values or values["tls.ca_file"] is not None:
        return []
    return [
        f"tls.client_auth: {mode} needs tls.ca_file, the CA that client certificates are checked against; "
        "set tls.ca_file, or tls.client_auth to none"
    ]


def _workers_faults(values: Mapping[str, Any]) -> list[str]:
    if values.get("workers", 1) == 1:
        return []
    return [f"workers: {values['workers']} is not available in this version; leave it out or set it to 1"]


def _same_port_faults(values: Mapping[str, Any]) -> list[str]:
    host = values.get("host", "")
    listeners = [(key, host, values[key]) for key in ("grpc_port", "http_port") if values.get(key)]
    for key in ("admin.address", "backend.metrics"):
        private = values.get(key)
        if private is not None and not private.is_unix and private.port:
            listeners.append((key, private.host, private.port))
    faults = []
    for index, (key, address, port) in enumerate(listeners):
        for other, other_address, other_port in listeners[:index]:
            if port == other_port and _overlap(address, other_address):
                faults.append(f"{key}: port {port} is taken by {other} as well; give each listener a port of its own")
    return faults


def _overlap(one: str, other: str) -> bool:
    every = ("", "0.0.0.0", "::")  # noqa: S104  (compared with, not bound to)
    return one in every or other in every or one.lower() == other.lower()
