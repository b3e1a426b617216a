"""One call: a client's stream, the upstream stream that carries it onward, and how it ends.

Rules:
- A call ends exactly once: with the upstream's answer, with an answer of the gate, or with a reset from either side.
- Whatever ends it ends the upstream stream too: a cancelled call stops the model's work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.http2 import ErrorCode, HeaderBlock, Passing, Stream
from proxy.http2.headers import INTERNED_BYTES, list_size
from proxy.inference import status
from proxy.inference.calls import OTHER_METHOD
from proxy.inference.status import Code
from proxy.relay.facts import Facts
from proxy.relay.kept import ANSWERED, HAS_TRAILERS, NOTHING, SMALL, TOO_LONG, Held, Replayable
from proxy.relay.relay import log
from proxy.upstream.link import UpstreamConnection

if TYPE_CHECKING:
    from proxy.relay.downstream import Downstream

# Bytes of an answer that may come from the upstream before any of it was forwarded. Small, since a client can ask for
# hundreds of answers at once and take none: what waits in the gate then is so much for each.
FIRST_WINDOW = 4096


class Call(Replayable):
    """A client's stream and what is known of the call on it; `partner` is the upstream stream, once there is one."""

    __slots__ = ("deadline_slot", "done", "facts", "held", "responding", "started", "timeout")

    conn: Downstream
    timeout: float  # grpc-timeout in seconds, where there is one

    def __init__(self, conn: Downstream, stream_id: int, recv_window: int, send_window: int) -> None:
        super().__init__(conn, stream_id, recv_window, send_window)
        self.deadline_slot = -1
        self.done = False
        self.responding = False  # a response head has gone to the client
        self.facts: Facts | None = None
        self.started = conn.relay.now
        self.held: Held | None = None  # what came before there was an upstream connection
        self.kept = NOTHING

    # -- waiting for a connection (upstream.pool.Waiter)

    @property
    def owner(self) -> Downstream:
        return self.conn

    def progress(self) -> object | None:
        """See relay.room: None unless the call was opened and nothing has followed, from either side. One that has had
        data may be waiting for the model, or the model for it."""
        nothing_yet = not self.remote_closed and not self.responding and self.recv_window == self.window
        return "opened" if nothing_yet and not self.unacked else None

    def wait(self, end: bool) -> None:
        """Hold what has come and what will, until there is an upstream connection."""
        assert self.facts is not None
        size = self.facts.forward.size
        held = self.held = Held(self.passing, end, size if size > INTERNED_BYTES else 0)
        self.conn.hold(held.weight)

    def connected(self, conn: UpstreamConnection) -> None:
        """There is room on this connection: the request goes out with all that has come so far."""
        assert self.facts is not None
        held = self._take_held()
        assert held is not None
        if self.too_large(self.facts.forward, held.request, conn):
            return
        chunks = held.chunks
        partner = conn.open_stream(self.facts.forward, held.end and not chunks, held.request)
        partner.partner = self
        self.partner = partner
        self.conn.carry(1)
        if list_size(self.facts.forward, held.request) > SMALL:
            self.forget_long_fields()
        while chunks:
            chunk = chunks.popleft()
            self.keep(chunk)
            conn.send_data(partner, chunk, held.end and not chunks)
        if held.trailers is not None:
            self.forget_request(HAS_TRAILERS)
            if self.too_large(held.trailers, held.passing, conn):
                return
            conn.send_trailers(partner, held.trailers, held.passing)

    def forget_long_fields(self) -> None:
        """They have gone upstream; a call that may last for hours doesn't keep much for a second try."""
        assert self.facts is not None
        self.passing = None
        if self.facts.forward.size > SMALL:
            self.facts = self.facts.without_fields()
        self.forget_request(TOO_LONG)

    def too_large(self, block: HeaderBlock, passing: Passing | None, conn: UpstreamConnection) -> bool:
        """Answer the call if a header section of its request is larger than the upstream says that it takes.

        SETTINGS_MAX_HEADER_LIST_SIZE is advisory, but some end the whole connection, which others share, over it.
        """
        size = list_size(block, passing)
        limit = conn.peer.max_header_list
        if size <= limit:
            return False
        self.answer(
            Code.RESOURCE_EXHAUSTED,
            f"the request's headers take {size} bytes, upstream {self.conn.relay.pool.address} takes {limit} "
            "(its SETTINGS_MAX_HEADER_LIST_SIZE)",
        )
        return True

    def replay(self, refused_by: UpstreamConnection) -> str | None:
        """An upstream has not processed the request: send it again. Or say why it can't be."""
        held = self.take_request()
        if isinstance(held, str):
            return held
        if self.partner is not None:
            self._leave(self.partner)
        self.unlink()
        relay = self.conn.relay
        self.held = held
        self.conn.hold(held.weight)
        conn = relay.pool.pick_other(refused_by)
        if conn is not None:
            self.connected(conn)
        else:
            self.conn.queue_up(self, refused_by)
        return None

    def _take_held(self) -> Held | None:
        held = self.held
        if held is not None:
            self.held = None
            self.conn.hold(-held.weight)
        return held

    def not_connected(self, why: str) -> None:
        relay = self.conn.relay
        self.answer(
            Code.UNAVAILABLE,
            f"upstream {relay.pool.address}: {why}; waited {relay.pool.connect_timeout:g} s (timeouts.connect)",
        )

    def crowded_out(self) -> None:
        pool = self.conn.relay.pool
        self.answer(
            Code.RESOURCE_EXHAUSTED,
            f"{pool.waiting} calls already wait for upstream {pool.address}, {pool.max_waiting} may, and no client "
            "more than it leaves to others (limits.pending_requests)",
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
        self.answer(Code.DEADLINE_EXCEEDED, f"deadline of {self.timeout:g} s passed waiting for {waiting}")

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
        if self.kept is not ANSWERED:
            self.forget_request(ANSWERED)
        if self.deadline_slot >= 0:
            relay.deadlines.remove(self)
        partner = self.partner
        if partner is None:
            relay.pool.forget(self)
            self._take_held()
        else:
            self._leave(partner)
            if not (partner.local_closed and partner.remote_closed):
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

    def _leave(self, partner: Stream) -> None:
        """The upstream stream is over, or about to be: what it took of this client's shares is free."""
        conn = self.conn
        conn.carry(-1)
        conn.granted -= partner.window - FIRST_WINDOW

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
