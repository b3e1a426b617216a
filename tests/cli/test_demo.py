"""`tensorgate demo` from start to Ctrl-C, and what it prints, pasted."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from proxy import demo
from proxy.config import ports
from proxy.tls import pki

ROOT = Path(__file__).parents[2]
LIVENESS = 120.0


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TENSORGATE_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), **more}


class Demo:
    """A demo that stays up, its output so far, and the processes below it."""

    def __init__(self, folder: Path, cwd: Path, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "proxy", "demo", "--port", "0", "--dir", str(folder)],
            cwd=cwd,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._await("The gate stays up until Ctrl-C.")
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def _await(self, text: str) -> None:
        end = time.monotonic() + LIVENESS
        while text not in self.output:
            if self.process.poll() is not None or time.monotonic() > end:
                self.end(signal.SIGKILL)
                raise AssertionError(f"{text!r} is not in the demo's output:\n{self.output}")
            time.sleep(0.05)

    def end(self, number: signal.Signals) -> int:
        """Send it a signal and wait for its end and its children's; its exit code."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        code = self.process.wait(LIVENESS)
        self._reader.join(LIVENESS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def between(self, heading: str, following: str) -> str:
        """What is printed under a heading, up to the text that follows it."""
        match = re.search(rf"^{heading}.*\n-+\n(.*?)^{following}", self.output, re.MULTILINE | re.DOTALL)
        assert match, self.output
        return match[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name a shell or YAML would take apart if it were not quoted."""
    return tmp_path_factory.mktemp("demo") / "it's: a #demo"


@pytest.fixture(scope="module")
def shadowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A current folder with a `proxy.py` and a `yaml.py` of the user's own, which must not be run instead of ours."""
    here = tmp_path_factory.mktemp("shadowed")
    for name in ("proxy.py", "yaml.py", "grpc.py"):
        (here / name).write_text("raise SystemExit('not this one')\n")
    return here


@pytest.fixture(scope="module")
def running(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    # Settings of another gate and a proxy of the surroundings must not disturb it.
    env = {"TENSORGATE_GRPC_PORT": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    demo = Demo(folder, tmp_path_factory.mktemp("elsewhere"), **env)
    yield demo
    if demo.process.poll() is None:
        demo.end(signal.SIGINT)


def test_the_show_is_told(running: Demo) -> None:
    text = running.output
    assert "\nFAILED" not in text
    assert "Traceback" not in text
    assert re.search(r"^sum        +10   11   12 ", text, re.MULTILINE)
    assert re.search(r"^difference  -10   -9   -8 ", text, re.MULTILINE)
    assert re.search(r"^accuracy  9\d\.\d%: \d+ of all \d+ held-out samples are right$", text, re.MULTILINE)
    answers = re.search(r"^answer +(.*)\n.*\ntruth +(.*)$", text, re.MULTILINE)
    assert answers
    assert len(answers[1].split()) == len(answers[2].split()) == 10
    for result in ("no_certificate", "unknown_ca", "closed_by_client"):
        assert f'counted   tensorgate_handshakes_total{{result="{result}"}}' in text
    assert text.count("client    [StatusCode.UNAVAILABLE]") == 3
    assert "gate      the client sent no certificate, and tls.client_auth is require\n" in text
    assert "CERTIFICATE_VERIFY_FAILED" in text
    assert max(map(len, text.splitlines()[:40])) <= 120


def test_the_snippet_works_as_pasted(running: Demo, tmp_path: Path) -> None:
    snippet = running.between("Call it yourself, from Python", "or with grpcurl")
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIVENESS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[[", *map(str, range(1, 16)), "16]]"]


def test_the_grpcurl_line_works_as_pasted(running: Demo, tmp_path: Path) -> None:
    env = environment()
    assert shutil.which("grpcurl", path=env["PATH"]), "grpcurl is in the extra `test`"
    line = running.between("or with grpcurl", "The gate stays up")
    done = subprocess.run(
        ["/bin/sh", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIVENESS
    )
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    assert (config["name"], config["maxBatchSize"]) == ("simple", 8)


def test_its_files_are_the_owner_s_alone(running: Demo, folder: Path) -> None:
    assert stat.S_IMODE((folder / "pki").stat().st_mode) == 0o700
    keys = list(folder.rglob("*.key"))
    assert len(keys) == 6
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_the_settings_it_leaves_are_good_for_serve(running: Demo, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "check", str(folder / "gate.yaml")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIVENESS,
    )
    assert done.returncode == 0, done.stderr
    assert "(clients need a certificate), in front of the embedded backend" in done.stdout


def test_ctrl_c_ends_all_of_it_cleanly(running: Demo) -> None:
    assert len(running.children) == 2  # the gate and its backend
    assert running.end(signal.SIGINT) == 0
    assert running.output.endswith("Stopping the gate.\n")
    assert [child for child in running.children if child.is_running()] == []


def test_a_second_start_keeps_the_certificates_and_once_ends_with_0(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "pki").rglob("*.*")}
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "demo", "--once", "--port", "0", "--dir", str(folder)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIVENESS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "PKI       certificates of an earlier start, still valid\n" in done.stdout
    assert done.stdout.endswith("All of it held.\n")
    assert {path: path.read_bytes() for path in (folder / "pki").rglob("*.*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_gate_outlives_a_demo_that_is_ended_from_outside(number: signal.Signals, folder: Path) -> None:
    demo = Demo(folder, folder)
    demo.end(number)
    gone, alive = psutil.wait_procs(demo.children, timeout=LIVENESS)
    assert alive == []
    assert len(gone) == 2


def test_the_user_s_own_modules_in_the_current_folder_are_not_run(folder: Path, shadowed: Path) -> None:
    code = "import sys; from proxy.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "demo", "--once", "--port", "0", "--dir", str(folder)],
        cwd=shadowed,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIVENESS,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_a_busy_port_is_named_with_the_flag(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "proxy", "demo", "--once", "--port", str(port), "--dir", str(folder)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=LIVENESS,
        )
    assert (done.returncode, done.stderr) == (
        1,
        f"tensorgate demo: port {port} is in use; stop what listens there, or choose another with --port N (0: any)\n",
    )


def test_a_busy_admin_port_is_replaced_by_a_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    demo.prepare_certificates(tmp_path / "pki")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(demo, "_ADMIN_PORT", taken.getsockname()[1])
        config = demo._write_config(tmp_path, tmp_path / "pki", 0)
    assert "address: 127.0.0.1:0\n" in config.read_text()


def test_what_does_not_hold_is_said_and_is_exit_code_1(folder: Path, tmp_path: Path) -> None:
    """A gate that lets everybody in: the refusals of the show do not hold."""
    code = (
        "import sys; from pathlib import Path; from proxy import demo; settings = demo._settings\n"
        "def open_to_all(*arguments):\n"
        "    found = settings(*arguments); found['tls']['client_auth'] = 'none'; return found\n"
        "demo._settings = open_to_all\n"
        "sys.exit(demo.run(Path(sys.argv[1]), 0, once=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIVENESS,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "All of it held" not in done.stdout
    assert done.stdout.endswith(
        "Not all of it held\n------------------\n"
        "- A client without a certificate: the client was let in\n"
        "- A client with a certificate of another CA: the client was let in\n"
        f"The gate's log: {folder}/gate.log\n"
    )


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "demo", "--once", "--port", "0", "--dir", str(tmp_path / "file/demo")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIVENESS,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"tensorgate demo: {tmp_path}/file/demo/pki: cannot be written (not a directory); "
        "another folder can be given: --dir DIR\n"
    )


def test_a_file_that_cannot_be_written_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "gate.yaml").mkdir()
    assert demo.run(tmp_path, 0, once=True) == 1
    assert capsys.readouterr().err == (
        f"tensorgate demo: {tmp_path}/gate.yaml: cannot be used (is a directory); "
        "another folder can be given: --dir DIR\n"
    )


def test_a_port_that_needs_privileges_is_said_with_the_flag_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    def forbidden(settings: object) -> list[str]:
        return [ports._bind_fault("grpc_port", "host", "::", 80, "--grpc-port N", PermissionError(errno.EACCES, ""))]

    demo.prepare_certificates(tmp_path / "pki")
    monkeypatch.setattr(demo, "port_faults", forbidden)  # whoever runs the tests may have the privileges
    with pytest.raises(demo.DemoError, match=r"port 80 needs privileges .*; choose another with --port N, or give"):
        demo._write_config(tmp_path, tmp_path / "pki", 80)


def test_a_reader_that_goes_away_is_no_crash(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -m proxy demo --once --port 0 --dir "{folder}" | true'],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIVENESS,
    )
    assert done.stderr == ""


def test_the_default_folder_is_below_the_user_s_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert demo.default_folder() == Path("/home/me/.local/share/tensorgate/demo")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert demo.default_folder() == Path("/data/tensorgate/demo")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # to be ignored, says the XDG specification
    assert demo.default_folder() == Path("/home/me/.local/share/tensorgate/demo")


def test_certificates_are_made_anew_when_they_or_their_ca_no_longer_serve(tmp_path: Path) -> None:
    assert demo.prepare_certificates(tmp_path) == "new certificates: ca, server, alice, bob"
    assert demo.prepare_certificates(tmp_path) == "certificates of an earlier start, still valid"
    pki.issue(tmp_path, "alice", "client", days=1, force=True)
    assert demo.prepare_certificates(tmp_path) == "new certificates: alice"
    pki.issue(tmp_path, "server", "server", ["dns:another.host"], force=True)
    assert demo.prepare_certificates(tmp_path) == "new certificates: server"
    (tmp_path / "bob.key").write_bytes((tmp_path / "alice.key").read_bytes())
    assert demo.prepare_certificates(tmp_path) == "new certificates: bob"
    pki.init(tmp_path, force=True)
    assert demo.prepare_certificates(tmp_path) == "new certificates: server, alice, bob"
    (tmp_path / "ca.key").unlink()
    assert demo.prepare_certificates(tmp_path) == "new certificates: ca, server, alice, bob"
