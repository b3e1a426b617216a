"""Promise: a stream answers each of its requests, as they are ready, and a fault of one is told and ends nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from proxy.backend.answers import MOST_AHEAD
from proxy.backend.server import Backend
from proxy.backend.services.streaming import MOST_IN_FLIGHT
from proxy.config.model import Address
from tests.backend import rendezvous
from tests.backend.conftest import UNLIMITED, Local
from tests.backend.models import DECOUPLED, write_model
from tests.backend.test_queue import model_runs
from tests.support.processes import LIVENESS

Stub = service_pb2_grpc.GRPCInferenceServiceStub
Request = service_pb2.ModelInferRequest
FINAL = "triton_final_response"


def asking(model: str, value: int, request_id: str = "", **parameters: bool) -> Request:
    request = Request(model_name=model, id=request_id, raw_input_contents=[value.to_bytes(4, "little", signed=True)])
    request.inputs.add(name="IN", datatype="INT32", shape=[1])
    for name, flag in parameters.items():
        request.parameters[name].bool_param = flag
    return request


def told(response: service_pb2.ModelStreamInferResponse) -> tuple[str, int | None, bool | None]:
    """(id, the number that it holds, whether it is final)."""
    answer = response.infer_response
    value = int.from_bytes(answer.raw_output_contents[0], "little") if answer.raw_output_contents else None
    final = answer.parameters[FINAL].bool_param if FINAL in answer.parameters else None
    return answer.id, value, final


def stream(stub: Stub, *requests: Request) -> list[service_pb2.ModelStreamInferResponse]:
    return list(stub.ModelStreamInfer(iter(requests), timeout=LIVENESS))


def test_no_request_no_answer(stub: Stub) -> None:
    assert stream(stub) == []


def test_a_request_of_a_usual_model_has_one_answer(stub: Stub) -> None:
    request = Request(model_name="simple", id="a")
    for name in ("INPUT0", "INPUT1"):
        request.inputs.add(name=name, datatype="INT32", shape=[1, 16]).contents.int_contents.extend(range(16))
    (answer,) = stream(stub, request)
    assert (answer.infer_response.id, answer.infer_response.parameters[FINAL].bool_param) == ("a", True)
    assert (answer.infer_response.model_name, answer.infer_response.model_version) == ("simple", "1")
    assert [output.name for output in answer.infer_response.outputs] == ["OUTPUT0", "OUTPUT1"]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_decoupled_model_has_any_number_of_answers(stub: Stub, count: int) -> None:
    assert [told(one) for one in stream(stub, asking("counts", count, "x"))] == [
        ("x", value, False) for value in range(count)
    ]


@pytest.mark.parametrize("count", [0, 2])
def test_the_end_of_the_answers_is_told_to_who_asks(stub: Stub, count: int) -> None:
    answers = stream(stub, asking("counts", count, "x", triton_enable_empty_final_response=True))
    assert [told(one) for one in answers] == [("x", value, False) for value in range(count)] + [("x", None, True)]


def test_a_flag_of_a_wrong_type_is_refused(stub: Stub) -> None:
    request = asking("counts", 1, "x")
    request.parameters["triton_enable_empty_final_response"].int64_param = 1
    (answer,) = stream(stub, request)
    assert "triton_enable_empty_final_response" in answer.error_message
    assert "bool_param" in answer.error_message


FAULTS = {
    "unknown model": (asking("nope", 1, "bad"), "'nope'"),
    "unknown version": (Request(model_name="counts", model_version="7", id="bad"), "version 7"),
    "no input": (Request(model_name="counts", id="bad"), "input 'IN' is missing"),
    "a model that raises": (asking("fails", 9, "bad"), "boom: naïve"),
    "a model that raises after answers": (asking("counts", -2, "bad"), "counted enough"),
    "a reserved parameter": (asking("counts", 1, "bad", triton_nonsense=True), "'triton_nonsense'"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_told_and_the_stream_goes_on(stub: Stub, case: tuple[Request, str]) -> None:
    bad, says = case
    answers = stream(stub, bad, asking("counts", 1, "good"), bad)
    wrong = [answer for answer in answers if answer.error_message]
    assert [answer.infer_response.id for answer in wrong] == ["bad", "bad"]
    assert all(says in answer.error_message for answer in wrong)
    assert all("Traceback" not in answer.error_message for answer in wrong)
    assert [told(one) for one in answers if one.infer_response.id == "good"] == [("good", 0, False)]


def test_a_message_that_is_none_is_told(channel: grpc.Channel) -> None:
    raw = channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )
    wrong, good = raw(iter([b"\xff" * 9, asking("counts", 1, "x").SerializeToString()]), timeout=LIVENESS)
    assert "cannot be parsed" in wrong.error_message
    assert told(good) == ("x", 0, False)


def test_a_decoupled_model_needs_a_stream(stub: Stub) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(asking("counts", 1), timeout=LIVENESS)
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "ModelStreamInfer" in failed.value.details()


def test_more_requests_than_are_worked_on_at_a_time(stub: Stub) -> None:
    requests = [asking("counts", number % 3, str(number)) for number in range(3 * MOST_IN_FLIGHT)]
    found: dict[str, list[int | None]] = {request.id: [] for request in requests}
    for answer in stream(stub, *requests):
        found[answer.infer_response.id].append(told(answer)[1])
    assert found == {str(number): list(range(number % 3)) for number in range(3 * MOST_IN_FLIGHT)}


def test_large_messages_in_one_stream(stub: Stub) -> None:
    values = bytes(range(256)) * 12_000
    request = Request(model_name="echo", raw_input_contents=[values], outputs=[{"name": "OUT_UINT8"}])
    request.inputs.add(name="IN_UINT8", datatype="UINT8", shape=[len(values)])
    answers = stream(stub, *[request] * 6)
    assert [one.infer_response.raw_output_contents[0] == values for one in answers] == [True] * 6


async def test_a_fast_request_overtakes_a_slow_one(local: Local) -> None:
    async def requests() -> AsyncIterator[Request]:
        yield asking("waits", 1, "slow")
        await model_runs()
        yield Request(model_name="nope", id="fast")

    async with grpc.aio.insecure_channel(local.target) as channel:
        answers = []
        async for answer in Stub(channel).ModelStreamInfer(requests(), timeout=LIVENESS):
            answers.append(answer.infer_response.id)
            rendezvous.release.set()
    assert answers == ["fast", "slow"]


async def test_compressed_messages(local: Local) -> None:
    rendezvous.release.set()
    name = "z" * 2000  # short ones aren't compressed
    async with grpc.aio.insecure_channel(local.target, compression=grpc.Compression.Gzip) as channel:
        answers = [one async for one in Stub(channel).ModelStreamInfer(iter([asking("waits", 1, name)]))]
    assert [answer.infer_response.id for answer in answers] == [name]


ENDLESS = """
import numpy as np
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        try:
            for value in range(10**9):
                yield {"OUT": np.full(1 << 18, value, np.int32)}
                rendezvous.ran.append(value)
        finally:
            rendezvous.finalized.append("generator")
"""


@pytest.fixture
async def endless(folder: Path) -> AsyncIterator[Local]:
    rendezvous.reset()
    config = DECOUPLED.replace("dims: 1 }\nmodel", "dims: -1 }\nmodel")
    write_model(folder / "models", "endless", config, {"1/model.py": ENDLESS})
    backend = Backend(folder / "models")
    address = await backend.start(Address("127.0.0.1", 0, ""))
    await backend.load()
    yield Local(backend, str(address))
    await backend.stop(grace=5)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIVENESS):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_model_is_told_to_stop_when_its_caller_leaves(endless: Local) -> None:
    async with grpc.aio.insecure_channel(endless.target, options=UNLIMITED) as channel:
        call = Stub(channel).ModelStreamInfer(iter([asking("endless", 1)]))
        first = await call.read()
        assert first.infer_response.raw_output_contents[0][:4] == bytes(4)
        call.cancel()
    await until(lambda: rendezvous.finalized == ["generator"])
    await until(lambda: endless.backend.budget.held == 0)


async def test_a_model_waits_for_a_client_that_does_not_read(endless: Local) -> None:
    async with grpc.aio.insecure_channel(endless.target, options=UNLIMITED) as channel:
        call = Stub(channel).ModelStreamInfer(iter([asking("endless", 1)]))
        await call.read()
        await asyncio.sleep(0.3)
        made = len(rendezvous.ran)
        await asyncio.sleep(0.3)
        # What lies in windows and sockets on the way is a few MB, of 1 MB answers.
        assert len(rendezvous.ran) == made < MOST_AHEAD + 32
        assert endless.backend.budget.held <= 2 * 2**20
        call.cancel()
    await until(lambda: rendezvous.finalized == ["generator"])

