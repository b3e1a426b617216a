"""Promise: an upstream that dies fails the calls in flight with UNAVAILABLE and nothing more; when it is back, the next
calls succeed, and the gate was never restarted."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.conftest import SAMPLES
from tests.peers import ROOT
from tests.support.echo import echo_stub, start_echo
from tests.support.gate import Gate, GateMaker
from tests.support.h2_upstream import Call, Script
from tests.support.infer import add_sub_arrays, add_sub_request, check_add_sub_response
from tests.support.ports import free_port
from tests.support.processes import Process, wait_for
from tests.support.rawh2 import Connect, grpc_headers, grpc_message


def call_until_it_succeeds(gate: Gate) -> None:
    """The gate's backoff may let a first call fail; none may fail otherwise, and one must succeed soon."""
    with gate.channel() as channel:

        def attempt() -> bool:
            try:
                return bool(echo_stub(channel).unary(b"again", timeout=30) == b"again")
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False

        wait_for(attempt, "a call to succeed again")


class Load:
    """Threads that call without a pause, until told to stop; remembers how each call ended."""

    def __init__(self, gate: Gate, threads: int = 4) -> None:
        self.codes: list[grpc.StatusCode] = []
        self.details: list[str] = []
        self._stop = threading.Event()
        self._channel = gate.channel()
        self._pool = ThreadPoolExecutor(threads)
        self._runs = [self._pool.submit(self._run) for _ in range(threads)]

    def _run(self) -> None:
        stub = echo_stub(self._channel)
        while not self._stop.is_set():
            try:
                stub.unary(bytes(1000), timeout=30)
                self.codes.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                self.codes.append(error.code())
                self.details.append(error.details())

    def successes(self) -> int:
        return self.codes.count(grpc.StatusCode.OK)

    def stop(self) -> None:
        self._stop.set()
        for run in self._runs:
            run.result(timeout=60)
        self._pool.shutdown()
        self._channel.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_killed_and_started_again_under_load(make_gate: GateMaker, folder: Path, kind: str) -> None:
    address = f"127.0.0.1:{free_port()}" if kind == "tcp" else f"unix:{folder}/echo.sock"
    upstream = start_echo(folder, address)
    gate = make_gate(address)
    pid = gate.process.pid
    load = Load(gate)
    with gate.channel() as channel:
        asleep = [
            echo_stub(channel).sleep.future(b"3600", metadata=(("x-id", f"{n}"),), timeout=120) for n in range(50)
        ]
        for n in range(50):
            upstream.process.wait_log(f"started {n}\n")
        wait_for(lambda: load.successes() > 50, "calls under load")
        upstream.process.kill()
        for call in asleep:
            assert call.code() is grpc.StatusCode.UNAVAILABLE
            assert address in call.details()
    wait_for(lambda: gate.metric("upstream_up") == 0, "the gate to see that the upstream is gone")
    upstream = start_echo(folder, address, name="echo-again")
    before = load.successes()
    wait_for(lambda: load.successes() > before + 50, "calls to succeed again under the same load")
    load.stop()
    assert set(load.codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    # Nothing fails any more, and nobody started another gate.
    with gate.channel() as channel:
        for _ in range(20):
            assert echo_stub(channel).unary(b"after", timeout=30) == b"after"
    assert gate.process.popen.poll() is None
    assert gate.process.pid == pid
    assert gate.metric("upstream_up") == 1
    upstream.stop()


async def test_streams_in_flight_fail_too(make_gate: GateMaker, folder: Path) -> None:
    upstream = start_echo(folder)
    gate = make_gate(upstream.address)
    async with gate.aio_channel() as channel:
        calls = [echo_stub(channel).bidi(timeout=60) for _ in range(20)]
        for call in calls:
            await call.write(b"hello")
            assert await call.read() == b"hello"
        upstream.process.kill()
        codes = await asyncio.gather(*(call.code() for call in calls))
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}


def start_backend(folder: Path, address: str, name: str) -> Process:
    argv = [sys.executable, "-m", "proxy", "backend", str(SAMPLES), "--listen", address]
    return Process(name, argv, folder, cwd=ROOT)


def test_the_embedded_backend_alone_killed_and_started_again(make_gate: GateMaker, folder: Path) -> None:
    from tritonclient.grpc import service_pb2_grpc

    address = f"unix:{folder}/backend.sock"
    backend = start_backend(folder, address, "backend")
    gate = make_gate(address)
    arrays = add_sub_arrays()

    def infers() -> bool:
        try:
            check_add_sub_response(stub.ModelInfer(add_sub_request(*arrays), timeout=30), *arrays)
            return True
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False

    with gate.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        wait_for(infers, "the backend to be there")
        backend.kill()
        wait_for(lambda: not infers(), "the backend to be gone")
        backend = start_backend(folder, address, "backend-again")
        wait_for(infers, "the backend to be back")
    backend.stop()


def test_the_gates_own_backend_killed(make_gate: GateMaker) -> None:
    from tritonclient.grpc import service_pb2_grpc

    gate = make_gate(None, model_repository_path=str(SAMPLES))
    arrays = add_sub_arrays()
    with gate.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        check_add_sub_response(stub.ModelInfer(add_sub_request(*arrays), timeout=30), *arrays)
        (child,) = (child for child in gate.process.children() if "backend" in child.cmdline())
        child.kill()

        def infers() -> bool:
            try:
                check_add_sub_response(stub.ModelInfer(add_sub_request(*arrays), timeout=30), *arrays)
                return True
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False

        wait_for(lambda: not child.is_running(), "the backend to be gone")
        wait_for(infers, "the gate to have started its backend again", timeout=60)
    assert gate.process.popen.poll() is None


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_not_there_at_the_start(make_gate: GateMaker, folder: Path, kind: str) -> None:
    address = f"127.0.0.1:{free_port()}" if kind == "tcp" else f"unix:{folder}/late.sock"
    system_error = "Connection refused" if kind == "tcp" else "No such file or directory"
    gate = make_gate(address, timeouts={"connect": 1})
    with gate.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        echo_stub(channel).unary(b"too early", timeout=30)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert address in raised.value.details()
    assert system_error in raised.value.details()
    assert gate.metric("upstream_up", upstream=address) == 0
    gate.wait_log(f"{address}.*{system_error}")
    upstream = start_echo(folder, address)
    call_until_it_succeeds(gate)
    assert gate.metric("upstream_up", upstream=address) == 1
    upstream.stop()


def test_calls_wait_for_an_upstream_that_comes_in_time(make_gate: GateMaker, folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    gate = make_gate(address, timeouts={"connect": 30})
    with gate.channel() as channel:
        call = echo_stub(channel).unary.future(b"patient", timeout=60)
        wait_for(lambda: gate.metric("streams_open") == 1, "the call to reach the gate")
        upstream = start_echo(folder, address)
        assert call.result() == b"patient"
    upstream.stop()


def test_a_host_that_accepts_and_says_nothing_is_given_up(make_gate: GateMaker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        gate = make_gate(address, timeouts={"connect": 1})
        with gate.channel() as channel, pytest.raises(grpc.RpcError) as raised:
            echo_stub(channel).unary(b"anybody there", timeout=5)
    # UNAVAILABLE if the gate waits for the upstream's SETTINGS, the call's own deadline if it doesn't.
    assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_connection_reset_in_the_middle_of_an_answer(make_gate: GateMaker, script: Script, connect: Connect) -> None:
    upstream = script()
    gate = make_gate(upstream.address)
    client = connect(gate)
    whole, half = (client.request(grpc_headers("/any/Method"), grpc_message(b"request")) for _ in range(2))
    first, second = upstream.wait_call(0), upstream.wait_call(1)
    for call in (first, second):
        call.send_headers()
    first.send_data(grpc_message(b"whole"))
    second.send_data(grpc_message(bytes(1000))[:500])
    client.pump(lambda: len(client.replies[half].body) == 500, "the first half")
    for connection in upstream.connections:
        connection.abort()
    assert client.finish(whole).grpc_status == "14"
    answer = client.finish(half)
    assert answer.reset is not None or answer.grpc_status == "14"
    # The client's own connection is none the worse for it.
    upstream.on_end = lambda call: call.answer(bytes(call.body))
    reply = client.finish(client.request(grpc_headers("/any/Method"), grpc_message(b"after")))
    assert bytes(reply.body) == grpc_message(b"after")


class TestGoaway:
    def test_streams_that_it_covers_finish_and_new_ones_go_elsewhere(
        self, make_gate: GateMaker, script: Script, connect: Connect
    ) -> None:
        upstream = script()
        client = connect(make_gate(upstream.address))
        old = client.request(grpc_headers("/any/Method"), grpc_message(b"old"))
        running = upstream.wait_call()
        running.wait_ended()
        running.connection.go_away(last_stream=running.stream)
        new = [client.request(grpc_headers("/any/Method"), grpc_message(b"new")) for _ in range(5)]
        for number in range(5):
            call = upstream.wait_call(1 + number)
            assert call.connection is not running.connection
            call.wait_ended()
            call.answer(bytes(call.body))
        running.answer(bytes(running.body))
        assert bytes(client.finish(old).body) == grpc_message(b"old")
        for stream in new:
            assert bytes(client.finish(stream).body) == grpc_message(b"new")

    def test_streams_that_it_does_not_cover_are_not_lost(
        self, make_gate: GateMaker, script: Script, connect: Connect
    ) -> None:
        def refuse_the_first_connection(call: Call) -> None:
            if call.connection is upstream.connections[0]:
                call.connection.go_away(last_stream=0)
            else:
                call.answer(bytes(call.body))

        upstream = script(on_end=refuse_the_first_connection)
        client = connect(make_gate(upstream.address, limits={"upstream_connections": 1}))
        stream = client.request(grpc_headers("/any/Method"), grpc_message(b"request"))
        reply = client.finish(stream)
        # The upstream has not processed it: it is sent again, or the client is told that it may send it again.
        assert reply.grpc_status in ("0", "14") or reply.reset == 7

    def test_a_warning_goaway_does_not_fail_anything(
        self, make_gate: GateMaker, script: Script, connect: Connect
    ) -> None:
        """What grpc-go and Envoy send first in a drain: the highest stream id, then the real one."""
        upstream = script()
        client = connect(make_gate(upstream.address))
        stream = client.request(grpc_headers("/any/Method"), grpc_message(b"old"))
        call = upstream.wait_call()
        call.wait_ended()
        call.connection.go_away(last_stream=2**31 - 1)
        call.connection.go_away(last_stream=call.stream)
        call.answer(bytes(call.body))
        reply = client.finish(stream)
        assert reply.grpc_status == "0"
        assert bytes(reply.body) == grpc_message(b"old")
