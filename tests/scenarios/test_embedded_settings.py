"""Promise: what the settings say of the embedded backend is what it does, behind the gate's TLS."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.conftest import SAMPLES
from tests.support.certs import Authority, KeyPair
from tests.support.gate import Gate, GateMaker
from tests.support.ports import free_port
from tests.support.processes import LIVENESS, wait_for

LISTENS = r"backend listens: metrics on \S+:(?P<port>\d+)"


@pytest.fixture(scope="module")
def gate(shared_gates: GateMaker, authority: Authority) -> Gate:
    """In mode explicit, with one of the two models that there are, for clients with a certificate."""
    return shared_gates(
        None,
        model_repository_path=str(SAMPLES),
        backend={
            "model_control_mode": "explicit",
            "load_models": ["simple"],
            "metrics": "127.0.0.1:0",
            "memory_limit_bytes": 2**21,
        },
        tls={"client_auth": "require", "ca_file": str(authority.ca_file)},
    )


@pytest.fixture
def client(gate: Gate, client_pair: KeyPair) -> Iterator[triton.InferenceServerClient]:
    opened = triton.InferenceServerClient(
        gate.target, creds=gate.credentials(client_pair), ssl=True, channel_args=gate.options()
    )
    yield opened
    opened.close()


def scrape(gate: Gate) -> list[str]:
    port = gate.wait_log(LISTENS)["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIVENESS) as answer:
        return list(answer.read().decode().splitlines())


def ready(client: triton.InferenceServerClient) -> dict[str, bool]:
    return {name: client.is_model_ready(name) for name in ("digits", "simple")}


def add(client: triton.InferenceServerClient, rows: int = 1) -> None:
    """Have `simple` add and subtract."""
    ones = np.ones((rows, 16), np.int32)
    inputs = [triton.InferInput(name, list(ones.shape), "INT32") for name in ("INPUT0", "INPUT1")]
    for given in inputs:
        given.set_data_from_numpy(ones)
    answer = client.infer("simple", inputs, client_timeout=LIVENESS)
    assert (answer.as_numpy("OUTPUT0") == 2).all()


def test_clients_load_and_unload_beside_what_is_there_from_the_start(
    gate: Gate, client: triton.InferenceServerClient
) -> None:
    assert ready(client) == {"digits": False, "simple": True}
    client.load_model("digits")
    assert ready(client) == {"digits": True, "simple": True}
    client.unload_model("digits")
    client.unload_model("simple")
    assert ready(client) == {"digits": False, "simple": False}
    client.load_model("simple")
    assert ready(client) == {"digits": False, "simple": True}
    add(client)


def test_the_models_metrics_are_served(gate: Gate, client: triton.InferenceServerClient) -> None:
    def succeeded() -> float:
        samples = [line for line in scrape(gate) if line.startswith("nv_inference_request_success{")]
        return sum(float(line.rpartition(" ")[2]) for line in samples if 'model="simple"' in line)

    before = succeeded()
    add(client)
    assert succeeded() == before + 1


def test_the_memory_for_messages_is_what_was_set(gate: Gate, client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as refused:
        add(client, rows=2**15)  # 4 MiB in
    assert refused.value.status() == f"StatusCode.{grpc.StatusCode.RESOURCE_EXHAUSTED.name}"
    assert str(2**21) in refused.value.message()
    add(client)


def test_a_backend_that_died_is_started_again_as_it_was_set(
    gate: Gate, client: triton.InferenceServerClient
) -> None:
    client.load_model("digits")
    mark = gate.process.mark()
    (backend,) = gate.process.children()
    backend.kill()
    gate.wait_log(LISTENS, since=mark)
    wait_for(lambda: gate.get("/readyz")[0] == 200, "the gate to be ready again")
    assert ready(client) == {"digits": False, "simple": True}


def test_files_of_clients_do_not_outlive_a_backend_that_was_killed(
    gate: Gate, client: triton.InferenceServerClient
) -> None:
    tensors = {
        "input": [{"name": "IN", "data_type": "TYPE_INT32", "dims": [1]}],
        "output": [{"name": "OUT", "data_type": "TYPE_INT32", "dims": [1]}],
    }
    code = b"class Model:\n    def execute(self, batch):\n        return {'OUT': batch['IN']}\n"
    client.load_model("mine", config=json.dumps(tensors), files={"file:1/model.py": code})
    (backend,) = gate.process.children()
    (folder,) = Path(backend.environ()["TMPDIR"]).glob("tensorgate-files-*")
    mark = gate.process.mark()
    backend.kill()
    gate.wait_log(LISTENS, since=mark)
    wait_for(lambda: gate.get("/readyz")[0] == 200, "the gate to be ready again")
    assert not folder.exists()


def test_metrics_for_other_machines_open_nothing_else(make_gate: GateMaker) -> None:
    port = free_port()
    gate = make_gate(None, model_repository_path=str(SAMPLES), backend={"metrics": f"0.0.0.0:{port}"})
    assert gate.wait_log(LISTENS)["port"] == str(port)
    (backend,) = gate.process.children()
    sockets = [one for one in backend.net_connections() if one.status == psutil.CONN_LISTEN]
    assert [(one.laddr.ip, one.laddr.port) for one in sockets] == [("0.0.0.0", port)]


def test_in_mode_poll_models_are_found_later(make_gate: GateMaker, folder: Path) -> None:
    gate = make_gate(
        None,
        model_repository_path=str(folder),
        backend={"model_control_mode": "poll", "repository_poll": 0.1},
    )
    (backend,) = gate.process.children()
    assert "--repository-poll-secs=0.1" in backend.cmdline()
    with triton.InferenceServerClient(
        gate.target, creds=gate.credentials(), ssl=True, channel_args=gate.options()
    ) as opened:
        assert not opened.is_model_ready("simple")
        (folder / "simple").symlink_to(SAMPLES / "simple")
        wait_for(lambda: opened.is_model_ready("simple"), "the model to be found")
        add(opened)
