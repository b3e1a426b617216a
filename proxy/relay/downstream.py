"""A client's connection and its calls: requests go up from here, answers and endings come down.

Rules:
- A call ends exactly once: with the upstream's answer, with an answer of the gate, or with a reset from either side.
- Whatever ends it ends the upstream stream too: a cancelled call stops the model's work.
- Data that comes before an upstream connection is there waits without credit, so that the client's window bounds it.
"""

from __future__ import annotations

import logging

from proxy.http2 import (
    Abuse,
    Backlog,
    Buffer,
    ConnectionFault,
    ErrorCode,
    HeaderBlock,
    RequestHead,
    ServerConnection,
    Stream,
    Trailers,
    error_name,
)
from proxy.http2.hpack import MAX_FIELDS
from proxy.identity import Identity
from proxy.inference import status
from proxy.inference.calls import OTHER_METHOD
from proxy.inference.status import Code
from proxy.relay.facts import Facts
from proxy.relay.relay import Relay, Wire, log
from proxy.telemetry.log import throttled
from proxy.upstream.link import UpstreamConnection

_DROPPED_BODY = 65_535


class Call(Stream):
    """A client's stream and what is known of the call on it; `partner` is the upstream stream, once there is one."""

    __slots__ = ("deadline_slot", "done", "facts", "held", "responding", "started")

    conn: Downstream

    def __init__(self, conn: Downstream, stream_id: int, recv_window: int, send_window: int) -> None:
        super().__init__(conn, stream_id, recv_window, send_window)
        self.deadline_slot = -1
        self.done = False
        self.responding = False  # a response head has gone to the client
        self.facts: Facts | None = None
        self.started = conn.relay.now
        self.held: Backlog | None = None  # what came before there was an upstream connection

    # -- waiting for a connection (upstream.pool.Waiter)

    def connected(self, conn: UpstreamConnection) -> None:
        """There is room on this connection: the request goes out with all that has come so far."""
        assert self.facts is not None
        held = self._take_held()
        assert held is not None
        chunks = held.chunks
        partner = conn.open_stream(self.facts.forward, held.end and not chunks)
        partner.partner = self
        self.partner = partner
        while chunks:
            chunk = chunks.popleft()
            conn.send_data(partner, chunk, held.end and not chunks)
        if held.trailers is not None:
            conn.send_trailers(partner, held.trailers)

    def _take_held(self) -> Backlog | None:
        held = self.held
        if held is not None:
            self.held = None
            self.conn.relay.held_bytes -= held.size
        return held

    def not_connected(self, why: str) -> None:
        relay = self.conn.relay
        self.answer(
            Code.UNAVAILABLE,
            f"upstream {relay.pool.address}: {why}; waited {relay.pool.connect_timeout:g} s (timeouts.connect)",
        )

    # -- endings

    def expire(self) -> None:
        """The deadline has passed."""
        assert self.facts is not None
        if self.partner is None:
            waiting = "a connection to the upstream"
        elif self.responding:
            waiting = "the rest of the upstream's response"
        else:
            waiting = "the upstream's response"
        self.answer(Code.DEADLINE_EXCEEDED, f"deadline of {self.facts.timeout_text} passed waiting for {waiting}")

    def answer(self, code: Code, message: str) -> None:
        """End the call with a status of the gate's own, behind what the client already has of a response."""
        if self.done:
            return
        self.conn.drop_backlog(self)  # the call ends without what the client has no window for
        if self.responding:
            self.conn.send_trailers(self, HeaderBlock(status.trailers(code, message), checked=True))
        else:
            self.responding = True
            self.conn.send_headers(self, HeaderBlock(status.trailers_only(code, message), checked=True), end=True)
        self.finish(code)

    def finish(self, code: int) -> None:
        """The outcome is known: count it, and end the upstream stream if it still runs."""
        if self.done:
            return
        self.done = True
        relay = self.conn.relay
        if self.deadline_slot >= 0:
            relay.deadlines.remove(self)
        partner = self.partner
        if partner is None:
            relay.pool.forget(self)
            self._take_held()
        elif not (partner.local_closed and partner.remote_closed):
            partner.conn.reset(partner, ErrorCode.CANCEL)
        facts = self.facts
        if facts is None:
            relay.counters.routes[OTHER_METHOD].add(code, relay.now - self.started)
        else:
            if code == 0 and facts.route.method == OTHER_METHOD:
                facts.route = relay.counters.learn(facts.path)
            facts.route.add(code, relay.now - self.started)
            if relay.access_log:
                self._log(facts, code)
        if self.local_closed and self.remote_closed:
            self.unlink()

    def unlink(self) -> None:
        """The call is over on both sides. Two streams that refer to each other would wait for the cycle collector."""
        partner = self.partner
        if partner is not None:
            partner.partner = None
            self.partner = None

    def _log(self, facts: Facts, code: int) -> None:
        log.info(
            "call %s from %s as %s: %s in %.1f ms",
            facts.path[:256],
            self.conn.peer_name,
            self.conn.identity or "nobody",
            status.NAMES[code],
            (self.conn.relay.now - self.started) * 1000,
        )


class Downstream(ServerConnection):
    """One client's HTTP/2 connection. `peer_name` is its address, `identity` who its certificate says it is."""

    __slots__ = ("identity", "peer_name", "relay")

    def __init__(self, relay: Relay, wire: Wire, peer_name: str, identity: Identity | None) -> None:
        self.relay = relay
        self.peer_name = peer_name
        self.identity = identity
        limits = relay.limits
        super().__init__(
            relay.wake,
            limits.stream_window_bytes,
            limits.streams_per_connection,
            limits.header_list_bytes,
        )
        self.wire = wire
        self.spenders = relay.spenders

    def new_stream(self, stream_id: int) -> Call:
        return Call(self, stream_id, self.stream_window, self.peer.initial_window)

    def on_request(self, call: Stream, head: RequestHead, end: bool) -> None:
        assert isinstance(call, Call)
        relay = self.relay
        facts: Facts | None = head.note
        if facts is None:
            facts = head.note = Facts(head, relay.counters.routes)
        call.facts = facts
        if facts.refusal is not None:
            if end or not facts.refuse_late:
                self._refuse(call, facts)
            return
        if facts.timeout is not None:
            relay.add_deadline(call, facts.timeout)
        if self._spent:
            # A client that has just reset streams may do so again with its next frame. What it opens and resets in one
            # read must not reach the upstream, which would end the connection that others share (CVE-2023-44487).
            call.held = Backlog()
            call.held.end = end
            relay.deferred.append(call)
            return
        conn = relay.pool.pick()
        if conn is not None:
            partner = conn.open_stream(facts.forward, end)
            partner.partner = call
            call.partner = partner
        else:
            self._wait(call, end)

    def _refuse(self, call: Call, facts: Facts) -> None:
        assert facts.refusal is not None
        call.responding = True
        self.send_headers(call, facts.refusal, end=not facts.refusal_body)
        if facts.refusal_body:
            self.send_data(call, facts.refusal_body, end=True)
        call.finish(facts.refusal_code)

    def start_deferred(self, call: Call) -> None:
        """The read that a call came with is parsed, and the call still stands."""
        conn = self.relay.pool.pick()
        if conn is not None:
            call.connected(conn)
        else:
            self._queue_up(call)

    def _wait(self, call: Call, end: bool) -> None:
        call.held = Backlog()
        call.held.end = end
        self._queue_up(call)

    def _queue_up(self, call: Call) -> None:
        pool = self.relay.pool
        if not pool.wait(call):
            call.answer(
                Code.RESOURCE_EXHAUSTED,
                f"{pool.max_waiting} calls already wait for upstream {pool.address} (limits.pending_requests)",
            )

    def on_request_too_large(self, call: Stream, limit: int) -> None:
        assert isinstance(call, Call)
        call.answer(
            Code.RESOURCE_EXHAUSTED,
            f"the request's headers exceed {limit} bytes (limits.header_list_bytes) or {MAX_FIELDS} fields",
        )

    def on_stream_closed(self, call: Stream) -> None:
        assert isinstance(call, Call)
        if call.done:
            call.unlink()

    def on_data(self, call: Stream, chunk: Buffer, end: bool) -> None:
        partner = call.partner
        if partner is not None:
            partner.conn.send_data(partner, chunk, end)
            return
        assert isinstance(call, Call)
        held = call.held
        facts = call.facts
        if facts is not None and facts.refusal is not None:
            # Its body is dropped, and waited for as far as it has come without credit for more.
            if end or self.stream_window - call.recv_window >= _DROPPED_BODY:
                self._refuse(call, facts)
        elif held is not None:
            held.add(chunk, end)
            relay = self.relay
            relay.held_bytes += len(chunk)
            if relay.held_bytes > relay.limits.pending_bytes:
                call.answer(
                    Code.RESOURCE_EXHAUSTED,
                    f"calls that wait for upstream {relay.pool.address} hold {relay.limits.pending_bytes} bytes "
                    "already (limits.pending_bytes)",
                )

    def on_trailers(self, call: Stream, trailers: Trailers) -> None:
        assert isinstance(call, Call)
        partner = call.partner
        if partner is not None:
            partner.conn.send_trailers(partner, trailers)
        elif call.facts is not None and call.facts.refusal is not None:
            self._refuse(call, call.facts)
        elif call.held is not None:
            call.held.trailers = trailers

    def on_reset(self, call: Stream, code: int) -> None:
        """The client cancels, whatever its code; no client gets to send others to an upstream that all share."""
        assert isinstance(call, Call)
        call.finish(Code.CANCELLED)

    def on_stream_fault(self, call: Stream, code: ErrorCode, reason: str) -> None:
        assert isinstance(call, Call)
        log.debug("%s: stream %d: %s: %s", self.peer_name, call.id, error_name(code), reason)
        call.finish(Code.INTERNAL)

    def on_connection_fault(self, fault: ConnectionFault) -> None:
        if isinstance(fault, Abuse):
            self.relay.counters.abuse[fault.kind] += 1
            self.relay.remember_abuse(self.peer_name)
        throttled(logging.INFO, "connection errors", "%s: closed with GOAWAY: %s", self.peer_name, fault)
        self.lost()

    def end_calls(self, why: str) -> None:
        """Answer every call that still runs with UNAVAILABLE."""
        for call in list(self.streams.values()):
            assert isinstance(call, Call)
            call.answer(Code.UNAVAILABLE, why)

    def lost(self) -> None:
        """The transport is gone: all calls are cancelled."""
        self.closed = True
        for call in list(self.streams.values()):
            assert isinstance(call, Call)
            call.finish(Code.CANCELLED)
        self.streams.clear()
        self.blocked.clear()
