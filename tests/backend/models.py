"""Model repositories for the tests: small models, each with one way to behave."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from proxy.backend.samples import repository_path
from tests.backend.onnxfile import onnx_file

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16",
    "BYTES",
)  # fmt: skip

NUMBER_TO_NUMBER = """
input { name: "IN" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
"""

GRID = """
input { name: "IN" data_type: TYPE_FP32 dims: [-1, 2] }
output { name: "OUT" data_type: TYPE_FP32 dims: [-1, 2] }
"""

ECHO = """
class Model:
    def execute(self, batch):
        return {"OUT" + name.removeprefix("IN"): array for name, array in batch.items()}
"""

LIES = """
import numpy as np

ANSWERS = [
    {"OTHER": np.zeros(1, np.int32)},
    {},
    {"OUT": np.zeros(1, np.int64)},
    {"OUT": np.zeros(2, np.int32)},
    "nothing",
    {"OUT": np.zeros((1, 1), np.int32)},
]

class Model:
    def execute(self, batch):
        return ANSWERS[batch["IN"][0]]
"""

FAILS = """
class Untold(BaseException):
    def __str__(self):
        raise RuntimeError("no text")

class Model:
    def execute(self, batch):
        number = batch["IN"][0]
        if number == 1:
            raise SystemExit(3)
        if number == 2:
            raise Untold
        if number == 3:
            raise ValueError("half of a pair: \\udcff ")
        if number == 4:
            raise ValueError("\u6c49" * 3000)
        raise ValueError("boom: naïve %d%%")
"""

REUSES = """
import numpy as np

class Model:
    def initialize(self, config):
        self.answer = np.zeros(1, np.int32)

    def execute(self, batch):
        self.answer[:] = batch["IN"]
        return {"OUT": self.answer}
"""

WAITS = """
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        rendezvous.execute(int(batch["IN"][0]))
        return {"OUT": batch["IN"]}

    def finalize(self):
        rendezvous.finalized.append("waits")
"""


COUNTS = """
import numpy as np

class Model:
    def execute(self, batch):
        number = int(batch["IN"][0])
        for value in range(abs(number)):
            yield {"OUT": np.array([value], np.int32)}
        if number < 0:
            raise ValueError("counted enough")
"""

DECOUPLED = NUMBER_TO_NUMBER + "model_transaction_policy { decoupled: true }"


def write_model(repository: Path, name: str, config: str | None, files: Mapping[str, str | bytes]) -> Path:
    """Write a model; `files` are paths below its directory. Returns the directory."""
    directory = repository / name
    directory.mkdir(parents=True)
    if config is not None:
        (directory / "config.pbtxt").write_text(config)
    for path, content in files.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def echo_config() -> str:
    """Any one of the data types at a time: a vector IN_<type> comes back as OUT_<type>."""
    lines = []
    for name in DATATYPES:
        kind = "STRING" if name == "BYTES" else name
        lines.append(f'input {{ name: "IN_{name}" data_type: TYPE_{kind} dims: -1 optional: true }}')
        lines.append(f'output {{ name: "OUT_{name}" data_type: TYPE_{kind} dims: -1 }}')
    return "\n".join(lines)


def write_repository(repository: Path) -> Path:
    """The samples, and models that misbehave."""
    shutil.copytree(repository_path(), repository)
    write_model(repository, "echo", echo_config(), {"1/model.py": ECHO})
    write_model(repository, "lies", NUMBER_TO_NUMBER, {"1/model.py": LIES})
    write_model(repository, "fails", NUMBER_TO_NUMBER, {"1/model.py": FAILS})
    write_model(repository, "reuses", NUMBER_TO_NUMBER, {"1/model.py": REUSES})
    write_model(repository, "counts", DECOUPLED, {"1/model.py": COUNTS})
    write_model(repository, "grid", GRID, {"1/model.py": ECHO})
    text = {"IN": ("BYTES", ["n"])}
    write_model(repository, "text", None, {"1/model.onnx": onnx_file("Identity", text, {"OUT": ("BYTES", ["n"])})})
    write_model(repository, "broken_code", NUMBER_TO_NUMBER, {"1/model.py": "\nimport no_such_module\n"})
    write_model(repository, "broken_config", 'max_batch_size: 2\n  max_size: "x"\n', {"1/model.py": ECHO})
    write_model(repository, "broken_onnx", None, {"1/model.onnx": b"not an ONNX file"})
    return repository
