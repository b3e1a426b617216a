"""Good settings: files, environment and flags, which of them wins, and where a value says it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxy.config.load import ConfigError, load, resolve
from proxy.config.model import Address, Backend, Settings, Tls, Upstream, flatten, leaves

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = "tls: {cert_file: server.pem, key_file: server.key}\nupstream: {grpc: '127.0.0.1:9001'}\n"


def write(place: Path, text: str) -> Path:
    config = place / "gate.yaml"
    config.write_text(text)
    return config


def without(settings: Settings, *sections: str) -> dict[str, Any]:
    """{dotted key: value} of all but some sections."""
    return {key: value for key, value in flatten(settings).items() if key.partition(".")[0] not in sections}


def test_the_minimal_file_works_as_it_stands(place: Path) -> None:
    text = """\
model_repository_path: /models
grpc_port: 8001
http_port: 8000
tls:
  cert_file: /etc/ssl/certs/triton.pem
  key_file: /etc/ssl/private/triton.key
  ca_file: /etc/ssl/certs/ca.pem
"""
    for there, here in {
        "/models": "models",
        "/etc/ssl/certs/triton.pem": "server.pem",
        "/etc/ssl/private/triton.key": "server.key",
        "/etc/ssl/certs/ca.pem": "ca.pem",
    }.items():
        text = text.replace(there, str(place / here))
    settings = load(write(place, text), env={})
    assert settings.model_repository_path == place / "models"
    assert (settings.grpc_port, settings.http_port, settings.host, settings.upstream) == (8001, 8000, "", None)
    assert settings.tls.client_auth == "none"
    assert settings.admin.address == Address("127.0.0.1", 9090)


def test_defaults_are_those_of_the_documentation(place: Path) -> None:
    settings = load(write(place, GOOD), env={})
    assert without(settings, "tls", "upstream") == {
        "model_repository_path": None,
        "backend.model_control_mode": "none",
        "backend.repository_poll": 15.0,
        "backend.load_models": (),
        "backend.metrics": None,
        "backend.memory_limit_bytes": None,
        "host": "",
        "grpc_port": 8001,
        "http_port": None,
        "admin.address": Address("127.0.0.1", 9090),
        "limits.connections": 10000,
        "limits.connections_per_address": 1_024,
        "limits.streams_per_connection": 256,
        "limits.header_list_bytes": 65536,
        "limits.stream_window_bytes": 1048576,
        "limits.upstream_connections": 8,
        "limits.streams_per_upstream_connection": 256,
        "limits.pending_requests": 4096,
        "limits.pending_bytes": 67_108_864,
        "limits.waiting_bytes_per_connection": 16_777_216,
        "timeouts.handshake": 10.0,
        "timeouts.connect": 5.0,
        "timeouts.unread": 5.0,
        "timeouts.idle": 0.0,
        "drain.delay": 5.0,
        "drain.timeout": 30.0,
        "log.level": "info",
        "log.format": "text",
        "log.access": False,
        "workers": 1,
    }


def test_flags_beat_environment_beats_file(place: Path) -> None:
    config = write(place, GOOD + "grpc_port: 1001\nlog: {level: error}\ndrain: {delay: 1}\n")
    env = {"TENSORGATE_GRPC_PORT": "1002", "TENSORGATE_LOG__LEVEL": "warning"}
    loaded = resolve(config, env, {"grpc_port": "1003", "host": None})
    assert (loaded.settings.grpc_port, loaded.settings.log.level, loaded.settings.drain.delay) == (1003, "warning", 1.0)
    assert {key: loaded.origins[key] for key in ("grpc_port", "log.level", "drain.delay", "host")} == {
        "grpc_port": "flag --grpc-port",
        "log.level": "environment TENSORGATE_LOG__LEVEL",
        "drain.delay": "file",
        "host": "default",
    }


EXAMPLES: dict[str, Any] = {
    "model_repository_path": None,
    "backend.model_control_mode": ("poll", "poll"),
    "backend.repository_poll": ("0.5", 0.5),
    "backend.load_models": ("digits, simple", ("digits", "simple")),
    "backend.metrics": ("[::1]:8002", Address("::1", 8002)),
    "backend.memory_limit_bytes": ("2000000", 2_000_000),
    "upstream.grpc": ("10.0.0.1:9001", Address("10.0.0.1", 9001)),
    "upstream.http": ("unix:/run/triton.sock", Address(path="/run/triton.sock")),
    "host": ("::1", "::1"),
    "grpc_port": ("0", 0),
    "http_port": ("8000", 8000),
    "tls.client_auth": ("optional", "optional"),
    "admin.address": ("[::1]:0", Address("::1", 0)),
    "log.level": ("debug", "debug"),
    "log.format": ("json", "json"),
    "log.access": ("True", True),
    "limits.upstream_connections": ("3", 3),
    "limits.stream_window_bytes": ("100000", 100000),
    "limits.waiting_bytes_per_connection": ("2000000", 2_000_000),
    "workers": ("1", 1),
}


@pytest.mark.parametrize("key", [leaf.key for leaf in leaves()])
def test_every_key_can_be_set_by_its_environment_variable(key: str, place: Path) -> None:
    text, value = EXAMPLES.get(key) or ("17000", 17000)  # in range for most
    if key.endswith(("_file", "_path")):
        file = {"tls.key_file": "server.key", "tls.ca_file": "ca.pem", "model_repository_path": "models"}
        value = place / file.get(key, "server.pem")
        text = str(value)
    elif key.startswith(("timeouts.", "drain.")):
        text, value = "1.5", 1.5
    variable = "TENSORGATE_" + key.upper().replace(".", "__")
    tls = "tls: {cert_file: server.pem, key_file: server.key, ca_file: ca.pem}\n"
    behind = "upstream: {grpc: 'a:1'}\n"
    if key == "backend.load_models":
        behind = "model_repository_path: models\nbackend: {model_control_mode: explicit}\n"
    elif key.startswith("backend."):
        behind = "model_repository_path: models\n"
    config = write(place, tls if key == "model_repository_path" else tls + behind)
    loaded = resolve(config, {variable: text})
    section, _, name = key.rpartition(".")
    holder: Any = getattr(loaded.settings, section) if section else loaded.settings
    assert getattr(holder, name) == value
    assert loaded.origins[key] == f"environment {variable}"


EXPLICIT = (
    "tls: {cert_file: server.pem, key_file: server.key}\n"
    "model_repository_path: models\n"
    "backend: {model_control_mode: explicit, load_models: %s}\n"
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[digits, simple]", ("digits", "simple")),
        ("['a,b', '7', '-x', 'two words']", ("a,b", "7", "-x", "two words")),
        ("['*']", ("*",)),
        ("digits", ("digits",)),
        ("'digits, simple'", ("digits", "simple")),
        ("[]", ()),
    ],
)
def test_a_list_is_read(text: str, names: tuple[str, ...], place: Path) -> None:
    assert load(write(place, EXPLICIT % text), env={}).backend.load_models == names


def test_a_list_in_the_environment_replaces_that_of_the_file(place: Path) -> None:
    config, variable = write(place, EXPLICIT % "[digits, simple]"), "TENSORGATE_BACKEND__LOAD_MODELS"
    loaded = resolve(config, {variable: "*"})
    assert loaded.settings.backend.load_models == ("*",)
    assert loaded.origins["backend.load_models"] == f"environment {variable}"
    assert load(config, {variable: ""}).backend.load_models == ("digits", "simple")
    with pytest.raises(ConfigError) as caught:
        load(config, {variable: "digits,.hidden"})
    assert caught.value.faults == [
        f"backend.load_models: '.hidden' (from {variable}) is not a model's name; give the name of its folder in "
        "model_repository_path, or '*' for all"
    ]


def test_what_is_for_the_embedded_backend_may_be_written_with_its_default_elsewhere(place: Path) -> None:
    default = "backend: {model_control_mode: none, repository_poll: 15, load_models: [], metrics: }\n"
    assert load(write(place, GOOD + default), env={}).backend == Backend()


def test_environment_alone_can_name_the_upstream(place: Path) -> None:
    config = write(place, "tls: {cert_file: server.pem, key_file: server.key}\n")
    settings = load(config, {"TENSORGATE_UPSTREAM__GRPC": "unix:/run/x.sock"})
    assert settings.upstream is not None
    assert settings.upstream.grpc.path == "/run/x.sock"


def test_faults_name_the_variable_or_flag_they_come_from(place: Path) -> None:
    env = {
        "TENSORGATE_LIMITS__CONNECTIONS": "many",
        "TENSORGATE_LIMIT__CONNECTIONS": "1",
        "TENSORGATE_TLS": "x",
        "TENSORGATE_POLICY__DEFAULT": "deny",
        "TENSORGATE_QUUX": "x",
    }
    with pytest.raises(ConfigError) as caught:
        load(write(place, GOOD), env, {"grpc_port": "70000", "admin.address": "nine"})
    assert caught.value.faults == [
        "TENSORGATE_LIMIT__CONNECTIONS: no setting of that name; did you mean TENSORGATE_LIMITS__CONNECTIONS?",
        "TENSORGATE_POLICY__DEFAULT: rules are not available in this version, and nothing is started, because a rule "
        "that is not enforced would be worse than none; remove the key",
        "TENSORGATE_QUUX: no setting of that name; remove it, or see tensorgate check for the keys",
        "TENSORGATE_TLS: is a section and has no value of its own; there are: TENSORGATE_TLS__CERT_FILE, "
        "TENSORGATE_TLS__KEY_FILE, TENSORGATE_TLS__CA_FILE, TENSORGATE_TLS__CLIENT_AUTH",
        "grpc_port: '70000' (from --grpc-port) is out of range; give a whole number from 0 to 65535",
        "admin.address: 'nine' (from --admin-address) has no port; write HOST:PORT, [IPV6]:PORT or unix:/path",
        "limits.connections: 'many' (from TENSORGATE_LIMITS__CONNECTIONS) is not a whole number; "
        "give a whole number from 1 to 1000000",
    ]


def test_variables_of_kubernetes_services_called_tensorgate_are_not_settings(place: Path) -> None:
    env = {
        "TENSORGATE_SERVICE_HOST": "10.96.0.10",
        "TENSORGATE_SERVICE_PORT": "8001",
        "TENSORGATE_SERVICE_PORT_GRPC": "8001",
        "TENSORGATE_PORT": "tcp://10.96.0.10:8001",
        "TENSORGATE_PORT_8001_TCP": "tcp://10.96.0.10:8001",
        "TENSORGATE_PORT_8001_TCP_PROTO": "tcp",
        "TENSORGATE_PORT_8001_TCP_PORT": "8001",
        "TENSORGATE_PORT_8001_TCP_ADDR": "10.96.0.10",
        # of a service called tensorgate-grpc, whose variable has the very name of a setting
        "TENSORGATE_GRPC_PORT": "tcp://10.96.0.11:8001",
    }
    assert load(write(place, GOOD), env).grpc_port == 8001


def test_empty_variables_count_as_not_set(place: Path) -> None:
    assert load(write(place, GOOD + "grpc_port: 9\n"), {"TENSORGATE_GRPC_PORT": ""}).grpc_port == 9


def test_sections_whose_keys_are_all_commented_out_are_default(place: Path) -> None:
    assert load(write(place, GOOD + "limits:\n  # connections: 5\nlog:\n"), env={}).limits.connections == 10000


def test_relative_paths_start_at_the_file_and_others_at_the_current_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pem").write_bytes((place / "ca.pem").read_bytes())
    settings = load(write(place, GOOD), {"TENSORGATE_TLS__CA_FILE": "mine.pem"})
    assert (settings.tls.cert_file, settings.tls.ca_file) == (place / "server.pem", tmp_path / "mine.pem")


def test_a_tilde_is_the_home_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    settings = load(write(place, GOOD.replace("server.pem", "~/server.pem")), env={})
    assert settings.tls.cert_file == place / "server.pem"


@pytest.mark.parametrize("file", ["chain.pem", "both.pem"])
def test_chains_and_files_that_hold_the_key_as_well_are_fine(file: str, place: Path) -> None:
    load(write(place, GOOD.replace("server.pem", file)), env={})


def test_ports_of_different_hosts_may_be_equal(place: Path) -> None:
    load(write(place, GOOD + "host: 10.0.0.1\ngrpc_port: 9090\n"), env={})


def test_unix_admin_address_and_port_0_never_clash(place: Path) -> None:
    load(write(place, GOOD + "admin: {address: 'unix:/run/admin.sock'}\n"), env={})
    load(write(place, GOOD + "grpc_port: 0\nadmin: {address: '127.0.0.1:0'}\n"), env={})


def test_settings_are_frozen_and_checked_without_a_file_too() -> None:
    tls = Tls(cert_file=Path("/a"), key_file=Path("/b"))
    upstream: dict[str, Any] = {"upstream": Upstream(grpc=Address("a", 1))}
    settings = Settings(**upstream, tls=tls)
    with pytest.raises(AttributeError):
        settings.grpc_port = 1  # type: ignore[misc]
    for wrong in (
        {},
        {**upstream, "model_repository_path": Path("/m")},
        {**upstream, "workers": 2},
        {**upstream, "backend": Backend(model_control_mode="poll")},
    ):
        with pytest.raises(ValueError):
            Settings(**wrong, tls=tls)
    with pytest.raises(ValueError):
        Settings(**upstream, tls=Tls(cert_file=Path("/a"), key_file=Path("/b"), client_auth="require"))
    with pytest.raises(TypeError):
        Settings(**upstream, tls=tls, x=1)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_files_are_right_but_for_their_paths(file: Path, place: Path) -> None:
    text = file.read_text()
    for there, here in {
        "/etc/ssl/certs/triton.pem": "server.pem",
        "/etc/ssl/private/triton.key": "server.key",
        "/etc/ssl/certs/ca.pem": "ca.pem",
        "/etc/tensorgate/tls.crt": "server.pem",
        "/etc/tensorgate/tls.key": "server.key",
        "/etc/tensorgate/ca.crt": "ca.pem",
        "/models": "models",
    }.items():
        text = text.replace(there, str(place / here))
    load(write(place, text), env={})


def test_the_full_example_names_every_key_with_its_default(place: Path) -> None:
    text = (CONFIGS / "full.yaml").read_text()
    for leaf in leaves():
        assert f"{leaf.key.rpartition('.')[2]}:" in text
    for there, here in {"tls.crt": "server.pem", "tls.key": "server.key", "ca.crt": "ca.pem"}.items():
        text = text.replace(f"/etc/tensorgate/{there}", here)
    full = load(write(place, text.replace("/models", "models")), env={})
    plain = load(write(place, GOOD), env={})
    assert without(full, "tls", "upstream", "model_repository_path") == without(
        plain, "tls", "upstream", "model_repository_path"
    )


@pytest.mark.parametrize(
    ("text", "address", "again"),
    [
        ("127.0.0.1:9090", Address("127.0.0.1", 9090), "127.0.0.1:9090"),
        ("[::1]:0", Address("::1", 0), "[::1]:0"),
        ("triton.default.svc:8001", Address("triton.default.svc", 8001), "triton.default.svc:8001"),
        ("unix:/run/x.sock", Address(path="/run/x.sock"), "unix:/run/x.sock"),
        ("unix:///run/x.sock", Address(path="/run/x.sock"), "unix:/run/x.sock"),
    ],
)
def test_addresses_are_read_and_written(text: str, address: Address, again: str) -> None:
    assert Address.parse(text) == address
    assert str(address) == again
    assert Address.parse(again) == address


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/x/y", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_only_addresses_of_this_machine_are_loopback(text: str, loopback: bool) -> None:
    assert Address.parse(text).is_loopback is loopback
