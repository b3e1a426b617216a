"""The echo server as a process, and its methods on a channel."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.peers import ROOT
from tests.support.ports import free_port
from tests.support.processes import Process

SERVICE = "test.Echo"


@dataclass(frozen=True)
class Echo:
    process: Process
    address: str
    """HOST:PORT, or unix:PATH."""

    def stop(self) -> None:
        self.process.stop()


def start_echo(folder: Path, address: str | None = None, name: str = "echo") -> Echo:
    """Start it on `address`, by default on a free port of 127.0.0.1."""
    address = address or f"127.0.0.1:{free_port()}"
    argv = [sys.executable, "-m", "tests.support.echo_server", "--listen", address]
    process = Process(name, argv, folder, cwd=ROOT)
    process.wait_log("echo server listens on")
    return Echo(process, address)


def echo_stub(channel: Any) -> SimpleNamespace:
    """The methods of the echo service on a grpcio channel, sync or asyncio; messages are bytes."""
    return SimpleNamespace(
        unary=channel.unary_unary(f"/{SERVICE}/Unary"),
        client_stream=channel.stream_unary(f"/{SERVICE}/ClientStream"),
        server_stream=channel.unary_stream(f"/{SERVICE}/ServerStream"),
        bidi=channel.stream_stream(f"/{SERVICE}/Bidi"),
        fail=channel.unary_unary(f"/{SERVICE}/Fail"),
        fail_late=channel.unary_stream(f"/{SERVICE}/FailLate"),
        sleep=channel.unary_unary(f"/{SERVICE}/Sleep"),
        sleep_stream=channel.unary_stream(f"/{SERVICE}/SleepStream"),
        sleep_bidi=channel.stream_stream(f"/{SERVICE}/SleepBidi"),
    )
