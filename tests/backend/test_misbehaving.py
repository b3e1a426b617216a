"""Promise: a model that misbehaves fails its own requests, with a reason, and harms nothing and nobody else.

What holds Python's lock in native code, or ends the process, is beyond a server that runs models in its own process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.http
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests.backend import rendezvous
from tests.backend.models import DECOUPLED, ECHO, NUMBER_TO_NUMBER
from tests.backend.serving import (
    Array,
    Message,
    Served,
    Start,
    answer,
    counted,
    http_input,
    message,
    number,
    others_are_well,
    serving,
    starting,
    status,
    told,
    write,
)
from tests.support.processes import LIVENESS, wait_for

PAIRS = """
max_batch_size: 8
input { name: "IN" data_type: TYPE_INT32 dims: 2 }
output { name: "OUT" data_type: TYPE_INT32 dims: 2 }
"""
BATCHING = "dynamic_batching {}"
# A row that begins with -1 waits for the test; one that begins with 1 misbehaves.
CASE = """
import asyncio
import numpy as np
from tests.backend import rendezvous

def fail(error):
    raise error

def write(array):
    array[:] = 7
    return {{"OUT": array}}

def force(array):
    array.flags.writeable = True
    return write(array)

def recurse():
    return recurse()

class Ragged:
    def __array__(self, *more, **named):
        raise RuntimeError("no array")

class Model:
    def execute(self, batch):
        rows = batch["IN"]
        if (rows[:, 0] == -1).any():
            rendezvous.execute(-1)
        if (rows[:, 0] == 1).any():
            return {code}
        return {{"OUT": rows * 2}}
"""
# What execute returns, and what the client is to hear.
FAULTS: dict[str, tuple[str, str]] = {
    "raises": ("fail(ValueError('boom'))", "ValueError: boom"),
    "raises without a text": ("fail(ValueError())", "ValueError"),
    "raises what has a number": ("fail(OSError(2, 'gone'))", "[Errno 2] gone"),
    "SystemExit": ("fail(SystemExit(3))", "SystemExit: 3"),
    "KeyboardInterrupt": ("fail(KeyboardInterrupt)", "KeyboardInterrupt"),
    "StopIteration": ("next(iter(()))", "StopIteration"),
    "GeneratorExit": ("fail(GeneratorExit())", "GeneratorExit"),
    "CancelledError": ("fail(asyncio.CancelledError())", "CancelledError"),
    "out of memory": ("np.empty(2**58)", "Unable to allocate"),
    "calls itself": ("recurse()", "RecursionError"),
    "None": ("None", "returned NoneType, not a dict"),
    "text": ("'nothing'", "returned str, not a dict"),
    "an array": ("rows", "returned ndarray, not a dict"),
    "a list of pairs": ("[('OUT', rows)]", "returned list, not a dict"),
    "a generator": ("({'OUT': one} for one in [rows])", "returned generator, not a dict"),
    "no output": ("{}", "returned no 'OUT'"),
    "another output": ("{'OTHER': rows}", "'OTHER', which is not one of its outputs"),
    "one output too many": ("{'OUT': rows, 'OTHER': rows}", "'OTHER', which is not one of its outputs"),
    "a name that is no text": ("{1: rows}", "'1', which is not one of its outputs"),
    "integers too large": ("{'OUT': rows.astype('i8')}", "'OUT' as int64, which is not INT32"),
    "numbers without a sign": ("{'OUT': rows.astype('u4')}", "'OUT' as uint32"),
    "floats": ("{'OUT': rows.astype('f4')}", "'OUT' as float32"),
    "objects": ("{'OUT': rows.astype(object)}", "'OUT' as object"),
    "None for an array": ("{'OUT': None}", "'OUT'"),
    "text for an array": ("{'OUT': 'x'}", "'OUT'"),
    "a dict for an array": ("{'OUT': {'a': 1}}", "'OUT'"),
    "a structure": ("{'OUT': np.zeros(rows.shape, 'i4,i4')}", "'OUT' as"),
    "times": ("{'OUT': rows.astype('m8[s]')}", "'OUT' as timedelta64"),
    "lists of unequal length": ("{'OUT': [[1], [1, 2]]}", "ValueError"),
    "what makes no array": ("{'OUT': Ragged()}", "RuntimeError: no array"),
    "a number": ("{'OUT': np.int32(1)}", "'OUT' with shape []"),
    "a row too few": ("{'OUT': rows[:-1]}", "'OUT' with shape ["),
    "a row too many": ("{'OUT': np.concatenate([rows, rows[:1]])}", "'OUT' with shape ["),
    "no rows": ("{'OUT': rows[:0]}", "'OUT' with shape [0, 2]"),
    "without its rows": ("{'OUT': rows.ravel()}", "'OUT' with shape ["),
    "a column too few": ("{'OUT': rows[:, :1]}", "1], which is not ["),
    "a dimension too many": ("{'OUT': rows[..., None]}", "2, 1], which is not ["),
    "writes to its input": ("write(rows)", "read-only"),
    "forces its way to its input": ("force(rows.reshape(rows.shape))", "cannot set WRITEABLE flag"),
}

HEALTHY = np.array([[2, 3]], np.int32)
FAULTY = np.array([[1, 3]], np.int32)
WAITING = np.array([[-1, 0]], np.int32)


def is_well(served: Served, model: str) -> None:
    """It answers, as do the others, and the server holds nothing for what failed."""
    assert answer(served.stub.ModelInfer(message(model, IN=HEALTHY), timeout=LIVENESS)).tolist() == [[4, 6]]
    others_are_well(served)
    served.until_idle()


@pytest.fixture(autouse=True)
def meeting() -> None:
    rendezvous.reset()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model for each of FAULTS, by its number."""
    repository = tmp_path_factory.mktemp("faulty") / "models"
    for at, (code, _) in enumerate(FAULTS.values()):
        write(repository, f"m{at}", PAIRS + BATCHING, CASE.format(code=code))
    write(repository, "other", NUMBER_TO_NUMBER, ECHO)
    with serving(repository) as served:
        yield served


@pytest.fixture(params=list(FAULTS))
def fault(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(the model, what its clients are to hear)."""
    return f"m{list(FAULTS).index(request.param)}", FAULTS[request.param][1]


def test_a_fault_is_told_over_grpc(faulty: Served, fault: tuple[str, str]) -> None:
    model, says = fault
    before = counted(faulty, model)
    code, text = status(lambda: faulty.stub.ModelInfer(message(model, IN=FAULTY), timeout=LIVENESS))
    assert (code, says in told(text)) == (grpc.StatusCode.INTERNAL, True), text
    assert text.startswith(f"model '{model}' failed: ")
    is_well(faulty, model)
    success, fail, own = before
    assert counted(faulty, model) == (success + 1, fail + 1, own + 1)


def test_a_fault_is_told_over_rest(faulty: Served, fault: tuple[str, str]) -> None:
    model, says = fault
    with tritonclient.http.InferenceServerClient(faulty.http, network_timeout=LIVENESS) as client:
        for _ in range(2):
            with pytest.raises(InferenceServerException) as failed:
                client.infer(model, [http_input("IN", FAULTY)])
            assert says in told(failed.value.message()), failed.value.message()
        assert client.infer(model, [http_input("IN", HEALTHY)]).as_numpy("OUT").tolist() == [[4, 6]]
    is_well(faulty, model)


def test_a_fault_fails_those_that_ran_together_and_none_after_them(faulty: Served, fault: tuple[str, str]) -> None:
    model, says = fault
    before, executions = counted(faulty, model), faulty.statistics(model).execution_count
    busy = faulty.stub.ModelInfer.future(message(model, IN=WAITING), timeout=LIVENESS)
    assert rendezvous.running.acquire(timeout=LIVENESS)
    sent = (HEALTHY, FAULTY, np.repeat(HEALTHY, 2, axis=0))
    calls = [faulty.stub.ModelInfer.future(message(model, IN=rows), timeout=LIVENESS) for rows in sent]
    faulty.until_waiting(model, 3)
    rendezvous.release.set()
    assert answer(busy.result()).tolist() == [[-2, 0]]
    for call in calls:
        code, text = status(call.result)
        assert (code, says in told(text)) == (grpc.StatusCode.INTERNAL, True), text
    is_well(faulty, model)
    success, fail, own = before
    assert counted(faulty, model) == (success + 2, fail + 3, own + 3)
    assert faulty.statistics(model).execution_count == executions + 3


# -- elements of BYTES

TEXTS = """
input { name: "IN" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_STRING dims: -1 }
"""
ELEMENTS = """
import numpy as np

def objects(*elements):
    array = np.empty(len(elements), object)
    array[:] = elements
    return array

ANSWERS = [
    objects(b"a", "\\u00fc"), objects(b"a", 5), objects(None), objects(b"a", [b"b"]), objects(bytearray(b"a")),
    objects("\\udcff"), objects(np.zeros(2)), np.array([1, 2]), np.array([[b"a"]], object), np.array(b"a", object),
]

class Model:
    def execute(self, batch):
        return {"OUT": ANSWERS[int(batch["IN"][0])]}
"""
ELEMENT_FAULTS = [
    "bytes or str, not int", "bytes or str, not NoneType", "bytes or str, not list", "bytes or str, not bytearray",
    "surrogates not allowed", "bytes or str, not ndarray", "as int64, which is not BYTES", "with shape [1, 1]",
    "with shape []",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("texts") / "models"
    write(repository, "texts", TEXTS, ELEMENTS)
    write(repository, "other", NUMBER_TO_NUMBER, ECHO)
    with serving(repository) as served:
        yield served


@pytest.mark.parametrize("number", range(1, len(ELEMENT_FAULTS) + 1))
def test_elements_that_are_no_text_are_told(texts: Served, number: int) -> None:
    call = lambda at: texts.stub.ModelInfer(message("texts", IN=np.array([at], np.int32)), timeout=LIVENESS)  # noqa: E731
    code, text = status(lambda: call(number))
    assert (code, ELEMENT_FAULTS[number - 1] in told(text)) == (grpc.StatusCode.INTERNAL, True), text
    assert call(0).raw_output_contents[0] == b"\1\0\0\0a\2\0\0\0\xc3\xbc"
    others_are_well(texts)
    texts.until_idle()


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    with starting(folder) as start:
        yield start


# -- what a model does to arrays

KEEPS = """
import numpy as np

class Model:
    def initialize(self, config):
        self.kept = []
        self.first = []

    def execute(self, batch):
        rows = batch["IN"]
        for array, copy in zip(self.kept, self.first):
            if not (array == copy).all():
                raise ValueError("an input changed")
        self.kept.append(rows)
        self.first.append(rows.copy())
        return {"OUT": rows}
"""
SAME = """
import numpy as np

class Model:
    def initialize(self, config):
        self.answer = np.zeros((8, 2), np.int32)

    def execute(self, batch):
        count = len(batch["IN"])
        self.answer[:] = -9
        self.answer[:count] = batch["IN"]
        return {"OUT": self.answer[:count]}
"""


@pytest.mark.parametrize("code", [KEEPS, SAME], ids=["keeps its inputs", "returns the same buffer"])
@pytest.mark.parametrize("batching", ["", BATCHING], ids=["alone", "batched"])
def test_nobody_sees_what_is_not_theirs(start: Start, code: str, batching: str) -> None:
    served = start(PAIRS + batching, code)
    counts = enumerate((1, 3, 2, 8) * 20)
    sent = [np.arange(2 * rows, dtype=np.int32).reshape(rows, 2) + 100 * at for at, rows in counts]
    calls = [served.stub.ModelInfer.future(message("m", IN=rows), timeout=LIVENESS) for rows in sent]
    for rows, call in zip(sent, calls, strict=True):
        assert answer(call.result()).tolist() == rows.tolist()
    served.until_idle()


WRITES_ANY = """
class Model:
    def execute(self, batch):
        (name, array), = batch.items()
        array[:1] = array[:1]
        return {"OUT": array}
"""


def any_type(kind: str) -> str:
    return f"""
input {{ name: "IN" data_type: TYPE_{kind} dims: -1 }}
output {{ name: "OUT" data_type: TYPE_{kind} dims: -1 }}
"""


def typed(request: Message) -> Message:
    """The same request with typed contents."""
    (raw,) = request.raw_input_contents
    del request.raw_input_contents[:]
    request.inputs[0].contents.int_contents.extend(np.frombuffer(raw, "<i4").tolist())
    return request


NUMBERS = np.arange(3, dtype=np.int32)
LARGE = np.arange(2**19, dtype=np.int32)  # comes in pieces
WORDS = np.array([b"a", b"bc"], object)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        pytest.param("INT32", message("m", IN=NUMBERS), id="raw"),
        pytest.param("INT32", message("m", IN=LARGE), id="large"),
        pytest.param("BOOL", message("m", IN=np.array([True, False])), id="booleans"),
        pytest.param("BOOL", message("m", IN=np.array([2, 1], np.uint8)), id="odd booleans"),
        pytest.param("INT32", typed(message("m", IN=NUMBERS)), id="typed"),
        pytest.param("STRING", message("m", IN=WORDS), id="strings"),
    ],
)
def test_inputs_are_read_only_however_they_came(start: Start, kind: str, sent: Message) -> None:
    served = start(any_type(kind), WRITES_ANY)
    if kind == "BOOL":
        sent.inputs[0].datatype = "BOOL"
    code, text = status(lambda: served.stub.ModelInfer(sent, timeout=LIVENESS))
    assert (code, "read-only" in told(text)) == (grpc.StatusCode.INTERNAL, True), text
    served.until_idle()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("array", [NUMBERS, LARGE], ids=["small", "large"])
def test_inputs_over_rest_are_read_only(start: Start, array: Array, binary: bool) -> None:
    served = start(any_type("INT32"), WRITES_ANY)
    with (
        tritonclient.http.InferenceServerClient(served.http, network_timeout=LIVENESS) as client,
        pytest.raises(InferenceServerException, match="read-only"),
    ):
        client.infer("m", [http_input("IN", array, binary)])
    served.until_idle()


def test_nan_is_an_answer_like_any_other(start: Start) -> None:
    served = start(NUMBER_TO_NUMBER.replace('"OUT" data_type: TYPE_INT32', '"OUT" data_type: TYPE_FP32'), NAN)
    raw = served.stub.ModelInfer(number(0), timeout=LIVENESS).raw_output_contents[0]
    assert raw == np.array([np.nan], "<f4").tobytes()
    with tritonclient.http.InferenceServerClient(served.http, network_timeout=LIVENESS) as client:
        result = client.infer("m", [http_input("IN", np.zeros(1, np.int32))])
        assert np.isnan(result.as_numpy("OUT")).all()
    assert counted(served, "m")[:2] == (2, 0)


NAN = """
import numpy as np

class Model:
    def execute(self, batch):
        return {"OUT": np.array([np.nan], np.float32)}
"""

# -- decoupled models

STREAMS = """
import numpy as np
from tests.backend import rendezvous

class Model:
    def initialize(self, config):
        self.answer = np.zeros(1, np.int32)

    def execute(self, batch):
        number = int(batch["IN"][0])
        if number == 3:
            return self.clings()
        return self.answers(number)

    def answers(self, number):
        for value in range(4):
            self.answer[0] = value
            yield {"OUT": self.answer}
        if number == 1:
            yield {"OUT": np.zeros(2, np.int32)}
        if number == 2:
            yield "nothing"
        if number == 4:
            batch["IN"][:] = 0
        if number == 5:
            raise SystemExit(3)
        if number == 6:
            next(iter(()))

    def clings(self):
        try:
            for value in range(10**9):
                self.answer[0] = value
                yield {"OUT": self.answer}
        finally:
            rendezvous.finalized.append("m")
            yield {"OUT": self.answer}
"""
STREAM_FAULTS = {
    1: "with shape [2]", 2: "yielded str, not a dict", 4: "NameError", 5: "SystemExit: 3", 6: "StopIteration",
}  # fmt: skip


def streamed(served: Served, value: int) -> list[service_pb2.ModelStreamInferResponse]:
    return list(served.stub.ModelStreamInfer(iter([number(value)]), timeout=LIVENESS))


@pytest.mark.parametrize("value", list(STREAM_FAULTS))
def test_a_fault_between_answers_ends_that_stream_alone(start: Start, value: int) -> None:
    served = start(DECOUPLED, STREAMS)
    came = streamed(served, value)
    assert [int(answer(one.infer_response)[0]) for one in came[:4]] == [0, 1, 2, 3]
    assert STREAM_FAULTS[value] in told(came[4].error_message)
    assert [one.error_message for one in streamed(served, 0)] == [""] * 4
    assert counted(served, "m") == (1, 1, 1)
    others_are_well(served)
    served.until_idle()


def test_a_generator_that_will_not_end_is_left(start: Start) -> None:
    served = start(DECOUPLED, STREAMS)
    call = served.stub.ModelStreamInfer(iter([number(3)]))
    assert int(answer(next(call).infer_response)[0]) == 0
    call.cancel()
    wait_for(lambda: rendezvous.finalized == ["m"], "the model to be told")
    assert len(streamed(served, 0)) == 4
    others_are_well(served)
    served.until_idle()
