"""RFC 9113 section 6.5.3: who leaves our SETTINGS unacknowledged loses the connection, on both sides of the gate."""

from __future__ import annotations

import asyncio

from proxy.http2 import ErrorCode
from proxy.inference.status import Code
from tests.http2.wire import GOAWAY, settings
from tests.relay.harness import SETTINGS_ACK, Backend, World, joined, until

SECONDS = 0.1


async def sweep(world: World) -> None:
    """What the listener does once a second, when the time for an acknowledgement has passed."""
    await asyncio.sleep(SECONDS * 1.5)
    world.relay.refill()


async def test_6_5_3_a_client_that_does_not_acknowledge_is_ended() -> None:
    async with joined(Backend(), ack_timeout=SECONDS) as world:
        world.relay.refill()
        late, good = world.client(acknowledges=False), world.client()
        late.call(1)
        world.relay.refill()
        assert late.inbox.of(GOAWAY) == []  # its time has not passed
        await sweep(world)
        (goaway,) = late.inbox.of(GOAWAY)
        assert goaway.code == ErrorCode.SETTINGS_TIMEOUT
        assert b"timeouts.handshake" in goaway.payload
        assert late.output.closed
        good.alive()


async def test_6_5_3_a_client_that_is_slow_to_acknowledge_is_not() -> None:
    async with joined(Backend(), ack_timeout=SECONDS) as world:
        client = world.client(acknowledges=False)
        client.feed(SETTINGS_ACK, SETTINGS_ACK)  # one too many is harmless
        await sweep(world)
        client.alive()


async def test_6_5_3_settings_of_its_own_gain_a_client_no_time() -> None:
    async with joined(Backend(), ack_timeout=SECONDS) as world:
        client = world.client(acknowledges=False)
        await asyncio.sleep(SECONDS * 0.7)
        client.feed(settings())
        await asyncio.sleep(SECONDS * 0.7)
        world.relay.refill()
        assert [item.code for item in client.inbox.of(GOAWAY)] == [ErrorCode.SETTINGS_TIMEOUT]


async def test_6_5_3_nothing_is_kept_of_clients_that_have_gone() -> None:
    async with joined(Backend(), ack_timeout=SECONDS) as world:
        client = world.client(acknowledges=False)
        client.conn.lost()
        assert client.conn not in world.relay._unacknowledged
        await sweep(world)
        assert client.inbox.of(GOAWAY) == []


async def test_6_5_3_an_upstream_that_does_not_acknowledge_is_ended() -> None:
    """Its callers get a status in words, and keep their connections."""
    backend = Backend(acknowledges=False)
    async with joined(backend, ack_timeout=SECONDS) as world:
        client = world.client()
        client.call(1)
        silent = await backend.connection(0)
        await silent.call()
        backend.acknowledges = True
        await sweep(world)
        reply = await client.reply(1)
        assert reply.status == Code.UNAVAILABLE
        assert "acknowledgement of SETTINGS" in reply.words
        await until(lambda: silent.closed, "the connection to be closed")
        assert silent.inbox.of(GOAWAY)[-1].code == ErrorCode.SETTINGS_TIMEOUT
        # The next connection acknowledges them, and stays.
        good = await backend.connection(1)
        client.call(3)
        await good.call()
        await sweep(world)
        good.answer(1)
        assert (await client.reply(3)).status == 0
        client.alive()


async def test_6_5_3_an_upstream_has_time_from_its_own_settings_on() -> None:
    """One that accepts connections before it can read them is waited for as timeouts.connect says."""
    backend = Backend(acknowledges=False)
    backend.greets = False
    async with joined(backend, ack_timeout=SECONDS, ready=False) as world:
        conn = await backend.connection(0)
        await sweep(world)
        assert conn.inbox.of(GOAWAY) == []
        conn.send(settings())
        await until(lambda: bool(world.pool.ready), "the connection to be ready")
        assert len(backend.conns) == 1


async def test_6_5_3_nothing_is_kept_of_upstreams_that_have_gone() -> None:
    backend = Backend(acknowledges=False)
    async with joined(backend, ack_timeout=SECONDS) as world:
        conn = world.pool.ready[0]
        assert conn in world.relay._unacknowledged
        (await backend.connection(0)).abort()
        await until(lambda: conn not in world.pool.ready, "the connection to end")
        assert conn not in world.relay._unacknowledged
