"""A backend in a thread of the tests' own process, served over gRPC and REST, whose inside can be looked at.

Its clients are those that wait, in the test's thread: Triton's, and stubs with Triton's messages.
"""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.http
from tritonclient.grpc import service_pb2, service_pb2_grpc

from proxy.backend.control import Control
from proxy.backend.repository import Loaded
from proxy.backend.server import Backend
from proxy.config.model import Address
from tests.backend import rendezvous
from tests.backend.conftest import UNLIMITED
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, write_model
from tests.support.processes import LIVENESS, wait_for

Stub = service_pb2_grpc.GRPCInferenceServiceStub
Message = service_pb2.ModelInferRequest
Array = np.ndarray[Any, Any]


@dataclass
class Served:
    """`grpc` and `http` are where it listens."""

    backend: Backend
    loop: asyncio.AbstractEventLoop
    grpc: str
    http: str
    stub: Stub

    def loaded(self, model: str) -> Loaded:
        return self.backend.repository.find(model, "")

    def statistics(self, model: str) -> service_pb2.ModelStatistics:
        (found,) = self.stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=model)).model_stats
        return found

    def until_waiting(self, model: str, count: int) -> None:
        """Until so many requests wait for an instance."""
        wait_for(lambda: self.loaded(model).scheduler.waiting == count, f"{count} requests in the queue of {model}")

    def until_idle(self) -> None:
        """Until no call is left, and nothing is held for one."""
        wait_for(lambda: not self.backend.running() and self.backend.budget.held == 0, "the server to hold nothing")


@contextmanager
def serving(repository: Path, control: Control | None = None) -> Iterator[Served]:
    """Serve a model repository until the end of the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="backend", daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(LIVENESS)

    async def start() -> tuple[Backend, Address, Address]:
        backend = Backend(repository, control=control)
        anywhere = Address("127.0.0.1", 0, "")
        grpc_at, http_at = await backend.start(anywhere), await backend.start_http(anywhere)
        await backend.load()
        return backend, grpc_at, http_at

    backend, grpc_at, http_at = run(start())
    try:
        with grpc.insecure_channel(str(grpc_at), options=UNLIMITED) as channel:
            yield Served(backend, loop, str(grpc_at), str(http_at), Stub(channel))
    finally:
        rendezvous.release.set()
        run(backend.stop(grace=5))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def message(model: str, **arrays: np.ndarray[Any, Any]) -> Message:
    """A request with raw contents; arrays of objects are of bytes."""
    request = Message(model_name=model)
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=_datatype(array), shape=array.shape)
        request.raw_input_contents.append(_raw(array))
    return request


def http_input(name: str, array: np.ndarray[Any, Any], binary: bool = True) -> tritonclient.http.InferInput:
    made = tritonclient.http.InferInput(name, array.shape, _datatype(array))
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def answer(response: service_pb2.ModelInferResponse, dtype: str = "<i4") -> np.ndarray[Any, Any]:
    """Its first output."""
    return np.frombuffer(response.raw_output_contents[0], dtype).reshape(response.outputs[0].shape)


def status(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Of a call that fails."""
    try:
        got = call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    raise AssertionError(f"it was answered: {got}")


def told(text: str) -> str:
    """A message for a client, which may hold no traceback."""
    assert not [sign for sign in ("Traceback", "File ", ".py", "\n") if sign in text], text
    return text


def write(repository: Path, name: str, config: str, code: str) -> None:
    """A model in Python, of version 1."""
    write_model(repository, name, config, {"1/model.py": code})


def number(value: int) -> Message:
    """For the model `m`, whose input is one number."""
    return message("m", IN=np.array([value], np.int32))


def counted(served: Served, model: str) -> tuple[int, int, int]:
    """(requests that succeeded, those that failed, those that failed by the model's fault)."""
    stats = served.statistics(model).inference_stats
    return stats.success.count, stats.fail.count, served.loaded(model).scheduler.statistics.failures["BACKEND"]


def others_are_well(served: Served) -> None:
    """The server answers, and so does the model `other`, which gives the number back that it gets."""
    stub = served.stub
    assert stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=LIVENESS).live
    assert stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=LIVENESS).ready
    assert answer(stub.ModelInfer(message("other", IN=np.array([5], np.int32)), timeout=LIVENESS)).tolist() == [5]
    connection = http.client.HTTPConnection(served.http, timeout=LIVENESS)
    connection.request("GET", "/v2/health/ready")
    assert connection.getresponse().status == 200
    connection.close()


Start = Callable[..., Served]


@contextmanager
def starting(folder: Path) -> Iterator[Start]:
    """`start(config, code, control)` serves the model `m`, beside `other`, until the end of the block."""
    with ExitStack() as stack:

        def start(config: str, code: str, control: Control | None = None) -> Served:
            rendezvous.reset()
            write(folder / "models", "m", config, code)
            write(folder / "models", "other", NUMBER_TO_NUMBER, ECHO)
            return stack.enter_context(serving(folder / "models", control))

        yield start


def _datatype(array: np.ndarray[Any, Any]) -> str:
    named = {"f": "FP", "i": "INT", "u": "UINT"}
    if array.dtype.kind == "O":
        return "BYTES"
    return "BOOL" if array.dtype.kind == "b" else f"{named[array.dtype.kind]}{8 * array.dtype.itemsize}"


def _raw(array: np.ndarray[Any, Any]) -> bytes:
    if array.dtype.kind != "O":
        return array.tobytes()
    return b"".join(len(one).to_bytes(4, "little") + one for one in array.ravel().tolist())
