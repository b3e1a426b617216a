"""Foreign servers and tools that the tests act against.

`python -m tests.peers install` puts what pip can't put into the test environment itself (a real Triton Inference
Server: its wheel pins other versions of numpy and pytest) into a folder of its own, `.peers/` or the one that
TENSORGATE_PEERS_DIR names. Installing twice does nothing the second time. A peer that is missing makes its tests
skip and say what to install; with TENSORGATE_REQUIRE_PEERS=1 that is a failure.

`python -m tests.peers install mlserver` adds MLServer, in a virtual environment of its own there. Only the benchmark of
inference servers compares itself with it: no test needs it, and none may fail for want of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

TRITON_REQUIREMENT = "nvidia-pytriton==0.7.0"
# Triton 2.51's Python backend reads the array structure of numpy 1: with numpy 2 every output comes out empty.
NUMPY_REQUIREMENT = "numpy>=1.26,<2"
ROOT = Path(__file__).resolve().parent.parent
INSTALL_TRITON = "python -m tests.peers install"
# With the ONNX Runtime that its models call, and the parser that its REST server prefers where it is there.
# Its inference workers don't start with uvloop 0.22, which no longer makes an event loop where there is none.
MLSERVER_REQUIREMENTS = ("mlserver==1.7.1", "onnxruntime==1.32.0", "httptools==0.9.0", "uvloop==0.21.0")
INSTALL_MLSERVER = "python -m tests.peers install mlserver"
# Taken out of the environment: the gates that tests start take each TENSORGATE_ variable for a setting of theirs, and
# refuse to start with one that they don't know.
_PEERS_DIR = os.environ.pop("TENSORGATE_PEERS_DIR", "")
_PEERS_REQUIRED = os.environ.pop("TENSORGATE_REQUIRE_PEERS", "") == "1"


@dataclass(frozen=True)
class TritonFiles:
    """Where an installed Triton keeps what is needed to start it."""

    server: Path
    libraries: Path
    backends: Path


def folder() -> Path:
    """The folder that holds the installed peers; it may not exist yet."""
    return Path(_PEERS_DIR or ROOT / ".peers").absolute()


def triton_files() -> TritonFiles | None:
    """The installed Triton, or None where there is none (or one of another version)."""
    wheel = folder() / "pytriton"
    files = TritonFiles(
        server=wheel / "pytriton/tritonserver/bin/tritonserver",
        libraries=wheel / "nvidia_pytriton.libs",
        backends=folder() / "triton-backends",
    )
    return files if _marker().is_file() and _marker().read_text() == _wanted() else None


def mlserver_program() -> Path | None:
    """The command of the installed MLServer, or None where there is none (or one of another version)."""
    marker = _mlserver_marker()
    installed = marker.is_file() and marker.read_text() == _wanted_mlserver()
    return _mlserver_folder() / "bin/mlserver" if installed else None


def install_triton() -> None:
    """Install it if it is missing. Raises CalledProcessError with pip's own output on the terminal."""
    if triton_files() is not None:
        print(f"{TRITON_REQUIREMENT} is already in {folder()}")
        return
    folder().mkdir(parents=True, exist_ok=True)
    # All is made in a folder beside the final one and renamed: an interrupted install leaves no half of a Triton.
    with tempfile.TemporaryDirectory(dir=folder(), prefix="installing-") as scratch:
        wheel, backends = Path(scratch, "pytriton"), Path(scratch, "triton-backends")
        _pip_install(TRITON_REQUIREMENT, wheel)
        _prepare_backends(wheel / "pytriton/tritonserver", backends)
        for made in (wheel, backends):
            shutil.rmtree(folder() / made.name, ignore_errors=True)
            made.rename(folder() / made.name)
    _marker().write_text(_wanted())
    print(f"{TRITON_REQUIREMENT} installed in {folder()}")


def install_mlserver() -> None:
    """Install it if it is missing. Raises CalledProcessError with pip's own output on the terminal."""
    requirements = ", ".join(MLSERVER_REQUIREMENTS)
    if mlserver_program() is not None:
        print(f"{requirements} are already in {_mlserver_folder()}")
        return
    # The marker is written last: an interrupted install is begun again, from an empty environment.
    _mlserver_marker().unlink(missing_ok=True)
    venv.create(_mlserver_folder(), clear=True, with_pip=True)
    python = str(_mlserver_folder() / "bin/python")
    subprocess.run([python, "-m", "pip", "install", *MLSERVER_REQUIREMENTS], check=True)
    _mlserver_marker().write_text(_wanted_mlserver())
    print(f"{requirements} installed in {_mlserver_folder()}")


def missing(what: str, remedy: str) -> NoReturn:
    """Skip the running test, or fail it where peers are required."""
    reason = f"{what} is not installed; to install it: {remedy}"
    if _PEERS_REQUIRED:
        pytest.fail(f"TENSORGATE_REQUIRE_PEERS=1 and {reason}")
    pytest.skip(reason)


def require_triton() -> TritonFiles:
    files = triton_files()
    return files if files is not None else missing("Triton Inference Server", INSTALL_TRITON)


def require_tool(name: str, remedy: str) -> str:
    """The path of a command, from this environment's bin folder or from PATH."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.is_file() else shutil.which(name)
    return found if found is not None else missing(name, remedy)


def _pip_install(requirement: str, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), requirement]
    subprocess.run(pip, check=True)


def _prepare_backends(triton: Path, backends: Path) -> None:
    # The Python backend looks for its stub beside itself, and there is one stub for each minor version of Python.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise SystemExit(f"{TRITON_REQUIREMENT} has no Python backend stub for Python {version}")
    shutil.copytree(triton / "backends", backends)
    shutil.copy2(stub, backends / "python" / stub.name)
    (backends / "python" / stub.name).chmod(0o755)
    _give_numpy(backends / "python")


def _give_numpy(python_backend: Path) -> None:
    # The stub's interpreter ignores PYTHONPATH and searches the base Python's packages before the backend's folder, so
    # that it would find no numpy there, or a wrong one. Its helper module is what it imports first.
    _pip_install(NUMPY_REQUIREMENT, python_backend)
    utilities = python_backend / "triton_python_backend_utils.py"
    own_folder_first = "import os, sys\n\nsys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))\n\n"
    utilities.write_text(own_folder_first + utilities.read_text())


def _wanted() -> str:
    return f"{TRITON_REQUIREMENT} {NUMPY_REQUIREMENT} for Python {sys.version_info.major}.{sys.version_info.minor}\n"


def _marker() -> Path:
    return folder() / "triton.installed"


def _wanted_mlserver() -> str:
    return f"{' '.join(MLSERVER_REQUIREMENTS)} for Python {sys.version_info.major}.{sys.version_info.minor}\n"


def _mlserver_folder() -> Path:
    return folder() / "mlserver"


def _mlserver_marker() -> Path:
    return folder() / "mlserver.installed"


INSTALLERS: dict[str, Callable[[], None]] = {"triton": install_triton, "mlserver": install_mlserver}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description="Install the tests' foreign servers.")
    parser.add_argument("action", choices=["install", "where"])
    parser.add_argument("peer", choices=list(INSTALLERS), nargs="?", default="triton",
                        help="which to install (default: triton, which the tests need)")  # fmt: skip
    options = parser.parse_args()
    if options.action == "install":
        INSTALLERS[options.peer]()
    else:
        print(folder())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
