"""nghttpd, the server of the nghttp2 project, as an h2c echo that answers like gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port
from tests.support.processes import Process, port_answers, wait_for


@dataclass(frozen=True)
class Nghttpd:
    process: Process
    address: str

    def stop(self) -> None:
        self.process.stop()


def start_nghttpd(command: str, folder: Path, *, verbose: bool = False, name: str = "nghttpd") -> Nghttpd:
    """Start it on a free port of 127.0.0.1; `verbose` logs every frame."""
    port = free_port()
    argv = [command, "--no-tls", "--echo-upload", "--trailer", "grpc-status: 0", "--address=127.0.0.1", str(port)]
    process = Process(name, argv + ["--verbose"] * verbose, folder)
    wait_for(lambda: port_answers(port), "nghttpd to listen")
    return Nghttpd(process, f"127.0.0.1:{port}")
