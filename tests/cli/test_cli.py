"""The command as users run it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import __version__

ROOT = Path(__file__).parents[2]


def tensorgate(*arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with this environment's settings of the gate taken out and `env` put in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TENSORGATE_")}
    return subprocess.run(
        [sys.executable, "-m", "proxy", *map(str, arguments)],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a PKI made by the command itself, a model folder, and a settings file."""
    place = tmp_path_factory.mktemp("cli")
    for arguments in (
        ("certs", "init", "pki"),
        ("certs", "issue", "pki", "server", "--server"),
        ("certs", "issue", "pki", "alice", "--client", "--san", "uri:spiffe://x/alice", "--days", "30"),
    ):
        done = tensorgate(*arguments, cwd=place)
        assert (done.returncode, done.stderr) == (0, "")
    (place / "models/simple").mkdir(parents=True)
    (place / "gate.yaml").write_text(
        "model_repository_path: models\n"
        "tls: {cert_file: pki/server.pem, key_file: pki/server.key, ca_file: pki/ca.pem}\n"
    )
    return place


def test_version(tmp_path: Path) -> None:
    done = tensorgate("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"tensorgate {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("serve",),
        ("check",),
        ("serve", "x.yaml", "--grpc", "1"),
        ("certs",),
        ("certs", "issue", "pki", "alice"),
        ("certs", "issue", "pki", "alice", "--client", "--server"),
        ("certs", "init", "pki", "--days", "many"),
        ("backend", "models"),
        ("backend", "models", "--listen", "unix:/x", "--log-level", "loud"),
        ("demo", "--port", "70000"),
        ("demo", "--port", "x"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_with_the_usage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = tensorgate(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: tensorgate")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command(tmp_path: Path) -> None:
    done = tensorgate("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("serve", "check", "certs", "backend", "demo"):
        assert f"\n    {command} " in done.stdout
        assert tensorgate(command, "--help", cwd=tmp_path).stdout.startswith(f"usage: tensorgate {command} ")


def test_check_says_what_the_file_means(place: Path) -> None:
    env = {"TENSORGATE_TLS__CLIENT_AUTH": "require", "TENSORGATE_GRPC_PORT": "9443"}
    done = tensorgate("check", "gate.yaml", cwd=place, **env)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    words = [line.split() for line in lines]
    assert lines[0] == "gate.yaml: these settings are right."
    assert ["model_repository_path", f"{place}/models", "file", "models", "for", "the", "embedded", "backend"] in words
    assert ["timeouts.handshake", "10", "default", "seconds", "for", "a", "TLS", "handshake"] in words
    assert ["subject", "CN=server"] in words
    assert any(line[:3] == ["grpc_port", "9443", "environment"] for line in words)
    assert any(line.startswith("    names   dns:localhost") for line in lines)
    assert any(line.startswith("    valid ") and line.endswith("days left)") for line in lines)
    assert lines[-1] == (
        "ready to serve: gRPC over TLS on every address, port 9443 (clients need a certificate), "
        f"in front of the embedded backend with {place}/models"
    )


def test_check_prints_warnings_before_the_verdict(place: Path) -> None:
    (place / "warned.yaml").write_text((place / "gate.yaml").read_text() + "http_port: 8000\n")
    done = tensorgate("check", "warned.yaml", cwd=place)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-4:-2] == [
        "1 warning:",
        "  http_port: 8000 is not served in this version; gRPC on grpc_port is",
    ]


@pytest.mark.parametrize(
    ("command", "consequence"), [("check", "it would not start"), ("serve", "nothing was started")]
)
def test_wrong_settings_are_exit_code_78_with_every_fault(command: str, consequence: str, place: Path) -> None:
    (place / "bad.yaml").write_text(
        "grpc_prt: 1\nlog: {level: loud}\ntls: {cert_file: gone.pem, key_file: pki/server.key}\n"
    )
    done = tensorgate(command, "bad.yaml", cwd=place)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines() == [
        f"tensorgate: 4 faults in the settings (bad.yaml); {consequence}",
        "  grpc_prt: unknown key; did you mean grpc_port?",
        "  log.level: 'loud' is not known here; give one of: debug, info, warning, error",
        "  model_repository_path: neither it nor upstream.grpc is set; give a folder of models to serve, "
        "or the address of a running server in upstream.grpc",
        f"  tls.cert_file: {place}/gone.pem does not exist; give the path of a file that does",
    ]


def test_serve_reports_faults_of_flags_by_their_names(place: Path) -> None:
    flags = ("--grpc-port", "many", "--host", "a b", "--admin-address", "x", "--log-level", "loud")
    done = tensorgate("serve", "gate.yaml", *flags, cwd=place)
    assert done.returncode == 78
    faults = done.stderr.splitlines()[1:]
    assert [fault.split()[0] for fault in faults] == ["host:", "grpc_port:", "admin.address:", "log.level:"]
    assert all(f"(from {flag})" in "\n".join(faults) for flag in flags[::2])


def test_serve_with_ports_in_use_names_all_of_them_and_starts_nothing(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        grpc, admin = one.getsockname()[1], two.getsockname()[1]
        flags = ("--host", "127.0.0.1", "--grpc-port", grpc, "--admin-address", f"127.0.0.1:{admin}")
        done = tensorgate("serve", "gate.yaml", *flags, cwd=place)
    assert (done.returncode, done.stdout) == (78, "")
    assert [line.split(";")[0] for line in done.stderr.splitlines()[1:]] == [
        f"  grpc_port: port {grpc} is in use",
        f"  admin.address: port {admin} is in use",
    ]


def test_certs_show_and_the_refusal_to_replace(place: Path) -> None:
    shown = tensorgate("certs", "show", "pki/alice.pem", cwd=place)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "  names    uri:spiffe://x/alice" in shown.stdout.splitlines()
    assert "(29 days left)" in shown.stdout
    key = (place / "pki/alice.key").read_bytes()
    again = tensorgate("certs", "issue", "pki", "alice", "--client", cwd=place)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == (
        "tensorgate: pki/alice.key: exists already and is left as it is; "
        "replace it with --force, or choose another name\n"
    )
    assert (place / "pki/alice.key").read_bytes() == key


def test_certs_force_replaces(place: Path) -> None:
    first = tensorgate("certs", "issue", "pki", "carol", "--client", cwd=place)
    before = (place / "pki/carol.key").read_bytes()
    second = tensorgate("certs", "issue", "pki", "carol", "--client", "--force", cwd=place)
    assert (first.returncode, second.returncode) == (0, 0)
    assert (place / "pki/carol.key").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "gone.pem"), "gone.pem: does not exist; give the path of a file that does"),
        (("show", "pki/ca.key"), "pki/ca.key: holds no certificate, only: private key; were two files exchanged?"),
        (("issue", "elsewhere", "x", "--client"), "elsewhere: holds no CA; make one: tensorgate certs init elsewhere"),
        (("issue", "pki", "x", "--server", "--san", "x"), "--san x: is none of dns:NAME, ip:ADDRESS, uri:URI "),
        (("init", "gate.yaml/pki"), "gate.yaml/pki: cannot be written (not a directory)"),
    ],
)
def test_certs_faults_are_one_line_and_exit_code_1(arguments: tuple[str, ...], message: str, place: Path) -> None:
    done = tensorgate("certs", *arguments, cwd=place)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tensorgate: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("address", ["0.0.0.0:9001", "[::]:9001", "192.0.2.1:9001", "gate.example.com:9001"])
def test_the_backend_does_not_listen_where_others_reach_it(address: str, place: Path) -> None:
    done = tensorgate("backend", "models", "--listen", address, cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tensorgate: --listen {address}: the backend speaks plaintext to anybody")
    assert done.stderr.endswith("or add --insecure-any-address\n")


def test_the_backend_says_what_is_wrong_with_its_arguments(place: Path) -> None:
    done = tensorgate("backend", "models", "--listen", "9001", cwd=place)
    assert (done.returncode, done.stderr) == (
        2,
        "tensorgate: --listen '9001' has no port; write HOST:PORT, [IPV6]:PORT or unix:/path\n",
    )
    done = tensorgate("backend", "gone", "--listen", "127.0.0.1:0", cwd=place)
    assert (done.returncode, done.stderr) == (
        2,
        "tensorgate: gone: is not a folder; give a folder with one folder per model\n",
    )


def test_check_and_certs_need_no_extra_and_load_none(place: Path) -> None:
    """Neither the packages of the extras nor those of the gate are imported to check a file or show a certificate."""
    code = (
        "import json, sys; from proxy.cli import main; main(sys.argv[1:]); "
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'numpy', 'onnxruntime', 'grpc', 'grpclib', 'h2', 'tritonclient', 'uvloop', 'aiohttp'})))"
    )
    for arguments in (["check", "gate.yaml"], ["certs", "show", "pki/ca.pem"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_gate_loads_nothing_of_the_extras(place: Path) -> None:
    """Every module but those of the backend, loaded into one process: the demo's, too, as far as its start."""
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "proxy").rglob("*.py")]
    names = [".".join(file.parts).removesuffix(".__init__") for file in files if "backend" not in file.parts]
    assert {"proxy.app", "proxy.cli", "proxy.relay.relay", "proxy.http2.connection"} <= set(names)
    foreign = ("numpy", "onnxruntime", "google.protobuf", "grpc", "grpclib", "h2", "tritonclient")
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {foreign} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which the packages of the extras cannot be found, as in an install without them."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Lacking:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in 'numpy onnxruntime grpc grpclib h2 tritonclient google'.split():\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Lacking())\n"
    )
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("serve", "gate.yaml", "--grpc-port", "0", "--admin-address", "127.0.0.1:0"), "backend"),
        (("backend", "models", "--listen", "127.0.0.1:0"), "backend"),
        (("demo", "--once"), "demo"),
    ],
)
def test_a_missing_extra_is_named_with_the_pip_command(
    arguments: tuple[str, ...], extra: str, bare: str, place: Path
) -> None:
    done = tensorgate(*arguments, cwd=place, PYTHONPATH=bare)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"pip install 'tensorgate[{extra}]'\n")
    assert "numpy" in done.stderr
    assert done.stderr.count("\n") == 1
    assert tensorgate("check", "gate.yaml", cwd=place, PYTHONPATH=bare).returncode == 0


def test_a_reader_that_goes_away_is_no_crash(place: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -m proxy check gate.yaml | true'],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
