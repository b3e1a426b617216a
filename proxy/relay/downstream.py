"""A client's connection and its calls: requests go up from here, answers and endings come down.

Rules:
- How a call goes on and ends is the business of `call`.
- Data that comes before an upstream connection is there waits without credit, so that the client's window bounds it.
"""

from __future__ import annotations

import logging
from typing import cast

from proxy.http2 import (
    Abuse,
    Buffer,
    ConnectionFault,
    ErrorCode,
    RequestHead,
    ServerConnection,
    Stream,
    Trailers,
    error_name,
    guards,
)
from proxy.http2.headers import list_size
from proxy.http2.hpack import MAX_FIELDS
from proxy.identity import Identity
from proxy.inference.status import Code
from proxy.relay.call import Call
from proxy.relay.facts import Facts, timeout_of
from proxy.relay.kept import HAS_TRAILERS, SMALL
from proxy.relay.relay import Relay, Wire, address_of, log
from proxy.telemetry.log import throttled
from proxy.upstream.link import UpstreamConnection

_DROPPED_BODY = 65_535
# Bytes of a request that may come before any of it was forwarded; a client far away would wait for a smaller one.
REQUEST_WINDOW = 262_144
_MORE_THAN_TAKEN = 2  # bytes that may wait for a client, for each that it has taken
_WIDE_CALLS = 16  # how many calls get a wide window at once after one that had use for it


def _shared(client: Downstream) -> int:
    """Bytes that calls of this client's address hold, where there are other addresses."""
    return 0 if client.account.alone else client.account.held_bytes


class Downstream(ServerConnection):
    """One client's HTTP/2 connection. `peer_name` is its address, `identity` who its certificate says it is."""

    __slots__ = (
        "account",
        "carried",
        "granted",
        "granted_requests",
        "held_bytes",
        "identity",
        "peer_name",
        "relay",
        "wide_calls",
    )

    def __init__(self, relay: Relay, wire: Wire, peer_name: str, identity: Identity | None) -> None:
        self.relay = relay
        self.peer_name = peer_name
        self.account = relay.accounts.join(address_of(peer_name))
        self.carried = 0  # calls that are on an upstream connection
        self.granted = 0  # bytes by which windows of streams upstream have grown on this client's account
        self.granted_requests = 0  # the same of its own streams
        self.held_bytes = 0  # of calls that wait for an upstream connection
        self.wide_calls = 0
        self.identity = identity
        limits = relay.limits
        super().__init__(
            relay.wake,
            limits.stream_window_bytes,
            limits.streams_per_connection,
            limits.header_list_bytes,
            min(REQUEST_WINDOW, limits.stream_window_bytes),
        )
        self.wire = wire
        self.spenders = relay.spenders
        relay.clients[self] = None

    def carry(self, calls: int) -> None:
        """So many calls more, or less, are on an upstream connection."""
        self.carried += calls
        self.account.carried += calls

    def new_stream(self, stream_id: int) -> Call:
        return Call(self, stream_id, self.first_window, self.peer.initial_window)

    def on_request(self, call: Call, head: RequestHead, end: bool) -> None:  # type: ignore[override]
        relay = self.relay
        facts: Facts | None = head.note
        if facts is None:
            facts = head.note = Facts(head, relay.counters.routes)
            facts.forward.size = head.size - len(head.scheme) + len(b"http")
        call.facts = facts
        if facts.refusal is not None:
            if end or not facts.refuse_late:
                self._refuse(call, facts)
            return
        timeout = facts.timeout
        if call.passing is not None:
            try:
                own = timeout_of(call.passing)
            except ValueError as error:
                call.answer(Code.INTERNAL, str(error))
                return
            if own is not None:
                timeout = own
        if timeout is not None:
            call.timeout = timeout
            relay.add_deadline(call, timeout)
        if self.resetting:
            # A client that has just reset streams may do so again with its next frame. What it opens and resets in one
            # read must not reach the upstream, which would end the connection that others share (CVE-2023-44487).
            call.wait(end)
            relay.deferred.append(call)
            return
        conn = relay.pool.pick(self)
        if conn is not None:
            passing = call.passing
            size = facts.forward.size if passing is None else facts.forward.size + passing.size_bound
            if size > conn.peer.max_header_list and call.too_large(facts.forward, passing, conn):
                return
            partner = conn.open_stream(facts.forward, end, passing)
            partner.partner = call
            call.partner = partner
            self.carried += 1
            self.account.carried += 1
            if size > SMALL:
                call.forget_long_fields()
            if self.wide_calls:
                self.wide_calls -= 1
                conn.widen(partner)
        else:
            call.wait(end)
            self.queue_up(call)

    def _refuse(self, call: Call, facts: Facts) -> None:
        assert facts.refusal is not None
        if call.done:
            return  # what still comes of the request is dropped
        self._spend(guards.REFUSED_CALL)
        call.responding = True
        self.send_headers(call, facts.refusal, end=not facts.refusal_body)
        if facts.refusal_body:
            self.send_data(call, facts.refusal_body, end=True)
        call.finish(facts.refusal_code)

    def start_deferred(self, call: Call) -> None:
        """The read that a call came with is parsed, and the call still stands."""
        conn = self.relay.pool.pick(self)
        if conn is not None:
            call.connected(conn)
        else:
            self.queue_up(call)

    def queue_up(self, call: Call, refused_by: UpstreamConnection | None = None) -> None:
        """Let a call wait for an upstream connection with what it holds."""
        pool = self.relay.pool
        if pool.wait(call, refused_by):
            self.relay.look_for_room()
            self._bound_held(call)
        else:
            call.crowded_out()

    def _bound_held(self, call: Call) -> None:
        relay = self.relay
        while relay.held_bytes > relay.limits.pending_bytes and not call.done:
            # Who holds most gives way, lest a few clients have the calls of all others refused: of the heaviest
            # address its heaviest connection; the one that asks, where it is as heavy.
            most = max(relay.clients, key=lambda client: (_shared(client), client.held_bytes, client is self))
            heaviest = call if most is self else most.heaviest_held()
            heaviest.answer(
                Code.RESOURCE_EXHAUSTED,
                f"calls that wait for upstream {relay.pool.address} hold {relay.limits.pending_bytes} bytes "
                "already, of which this client has most (limits.pending_bytes)",
            )
        if not call.done:
            self.on_stuck(call)

    def heaviest_held(self) -> Call:
        """Of the calls that wait for an upstream connection, the one that holds most."""
        calls = cast("list[Call]", [call for call in self.streams.values() if call.held is not None])  # type: ignore[attr-defined]
        return max(calls, key=lambda call: call.held.weight if call.held is not None else 0)

    def on_request_too_large(self, call: Call, limit: int) -> None:  # type: ignore[override]
        call.answer(
            Code.RESOURCE_EXHAUSTED,
            f"the request's headers exceed {limit} bytes (limits.header_list_bytes) or {MAX_FIELDS} fields",
        )

    def on_stream_closed(self, call: Call) -> None:  # type: ignore[override]
        self.granted_requests -= call.window - self.first_window
        if call.done:
            call.unlink()

    def on_settings(self) -> None:
        # From here on, and not before: the preface itself is the listener's to wait for.
        if not self.settings_acked:
            self.relay.await_settings_ack(self)

    def on_settings_acked(self) -> None:
        self.relay.settings_acked(self)

    def hold(self, size: int) -> None:
        """So many bytes more, or less, wait for an upstream connection."""
        self.held_bytes += size
        self.account.held_bytes += size
        self.relay.held_bytes += size

    def on_stuck(self, call: Call) -> None:  # type: ignore[override]
        most = self.relay.limits.waiting_bytes_per_connection
        if self.stuck + self.held_bytes > most:
            call.answer(
                Code.RESOURCE_EXHAUSTED,
                f"{most} bytes of this connection's calls already wait for upstream {self.relay.pool.address} "
                "(limits.waiting_bytes_per_connection)",
            )

    def growth(self, call: Stream) -> int:
        """A large request that the upstream takes gets a wider window, as long as there aren't many such."""
        most = self.relay.limits.waiting_bytes_per_connection // 4
        left = most - self.granted_requests - self.stuck - self.held_bytes
        more = min(self.stream_window - call.window, max(left, 0))
        self.granted_requests += more
        return more

    def answer_bytes_left(self, most: int) -> int:
        """How many bytes of answers, `most` at most, may wait here besides what waits and what was allowed already.

        A client that takes what it asks for gets wide windows after a few round trips on the gate's side. One that
        doesn't read leaves little in the gate, however many calls it makes.
        """
        taken: int = self.data_bytes_sent - self.wire.untaken - self.out_size
        allowed = min(_MORE_THAN_TAKEN * taken, self.relay.limits.waiting_bytes_per_connection)
        left = min(most, max(allowed - self.granted - self.queued, 0))
        if left:
            self.wide_calls = _WIDE_CALLS
        return left

    def unforwarded(self, call: Stream) -> int:
        """Bytes of a call that came and for which it got no credit yet: they wait for the upstream's window."""
        under_way = self._data_left if self._data_stream is call else 0
        return call.window - call.recv_window - call.unacked - under_way

    def on_data(self, call: Call, chunk: Buffer, end: bool) -> None:  # type: ignore[override]
        partner = call.partner
        if partner is not None:
            if not call.kept and type(chunk) is bytes and len(chunk) <= SMALL:
                call.kept = chunk
            elif type(call.kept) is not str:
                call.keep(chunk)
            partner.conn.send_data(partner, chunk, end)
            return
        held = call.held
        facts = call.facts
        if facts is not None and facts.refusal is not None:
            # Its body is dropped, and waited for as far as it has come without credit for more.
            if end or call.window - call.recv_window >= _DROPPED_BODY:
                self._refuse(call, facts)
        elif held is not None:
            held.add(chunk, end)
            self.hold(len(chunk))
            self._bound_held(call)

    def on_trailers(self, call: Call, trailers: Trailers) -> None:  # type: ignore[override]
        partner = call.partner
        if partner is not None:
            call.forget_request(HAS_TRAILERS)
            if not call.too_large(trailers, call.passing, cast(UpstreamConnection, partner.conn)):
                partner.conn.send_trailers(partner, trailers, call.passing)
        elif call.facts is not None and call.facts.refusal is not None:
            self._refuse(call, call.facts)
        elif call.held is not None:
            held = call.held
            held.trailers = trailers
            held.passing = call.passing
            size = list_size(trailers, call.passing)
            held.fields += size
            self.hold(size)
            self._bound_held(call)

    def on_reset(self, call: Call, code: int) -> None:  # type: ignore[override]
        """The client cancels, whatever its code; no client gets to send others to an upstream that all share."""
        call.finish(Code.CANCELLED)

    def on_stream_fault(self, call: Call, code: ErrorCode, reason: str) -> None:  # type: ignore[override]
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
        self.relay.settings_acked(self)
        leaves = self in self.relay.clients
        self.relay.clients.pop(self, None)
        for call in list(self.streams.values()):
            assert isinstance(call, Call)
            self.drop_backlog(call)
            call.local_closed = call.remote_closed = True
            call.finish(Code.CANCELLED)
            call.unlink()  # also those that had finished before
        self.streams.clear()
        self.blocked.clear()
        self.granted_requests = 0
        if leaves:
            self.relay.accounts.leave(self.account)
            if self.relay.pool.waiting:
                self.relay.room_appeared = True  # the shares of those who are left may have grown
