"""Warnings, and the ports and sockets that cannot be listened on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography import x509

from proxy.config.check import expiries, warnings
from proxy.config.load import load, resolve
from proxy.config.model import Settings
from proxy.config.ports import port_faults
from proxy.config.report import lines
from tests.config.places import unprivileged

Make = Callable[[str], Settings]


@pytest.fixture
def settings_of(place: Path) -> Make:
    def make(text: str) -> Settings:
        config = place / "gate.yaml"
        defaults = {"tls:": "tls: {cert_file: server.pem, key_file: server.key}\n", "up": "upstream: {grpc: 'a:1'}\n"}
        for key, line in defaults.items():
            if key not in text and not (key == "up" and "model_repository_path" in text):
                text += line
        config.write_text(text)
        return load(config, env={})

    return make


def pair(name: str) -> str:
    return f"tls: {{cert_file: {name}.pem, key_file: {name}.key}}\n"


def test_good_settings_have_no_warning(settings_of: Make) -> None:
    assert warnings(settings_of("")) == []


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("expired", "tls.cert_file: the server certificate CN=expired expired on ", "(expired 3 days ago); replace it"),
        ("soon", "tls.cert_file: the server certificate CN=soon expires on ", "(5 days left); replace it"),
        ("future", "tls.cert_file: the server certificate CN=future is not valid before ", "; is the clock right?"),
        ("alice", "tls.cert_file: the certificate names no host ", "issue one with --san dns:NAME"),
    ],
)
def test_certificates_that_clients_refuse_are_warned_of(name: str, start: str, end: str, settings_of: Make) -> None:
    found = warnings(settings_of(pair(name)))
    assert found[0].startswith(start)
    assert found[0].endswith(end)


def test_a_client_certificate_as_the_server_s_is_warned_of(settings_of: Make) -> None:
    assert warnings(settings_of(pair("alice")))[1:] == [
        "tls.cert_file: the certificate is for clientAuth only, so clients refuse it; issue one with --server"
    ]


def test_an_expired_ca_is_warned_of(settings_of: Make) -> None:
    found = warnings(settings_of("tls: {cert_file: server.pem, key_file: server.key, ca_file: expired.pem}\n"))
    assert found[0].startswith("tls.ca_file: the CA certificate CN=expired expired on ")


def test_keys_that_everybody_may_read_are_warned_of(settings_of: Make, place: Path, tmp_path: Path) -> None:
    key = tmp_path / "open.key"
    key.write_bytes((place / "server.key").read_bytes())
    key.chmod(0o644)
    found = warnings(settings_of(f"tls: {{cert_file: server.pem, key_file: {key}}}\n"))
    assert found == [f"tls.key_file: {key} is open to every user of this machine (mode 644); chmod 600 it"]


def test_when_certificates_expire(settings_of: Make, place: Path, tmp_path: Path) -> None:
    """Of the server's file its own certificate counts, of a file of CAs the one that expires first."""
    ends = {}
    for name in ("server", "soon", "ca"):
        (certificate,) = x509.load_pem_x509_certificates((place / f"{name}.pem").read_bytes())
        ends[name] = certificate.not_valid_after_utc.timestamp()
    assert expiries(settings_of("tls: {cert_file: chain.pem, key_file: server.key}\n")) == {"server": ends["server"]}
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes((place / "ca.pem").read_bytes() + (place / "soon.pem").read_bytes())
    settings = settings_of(f"tls: {{cert_file: server.pem, key_file: server.key, ca_file: {bundle}}}\n")
    assert expiries(settings) == {"server": ends["server"], "ca": ends["soon"]}


def test_what_is_not_served_yet_and_an_empty_repository_are_warned_of(settings_of: Make, place: Path) -> None:
    assert warnings(settings_of("model_repository_path: no-models\nhttp_port: 8000\n")) == [
        f"model_repository_path: {place}/no-models holds no model; each model is a folder in it",
        "http_port: 8000 is not served in this version; gRPC on grpc_port is",
    ]
    assert warnings(settings_of("upstream: {grpc: 'a:1', http: 'a:2'}\n")) == [
        "upstream.http: a:2 is not used in this version; upstream.grpc is"
    ]


EXPLICIT = "model_repository_path: models\nbackend: {{model_control_mode: explicit, load_models: {}}}\n"
CLIENTS = "tls: {cert_file: server.pem, key_file: server.key, ca_file: ca.pem, client_auth: %s}\n"


def test_models_that_are_not_there_are_warned_of(settings_of: Make, place: Path) -> None:
    settings = settings_of(EXPLICIT.format("[simple, gone, '*']") + CLIENTS % "require")
    assert warnings(settings) == [
        f"backend.load_models: gone is not a folder in {place}/models, so it is not loaded; add it, or remove the name"
    ]


def test_a_name_too_long_for_a_folder_is_not_there(settings_of: Make) -> None:
    name = "\u6c49" * 255
    (found,) = warnings(settings_of(EXPLICIT.format(name) + CLIENTS % "require"))
    assert found.startswith(f"backend.load_models: {name} is not a folder in ")


def test_the_report_shows_a_list_as_it_may_be_written(place: Path) -> None:
    config = place / "gate.yaml"
    for text, shown in (("simple, '*'", "[simple, *]"), ("", "[]")):
        config.write_text(EXPLICIT.format(f"[{text}]") + CLIENTS % "require")
        rows = [line.split("  ") for line in lines(config, resolve(config, env={}), [])]
        (row,) = [row for row in rows if "backend.load_models" in row]
        assert [cell.strip() for cell in row if cell] == [
            "backend.load_models", shown, "file", "loaded at the start in mode explicit; '*': all"
        ]


@pytest.mark.parametrize("mode", ["none", "optional"])
def test_anybody_loading_models_is_warned_of(mode: str, settings_of: Make) -> None:
    assert warnings(settings_of(EXPLICIT.format("simple") + CLIENTS % mode)) == [
        "backend.model_control_mode: explicit lets clients load and unload models, also from files that they send, "
        f"with code that is run; tls.client_auth is {mode}, so anybody can: set it to require"
    ]


@pytest.fixture
def taken() -> Iterator[Callable[[int, str], int]]:
    """`taken(family, host)` listens on a free port until the end of the test and returns it."""
    with ExitStack() as stack:

        def listen(family: int, host: str) -> int:
            listener = stack.enter_context(socket.socket(family))
            listener.bind((host, 0))
            listener.listen()
            return int(listener.getsockname()[1])

        yield listen


Taken = Callable[[int, str], int]


def test_free_ports_are_no_fault(settings_of: Make) -> None:
    assert port_faults(settings_of("grpc_port: 0\nadmin: {address: '127.0.0.1:0'}\n")) == []


def test_every_port_in_use_is_named_with_its_key_and_the_remedy(settings_of: Make, taken: Taken) -> None:
    grpc, admin = taken(socket.AF_INET, "127.0.0.1"), taken(socket.AF_INET, "127.0.0.1")
    settings = settings_of(f"host: 127.0.0.1\ngrpc_port: {grpc}\nadmin: {{address: '127.0.0.1:{admin}'}}\n")
    assert port_faults(settings) == [
        f"grpc_port: port {grpc} is in use; stop what listens there, or choose another with grpc_port or --grpc-port N",
        f"admin.address: port {admin} is in use; stop what listens there, "
        "or choose another with admin.address or --admin-address HOST:PORT",
    ]


def test_the_port_of_the_models_metrics_is_looked_at_too(settings_of: Make, taken: Taken) -> None:
    port = taken(socket.AF_INET, "127.0.0.1")
    rest = "grpc_port: 0\nadmin: {address: '127.0.0.1:0'}\nmodel_repository_path: models\n"
    assert port_faults(settings_of(f"{rest}backend: {{metrics: '127.0.0.1:{port}'}}\n")) == [
        f"backend.metrics: port {port} is in use; stop what listens there, or choose another with backend.metrics"
    ]
    assert port_faults(settings_of(f"{rest}backend: {{metrics: '127.0.0.1:0'}}\n")) == []


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_every_address_means_ipv4_and_ipv6(family: int, host: str, settings_of: Make, taken: Taken) -> None:
    port = taken(family, host)
    settings = settings_of(f"grpc_port: {port}\nadmin: {{address: '127.0.0.1:0'}}\n")
    assert port_faults(settings) == [
        f"grpc_port: port {port} is in use; stop what listens there, or choose another with grpc_port or --grpc-port N"
    ]


def test_a_port_with_connections_left_in_time_wait_is_free(settings_of: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            served, _ = listener.accept()
            served.close()  # the side that closes first keeps the address in TIME_WAIT
            assert client.recv(1) == b""
    settings = settings_of(f"host: 127.0.0.1\ngrpc_port: {port}\nadmin: {{address: '127.0.0.1:0'}}\n")
    assert port_faults(settings) == []


def test_a_privileged_port_needs_privileges(settings_of: Make) -> None:
    settings = settings_of("host: 127.0.0.1\ngrpc_port: 1\nadmin: {address: '127.0.0.1:0'}\n")
    open_to_all = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1
    with unprivileged():
        faults = port_faults(settings)
    remedy = "choose another with grpc_port or --grpc-port N, or give the process CAP_NET_BIND_SERVICE"
    assert faults == ([] if open_to_all else [f"grpc_port: port 1 needs privileges (below 1024); {remedy}"])


def test_an_address_of_another_machine_cannot_be_listened_on(settings_of: Make) -> None:
    settings = settings_of("host: 192.0.2.1\ngrpc_port: 0\nadmin: {address: '127.0.0.1:0'}\n")
    assert port_faults(settings) == ["host: 192.0.2.1 is not an address of this machine; give one that is"]


def test_a_host_that_no_one_knows_is_said_so(settings_of: Make) -> None:
    settings = settings_of("host: nobody.invalid\ngrpc_port: 0\nadmin: {address: '127.0.0.1:0'}\n")
    (fault,) = port_faults(settings)
    assert fault.startswith("host: nobody.invalid cannot be resolved (")
    assert fault.endswith("); give an address of this machine")


def test_admin_sockets_are_looked_at_too(settings_of: Make, tmp_path: Path) -> None:
    def faults(path: Path) -> list[str]:
        return port_faults(settings_of(f"grpc_port: 0\nadmin: {{address: 'unix:{path}'}}\n"))

    assert faults(tmp_path / "gone/admin.sock") == [
        f"admin.address: the folder {tmp_path}/gone does not exist; make it, or choose another path"
    ]
    (tmp_path / "file").touch()
    assert faults(tmp_path / "file") == [
        f"admin.address: {tmp_path}/file exists and is not a socket; remove it, or choose another path"
    ]
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(tmp_path)  # the whole path may be too long for a socket
        listener.bind("x")
        os.chdir(before)
        assert faults(tmp_path / "x") == []  # left behind by a process that has ended
        listener.listen()
        assert faults(tmp_path / "x") == [
            f"admin.address: another process listens on {tmp_path}/x; stop it, or choose another path"
        ]
