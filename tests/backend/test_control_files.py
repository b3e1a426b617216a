"""Promise: what a client sent lies in a folder that only its process uses, and that outlives no process for long."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from proxy.backend import control
from proxy.backend.repository import Repository
from tests.peers import ROOT


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    folder = tmp_path / ".temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


async def test_files_of_a_process_that_was_killed_are_removed(tmp_path: Path, temporary: Path) -> None:
    """And nothing else: not those of processes that live, nor what has another name."""
    live, _ = control.write_files({"1/x": b"x"})
    code = "import os; from proxy.backend.control import write_files as w; w({'1/x': b'x'}); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code], env={"TMPDIR": str(temporary)}, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (left,) = set(temporary.iterdir()) - {live.path}
    assert (left / "override/1/x").read_bytes() == b"x"
    other, link = temporary / "tensorgate-other", temporary / "tensorgate-files-link"
    other.mkdir()
    link.symlink_to(other)
    await Repository(tmp_path).load()
    assert set(temporary.iterdir()) == {live.path, other, link}
    assert (live.path / "override/1/x").exists()
    live.remove()
    assert set(temporary.iterdir()) == {other, link}


def test_a_folder_that_is_taken_for_a_leftover_is_made_anew(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkdtemp

    def slow(prefix: str) -> str:
        """Another process starts before the folder is locked."""
        monkeypatch.setattr(tempfile, "mkdtemp", made)
        folder = made(prefix=prefix)
        control.remove_leftovers()
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", slow)
    folder, directory = control.write_files({"1/x": b"x"})
    control.remove_leftovers()
    assert (directory / "1/x").read_bytes() == b"x"
    folder.remove()
    folder.remove()
    assert not list(temporary.iterdir())
