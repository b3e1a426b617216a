"""Promise: what asks for a GPU gets one and numbers as good, or a reason; what leaves it open is told what it got."""

from __future__ import annotations

import functools
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from proxy.backend.samples import heldout, repository_path
from tests.backend import networks
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, write_model
from tests.backend.serving import Array, Served, answer, message, serving, status
from tests.support.processes import LIVENESS

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
HIDDEN = 256
GROUP = re.compile(r"instance_group \{.*\}")
# Of scores about as large as 1: CUDA multiplies with 10 bits of each number (TF32) unless it is told not to.
TF32, FULL = 2e-2, 1e-4
PRECISE = """
optimization { execution_accelerators { gpu_execution_accelerator {
  name: "cuda"
  parameters { key: "use_tf32" value: "0" }
} } }
"""


@functools.cache
def cuda_works() -> bool:
    """Whether ONNX Runtime has CUDA, and a network runs on it: driver and libraries may be missing."""
    if CUDA not in onnxruntime.get_available_providers():
        return False
    try:
        session = onnxruntime.InferenceSession(networks.convnet(hidden=16), providers=[CUDA])
        session.run(None, {networks.CONVNET_INPUT: networks.convnet_image()})
    except Exception:  # its exceptions have no common base
        return False
    return CUDA in session.get_providers()


needs_gpu = pytest.mark.skipif(not cuda_works(), reason="needs a GPU, and ONNX Runtime with CUDA (tensorgate[gpu])")
without_gpu = pytest.mark.skipif(cuda_works(), reason="there is a GPU")


def group(text: str) -> str:
    return f"instance_group {{ {text} }}"


def write_convnet(repository: Path, name: str, instances: str, more: str = "") -> None:
    """The network with these instances; as KIND_AUTO by default if the text is empty."""
    config = GROUP.sub(lambda _: instances, networks.convnet_config(16, "")) + more
    write_model(repository, name, config, {"1/model.onnx": networks.convnet(hidden=HIDDEN)})


def write_digits(repository: Path, name: str, instances: str) -> None:
    made = shutil.copytree(repository_path() / "digits", repository / name)
    config = made / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "digits"', f'name: "{name}"') + instances)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("gpu") / "models"
    for name, instances in INSTANCES.items():
        write_convnet(repository, name, instances)
    write_convnet(repository, "precise", group("kind: KIND_GPU"), PRECISE)
    write_digits(repository, "digits_gpu", group("kind: KIND_GPU"))
    write_digits(repository, "digits", group("kind: KIND_CPU"))
    write_model(repository, "python_gpu", NUMBER_TO_NUMBER + group("kind: KIND_GPU"), {"1/model.py": ECHO})
    write_model(repository, "python_auto", NUMBER_TO_NUMBER + group("kind: KIND_AUTO"), {"1/model.py": ECHO})
    logger = logging.getLogger("tensorgate.backend")
    kept, level = Kept(), logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    try:
        with serving(repository) as served:
            LINES[:] = kept.lines
            yield served
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)


INSTANCES = {
    "cpu": group("kind: KIND_CPU"),
    "gpu": group("kind: KIND_GPU"),
    "gpu_0": group("kind: KIND_GPU gpus: [0] count: 2"),
    "gpu_99": group("kind: KIND_GPU gpus: [99]"),
    "both": group("kind: KIND_GPU") + group("kind: KIND_CPU"),
    "auto": group("kind: KIND_AUTO"),
    "auto_0": group("kind: KIND_AUTO gpus: [0]"),
    "auto_2": group("count: 2"),
    "unsaid": "",
}
AUTO = ("auto", "auto_0", "auto_2", "unsaid")
LINES: list[str] = []  # of the log, while the models were loaded


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def instances(served: Served, model: str) -> list[tuple[str, list[int], int]]:
    """(kind, gpus, count) of each group, as ModelConfig shows it."""
    config = served.stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=LIVENESS).config
    return [(ModelInstanceGroup.Kind.Name(one.kind), list(one.gpus), one.count) for one in config.instance_group]


def scores(served: Served, model: str, images: Array) -> Array:
    return answer(served.stub.ModelInfer(message(model, image=images), timeout=LIVENESS), "<f4")


def here(images: Array) -> Array:
    session = onnxruntime.InferenceSession(networks.convnet(hidden=HIDDEN), providers=[CPU])
    made: Array = session.run(None, {networks.CONVNET_INPUT: images})[0]
    return made


def refused(served: Served, model: str) -> str:
    request = message(model, image=networks.convnet_image())
    code, text = status(lambda: served.stub.ModelInfer(request, timeout=LIVENESS))
    assert code is grpc.StatusCode.UNAVAILABLE
    return text


def others_are_served(served: Served) -> None:
    images = networks.convnet_image(rows=2)
    np.testing.assert_allclose(scores(served, "cpu", images), here(images), rtol=1e-6, atol=1e-6)
    pixels, digits = heldout()
    response = served.stub.ModelInfer(message("digits", pixels=pixels[:9]), timeout=LIVENESS)
    assert answer(response, "<i8").ravel().tolist() == digits[:9].tolist()


# -- with or without a GPU


def test_python_models_have_no_gpu(served: Served) -> None:
    request = message("python_gpu", IN=np.zeros(1, np.int32))
    code, text = status(lambda: served.stub.ModelInfer(request, timeout=LIVENESS))
    assert (code, "KIND_GPU" in text, "use KIND_CPU" in text) == (grpc.StatusCode.UNAVAILABLE, True, True), text
    assert instances(served, "python_auto") == [("KIND_CPU", [], 1)]
    others_are_served(served)


def test_a_gpu_that_is_not_there_is_told(served: Served) -> None:
    text = refused(served, "gpu_99")
    assert "GPU" in text or "CUDA" in text
    assert "Traceback" not in text
    others_are_served(served)


def test_what_an_open_choice_came_to_is_shown_and_used(served: Served) -> None:
    kinds = [[kind for kind, _, _ in instances(served, model)] for model in AUTO]
    assert kinds == [["KIND_GPU" if cuda_works() else "KIND_CPU"]] * len(AUTO)
    taken = "GPU 0" if cuda_works() else "the CPU"
    assert [f"model {model}: KIND_AUTO takes {taken}" in LINES for model in AUTO] == [True] * len(AUTO)
    images = networks.convnet_image(rows=3)
    for model in AUTO:
        np.testing.assert_allclose(scores(served, model, images), here(images), rtol=TF32, atol=TF32)
    assert [count for _, _, count in instances(served, "auto_2")] == [2]


# -- without


@without_gpu
@pytest.mark.parametrize("model", ["gpu", "gpu_0", "both"])
def test_without_a_gpu_the_reason_is_told_and_others_are_served(served: Served, model: str) -> None:
    text = refused(served, model)
    assert "KIND_GPU: " in text
    assert "use KIND_CPU" in text
    assert f"model '{model}'" in text
    assert any(line.startswith(f"model {model} version 1 is not ready: KIND_GPU: ") for line in LINES)
    index = served.stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=LIVENESS).models
    (entry,) = [one for one in index if one.name == model]
    assert (entry.state, "KIND_GPU" in entry.reason) == ("UNAVAILABLE", True)
    others_are_served(served)


@without_gpu
def test_an_open_choice_forgets_its_gpus(served: Served) -> None:
    assert instances(served, "auto_0") == [("KIND_CPU", [], 1)]


# -- with


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("model", "most"), [("gpu", TF32), ("gpu_0", TF32), ("both", TF32), ("precise", FULL)])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_the_gpu_agrees_with_the_cpu(served: Served, model: str, most: float, rows: int) -> None:
    images = networks.convnet_image(seed=rows, rows=rows)
    wanted = here(images)
    for _ in range(4):  # for each instance
        np.testing.assert_allclose(scores(served, model, images), wanted, rtol=most, atol=most)


def recognized(served: Served, model: str, pixels: Array) -> tuple[Array, Array]:
    """(labels, probabilities)."""
    labels, probabilities = served.stub.ModelInfer(message(model, pixels=pixels), timeout=LIVENESS).raw_output_contents
    return np.frombuffer(labels, "<i8"), np.frombuffer(probabilities, "<f4").reshape(-1, 10)


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_reads_digits_as_the_cpu(served: Served) -> None:
    pixels = heldout()[0]
    for at in range(0, 320, 64):
        labels, probabilities = recognized(served, "digits", pixels[at : at + 64])
        gpu_labels, gpu_probabilities = recognized(served, "digits_gpu", pixels[at : at + 64])
        np.testing.assert_allclose(gpu_probabilities, probabilities, atol=TF32)
        sure = probabilities.max(axis=1) > 0.6
        assert sure.sum() > 50
        np.testing.assert_array_equal(gpu_labels[sure], labels[sure])


@pytest.mark.gpu
@needs_gpu
def test_the_network_does_run_on_the_gpu(served: Served) -> None:
    sessions = served.loaded("gpu").scheduler._runtime._sessions  # type: ignore[attr-defined]
    assert {device.kind: session.get_providers()[0] for device, session in sessions.items()}["gpu"] == CUDA


@pytest.mark.gpu
@needs_gpu
def test_instances_of_a_group_with_gpus(served: Served) -> None:
    assert instances(served, "gpu_0") == [("KIND_GPU", [0], 2)]
    assert [kind for kind, _, _ in instances(served, "both")] == ["KIND_GPU", "KIND_CPU"]


@pytest.mark.gpu
@needs_gpu
def test_clients_of_the_gpu_get_their_own_rows(served: Served) -> None:
    images = networks.convnet_image(rows=12)
    wanted = here(images)
    picks = [np.random.default_rng(at).integers(0, 12, 1 + at % 7) for at in range(64)]
    with ThreadPoolExecutor(8) as pool:
        came = list(pool.map(lambda picked: scores(served, "gpu_0", images[picked]), picks))
    for picked, got in zip(picks, came, strict=True):
        np.testing.assert_allclose(got, wanted[picked], rtol=TF32, atol=TF32)
