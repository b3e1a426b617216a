"""`tensorgate demo`: certificates, a backend, the gate with mutual TLS, and clients that get in or do not.

Runs the gate as its users do, as a process with a settings file, and talks to it with tritonclient unchanged. All that
it makes lies in one folder, keys included; nothing of it is meant for production.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from proxy.config import pem
from proxy.config.load import ConfigError, load
from proxy.config.ports import port_faults
from proxy.demo_gate import Gate, GateError, running_gate, tail
from proxy.tls import pki

_CALL_SECONDS = 30.0
_COUNT_SECONDS = 10.0
_POLL_SECONDS = 0.05
_BATCH = 60  # the model takes up to 64 at once
_SHOWN_DIGITS = 10
_LEAST_ACCURACY = 0.95
_STILL_VALID = timedelta(days=1)
_ADMIN_PORT = 9090
_CLIENTS = ("alice", "bob")

_SNIPPET = """\
import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(
    "localhost:{port}",
    ssl=True,
    root_certificates={ca},
    private_key={key},
    certificate_chain={cert},
)
a = triton.InferInput("INPUT0", [1, 16], "INT32")
a.set_data_from_numpy(np.arange(16, dtype=np.int32).reshape(1, 16))
b = triton.InferInput("INPUT1", [1, 16], "INT32")
b.set_data_from_numpy(np.ones((1, 16), dtype=np.int32))
print(client.infer("simple", [a, b]).as_numpy("OUTPUT0"))
"""


class DemoError(Exception):
    """The demo cannot go on; one or a few lines for its user."""


def run(folder: Path | None = None, port: int = 8001, once: bool = False) -> int:
    """The whole demo; returns the exit code. `folder`: where its files go; `once`: end after the show."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe or a file too
    try:
        with _signals_interrupt():
            return _run((folder or default_folder()).absolute(), port, once)
    except BrokenPipeError:
        raise  # `tensorgate demo | head`: nobody is there to be told
    except (DemoError, GateError, pki.PkiError) as error:
        print(f"tensorgate demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        place = f"{error.filename}: cannot be used ({(error.strerror or '').lower()})" if error.filename else error
        print(f"tensorgate demo: {place}; another folder can be given: --dir DIR", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.")
        return 1 if once else 0


def default_folder() -> Path:
    """tensorgate/demo below XDG_DATA_HOME, or below ~/.local/share."""
    base = os.environ.get("XDG_DATA_HOME", "")
    try:
        return (Path(base) if base.startswith("/") else Path.home() / ".local/share") / "tensorgate/demo"
    except RuntimeError:
        raise DemoError("this user has no home folder; say where its files may go: --dir DIR") from None


def _run(folder: Path, port: int, once: bool) -> int:
    _head("Tensorgate demo")
    print(f"files     {folder}")
    files = folder / "pki"
    try:
        made = prepare_certificates(files)
    except pki.PkiError as error:
        raise DemoError(f"{error}; another folder can be given: --dir DIR") from None
    print(f"PKI       {made}")
    config = _write_config(folder, files, port)
    with running_gate(folder, config) as gate:
        print(f"gate      localhost:{gate.port}, gRPC over TLS, client certificate required")
        print(f"log       {gate.log}")
        print(f"admin     http://{gate.admin}/metrics, /livez, /readyz")
        failed = Show(gate, files).run()
        if failed:
            _head("Not all of it held")
            print("\n".join(f"- {line}" for line in failed))
            print(f"The gate's log: {gate.log}")
            return 1
        _print_ways_in(gate, files)
        if once:
            print("\nAll of it held.")
            return 0
        print("\nThe gate stays up until Ctrl-C.")
        return _wait(gate)


def _head(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


# certificates


def prepare_certificates(folder: Path) -> str:
    """Make what `folder` lacks: a CA, server, alice, bob, and a stranger of another CA. Says what was done."""
    new = [] if _usable_authority(folder) else ["ca"]
    if new:
        pki.init(folder, force=True)
    authority = pki.load_authority(folder)
    for name in ("server", *_CLIENTS):
        if not _usable(folder, name, authority):
            pki.issue(folder, name, "server" if name == "server" else "client", force=True)
            new.append(name)
    stranger = folder / "another-ca"
    if not _usable_authority(stranger) or not _usable(stranger, "stranger", pki.load_authority(stranger)):
        pki.init(stranger, force=True)
        pki.issue(stranger, "stranger", "client", force=True)
    return f"new certificates: {', '.join(new)}" if new else "certificates of an earlier start, still valid"


def _usable_authority(folder: Path) -> bool:
    try:
        authority = pki.load_authority(folder)
    except pki.PkiError:
        return False
    return _lasts(authority.certificate)


def _usable(folder: Path, name: str, authority: pki.Pair) -> bool:
    try:
        certificate = pem.read_certificates(folder / f"{name}.pem")[0]
        key = pem.read_private_key(folder / f"{name}.key")
        certificate.verify_directly_issued_by(authority.certificate)
    except (pem.PemError, InvalidSignature, ValueError, TypeError):
        return False
    # The host may have got another name since.
    names = {f"dns:{host.value}" for host in pki.default_server_sans() if isinstance(host, x509.DNSName)}
    named = name != "server" or names <= set(pem.sans(certificate))
    return named and _lasts(certificate) and pem.belongs(key, certificate)


def _lasts(certificate: x509.Certificate) -> bool:
    return certificate.not_valid_after_utc - datetime.now(UTC) > _STILL_VALID


# the gate


def _write_config(folder: Path, files: Path, port: int) -> Path:
    config = folder / "gate.yaml"
    for admin_port in (_ADMIN_PORT, 0):
        text = yaml.safe_dump(_settings(files, port, admin_port), sort_keys=False, allow_unicode=True)
        config.write_text(f"# Written by `tensorgate demo`, anew at each start.\n{text}", encoding="utf-8")
        faults = _faults(config)
        if not any(fault.startswith("admin.address: port") for fault in faults):
            break
    if any(f"port {port} is in use" in fault for fault in faults):
        raise DemoError(f"port {port} is in use; stop what listens there, or choose another with --port N (0: any)")
    if faults:
        faults = [fault.replace("with grpc_port or --grpc-port N", "with --port N") for fault in faults]
        raise DemoError("\n  ".join(["its settings do not work here:", *faults]))
    if admin_port != _ADMIN_PORT:
        print(f"admin     port {_ADMIN_PORT} is in use, so a free one is taken")
    return config


def _settings(files: Path, port: int, admin_port: int) -> dict[str, Any]:
    from proxy.backend.samples import repository_path

    return {
        "model_repository_path": str(repository_path()),
        "grpc_port": port,
        "tls": {
            "cert_file": str(files / "server.pem"),
            "key_file": str(files / "server.key"),
            "ca_file": str(files / "ca.pem"),
            "client_auth": "require",
        },
        "admin": {"address": f"127.0.0.1:{admin_port}"},
        "drain": {"delay": 0, "timeout": 5},  # nothing waits for a load balancer here
        "log": {"access": True},
    }


def _faults(config: Path) -> list[str]:
    try:
        return port_faults(load(config, env={}))
    except ConfigError as error:
        return error.faults


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that no gate is left behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(gate: Gate) -> int:
    try:
        code = gate.process.wait()
    except KeyboardInterrupt:
        print("\nStopping the gate.")
        return 0
    raise GateError(f"the gate ended by itself with exit code {code}:\n{tail(gate)}")


# the show


@dataclass
class Show:
    """Clients that work and clients that are turned away; what did not hold is collected in `failed`."""

    gate: Gate
    files: Path
    failed: list[str] = field(default_factory=list)
    _title: str = ""

    def run(self) -> list[str]:
        """All parts in order; returns what did not hold, [] when all did."""
        # Said in words below; the C core would write its own account of each refused handshake to the terminal.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        # A proxy of the surroundings cannot reach this machine's localhost.
        os.environ["no_grpc_proxy"] = "localhost"  # noqa: SIM112  (gRPC reads it in lower case only)
        parts: list[tuple[str, Callable[[], None]]] = [
            ("alice asks the model simple (numpy): the sum and the difference of two tensors", self._simple),
            ("bob asks the model digits (ONNX): handwritten digits that it was not trained on", self._digits),
            ("A client without a certificate", self._without_certificate),
            ("A client with a certificate of another CA", self._of_another_ca),
            ("A client that does not trust the server's CA", self._distrusting),
        ]
        for title, part in parts:
            _head(title)
            self._title = title
            try:
                part()
            except Exception as error:  # noqa: BLE001  (whatever the client raises is shown, and the show goes on)
                self._fail(" ".join(str(error).split()) or type(error).__name__)
        return self.failed

    def _fail(self, text: str) -> None:
        print(f"FAILED    {text}")
        self.failed.append(f"{self._title}: {text}")

    def _client(self, name: str) -> Any:
        return self._connect(self.files / "ca.pem", self.files / name)

    def _connect(self, ca: Path | None, pair: Path | None) -> Any:
        import tritonclient.grpc as triton

        return triton.InferenceServerClient(
            f"localhost:{self.gate.port}",
            ssl=True,
            root_certificates=str(ca) if ca else None,
            private_key=f"{pair}.key" if pair else None,
            certificate_chain=f"{pair}.pem" if pair else None,
        )

    def _infer(self, client: Any, model: str, tensors: dict[str, Any]) -> Any:
        import tritonclient.grpc as triton
        from tritonclient.utils import np_to_triton_dtype

        inputs = []
        for name, values in tensors.items():
            inputs.append(triton.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype)))
            inputs[-1].set_data_from_numpy(values)
        return client.infer(model, inputs, client_timeout=_CALL_SECONDS)

    def _simple(self) -> None:
        import numpy as np

        first = np.arange(16, dtype=np.int32).reshape(1, 16)
        second = np.full((1, 16), 10, dtype=np.int32)
        with self._client("alice") as client:
            answer = self._infer(client, "simple", {"INPUT0": first, "INPUT1": second})
        total, difference = answer.as_numpy("OUTPUT0"), answer.as_numpy("OUTPUT1")
        rows = {"INPUT0": first, "INPUT1": second, "sum": total, "difference": difference}
        for label, values in rows.items():
            print(f"{label:<10}" + "".join(f"{value:5}" for value in values[0]))
        if not (np.array_equal(total, first + second) and np.array_equal(difference, first - second)):
            self._fail("the sum or the difference is wrong")

    def _digits(self) -> None:
        import numpy as np

        from proxy.backend.samples import heldout

        pixels, truth = heldout()
        labels, sure = [], []
        with self._client("bob") as client:
            for start in range(0, len(pixels), _BATCH):
                answer = self._infer(client, "digits", {"pixels": pixels[start : start + _BATCH]})
                labels.append(answer.as_numpy("label").reshape(-1))
                sure.append(answer.as_numpy("probabilities").max(axis=1))
        answers, certainty = np.concatenate(labels), np.concatenate(sure)
        chosen = np.linspace(0, len(truth) - 1, _SHOWN_DIGITS).astype(int)
        print("sample    " + "".join(f"{index:6}" for index in chosen))
        print("answer    " + "".join(f"{answers[index]:6}" for index in chosen))
        print("sure of it" + "".join(f"{certainty[index]:6.0%}" for index in chosen))
        print("truth     " + "".join(f"{truth[index]:6}" for index in chosen))
        right = int((answers == truth).sum())
        print(f"accuracy  {right / len(truth):.1%}: {right} of all {len(truth)} held-out samples are right")
        if right < _LEAST_ACCURACY * len(truth):
            self._fail(f"fewer than {_LEAST_ACCURACY:.0%} of the answers are right")

    def _without_certificate(self) -> None:
        self._refused(self.files / "ca.pem", None, {"no_certificate"})

    def _of_another_ca(self) -> None:
        self._refused(self.files / "ca.pem", self.files / "another-ca/stranger", {"unknown_ca"})

    def _distrusting(self) -> None:
        # gRPC's own TLS stack closes without an alert, others say why.
        expected = {"closed_by_client", "client_rejected_unknown_ca", "client_rejected"}
        self._refused(self.files / "another-ca/ca.pem", self.files / "alice", expected)

    def _refused(self, ca: Path, pair: Path | None, expected: set[str]) -> None:
        """One client that must be turned away, for a reason among `expected` (results of handshakes_total)."""
        from tritonclient.utils import InferenceServerException

        before, start = self.gate.handshakes(), self.gate.log_size()
        try:
            with self._connect(ca, pair) as client:
                client.is_server_live(client_timeout=_CALL_SECONDS)
        except InferenceServerException as error:
            _aligned("client", f"[{error.status()}] {error.message()}")
        else:
            self._fail("the client was let in")
            return
        reason = self._reason(before)
        if reason not in expected:
            self._fail(f"the gate counted the handshake as {reason}, not as {' or '.join(sorted(expected))}")
            return
        _aligned("gate", self._words(start, reason))
        _aligned("counted", f'tensorgate_handshakes_total{{result="{reason}"}}')

    def _reason(self, before: dict[str, float]) -> str:
        """What the gate has counted since `before`; it may do so a moment after the client has its error."""
        deadline = time.monotonic() + _COUNT_SECONDS
        while time.monotonic() < deadline:
            now = self.gate.handshakes()
            new = [result for result, count in now.items() if count > before.get(result, 0)]
            if new:
                return new[0]
            time.sleep(_POLL_SECONDS)
        return "nothing"

    def _words(self, start: int, reason: str) -> str:
        """What the gate's log says of a handshake that failed for `reason` since `start`, without time and address."""
        deadline = time.monotonic() + _COUNT_SECONDS  # the log is written by a thread of its own
        while time.monotonic() < deadline:
            if found := re.search(rf": TLS: (.*) \[{reason}\]", self.gate.log_text(start)):
                return found[1]
            time.sleep(_POLL_SECONDS)
        return reason.replace("_", " ")


def _aligned(label: str, text: str) -> None:
    print(textwrap.fill(text, 110, initial_indent=f"{label:<10}", subsequent_indent=" " * 10, break_long_words=False))


def _print_ways_in(gate: Gate, files: Path) -> None:
    ca, cert, key = (str(files / name) for name in ("ca.pem", "alice.pem", "alice.key"))
    protos = Path(__file__).parent / "backend/protos"
    _head(f"Call it yourself, from Python ({sys.executable})")
    quoted = [json.dumps(path, ensure_ascii=False) for path in (ca, key, cert)]
    print(_SNIPPET.format(port=gate.port, ca=quoted[0], key=quoted[1], cert=quoted[2]), end="")
    _head("or with grpcurl")
    words = ["grpcurl", "-cacert", ca, "-cert", cert, "-key", key, "-import-path", str(protos)]
    words += ["-proto", "inference.proto", "-d", '{"name": "simple"}', f"localhost:{gate.port}"]
    print(shlex.join([*words, "inference.GRPCInferenceService/ModelConfig"]))
