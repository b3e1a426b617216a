"""A real Triton Inference Server, in plaintext on loopback, with the models of `triton_repository/`."""

from __future__ import annotations

import os
import secrets
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests.peers import TritonFiles
from tests.support.ports import free_port
from tests.support.processes import Process, port_answers, wait_for

REPOSITORY = Path(__file__).parent / "triton_repository"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Regions:
    """The shared memory of one Triton's Python backend, told from that of any other by how the names start."""

    prefix: str

    @classmethod
    def new(cls) -> Regions:
        return cls(f"tensorgate_{secrets.token_hex(8)}_")

    @property
    def option(self) -> str:
        """A value of --backend-config."""
        return f"python,shm-region-prefix-name={self.prefix}"

    def remove(self) -> None:
        """Remove what the Triton, which has ended, left behind: it does so when it is stopped, and when it crashes."""
        for region in SHARED_MEMORY.glob(f"{self.prefix}*"):
            region.unlink(missing_ok=True)


@dataclass(frozen=True)
class Triton:
    process: Process
    address: str
    """HOST:PORT of its gRPC endpoint."""
    regions: Regions

    def stop(self) -> None:
        self.process.stop()
        self.regions.remove()


def start_triton(files: TritonFiles, folder: Path) -> Triton:
    """Start it; returns once it serves, after a few seconds."""
    ports = {name: free_port() for name in ("grpc", "http", "metrics")}
    argv = [str(files.server), f"--model-repository={REPOSITORY}", f"--backend-directory={files.backends}"]
    for name, port in ports.items():
        argv += [f"--{name}-port={port}", f"--{name}-address=127.0.0.1"]
    regions = Regions.new()
    # 64 MiB tensors pass through the shared memory of the Python backend.
    argv += ["--backend-config=python,shm-default-byte-size=16777216", f"--backend-config={regions.option}"]
    argv += ["--exit-timeout-secs=1"]
    process = Process("triton", argv, folder, env={"LD_LIBRARY_PATH": libraries(files)})
    process.wait_log(r"Started GRPCInferenceService", timeout=60)
    # It says that it has started a moment before it listens.
    wait_for(lambda: port_answers(ports["grpc"]), "Triton's gRPC port")
    return Triton(process, f"127.0.0.1:{ports['grpc']}", regions)


def libraries(files: TritonFiles) -> str:
    # The Python backend's stub embeds an interpreter, whose shared library may lie outside the system's folders.
    return os.pathsep.join(filter(None, [str(files.libraries), sysconfig.get_config_var("LIBDIR") or ""]))
