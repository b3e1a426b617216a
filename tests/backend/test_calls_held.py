"""Promise: what a call costs in memory is counted when it comes into being, bounded, and given back with the call."""

from __future__ import annotations

import asyncio
import gc
import gzip
import re
import socket
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

from proxy.backend import scheduler
from proxy.backend.answers import Answers
from proxy.backend.budget import Budget
from proxy.backend.cache import ResponseCache
from proxy.backend.errors import Code, InferenceError
from proxy.backend.execution import Output
from proxy.backend.services.compression import Inflater
from proxy.backend.services.http2 import Connections, ServerProtocol
from proxy.backend.services.messages import Heads
from proxy.backend.services.wire import MOST_GROWTH
from proxy.backend.tensors import DATATYPES, to_raw
from tests.backend import rendezvous
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, WAITS
from tests.backend.serving import Message, Served, Start, number
from tests.backend.test_calls import (
    CANCEL,
    INFER,
    STREAM,
    VECTOR,
    Connect,
    asking,
    connect,
    held,
    inside,
    numbers,
    start,
    typed,
)
from tests.support.processes import LIVENESS, wait_for
from tests.support.rawh2 import H2Client, Reply, grpc_headers, grpc_message

__all__ = ["connect", "start"]

MIB = 2**20
RESOURCE_EXHAUSTED = "8"
UNAVAILABLE = "14"


def refused(reply: Reply) -> str:
    """The message of a call that goes over a limit."""
    assert reply.grpc_status == RESOURCE_EXHAUSTED, reply
    return reply.grpc_message


def more_than_is_left(said: str) -> int:
    """How many bytes there was no room for."""
    found = re.search(r"; (\d+) more would exceed its limit", said)
    assert found, said
    return int(found[1])


def send(client: H2Client, path: str, body: bytes, *extra: tuple[str, str], end: bool = True) -> int:
    stream = client.request(grpc_headers(path, *extra), end=False)
    client.send_all(stream, body, end=end)
    return stream


# -- messages and answers on their way


async def test_messages_that_came_together_are_cut_off_one_buffer() -> None:
    connections = Connections({}, Budget(MIB))
    ours, theirs = socket.socketpair()
    transport, protocol = await asyncio.get_running_loop().connect_accepted_socket(
        lambda: ServerProtocol(connections), ours
    )
    messages = [b"%d" % value * (value % 3) for value in range(300)]
    call = protocol.conn.new_stream(1)
    call.feed(b"".join(map(grpc_message, messages)))
    buffers: list[object] = []
    for expected in messages:
        assert await call.receive() == expected
        buffers.append(call._buffer)
    # One after the first cut and until the last one, rather than one for each, which takes what is left along.
    assert isinstance(buffers[0], bytearray)
    assert all(buffer is buffers[0] for buffer in buffers[:-1])
    assert not buffers[-1]
    transport.close()
    theirs.close()


async def test_an_answer_that_came_before_the_end_is_delivered_though_the_loop_hears_of_the_end_first() -> None:
    answers, end = Answers(), asyncio.get_running_loop().create_future()
    output = Output("OUT", "INT32", (1,), bytes(4))

    def model() -> None:
        answers.put([output])
        answers.put([output, output])

    thread = threading.Thread(target=model)
    thread.start()
    thread.join()  # on the loop, which so hears of nothing meanwhile
    end.set_result(())
    assert [len(outputs) async for outputs in answers.until(end)] == [1, 2]


# -- what grows


def test_a_bomb_is_refused_after_one_step_beyond_the_budget(start: Start, connect: Connect) -> None:
    served = start(VECTOR, ECHO)
    served.backend.budget.limit = 8 * MIB
    bomb = gzip.compress(bytes(64 * MIB), 1)
    for path in (INFER, STREAM):
        client = connect(served)
        body = b"\1" + len(bomb).to_bytes(4, "big") + bomb
        said = refused(client.finish(send(client, path, body, ("grpc-encoding", "gzip"))))
        assert more_than_is_left(said) <= MIB
        served.until_idle()


async def test_what_is_inflated_stops_with_who_counts_it() -> None:
    counted: list[int] = []

    def hold(size: int) -> None:
        if sum(counted) + size > 3 * MIB:
            raise InferenceError(Code.RESOURCE_EXHAUSTED, "full")
        counted.append(size)

    grown = bytearray()
    with pytest.raises(InferenceError, match="full"):
        await Inflater("gzip").inflate(gzip.compress(bytes(16 * MIB), 1), grown, 2**40, hold)
    assert 2 * MIB <= len(grown) == sum(counted) <= 3 * MIB


def long_shape() -> Message:
    request = Message(model_name="m")
    request.inputs.add(name="IN", datatype="INT32", shape=[1] * 40_000)
    return request


def many_parameters() -> Message:
    request = Message(model_name="m")
    tensor = request.inputs.add(name="IN", datatype="INT32", shape=[1])
    for count in range(70_000):
        tensor.parameters[str(count)].int64_param = 1
    return request


def many_elements() -> Message:
    request = Message(model_name="m")
    request.inputs.add(name="IN", datatype="BYTES", shape=[1]).contents.bytes_contents.extend([b""] * 70_000)
    return request


def long_element() -> Message:
    request = Message(model_name="m")
    request.inputs.add(name="IN", datatype="BYTES", shape=[1]).contents.bytes_contents.append(bytes(17 * MIB))
    return request


LONG = {
    "shape": (long_shape, "request has an input with a shape of more than 64 dimensions"),
    "parameters": (many_parameters, "more than 65536 elements or parameters; send large tensors in raw_input_contents"),
    "elements": (many_elements, "more than 65536 elements or parameters; send large tensors in raw_input_contents"),
    "contents": (long_element, f"bytes besides raw_input_contents, more than {16 * MIB}; send large tensors in those"),
}


@pytest.mark.parametrize("case", LONG)
async def test_what_costs_more_to_parse_than_to_send_is_refused_and_says_why(case: str) -> None:
    made, says = LONG[case]
    with pytest.raises(InferenceError, match=re.escape(says)) as failed:
        await Heads().parse(made().SerializeToString(), lambda size: None)
    assert failed.value.code is Code.RESOURCE_EXHAUSTED


def test_what_contents_become_when_they_are_parsed_is_held_with_the_request(start: Start, connect: Connect) -> None:
    served = start(VECTOR, WAITS)
    client = connect(served)
    body = typed(100_000)
    for path, end in ((INFER, True), (STREAM, False)):
        rendezvous.reset()
        stream = send(client, path, body, end=end)
        assert rendezvous.running.acquire(timeout=LIVENESS)
        assert held(served) == len(body) + MOST_GROWTH * (len(body) - 5)
        rendezvous.release.set()
        reply = client.replies[stream]
        client.pump(lambda reply=reply: len(reply.body) > 400_000, "the answer")
        # A stream that goes on keeps nothing of it.
        wait_for(lambda: held(served) == 0, "the request's bytes to be given back")
        assert bool(served.backend.running()) is not end


def test_contents_that_may_become_more_than_there_is_room_for_are_refused(start: Start, connect: Connect) -> None:
    served = start(VECTOR, ECHO)
    served.backend.budget.limit = MIB
    client = connect(served)
    body = typed(200_000)
    assert more_than_is_left(refused(client.finish(send(client, INFER, body)))) > (MOST_GROWTH - 1) * len(body)
    served.until_idle()
    assert numbers(client.finish(client.request(grpc_headers(INFER), asking(1, 2)))).tolist() == [1, 2]


def test_a_response_that_is_kept_does_not_keep_its_batch() -> None:
    batch = np.empty((64, 1000), np.int32)
    batch[3] = range(3000, 4000)
    gone = weakref.ref(batch)
    data = to_raw(batch[3:4], DATATYPES["INT32"], shared=False)
    cache = ResponseCache()
    cache.put((1, b"key"), [Output("OUT", "INT32", (1, 1000), data)])
    del batch, data
    gc.collect()
    assert gone() is None
    (kept,) = cache.get((1, b"key")) or ()
    assert (kept.name, kept.datatype, kept.shape) == ("OUT", "INT32", (1, 1000))
    assert np.frombuffer(kept.data, np.int32).tolist() == list(range(3000, 4000))


# -- requests that nobody waits for

BATCHED = """
input { name: "IN" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
"""
FIRST_WAITS = """
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        if int(batch["IN"][0, 0]) == 1:
            rendezvous.execute(1)
        return {"OUT": batch["IN"]}
"""


def batched(value: int) -> bytes:
    request = Message(model_name="m", raw_input_contents=[value.to_bytes(4, "little")])
    request.inputs.add(name="IN", datatype="INT32", shape=[1, 1])
    return grpc_message(request.SerializeToString())


def leave_all(client: H2Client, streams: Sequence[int]) -> None:
    for stream in streams:
        if not client.replies[stream].over:
            client.h2.reset_stream(stream, CANCEL)
    client.flush()
    client.settle()


def ends(served: Served) -> tuple[int, int]:
    """(requests that succeeded, those that failed) of the model `m`, whether it is still there or not."""
    made = served.loaded("m").scheduler.statistics
    return inside(served, lambda: (made.success.count, made.fail.count))


def test_requests_of_callers_that_left_take_no_room_in_the_queue_of_a_busy_model(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_WAITING", 64)
    served = start(NUMBER_TO_NUMBER, WAITS)
    leaving, staying = connect(served), connect(served)
    body = grpc_message(number(1).SerializeToString())
    first = staying.request(grpc_headers(INFER), body)
    assert rendezvous.running.acquire(timeout=LIVENESS)
    for _ in range(10):
        streams = [leaving.request(grpc_headers(INFER), body) for _ in range(30)]
        leaving.settle()  # or else some are gone before they come to the model
        leave_all(leaving, streams)
        wait_for(lambda: len(served.backend.running()) == 1, "their calls to end")
    second = staying.request(grpc_headers(INFER), grpc_message(number(2).SerializeToString()))
    staying.settle()
    rendezvous.release.set()
    assert [numbers(staying.finish(stream)).tolist() for stream in (first, second)] == [[1], [2]]
    assert rendezvous.ran == [1, 2]
    wait_for(lambda: sum(ends(served)) >= 302, "all requests to be counted")
    assert ends(served) == (2, 300)
    served.until_idle()


ORDERED = f"""{BATCHED}
max_batch_size: 1
dynamic_batching {{ preserve_ordering: true }}
instance_group [{{ count: 2 kind: KIND_CPU }}]
"""


def test_a_request_that_was_run_and_waits_for_its_turn_counts_once_though_its_caller_leaves(
    start: Start, connect: Connect
) -> None:
    served = start(ORDERED, FIRST_WAITS)
    client = connect(served)
    first = client.request(grpc_headers(INFER), batched(1))
    assert rendezvous.running.acquire(timeout=LIVENESS)
    others = [client.request(grpc_headers(INFER), batched(value)) for value in (2, 3, 4)]
    made = served.loaded("m").scheduler.statistics
    wait_for(lambda: inside(served, lambda: made.execution_count) == 3, "the others to be run")
    leave_all(client, others[:2])
    wait_for(lambda: len(served.backend.running()) == 2, "their calls to end")
    rendezvous.release.set()
    assert numbers(client.finish(first)).tolist() == [1]
    assert numbers(client.finish(others[2])).tolist() == [4]
    wait_for(lambda: sum(ends(served)) >= 4, "all requests to be counted")
    assert sum(ends(served)) == 4
    served.until_idle()


def test_requests_that_an_unloaded_model_leaves_unanswered_have_failed(start: Start, connect: Connect) -> None:
    served = start(BATCHED + "max_batch_size: 8 dynamic_batching {}", FIRST_WAITS)
    client = connect(served)
    first = client.request(grpc_headers(INFER), batched(1))
    assert rendezvous.running.acquire(timeout=LIVENESS)
    others = [client.request(grpc_headers(INFER), batched(2)) for _ in range(5)]
    served.until_waiting("m", 5)
    leave_all(client, others[:1])
    served.until_waiting("m", 4)
    inside(served, served.loaded("m").scheduler.close)
    assert [client.finish(stream).grpc_status for stream in others[1:]] == [UNAVAILABLE] * 4
    rendezvous.release.set()
    assert numbers(client.finish(first)).tolist() == [1]
    wait_for(lambda: sum(ends(served)) >= 6, "all requests to be counted")
    assert ends(served) == (1, 5)
    served.until_idle()
