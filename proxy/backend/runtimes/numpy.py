"""Models written in Python: `model.py` with a class Model that works on numpy arrays.

    class Model:
        def initialize(self, config):   # optional; config is a proxy.backend.spec.ModelSpec
            ...
        def execute(self, batch):       # {input name: array} -> {output name: array}
            return {"OUTPUT0": batch["INPUT0"] * 2}
        def finalize(self):             # optional
            ...

Each instance is an object of its own, and all three methods are called in the instance's own thread. With
max_batch_size above 0 every array has a leading batch dimension, and rows must not depend on each other: rows of
several requests may come in one call. Inputs are read-only. Elements of BYTES are `bytes` in an object array.

Where config.pbtxt has `model_transaction_policy { decoupled: true }`, `execute` yields any number of such dicts for a
request, each an answer of its own, and gets one request at a time.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import sys
import traceback
import weakref
from collections.abc import Generator, Iterable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from proxy.backend.errors import LoadError, description
from proxy.backend.protos import model_config_pb2 as pb
from proxy.backend.spec import Device, ModelSpec
from proxy.backend.tensors import Array

_log = logging.getLogger("tensorgate.backend")
_numbers = itertools.count()


class NumpyRuntime:
    """A model.py. Raises LoadError if it can't be imported or has no usable class Model."""

    shared_outputs = True  # execute may return a buffer that it fills again next time

    def __init__(self, path: Path) -> None:
        self._path = path
        # A name that no import statement can spell, and another each time: models must not shadow modules or each
        # other, and one that is loaded anew must not meet what it was before.
        name = f"tensorgate model {next(_numbers)} {path.resolve()}"
        self._model = _model_class(path, name)
        weakref.finalize(self, sys.modules.pop, name, None)

    def describe(self, config: pb.ModelConfig) -> None:
        """Nothing can be read off a model.py: config.pbtxt has to say it all."""

    def choose(self, device: Device) -> Device:
        return Device("cpu")

    def start(self, spec: ModelSpec, device: Device) -> _NumpyInstance:
        if device.kind == "gpu":
            raise LoadError("KIND_GPU: model.py gets its arrays in main memory; use KIND_CPU or KIND_MODEL")
        try:
            model = self._model()
            if hasattr(model, "initialize"):
                model.initialize(spec)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (somebody else's code)
            _log.debug("initialize of %s failed", self._path, exc_info=True)
            raise LoadError(_blame(self._path, error)) from None
        return _NumpyInstance(model, self._path)


class _NumpyInstance:
    def __init__(self, model: Any, path: Path) -> None:
        self._model = model
        self._path = path

    def execute(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._model.execute(batch)
        if not isinstance(outputs, Mapping):
            raise TypeError(f"execute returned {type(outputs).__name__}, not a dict of arrays")
        return outputs

    def stream(self, batch: Mapping[str, Array]) -> Generator[Mapping[str, Array], None, None]:
        answers = self._model.execute(batch)
        if isinstance(answers, Mapping) or not isinstance(answers, Iterable):
            raise TypeError(f"execute of a decoupled model returned {type(answers).__name__}; it has to yield dicts")
        try:
            for outputs in answers:
                if not isinstance(outputs, Mapping):
                    raise TypeError(f"execute yielded {type(outputs).__name__}, not a dict of arrays")
                yield outputs
        finally:
            if isinstance(answers, Generator):
                answers.close()

    def finalize(self) -> None:
        if hasattr(self._model, "finalize"):
            self._model.finalize()


class _Source(SourceFileLoader):
    """Compiles the file as it is now: a cached .pyc is taken for current when second and size agree."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _model_class(path: Path, name: str) -> Any:
    if path.suffix != ".py":
        raise LoadError(f"{_place(path)}: is not a Python file; give it a name that ends in .py")
    module = ModuleType(name)
    loader = _Source(name, str(path))
    module.__spec__ = importlib.util.spec_from_loader(name, loader)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (somebody else's code)
        sys.modules.pop(name, None)
        _log.debug("import of %s failed", path, exc_info=True)
        raise LoadError(_blame(path, error)) from None
    except BaseException:
        sys.modules.pop(name, None)
        raise
    found = getattr(module, "Model", None)
    if not isinstance(found, type) or not callable(getattr(found, "execute", None)):
        sys.modules.pop(name, None)
        raise LoadError(f"{_place(path)}: has no class Model with a method execute(self, batch)")
    return found


def _blame(path: Path, error: BaseException) -> str:
    """`model/1/model.py:12: ValueError: text`: the last line of the model's own file on the way to the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    line = f":{lines[-1]}" if lines else ""
    return f"{_place(path)}{line}: {description(error)}"


def _place(path: Path) -> str:
    return "/".join(path.parts[-3:])
