"""The gate as its users run it: a configuration file, `tensorgate serve`, its log, its metrics."""

from __future__ import annotations

import itertools
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.peers import ROOT
from tests.support.certs import KeyPair
from tests.support.processes import LIVENESS, Process, wait_for

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
READY = r"ready: grpc on (?P<host>\S+):(?P<port>\d+), admin on \S+:(?P<admin>\d+)"


class Gate:
    """A running gate. `root` is the CA that its clients should trust."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any] | str,
        root: bytes,
        *,
        name: str = "gate",
        args: tuple[str, ...] = (),
    ) -> None:
        self.root = root
        self.config_file = folder / f"{name}.yaml"
        self.config_file.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config)))
        argv = [sys.executable, "-m", "proxy", "serve", str(self.config_file), *args]
        # What a gate that is killed leaves behind goes with the folder.
        self.process = Process(name, argv, folder, env={"TMPDIR": str(folder)}, cwd=ROOT)
        try:
            ready = self.process.wait_log(READY)
        except AssertionError:
            self.process.kill()
            raise
        self.port, self.admin_port = int(ready["port"]), int(ready["admin"])

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.stop()

    # -- clients

    def channel(self, *, client: KeyPair | None = None, root: bytes | None = None) -> grpc.Channel:
        return grpc.secure_channel(self.target, self.credentials(client, root), options=self.options())

    def aio_channel(self, *, client: KeyPair | None = None) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(self.target, self.credentials(client), options=self.options())

    def credentials(self, client: KeyPair | None = None, root: bytes | None = None) -> grpc.ChannelCredentials:
        key, cert = (client.key, client.cert) if client else (None, None)
        return grpc.ssl_channel_credentials(
            root_certificates=root or self.root, private_key=key, certificate_chain=cert
        )

    def options(self) -> list[tuple[str, Any]]:
        # Without its own pool, a channel shares a connection with every other channel to the same port.
        return [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]

    # -- what it says of itself

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an admin page."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=LIVENESS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of `tensorgate_<name>` that have these labels; 0.0 where there is none."""
        status, text = self.get("/metrics")
        assert status == 200, text
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples if sample.name == f"tensorgate_{name}"]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def handshakes(self) -> dict[str, float]:
        """Handshakes so far, by result."""
        status, text = self.get("/metrics")
        assert status == 200, text
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return {
            sample.labels["result"]: sample.value for sample in samples if sample.name == "tensorgate_handshakes_total"
        }

    def wait_metric(self, name: str, value: float, **labels: str) -> None:
        """Wait until the sum is `value`: a call may be counted a moment after the client has its answer."""
        wait_for(lambda: self.metric(name, **labels) == value, f"tensorgate_{name}{labels} to be {value}")

    def wait_log(self, pattern: str, since: int = 0) -> re.Match[str]:
        return self.process.wait_log(pattern, since)


def gate_config(server: KeyPair, upstream: str | None, **settings: Any) -> dict[str, Any]:
    """Settings for a gate on free ports of 127.0.0.1; `settings` go into the top level, `tls` into its section."""
    tls = {"cert_file": str(server.cert_file), "key_file": str(server.key_file), **settings.pop("tls", {})}
    config: dict[str, Any] = {
        "host": "127.0.0.1",
        "grpc_port": 0,
        "tls": tls,
        "admin": {"address": "127.0.0.1:0"},
        # Nothing waits for a load balancer here.
        "drain": {"delay": 0, "timeout": 10},
    }
    if upstream is not None:
        config["upstream"] = {"grpc": upstream}
    return {**config, **settings}


_numbers = itertools.count()


class GateMaker:
    """Called with the address of an upstream and settings, starts a gate; ends all that it has started."""

    def __init__(self, folder: Path, root: bytes, server: KeyPair) -> None:
        self.folder, self.root, self.server = folder, root, server
        self.started: list[Gate] = []

    def __call__(
        self, upstream: str | None, *, server: KeyPair | None = None, root: bytes | None = None, **settings: Any
    ) -> Gate:
        config = gate_config(server or self.server, upstream, **settings)
        gate = Gate(self.folder, config, root or self.root, name=f"gate-{next(_numbers)}")
        self.started.append(gate)
        return gate

    def stop(self) -> None:
        for gate in self.started:
            gate.stop()
