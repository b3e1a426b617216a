"""Promise: a model that is slow, interrupted, full, loading or at its end takes nothing away from anybody else."""

from __future__ import annotations

import ctypes
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from proxy.backend.control import Control
from tests.backend import rendezvous
from tests.backend.conftest import Running, start_backend
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, WAITS
from tests.backend.serving import (
    Served,
    Start,
    Stub,
    answer,
    counted,
    http_input,
    message,
    number,
    others_are_well,
    starting,
    status,
    told,
    write,
)
from tests.support.processes import LIVENESS, wait_for

BATCHING = "dynamic_batching {}"


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    with starting(folder) as start:
        yield start


def test_models_that_are_slow_hold_up_nothing_else(start: Start) -> None:
    served = start(NUMBER_TO_NUMBER + "instance_group { count: 5 }", WAITS)
    slow = [served.stub.ModelInfer.future(number(value), timeout=LIVENESS) for value in range(5)]
    for _ in slow:
        assert rendezvous.running.acquire(timeout=LIVENESS)
    late = served.stub.ModelInfer.future(number(5), timeout=LIVENESS)
    served.until_waiting("m", 1)
    for _ in range(20):
        others_are_well(served)
    assert served.stub.ModelReady(service_pb2.ModelReadyRequest(name="m"), timeout=LIVENESS).ready
    assert served.statistics("m").inference_count == 0
    assert not any(call.done() for call in [*slow, late])
    rendezvous.release.set()
    assert [answer(call.result()).tolist() for call in [*slow, late]] == [[value] for value in range(6)]
    served.until_idle()


@pytest.mark.parametrize("batching", ["", BATCHING], ids=["alone", "batched"])
def test_what_its_client_cancels_while_all_instances_are_busy_never_runs(start: Start, batching: str) -> None:
    config = "max_batch_size: 8 instance_group { count: 2 }" + NUMBER_TO_NUMBER + batching
    served = start(config, NOTES)
    row = lambda value: message("m", IN=np.array([[value]], np.int32))  # noqa: E731
    busy = []
    for _ in range(2):  # one after the other, or they would be joined
        busy.append(served.stub.ModelInfer.future(row(-1), timeout=LIVENESS))
        assert rendezvous.running.acquire(timeout=LIVENESS)
    waiting = [served.stub.ModelInfer.future(row(value), timeout=LIVENESS) for value in range(6)]
    left = http.client.HTTPConnection(served.http, timeout=LIVENESS)
    inputs = [{"name": "IN", "datatype": "INT32", "shape": [1, 1], "data": [99]}]
    left.request("POST", "/v2/models/m/infer", json.dumps({"inputs": inputs}))
    served.until_waiting("m", 7)
    for value in (0, 2, 5):
        waiting[value].cancel()
    left.close()
    failures = served.loaded("m").scheduler.statistics.failures
    wait_for(lambda: failures["CANCELED"] == 4, "the server to notice")
    rendezvous.release.set()
    assert [answer(waiting[value].result()).tolist() for value in (1, 3, 4)] == [[[value]] for value in (1, 3, 4)]
    assert [call.result().model_name for call in busy] == ["m", "m"]
    assert sorted(rendezvous.ran) == [-1, -1, 1, 3, 4]
    stats = served.statistics("m").inference_stats
    assert (stats.success.count, stats.fail.count) == (5, 4)
    served.until_idle()


NOTES = """
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        rows = batch["IN"]
        if rows[0, 0] == -1:
            rendezvous.execute(-1)
        else:
            rendezvous.ran.extend(rows[:, 0].tolist())
        return {"OUT": rows}
"""


def test_a_full_queue_is_unavailable_at_once(start: Start) -> None:
    served = start(NUMBER_TO_NUMBER + "dynamic_batching { default_queue_policy { max_queue_size: 2 } }", WAITS)
    taken = [served.stub.ModelInfer.future(number(0), timeout=LIVENESS)]
    assert rendezvous.running.acquire(timeout=LIVENESS)
    taken += [served.stub.ModelInfer.future(number(value), timeout=LIVENESS) for value in (1, 2)]
    served.until_waiting("m", 2)
    code, text = status(lambda: served.stub.ModelInfer(number(3), timeout=LIVENESS))
    assert (code, "max_queue_size" in told(text)) == (grpc.StatusCode.UNAVAILABLE, True), text
    with tritonclient.http.InferenceServerClient(served.http, network_timeout=LIVENESS) as client:
        with pytest.raises(InferenceServerException, match="max_queue_size") as failed:
            client.infer("m", [http_input("IN", np.array([4], np.int32))])
        assert failed.value.status() == "503"
    assert not any(call.done() for call in taken)
    rendezvous.release.set()
    assert [answer(call.result()).tolist() for call in taken] == [[0], [1], [2]]
    assert sorted(rendezvous.ran) == [0, 1, 2]
    assert counted(served, "m")[:2] == (3, 2)
    assert served.loaded("m").scheduler.statistics.failures["REJECTED"] == 2
    served.until_idle()


# -- threads that are interrupted from elsewhere

THREADS = """
import threading
import time
from tests.backend import rendezvous

class Model:
    def initialize(self, config):
        rendezvous.ran.append(threading.get_ident())

    def execute(self, batch):
        if batch["IN"][0] == 1:
            rendezvous.running.release()
            while True:
                time.sleep(0.001)
        return {"OUT": batch["IN"]}
"""
INTERRUPTED = 5.0  # seconds in which a request is answered after an interruption: one that is lost never is


def interrupt(thread: int, error: type[BaseException]) -> None:
    """As a model's code might, to end what runs in that thread."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error)) == 1


KILLS = [SystemExit, KeyboardInterrupt, RuntimeError]
EITHER = pytest.mark.parametrize("batching", ["", "dynamic_batching { default_queue_policy { max_queue_size: 9 } }"])


@EITHER
@pytest.mark.parametrize("error", KILLS)
def test_a_thread_that_is_interrupted_while_the_model_runs_goes_on(
    start: Start, batching: str, error: type[BaseException]
) -> None:
    served = start(NUMBER_TO_NUMBER + batching, THREADS)
    (thread,) = rendezvous.ran
    for _ in range(3):
        endless = served.stub.ModelInfer.future(number(1), timeout=LIVENESS)
        assert rendezvous.running.acquire(timeout=LIVENESS)
        behind = served.stub.ModelInfer.future(number(2), timeout=LIVENESS)
        served.until_waiting("m", 1)
        interrupt(thread, error)
        code, text = status(endless.result)
        assert (code, error.__name__ in told(text)) == (grpc.StatusCode.INTERNAL, True), text
        assert answer(behind.result()).tolist() == [2]
    assert counted(served, "m") == (3, 3, 3)
    others_are_well(served)
    served.until_idle()


@EITHER
def test_a_thread_that_is_interrupted_while_it_is_idle_goes_on(start: Start, batching: str) -> None:
    served = start(NUMBER_TO_NUMBER + batching, THREADS)
    (thread,) = rendezvous.ran
    assert answer(served.stub.ModelInfer(number(2), timeout=LIVENESS)).tolist() == [2]
    served.until_idle()
    interrupt(thread, SystemExit)
    # Whether the interruption hits this one is open; that it is answered is not.
    first = served.stub.ModelInfer.future(number(3), timeout=INTERRUPTED)
    if first.exception() is not None:
        assert (first.code(), "interrupted" in told(first.details())) == (grpc.StatusCode.INTERNAL, True)
    assert answer(served.stub.ModelInfer(number(4), timeout=INTERRUPTED)).tolist() == [4]
    assert sum(counted(served, "m")[:2]) == 3
    others_are_well(served)
    served.until_idle()


ANYWHERE = """
import sys

class Model:
    def execute(self, batch):
        at = int(batch["IN"][0])
        if at:
            self.interrupt_at(at)
        return {"OUT": batch["IN"]}

    def interrupt_at(self, at):
        # At that line after the model's own, in the thread's work; a tracer that has raised is off.
        count = 0

        def tracer(frame, event, argument):
            nonlocal count
            if not frame.f_code.co_filename.endswith("scheduler.py"):
                return None
            count += event == "line"
            if count == at:
                raise SystemExit
            return tracer

        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name in ("_work", "_serve"):
                frame.f_trace = tracer
            frame = frame.f_back
        sys.settrace(tracer)
"""
PLACES = 25  # lines that a thread passes from one request to the next, and some more


@EITHER
def test_a_thread_may_be_interrupted_anywhere(start: Start, batching: str) -> None:
    served = start(NUMBER_TO_NUMBER + batching, ANYWHERE)
    for place in range(1, PLACES):
        for value in (place, 0, 0):
            call = served.stub.ModelInfer.future(number(value), timeout=INTERRUPTED)
            if call.exception() is not None:
                assert (call.code(), "interrupted" in told(call.details())) == (grpc.StatusCode.INTERNAL, True), place
        assert call.exception() is None
    served.until_idle()
    assert sum(counted(served, "m")[:2]) == 3 * (PLACES - 1)
    assert served.loaded("m").scheduler._given == 0


# -- loading and ending

EXPLICIT = Control(mode="explicit", startup=("other",))
SLOW_TO_LOAD = """
from tests.backend import rendezvous

class Model:
    def initialize(self, config):
        rendezvous.execute(0)

    def execute(self, batch):
        return {"OUT": batch["IN"]}
"""


def load(served: Served, name: str, **more: Any) -> grpc.Future:
    request = service_pb2.RepositoryModelLoadRequest(model_name=name)
    return served.stub.RepositoryModelLoad.future(request, timeout=LIVENESS, **more)


def unload(served: Served, name: str) -> None:
    served.stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name=name), timeout=LIVENESS)


def test_a_model_that_is_slow_to_load_holds_up_nothing_else(start: Start, folder: Path) -> None:
    served = start(NUMBER_TO_NUMBER, SLOW_TO_LOAD, EXPLICIT)
    write(folder / "models", "quick", NUMBER_TO_NUMBER, ECHO)
    slow = load(served, "m")
    assert rendezvous.running.acquire(timeout=LIVENESS)
    load(served, "quick").result()
    others_are_well(served)
    quick = message("quick", IN=np.array([3], np.int32))
    assert answer(served.stub.ModelInfer(quick, timeout=LIVENESS)).tolist() == [3]
    code, text = status(lambda: served.stub.ModelInfer(number(1), timeout=LIVENESS))
    assert (code, "'m'" in told(text)) == (grpc.StatusCode.UNAVAILABLE, True), text
    assert not slow.done()
    rendezvous.release.set()
    slow.result()
    assert answer(served.stub.ModelInfer(number(1), timeout=LIVENESS)).tolist() == [1]
    served.until_idle()


FINALIZES = """
import sys
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        return {"OUT": batch["IN"]}

    def finalize(self):
        rendezvous.finalized.append("m")
        raise %s
"""


@pytest.mark.parametrize("error", ["ValueError('no end')", "SystemExit(3)", "KeyboardInterrupt"])
def test_a_model_that_fails_at_its_end_has_ended(start: Start, error: str) -> None:
    served = start(NUMBER_TO_NUMBER, FINALIZES % error, EXPLICIT)
    for turn in (1, 2):
        load(served, "m").result()
        assert answer(served.stub.ModelInfer(number(turn), timeout=LIVENESS)).tolist() == [turn]
        unload(served, "m")
        wait_for(lambda turn=turn: rendezvous.finalized == ["m"] * turn, "finalize")
        wait_for(lambda: not served.backend.repository._retiring, "the version to be gone")
        assert status(lambda: served.stub.ModelInfer(number(1), timeout=LIVENESS))[0] is grpc.StatusCode.NOT_FOUND
    others_are_well(served)
    served.until_idle()


TALKS = """
import logging
import sys
import warnings

class Model:
    def execute(self, batch):
        for _ in range(200):
            print("out " * 1000)
            print("err " * 1000, file=sys.stderr)
        logging.getLogger("model").error("%s", "log " * 1000)
        sys.stdout.flush()
        return {"OUT": batch["IN"]}

    def finalize(self):
        raise ValueError("no end")
"""
CLOSES = """
import sys

class Model:
    def execute(self, batch):
        sys.stdout.close()
        sys.stderr.close()
        return {"OUT": batch["IN"]}
"""


@pytest.fixture
def process(folder: Path) -> Iterator[Callable[[], Running]]:
    """Starts a process that serves the models of the test's folder."""
    started: list[Running] = []

    def begin() -> Running:
        started.append(start_backend("backend", folder / "models", "127.0.0.1:0", folder))
        return started[-1]

    yield begin
    for running in started:
        running.process.stop()


def test_a_process_with_models_that_talk_and_fail_at_the_end_ends_well(
    process: Callable[[], Running], folder: Path
) -> None:
    write(folder / "models", "m", NUMBER_TO_NUMBER, TALKS)
    running = process()
    with grpc.insecure_channel(running.target) as channel:
        stub = Stub(channel)
        assert [answer(stub.ModelInfer(number(at), timeout=LIVENESS)).tolist() for at in range(3)] == [[0], [1], [2]]
    running.process.popen.terminate()
    assert running.process.wait() == 0
    log = running.process.log()
    wanted = ("out out", "err err", "log log", "finalize of model m failed", "no end")
    assert [part for part in wanted if part not in log] == []


def test_a_model_that_closes_the_standard_streams_harms_no_other(process: Callable[[], Running], folder: Path) -> None:
    write(folder / "models", "m", NUMBER_TO_NUMBER, CLOSES)
    write(folder / "models", "other", NUMBER_TO_NUMBER, FAILS_ONCE)
    running = process()
    with grpc.insecure_channel(running.target) as channel:
        stub = Stub(channel)
        assert answer(stub.ModelInfer(number(1), timeout=LIVENESS)).tolist() == [1]
        failing, working = (message("other", IN=np.array([value], np.int32)) for value in (1, 2))
        code, text = status(lambda: stub.ModelInfer(failing, timeout=INTERRUPTED))
        assert (code, "boom" in told(text)) == (grpc.StatusCode.INTERNAL, True)
        assert answer(stub.ModelInfer(working, timeout=INTERRUPTED)).tolist() == [2]
    running.process.popen.terminate()
    assert running.process.wait() == 0


FAILS_ONCE = """
class Model:
    def execute(self, batch):
        if batch["IN"][0] == 1:
            raise ValueError("boom")
        return {"OUT": batch["IN"]}
"""
