"""Pairs of equal models, for Triton's Python backend and for the embedded server.

What a model computes is written once, as a function over numpy arrays; only what calls it differs. The configurations
are the same but for the backend, which the embedded server finds by the file.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.backend.models import echo_config

LABELS = ("cat", "dog", "fish")  # one fewer than there are classes
LOADED = ("simple", "identity", "words", "repeat", "scores", "fails")
"""Those that are loaded from the start; of the others `idle` never is."""

_CPU = "instance_group { kind: KIND_CPU count: 1 }\n"
_NUMBER = """
input { name: "IN" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
"""

_CONFIGS = {
    "simple": """
max_batch_size: 8
dynamic_batching {}
input { name: "INPUT0" data_type: TYPE_INT32 dims: 16 }
input { name: "INPUT1" data_type: TYPE_INT32 dims: 16 }
output { name: "OUTPUT0" data_type: TYPE_INT32 dims: 16 }
output { name: "OUTPUT1" data_type: TYPE_INT32 dims: 16 }
""",
    "words": """
max_batch_size: 4
input { name: "TEXT" data_type: TYPE_STRING dims: -1 }
output { name: "REVERSED" data_type: TYPE_STRING dims: -1 }
output { name: "LENGTH" data_type: TYPE_INT32 dims: -1 }
""",
    "repeat": """
model_transaction_policy { decoupled: true }
input { name: "COUNT" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
""",
    "scores": """
max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: 4 }
output { name: "SCORES" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }
output { name: "PLAIN" data_type: TYPE_FP32 dims: 4 }
""",
    "fails": _NUMBER,
    "times": _NUMBER,
    "idle": _NUMBER,
    "broken": _NUMBER,
}

# `fails` does so after as many milliseconds as IN says.
_ANSWERS = {
    "simple": """
def answer(batch):
    left, right = batch["INPUT0"], batch["INPUT1"]
    return {"OUTPUT0": left + right, "OUTPUT1": left - right}
""",
    "words": """
def answer(batch):
    text = batch["TEXT"]
    turned = np.array([word[::-1] for word in text.ravel()], dtype=object).reshape(text.shape)
    lengths = np.array([len(word) for word in text.ravel()], dtype=np.int32).reshape(text.shape)
    return {"REVERSED": turned, "LENGTH": lengths}
""",
    "repeat": """
def answers(batch):
    count = int(batch["COUNT"][0])
    for number in range(abs(count)):
        yield {"OUT": np.array([number], dtype=np.int32)}
    if count < 0:
        raise ValueError(f"gave up after {-count}")
""",
    "scores": """
def answer(batch):
    return {"SCORES": batch["IN"], "PLAIN": batch["IN"]}
""",
    "fails": """
import time

def answer(batch):
    time.sleep(int(batch["IN"][0]) / 1000)
    raise ValueError("boom at %d" % batch["IN"][0])
""",
    "broken": """
import no_such_module
""",
}

# The import of Triton's helpers comes first: it is what leads to the numpy that Triton can use (tests.peers).
_TRITON = """
import triton_python_backend_utils as pb_utils
import numpy as np

{function}

def arrays(request):
    return {{tensor.name(): tensor.as_numpy() for tensor in request.inputs()}}

def respond(outputs):
    tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
    return pb_utils.InferenceResponse(output_tensors=tensors)

class TritonPythonModel:
    {execute}
"""

_TRITON_ONE = """
    def execute(self, requests):
        return [respond(answer(arrays(request))) for request in requests]
"""

_TRITON_MANY = """
    def execute(self, requests):
        for request in requests:
            self.respond(request.get_response_sender(), arrays(request))

    def respond(self, sender, batch):
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            for outputs in answers(batch):
                sender.send(respond(outputs))
        except ValueError as error:
            failure = pb_utils.TritonError(str(error))
            sender.send(pb_utils.InferenceResponse(output_tensors=[], error=failure), flags=final)
        else:
            sender.send(flags=final)
"""

# numpy has no BF16: what isn't looked at goes from tensor to tensor.
_TRITON_IDENTITY = """
    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        return pb_utils.InferenceResponse(output_tensors=[self.copy(tensor) for tensor in request.inputs()])

    def copy(self, tensor):
        name = tensor.name().replace("IN_", "OUT_")
        if name == "OUT_BF16":
            return pb_utils.Tensor.from_dlpack(name, tensor)
        return pb_utils.Tensor(name, tensor.as_numpy())
"""

_EMBEDDED = """
import numpy as np

{function}

class Model:
    def execute(self, batch):
        return {call}(batch)
"""

_EMBEDDED_IDENTITY = """
def answer(batch):
    return {name.replace("IN_", "OUT_"): array for name, array in batch.items()}
"""


def write_repository(repository: Path, server: str) -> Path:
    """All models as `server` ('triton' or 'embedded') runs them."""
    for name in (*_CONFIGS, "identity"):
        version = repository / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(source(name, server))
        backend = 'backend: "python"\n' if server == "triton" else ""
        (version.parent / "config.pbtxt").write_text(backend + _CPU + (_CONFIGS.get(name) or echo_config()))
    (repository / "scores/labels.txt").write_text("\n".join(LABELS) + "\n")
    return repository


def source(name: str, server: str) -> str:
    """The model.py of a model."""
    if name in ("times", "idle"):
        return times(1, server)
    if name == "identity":
        if server == "triton":
            return _TRITON.format(function="", execute=_TRITON_IDENTITY)
        return _EMBEDDED.format(function=_EMBEDDED_IDENTITY, call="answer")
    return _source(_ANSWERS[name], server, decoupled=name == "repeat")


def times(factor: int, server: str) -> str:
    """The model.py of a model that multiplies IN."""
    return _source(f'def answer(batch):\n    return {{"OUT": batch["IN"] * {factor}}}\n', server)


def override(server: str, most_rows: int) -> str:
    """A configuration of `times` for a load with parameters: JSON, with another max_batch_size."""
    tensor = {"data_type": "TYPE_INT32", "dims": [1]}
    config = {"max_batch_size": most_rows, "input": [{"name": "IN", **tensor}], "output": [{"name": "OUT", **tensor}]}
    return json.dumps({**config, "backend": "python"} if server == "triton" else config)


def _source(function: str, server: str, decoupled: bool = False) -> str:
    if server == "triton":
        return _TRITON.format(function=function, execute=_TRITON_MANY if decoupled else _TRITON_ONE)
    return _EMBEDDED.format(function=function, call="answers" if decoupled else "answer")
