"""What a gate holds while it runs: nothing that only checks its settings, nothing that reads certificates if it asks
for none, and not what bursts have left behind."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from proxy import memory
from tests.peers import ROOT
from tests.support.certs import Authority, KeyPair
from tests.support.gate import READY, gate_config
from tests.support.ports import free_port
from tests.support.processes import LIVENESS, Process

_numbers = itertools.count()

CHECKERS = {"pydantic", "pydantic_core", "yaml"}
CERTIFICATE_READERS = {"cryptography"}
EXTRAS = {"numpy", "onnxruntime", "grpc", "grpclib", "h2", "tritonclient", "google"}
TOOLS = {"ctypes", "multiprocessing", "unittest", "pdb", "doctest", "xml"}

# Runs the command and says at its end what was imported in the meantime.
MODULES = (
    "import json, sys\n"
    "from proxy.cli import main\n"
    "code = main(['serve', sys.argv[1]])\n"
    "open(sys.argv[2], 'w').write(json.dumps(sorted(sys.modules)))\n"
    "sys.exit(code)\n"
)


def loaded(folder: Path, server: KeyPair, **tls: str) -> set[str]:
    """The modules of a gate that has started, shown its metrics and ended."""
    number = next(_numbers)
    config, modules = folder / f"memory-{number}.yaml", folder / f"memory-{number}.json"
    settings = gate_config(server, f"127.0.0.1:{free_port()}", tls=tls, http_port=1)
    config.write_text(yaml.safe_dump(settings))
    argv = [sys.executable, "-c", MODULES, str(config), str(modules)]
    process = Process(f"memory-{number}", argv, folder, cwd=ROOT)
    try:
        admin = process.wait_log(READY)["admin"]
        process.wait_log("warning http_port: 1 is not served in this version")
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=LIVENESS) as answer:
            assert b"tensorgate_certificate_expiry_timestamp_seconds{" in answer.read()
        process.popen.terminate()
        assert process.wait() == 0
    finally:
        process.kill()
    names = json.loads(modules.read_text())
    assert {"proxy.app", "proxy.http2.connection", "aiohttp.web", "uvloop"} <= set(names)
    return {name.partition(".")[0] for name in names} | {name for name in names if name.startswith("proxy.")}


def test_a_gate_without_client_certificates_holds_nothing_that_it_does_not_use(
    folder: Path, server_pair: KeyPair
) -> None:
    names = loaded(folder, server_pair)
    assert names & (CHECKERS | CERTIFICATE_READERS | EXTRAS | TOOLS) == set()
    assert names & {"proxy.config.load", "proxy.config.check", "proxy.config.pem", "proxy.tls.pki"} == set()


@pytest.mark.parametrize("client_auth", ["optional", "require"])
def test_what_reads_certificates_is_there_before_the_first_client(
    client_auth: str, folder: Path, server_pair: KeyPair, authority: Authority
) -> None:
    names = loaded(folder, server_pair, client_auth=client_auth, ca_file=str(authority.ca_file))
    assert names & (CHECKERS | CERTIFICATE_READERS | EXTRAS | TOOLS) == CERTIFICATE_READERS


def test_the_admin_pages_leave_the_environment_as_it_was() -> None:
    code = (
        "import json, os\n"
        "before = dict(os.environ)\n"
        "import proxy.admin\n"
        "print(json.dumps([name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)]))"
    )
    for own in ({}, {"SSL_CERT_FILE": "/x/ca.pem"}, {"SSL_CERT_FILE": "/x/ca.pem", "SSL_CERT_DIR": "/x"}):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT_")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**kept, **own}, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_free_memory_is_returned_as_often_as_one_likes() -> None:
    memory.return_free_memory()
    memory.return_free_memory()


class _NoTrim:
    def __init__(self, name: None) -> None:
        pass


def _no_library(name: None) -> object:
    raise OSError("no such library")


@pytest.mark.parametrize("library", [_NoTrim, _no_library], ids=["musl", "nothing to be loaded"])
def test_where_the_c_library_cannot_nothing_happens(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    memory._malloc_trim.cache_clear()
    try:
        memory.return_free_memory()
    finally:
        memory._malloc_trim.cache_clear()
