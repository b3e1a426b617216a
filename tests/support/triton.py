"""A real Triton Inference Server, in plaintext on loopback, with the models of `triton_repository/`."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests.peers import TritonFiles
from tests.support.ports import free_port
from tests.support.processes import Process, port_answers, wait_for

REPOSITORY = Path(__file__).parent / "triton_repository"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Triton:
    process: Process
    address: str
    """HOST:PORT of its gRPC endpoint."""

    def stop(self) -> None:
        # Its Python backend leaves the shared memory of its instances behind; the name is on each stub's command line.
        words = [word for child in self.process.children() for word in child.cmdline()]
        self.process.stop()
        for word in words:
            if word.startswith("triton_python_backend_shm_region"):
                (SHARED_MEMORY / word).unlink(missing_ok=True)


def start_triton(files: TritonFiles, folder: Path) -> Triton:
    """Start it; returns once it serves, after a few seconds."""
    ports = {name: free_port() for name in ("grpc", "http", "metrics")}
    argv = [str(files.server), f"--model-repository={REPOSITORY}", f"--backend-directory={files.backends}"]
    for name, port in ports.items():
        argv += [f"--{name}-port={port}", f"--{name}-address=127.0.0.1"]
    # 64 MiB tensors pass through the shared memory of the Python backend.
    argv += ["--backend-config=python,shm-default-byte-size=16777216", "--exit-timeout-secs=1"]
    process = Process("triton", argv, folder, env={"LD_LIBRARY_PATH": _libraries(files)})
    process.wait_log(r"Started GRPCInferenceService", timeout=60)
    # It says that it has started a moment before it listens.
    wait_for(lambda: port_answers(ports["grpc"]), "Triton's gRPC port")
    return Triton(process, f"127.0.0.1:{ports['grpc']}")


def _libraries(files: TritonFiles) -> str:
    # The Python backend's stub embeds an interpreter, whose shared library may lie outside the system's folders.
    return os.pathsep.join(filter(None, [str(files.libraries), sysconfig.get_config_var("LIBDIR") or ""]))
