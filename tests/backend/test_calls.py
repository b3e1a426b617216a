"""Promise: every call ends, whatever its client does with deadlines and windows, and what nobody takes is bounded."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import uvloop
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame
from tritonclient.grpc import service_pb2

from proxy.backend.answers import MOST_AHEAD
from proxy.backend.services.http2 import STREAM_WINDOW, ServerProtocol
from proxy.backend.services.streaming import MOST_IN_FLIGHT
from proxy.http2.headers import INTERNED_BYTES
from tests.backend import rendezvous
from tests.backend.models import DECOUPLED, ECHO, NUMBER_TO_NUMBER, WAITS
from tests.backend.serving import Message, Served, Start, message, number, starting
from tests.support.processes import LIVENESS, wait_for
from tests.support.rawh2 import H2Client, Reply, grpc_headers, grpc_message

LIVE = "/inference.GRPCInferenceService/ServerLive"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
DEADLINE_EXCEEDED = "4"
CANCEL = 8
NO_WINDOW = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
WIDE = {SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1}
WIDE_CONNECTION = 2**31 - 1 - 65_535
VECTOR = """
input { name: "IN" data_type: TYPE_INT32 dims: -1 }
output { name: "OUT" data_type: TYPE_INT32 dims: -1 }
"""
RANGE = """
import numpy as np

class Model:
    def execute(self, batch):
        first, count = (int(value) for value in batch["IN"])
        return {"OUT": np.arange(first, first + count, dtype=np.int32)}
"""

Connect = Callable[..., H2Client]
T = TypeVar("T")


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Backends on the event loop that the real process has: which callback comes first is part of what is tested."""
    monkeypatch.setattr(asyncio, "new_event_loop", uvloop.new_event_loop)
    with starting(folder) as start:
        yield start


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(served, receive_buffer, **options)`: a client whose preface has been answered."""
    with ExitStack() as stack:

        def connect(served: Served, receive_buffer: int = 0, **options: Any) -> H2Client:
            sock = stack.enter_context(socket.socket())
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            host, _, port = served.grpc.rpartition(":")
            sock.settimeout(LIVENESS)
            sock.connect((host, int(port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = H2Client(sock, **options)
            client.settle()
            return client

        yield connect


def inside(served: Served, look: Callable[[], T]) -> T:
    """What `look` finds on the server's event loop."""

    async def there() -> T:
        return look()

    return asyncio.run_coroutine_threadsafe(there(), served.loop).result(LIVENESS)


def standstill(look: Callable[[], T]) -> T:
    """What `look` finds once it has found the same for a while."""
    found, same = look(), 0
    end = time.monotonic() + LIVENESS
    while same < 10:
        assert time.monotonic() < end, f"it never stops: {found}"
        time.sleep(0.02)
        before, found = found, look()
        same = same + 1 if found == before else 0
    return found


def connection(served: Served) -> ServerProtocol:
    """The only one."""
    (found,) = served.backend._connections.open
    return found


def queued(served: Served) -> int:
    """Bytes of answers that the wire core has and no window has room for."""
    return inside(served, lambda: sum(protocol.conn.queued for protocol in served.backend._connections.open))


def held(served: Served) -> int:
    return inside(served, lambda: served.backend.budget.held)


def asking(*values: int) -> bytes:
    """A message for the model `m`, whose input is a vector."""
    return grpc_message(message("m", IN=np.array(values, np.int32)).SerializeToString())


def numbers(reply: Reply) -> np.ndarray[Any, Any]:
    """The answer of a call with one answer."""
    assert (reply.grpc_status, reply.reset) == ("0", None), reply.grpc_message
    answer = service_pb2.ModelInferResponse.FromString(bytes(reply.body[5:]))
    return np.frombuffer(answer.raw_output_contents[0], np.int32)


def open_window(client: H2Client, stream: int, size: int) -> None:
    client.h2.increment_flow_control_window(size, stream)
    client.flush()


# -- deadlines


CALLS = {
    "unary": (LIVE, grpc_message(b""), True),
    "inference": (INFER, grpc_message(number(1).SerializeToString()), True),
    "stream": (STREAM, b"", False),
    "stream with a request": (STREAM, grpc_message(number(1).SerializeToString()), False),
    "headers only": (LIVE, b"", True),
    "headers so far": (LIVE, b"", False),
    "half a message": (INFER, b"\0\0\0\0\x09abc", False),
}


def test_a_deadline_that_passes_before_the_task_s_first_step_ends_every_call(start: Start, connect: Connect) -> None:
    served = start(NUMBER_TO_NUMBER, ECHO)
    client = connect(served)
    for text in ("0n", "1n", "0S"):
        for name, (path, body, end) in CALLS.items():
            stream = client.request(grpc_headers(path, ("grpc-timeout", text)), body, end=end)
            assert client.finish(stream).grpc_status == DEADLINE_EXCEEDED, (text, name)
            served.until_idle()


@pytest.mark.parametrize("count", [10, 2**18], ids=["one piece", "many pieces"])
def test_a_deadline_that_passes_while_the_answer_waits_for_a_window_ends_the_stream(
    start: Start, connect: Connect, count: int
) -> None:
    served = start(VECTOR, RANGE)
    client = connect(served, settings=NO_WINDOW)
    stream = client.request(grpc_headers(INFER, ("grpc-timeout", "100S")), asking(0, count))
    wait_for(lambda: queued(served), "the answer to wait for the client's window")
    (call,) = served.backend.running()
    assert held(served) >= 4 * count

    def pass_deadline() -> None:
        assert call.timer is not None
        call.timer.cancel()
        call.expire()

    inside(served, pass_deadline)
    assert client.finish(stream).reset == CANCEL
    served.until_idle()
    assert queued(served) == 0


# -- clients that take nothing

REFUSED = Message(model_name="nope", id="x" * 3000)
ANSWERED = {"answers": message("m", IN=np.zeros(750, np.int32)), "errors": REFUSED}


@pytest.mark.parametrize("request_message", ANSWERED.values(), ids=list(ANSWERED))
def test_answers_that_nobody_takes_are_counted_and_stop_the_requests(
    start: Start, connect: Connect, request_message: Message
) -> None:
    served = start(VECTOR, ECHO)
    client = connect(served, settings=NO_WINDOW)
    stream = client.request(grpc_headers(STREAM), end=False)
    batch = grpc_message(request_message.SerializeToString()) * 5
    sent, most = 0, 2 * STREAM_WINDOW

    def room() -> bool:
        return client.sendable(stream) >= len(batch)

    while sent < most:
        if not room():
            standstill(lambda: (held(served), queued(served)))
            client.settle()
            if not room():
                break
        client.h2.send_data(stream, batch)
        client.flush()
        sent += len(batch)
    assert sent < most
    assert queued(served) < 16_384
    # Beside the requests, an answer of 3000 bytes for each that is worked on.
    assert held(served) > sent + (MOST_IN_FLIGHT - 10) * 3000
    client.close()
    served.until_idle()


ENDLESS = """
import numpy as np
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        for value in range(20_000):
            rendezvous.ran.append(value)
            yield {"OUT": np.array([value], np.int32)}
"""


def test_a_decoupled_model_waits_while_nobody_takes_its_answers(start: Start, connect: Connect) -> None:
    served = start(DECOUPLED, ENDLESS)
    client = connect(served, settings=NO_WINDOW)
    client.request(grpc_headers(STREAM), grpc_message(number(1).SerializeToString()), end=False)
    wait_for(lambda: rendezvous.ran, "the model to run")
    assert standstill(lambda: len(rendezvous.ran)) <= MOST_AHEAD + 8
    assert queued(served) < 1000
    client.close()
    served.until_idle()


def test_calls_whose_window_is_shut_are_left_alone_and_end_when_windows_open(start: Start, connect: Connect) -> None:
    served = start(VECTOR, RANGE)
    client = connect(served, settings=NO_WINDOW, connection_window=WIDE_CONNECTION)
    client.credit = False
    firsts = {client.request(grpc_headers(INFER), asking(first, 2**18)): first for first in range(100)}
    wait_for(lambda: waiting_answers(served) == 100, "100 answers that wait for a window")
    assert stalled(served) == 0

    dice = random.Random(8)
    left = dict.fromkeys(firsts, 4 * 2**18 + 1000)  # bytes, a little more than an answer
    while left:
        stream = dice.choice(list(left))
        size = min(dice.choice((1, 5, 16_384, 100_000, 400_000)), left[stream])
        if size and not client.replies[stream].over:
            open_window(client, stream, size)
            left[stream] -= size
        else:
            del left[stream]
            wait_for(lambda: stalled_after_a_ping(client, served) == 0, "what windows let through to be sent")
    for stream, first in firsts.items():
        assert np.array_equal(numbers(client.finish(stream)), np.arange(first, first + 2**18))
        client.replies.pop(stream)
    served.until_idle()


def stalled(served: Served) -> int:
    """Calls that are looked at whenever something is written."""
    return inside(served, lambda: len(connection(served).conn.stalled))


def stalled_after_a_ping(client: H2Client, served: Served) -> int:
    client.settle()
    return stalled(served)


def waiting_answers(served: Served) -> int:
    return inside(served, lambda: sum(call.backlog is not None for call in served.backend.running()))


# -- what headers leave behind


def test_long_header_sections_are_not_remembered(start: Start, connect: Connect) -> None:
    served = start(VECTOR, ECHO)
    client = connect(served)
    for agent in ("usual", "a" * 3000, "b" * 3000):
        headers = grpc_headers(LIVE, ("user-agent", agent))
        assert client.finish(client.request(headers, grpc_message(b""))).grpc_status == "0"
    (kept,) = inside(served, lambda: list(served.backend._connections._facts))
    assert kept.size <= INTERNED_BYTES


def test_trailers_do_not_stay_with_a_call(start: Start, connect: Connect) -> None:
    served = start(NUMBER_TO_NUMBER, WAITS)
    client = connect(served)
    stream = client.request(grpc_headers(INFER), grpc_message(number(1).SerializeToString()), end=False)
    client.h2.send_headers(stream, [("x-odd", "b" * 5000)], end_stream=True)
    client.flush()
    assert rendezvous.running.acquire(timeout=LIVENESS)
    (call,) = served.backend.running()
    assert (call.remote_closed, call.passing) == (True, None)
    rendezvous.release.set()
    assert numbers(client.finish(stream)).tolist() == [1]


# -- the end of a connection

LEFT = 225_000  # numbers: less than a transport takes at once, more than the sockets below hold


def unread(served: Served, connect: Connect) -> tuple[H2Client, int]:
    """A client and its stream, whose answer has left the server's tables and lies in the transport."""
    client = connect(served, 16_384, settings=WIDE, connection_window=WIDE_CONNECTION)
    transport = connection(served).transport
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    stream = client.request(grpc_headers(INFER), asking(5, LEFT))
    wait_for(lambda: inside(served, transport.get_write_buffer_size) > 100_000, "the answer to be written")
    assert served.backend.running() == []
    return client, stream


# A connection that ends for a fault is cut off after a second.
LONGER = 1.3


def test_who_reads_slowly_gets_the_whole_of_the_last_answer_when_the_server_stops(
    start: Start, connect: Connect
) -> None:
    served = start(VECTOR, RANGE)
    client, stream = unread(served, connect)
    stopping = asyncio.run_coroutine_threadsafe(served.backend.stop(grace=10), served.loop)
    futures.wait([stopping], LONGER)
    assert not stopping.done()
    assert np.array_equal(numbers(client.finish(stream)), np.arange(5, 5 + LEFT))
    client.wait_closed()
    stopping.result(LIVENESS)


def test_who_says_goaway_and_reads_slowly_gets_the_whole_of_the_last_answer(start: Start, connect: Connect) -> None:
    served = start(VECTOR, RANGE)
    client, stream = unread(served, connect)
    protocol = connection(served)
    client.sock.sendall(GoAwayFrame(0, last_stream_id=0).serialize())
    wait_for(partial(inside, served, protocol.transport.is_closing), "the connection's end")
    time.sleep(LONGER)
    assert np.array_equal(numbers(client.finish(stream)), np.arange(5, 5 + LEFT))
    client.wait_closed()


# -- callers that leave

VECTOR_WAITS = """
from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        if int(batch["IN"][0]) == 1:
            rendezvous.execute(1)
        return {"OUT": batch["IN"]}
"""


def typed(count: int) -> bytes:
    """A message with contents that are not raw: a long one is parsed in a thread."""
    request = Message(model_name="m")
    tensor = request.inputs.add(name="IN", datatype="INT32", shape=[count])
    tensor.contents.int_contents.extend([2] * count)
    return grpc_message(request.SerializeToString())


def test_callers_that_leave_a_stream_at_any_stage_take_nothing_along(start: Start, connect: Connect) -> None:
    served = start(VECTOR, VECTOR_WAITS)
    client = connect(served, settings=NO_WINDOW, connection_window=WIDE_CONNECTION)
    client.credit = False
    first = client.request(grpc_headers(INFER), asking(1))  # behind which others wait for a while
    dice = random.Random(13)
    messages = (asking(2), asking(2, *range(5000)), typed(20_000), grpc_message(REFUSED.SerializeToString()))
    calls: list[int] = []
    for count in range(200):
        stream = client.request(grpc_headers(STREAM), end=False)
        client.send_all(stream, b"".join(dice.choices(messages, k=dice.randrange(1, 4))), end=False)
        if dice.random() < 0.3:
            client.send_all(stream, messages[2][: dice.randrange(1, 20_000)], end=False)
        calls.append(stream)
        if count == 60:
            rendezvous.release.set()
        if dice.random() < 0.5:
            client.settle()
        if dice.random() < 0.5:
            open_window(client, dice.choice(calls), dice.choice((1, 3000, 30_000)))
        while len(calls) > 5 or (calls and dice.random() < 0.6):
            leave(client, calls.pop(dice.randrange(len(calls))))
    for stream in calls:
        leave(client, stream)
    client.settle()
    wait_for(lambda: len(served.backend.running()) == 1, "all but the first call to end")
    open_window(client, first, 1000)
    assert numbers(client.finish(first)).tolist() == [1]
    served.until_idle()


def leave(client: H2Client, stream: int) -> None:
    client.h2.reset_stream(stream, CANCEL)
    client.flush()
