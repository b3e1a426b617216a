"""Promises: handshakes are done in turns, and a connection that ends holds nothing while its socket lingers."""

from __future__ import annotations

import asyncio
import gc
import itertools
import ssl
import weakref
from time import monotonic
from typing import Any, cast

import pytest

from proxy.telemetry.metrics import Counters
from proxy.tls import reasons
from proxy.tls.handshakes import Handshakes
from proxy.tls.reasons import Reason
from proxy.tls.shell import Session, Shell
from tests.support.certs import Authority, KeyPair


class Transport:
    """What a shell needs of one; `sent` is what has gone out."""

    def __init__(self, address: str = "192.0.2.1") -> None:
        self.peer = (address, 4711)
        self.sent = b""
        self.reading = True
        self.eof = self.aborted = False

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_extra_info(self, name: str) -> object:
        return self.peer

    def write(self, data: bytes) -> None:
        assert not self.eof
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.aborted

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def abort(self) -> None:
        self.aborted = True


class Echo:
    """A session that keeps what it was given."""

    paused = False

    def __init__(self) -> None:
        self.received = b""
        self.is_lost = False

    def receive(self, data: bytes | memoryview) -> None:
        self.received += bytes(data)

    def resume(self) -> None: ...

    def lost(self) -> None:
        self.is_lost = True


class Host:
    """A listener, as far as shells know it. `others`: whether settled connections are at work."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.counters = Counters()
        self.others = False
        self.handshakes = Handshakes(self._work, lambda shell: shell.timed_out())
        self.ended: list[Shell] = []
        self.reasons: list[str] = []
        self.proof = 0
        self.unsettled_bytes = 0
        self.reads = 0
        self.worked = 0.0

    def _work(self) -> int:
        self.counters.downstream_received += 1 if self.others else 0
        return self.counters.downstream_received - self.unsettled_bytes

    def begin(self) -> float:
        return monotonic()

    def flush(self) -> None: ...

    def flush_soon(self) -> None: ...

    def opened(self, shell: Shell) -> None: ...

    def established(self, shell: Shell, tls: ssl.SSLObject) -> Session | Reason:
        return Echo()

    def proved(self, shell: Shell) -> None:
        self.proof += 1

    def failed(self, shell: Shell, reason: Reason) -> None:
        self.reasons.append(reason[0])

    def unread(self, shell: Shell, limit: int) -> None: ...

    def unsettled(self, received: int) -> None:
        self.unsettled_bytes += received

    def ending(self, shell: Shell) -> None:
        self.handshakes.done(shell)
        self.ended.append(shell)

    def closed(self, shell: Shell) -> None:
        self.handshakes.done(shell)


class Client:
    """The other end of a shell: OpenSSL's, in memory."""

    def __init__(self, host: Host, context: ssl.SSLContext, address: str = "192.0.2.1") -> None:
        self.transport = Transport(address)
        self.shell = Shell(host)
        self.shell.connection_made(cast(asyncio.BaseTransport, self.transport))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def send(self, data: bytes) -> None:
        """As the event loop does: in pieces that fit the buffer."""
        while data:
            buffer = self.shell.get_buffer(-1)
            piece, data = data[: len(buffer)], data[len(buffer) :]
            buffer[: len(piece)] = piece
            self.shell.buffer_updated(len(piece))

    def shake(self) -> bool:
        """Take what the shell has sent and answer it; whether the client's side is done."""
        self._incoming.write(self.transport.sent)
        self.transport.sent = b""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            done = False
        else:
            done = True
        self.send(self._outgoing.read())
        return done

    def connect(self) -> None:
        while not self.shake():
            pass

    def say(self, data: bytes) -> None:
        self.tls.write(data)
        self.send(self._outgoing.read())

    @property
    def session(self) -> Echo:
        session = self.shell.session
        assert isinstance(session, Echo)
        return session


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("shells"), "ca")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> KeyPair:
    return authority.server()


@pytest.fixture
def host(pair: KeyPair) -> Host:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    return Host(context)


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.ca_file))


async def settled(ready: Any, turns: int = 10_000) -> None:
    """Let the loop turn until `ready()`."""
    for _ in range(turns):
        if ready():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("never got ready")


# -- turns


async def test_a_handshake_alone_is_done_at_once(host: Host, trusting: ssl.SSLContext) -> None:
    client = Client(host, trusting)
    client.shake()
    assert client.transport.sent, "the answer to the first message, in the turn in which that came"
    await asyncio.sleep(0.01)  # as a client takes some time for its own part
    client.connect()
    client.say(b"hello")
    assert (client.session.received, host.proof) == (b"hello", 1)


async def test_of_many_that_come_at_once_one_has_its_step_in_each_turn(host: Host, trusting: ssl.SSLContext) -> None:
    clients = [Client(host, trusting) for _ in range(20)]
    for client in clients:
        client.shake()

    def answered() -> int:
        return sum(bool(client.transport.sent) for client in clients)

    seen = [answered()]
    while seen[-1] < 20 and len(seen) < 1000:
        await asyncio.sleep(0)
        seen.append(answered())
    assert all(after - before <= 1 for before, after in itertools.pairwise(seen))
    assert seen[-1] == 20
    assert [bool(client.transport.sent) for client in clients] == [True] * 20


@pytest.mark.parametrize("others", [False, True])
async def test_a_herd_is_served(host: Host, trusting: ssl.SSLContext, others: bool) -> None:
    host.others = others
    clients = [Client(host, trusting, f"192.0.2.{number}") for number in range(100)]
    waiting = {client: client.shake() for client in clients}

    def all_done() -> bool:
        for client in clients:
            if not waiting[client] and client.transport.sent:
                waiting[client] = client.shake()
        return all(client.shell.session is not None for client in clients)

    await settled(all_done)
    for client in clients:
        client.say(b"x")
    assert all(client.session.received == b"x" for client in clients)


async def test_clients_that_leave_while_they_wait_cost_nothing(host: Host, trusting: ssl.SSLContext) -> None:
    clients = [Client(host, trusting) for _ in range(20)]
    for client in clients:
        client.shake()
    for client in clients[1:19]:
        client.shell.eof_received()
        client.shell.connection_lost(None)
    await settled(lambda: clients[19].transport.sent)
    assert [bool(client.transport.sent) for client in clients] == [True] + 18 * [False] + [True]
    assert host.reasons == 18 * ["closed_by_client"]


async def test_who_waits_is_not_read_without_end(host: Host, trusting: ssl.SSLContext) -> None:
    first, second = Client(host, trusting), Client(host, trusting)
    first.shake()
    second.shake()
    second.send(bytes(100))
    assert not second.transport.reading
    await settled(lambda: host.reasons)
    assert second.transport.reading
    assert second.transport.eof


# -- the first message


async def test_a_first_message_in_pieces(host: Host, trusting: ssl.SSLContext) -> None:
    client = Client(host, trusting)
    with pytest.raises(ssl.SSLWantReadError):
        client.tls.do_handshake()
    hello = client._outgoing.read()
    for at in range(len(hello) - 1):
        client.send(hello[at : at + 1])
    assert client.shell._tls is None, "a part of it costs no state of OpenSSL's"
    client.send(hello[-1:])
    client.connect()
    await settled(lambda: client.shell.session)


async def test_one_that_is_too_long_is_refused_by_its_header(host: Host, trusting: ssl.SSLContext) -> None:
    client = Client(host, trusting)
    client.send(b"\x16\x03\x01" + (reasons.MAX_HELLO + 1).to_bytes(2, "big"))
    assert host.reasons == ["hello_too_long"]
    assert client.transport.sent == b"\x15\x03\x03\x00\x02\x02\x16"
    assert client.transport.eof


# -- what is held


async def test_a_connection_that_ends_holds_nothing_while_it_lingers(host: Host, trusting: ssl.SSLContext) -> None:
    client = Client(host, trusting)
    client.connect()
    await settled(lambda: client.shell.session)
    client.say(b"hello")
    session, tls = client.session, weakref.ref(client.shell._tls)  # type: ignore[arg-type]
    client.shell.close("enough")
    gc.collect()
    assert session.is_lost
    assert client.shell.session is None
    assert tls() is None
    assert (client.transport.eof, client.transport.aborted) == (True, False)
    assert host.ended == [client.shell]
    client.send(b"more")  # which is not looked at
    client.shell.connection_lost(None)


async def test_a_connection_that_is_lost_holds_nothing(host: Host, trusting: ssl.SSLContext) -> None:
    client = Client(host, trusting)
    client.connect()
    await settled(lambda: client.shell.session)
    session, tls = client.session, weakref.ref(client.shell._tls)  # type: ignore[arg-type]
    client.shell.connection_lost(None)
    gc.collect()
    assert session.is_lost
    assert tls() is None


async def test_new_connections_are_not_settled(host: Host, trusting: ssl.SSLContext) -> None:
    client = Client(host, trusting)
    client.connect()
    await settled(lambda: client.shell.session)
    assert host.counters.downstream_received == host.unsettled_bytes
    for _ in range(100):
        client.say(b"x")
    busy = host.unsettled_bytes
    client.say(b"x")
    assert host.unsettled_bytes == busy < host.counters.downstream_received
