"""Networks of a size that counts, for tests and benchmarks: one made here, and one that people use.

`convnet` gains from batching, because running it once means reading all its weights once, whatever the batch size.
`magika_file` finds the network by which magika (Apache-2.0) tells kinds of files apart; its wheel carries it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.backend.models import write_model
from tests.backend.onnxfile import _bytes, _number, _value
from tests.peers import missing

CONVNET_INPUT, CONVNET_OUTPUT = "image", "scores"
CONVNET_SHAPE = (1, 28, 28)
CONVNET_CLASSES = 10
CHANNELS = (8, 16)
HIDDEN = 16384
INSTALL_MAGIKA = "pip install 'magika>=1,<2'"
MAGIKA_END, MAGIKA_BLOCK, MAGIKA_PADDING = 1024, 4096, 256  # config.min.json beside the network says the same
MAGIKA_LABELS = 214
_FLOAT = 1
_INT, _INTS = 2, 7  # AttributeProto.AttributeType

Array = npt.NDArray[np.float32]


def convnet(seed: int = 7, hidden: int | None = None) -> bytes:
    """An ONNX file: image [n, 1, 28, 28] -> scores [n, 10], both FP32. The same seed makes the same file.

    Two convolutions of stride 2, and a layer of 784 x `hidden` weights, by default 16384: 52 MB, more than a core's
    share of most caches.
    """
    random = np.random.default_rng(seed)
    first, second = CHANNELS
    hidden = HIDDEN if hidden is None else hidden
    flat = second * 7 * 7
    weights = {
        "conv1": _weights(random, first, 1, 3, 3),
        "conv2": _weights(random, second, first, 3, 3),
        "dense": _weights(random, hidden, flat),
        "last": _weights(random, CONVNET_CLASSES, hidden),
    }
    image = [_ints("strides", 2, 2), _ints("pads", 1, 1, 1, 1)]
    rows = [_int("transB", 1)]  # weights lie as [outputs, inputs], as exporters write them
    nodes = [
        _node("Conv", [CONVNET_INPUT, "conv1"], "c1", *image),
        _node("Relu", ["c1"], "r1"),
        _node("Conv", ["r1", "conv2"], "c2", *image),
        _node("Relu", ["c2"], "r2"),
        _node("Flatten", ["r2"], "flat"),
        _node("Gemm", ["flat", "dense"], "d", *rows),
        _node("Relu", ["d"], "r3"),
        _node("Gemm", ["r3", "last"], CONVNET_OUTPUT, *rows),
    ]
    graph = [_bytes(1, node) for node in nodes] + [_bytes(2, b"convnet")]
    graph += [_bytes(5, _tensor(name, array)) for name, array in weights.items()]
    graph.append(_bytes(11, _value(CONVNET_INPUT, "FP32", ["n", *CONVNET_SHAPE])))
    graph.append(_bytes(12, _value(CONVNET_OUTPUT, "FP32", ["n", CONVNET_CLASSES])))
    return _number(1, 8) + _bytes(7, b"".join(graph)) + _bytes(8, _bytes(1, b"") + _number(2, 17))


def convnet_config(most_rows: int, batching: str) -> str:
    """config.pbtxt for it; `batching` is the text inside dynamic_batching, or "" for none. One thread, one instance."""
    dims, batch = list(CONVNET_SHAPE), f"dynamic_batching {{ {batching} }}" if batching else ""
    return f"""
backend: "onnxruntime"
max_batch_size: {most_rows}
input {{ name: "{CONVNET_INPUT}" data_type: TYPE_FP32 dims: {dims} }}
output {{ name: "{CONVNET_OUTPUT}" data_type: TYPE_FP32 dims: [{CONVNET_CLASSES}] }}
instance_group {{ kind: KIND_CPU count: 1 }}
parameters: {{ key: "intra_op_thread_count" value: {{ string_value: "1" }} }}
{batch}
"""


def write_convnet(repository: Path, name: str, most_rows: int, batching: str, hidden: int | None = None) -> Path:
    """Put it into a model repository; returns the model's directory."""
    files = {"1/model.onnx": convnet(hidden=hidden)}
    return write_model(repository, name, convnet_config(most_rows, batching), files)


def convnet_image(seed: int = 0, rows: int = 1) -> Array:
    return np.random.default_rng(seed).random((rows, *CONVNET_SHAPE), dtype=np.float32)


def magika_file() -> Path | None:
    """The network of the installed magika: bytes INT32 [n, 2048] (0 to 255, 256 where there are none: 1024 from the
    start of a file, 1024 from its end) -> target_label FP32 [n, 214]. None where magika isn't installed."""
    # Without importing it: only its file is wanted.
    found = importlib.util.find_spec("magika")
    places = list(found.submodule_search_locations or []) if found else []
    files = sorted(file for place in places for file in Path(place).glob("models/*/model.onnx"))
    return files[-1] if files else None


def magika_config(most_rows: int, batching: str) -> str:
    """config.pbtxt for it, as `convnet_config`."""
    batch = f"dynamic_batching {{ {batching} }}" if batching else ""
    return f"""
backend: "onnxruntime"
max_batch_size: {most_rows}
input {{ name: "bytes" data_type: TYPE_INT32 dims: {2 * MAGIKA_END} }}
output {{ name: "target_label" data_type: TYPE_FP32 dims: {MAGIKA_LABELS} }}
instance_group {{ kind: KIND_CPU count: 1 }}
parameters: {{ key: "intra_op_thread_count" value: {{ string_value: "1" }} }}
{batch}
"""


def require_magika() -> Path:
    """The same; the running test is skipped, or fails where peers are required, with how to install it."""
    file = magika_file()
    return file if file is not None else missing("magika", INSTALL_MAGIKA)


def magika_row(content: bytes) -> npt.NDArray[np.int32]:
    """What the network takes of a file's content: INT32 [2048]."""
    # Spaces at the two ends say nothing of the kind of file: it was trained without them.
    first, last = content[:MAGIKA_BLOCK].lstrip()[:MAGIKA_END], content[-MAGIKA_BLOCK:].rstrip()[-MAGIKA_END:]
    row = np.full(2 * MAGIKA_END, MAGIKA_PADDING, np.int32)
    row[: len(first)] = list(first)
    row[len(row) - len(last) :] = list(last)
    return row


def magika_labels(file: Path) -> list[str]:
    """The kinds of files, as the network numbers them: python, markdown, npz, onnx, ..."""
    labels = json.loads(file.with_name("config.min.json").read_text())["target_labels_space"]
    return [str(label) for label in labels]


def _weights(random: np.random.Generator, *shape: int) -> Array:
    # By the number of inputs of each output, so that scores stay of the size of the image's values.
    inputs = int(np.prod(shape[1:]))
    return random.standard_normal(shape, dtype=np.float32) * np.float32((2 / inputs) ** 0.5)


def _node(operator: str, inputs: list[str], output: str, *attributes: bytes) -> bytes:
    fields = [_bytes(1, name.encode()) for name in inputs] + [_bytes(2, output.encode()), _bytes(4, operator.encode())]
    return b"".join([*fields, *(_bytes(5, attribute) for attribute in attributes)])


def _ints(name: str, *values: int) -> bytes:
    return _bytes(1, name.encode()) + b"".join(_number(8, value) for value in values) + _number(20, _INTS)


def _int(name: str, value: int) -> bytes:
    return _bytes(1, name.encode()) + _number(3, value) + _number(20, _INT)


def _tensor(name: str, array: Array) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, _FLOAT) + _bytes(8, name.encode()) + _bytes(9, array.tobytes())
