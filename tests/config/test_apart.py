"""The settings checked in a process of its own: whatever becomes of that, the command ends as it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from proxy.config.load import load
from tests.peers import ROOT

BAD = "nonsense: 1\n"
FAULTS = (
    "tensorgate: 4 faults in the settings ({}); nothing was started\n"
    "  nonsense: unknown key; "
)


def serve(config: Path, before: str) -> subprocess.CompletedProcess[str]:
    """`tensorgate serve` to its end, in a process group of its own, after some lines of code."""
    code = f"import os, signal, sys, time\nfrom proxy.config import apart\n{before}\n"
    code += "from proxy.cli import main\nprint('begun')\nsys.exit(main(['serve', sys.argv[1]]))\n"
    return subprocess.run(
        [sys.executable, "-c", code, str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


def bad(folder: Path) -> Path:
    config = folder / "bad.yaml"
    config.write_text(BAD)
    return config


def test_faults_come_back_and_are_printed_once(tmp_path: Path) -> None:
    done = serve(bad(tmp_path), "")
    assert (done.returncode, done.stdout) == (78, "begun\n")
    assert done.stderr.startswith(FAULTS.format(tmp_path / "bad.yaml"))
    assert len(done.stderr.splitlines()) == 5


def test_settings_come_back_as_they_were_read(place: Path) -> None:
    config = place / "apart.yaml"
    config.write_text(
        "model_repository_path: models\ntls: {cert_file: server.pem, key_file: server.key}\n"
        "backend: {model_control_mode: explicit, load_models: [simple, '*'], metrics: '[::1]:8002'}\n"
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom proxy.config.apart import load_apart\n"
        "found = load_apart(Path(sys.argv[1]), {})\nprint('pydantic' in sys.modules, found.settings.backend)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"False {load(config, env={}).backend}\n"
    assert "load_models=('simple', '*')" in done.stdout


def test_without_a_process_to_be_had_it_is_checked_here(tmp_path: Path) -> None:
    refused = "def refuse(): raise BlockingIOError(11, 'no more processes')\nos.fork = refuse"
    assert serve(bad(tmp_path), refused).stderr == serve(bad(tmp_path), "").stderr


def test_a_check_that_is_killed_is_a_failure(tmp_path: Path) -> None:
    done = serve(bad(tmp_path), "apart._check = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert done.stderr == "tensorgate: the check of the settings ended with -9; nothing was started\n"


def test_a_check_that_breaks_is_a_failure_and_shows_where(tmp_path: Path) -> None:
    done = serve(bad(tmp_path), "def broken(*_): raise RuntimeError('broken')\napart._check = broken")
    assert (done.returncode, done.stdout) == (1, "begun\n")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-2:] == [
        "RuntimeError: broken",
        "tensorgate: the check of the settings ended with 1; nothing was started",
    ]
    assert done.stderr.count("Traceback") == 1


def test_ctrl_c_during_the_check_ends_quietly(tmp_path: Path) -> None:
    done = serve(bad(tmp_path), "apart._check = lambda *_: (os.killpg(0, signal.SIGINT), time.sleep(60))")
    assert (done.returncode, done.stdout, done.stderr) == (130, "begun\n", "")
