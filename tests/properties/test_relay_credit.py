"""Two connections joined stream by stream, between two far ends with windows of their own: whatever those are and
whenever a transport is full, each byte arrives once and in order, no window is overrun, nothing is kept beyond what
was allowed, and in the end all credit is back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from proxy.http2 import Buffer, RequestHead, ResponseHead, Stream, Trailers
from tests.http2 import wire
from tests.http2.wire import (
    DATA,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    WINDOW,
    WINDOW_UPDATE,
    Client,
    Peer,
    Server,
    block,
)
from tests.properties.quick import quick

_BODY = bytes(index * 7 % 251 for index in range(251 * 1000))


class Down(Server):
    """The client's side of the relay."""

    up: Up

    def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
        partner = self.up.open_stream(block(stream.section(head)), end)
        stream.partner, partner.partner = partner, stream

    def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        assert stream.partner is not None
        self.up.send_data(stream.partner, chunk, end)

    def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
        assert stream.partner is not None
        self.up.send_trailers(stream.partner, trailers)


class Up(Client):
    """The server's side of the relay."""

    down: Down

    def on_response(self, stream: Stream, head: ResponseHead, end: bool) -> None:
        assert stream.partner is not None
        self.down.send_headers(stream.partner, head, end)

    def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        assert stream.partner is not None
        self.down.send_data(stream.partner, chunk, end)

    def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
        assert stream.partner is not None
        self.down.send_trailers(stream.partner, trailers)


@dataclass
class Message:
    """One direction of a stream, as its two ends see it."""

    size: int
    may_send: int  # the sender's window
    may_come: int  # the window that the receiver has granted
    sent: int = 0
    ended: bool = False
    came: bytearray = field(default_factory=bytearray)
    come_to_end: bool = False


class End(Peer):
    """A far end: it counts its windows, and those that it has granted."""

    def __init__(self, conn: Down | Up) -> None:
        self.out: dict[int, Message] = {}
        self.back: dict[int, Message] = {}
        super().__init__(conn)
        self.may_send = WINDOW + sum(item.number for item in self.greeting if item.kind == WINDOW_UPDATE)
        self.target = self.may_send
        self.may_come = WINDOW
        self.initial = WINDOW

    def read(self) -> None:
        for item in self.sent():
            if item.kind == WINDOW_UPDATE and item.stream:
                self.out[item.stream].may_send += item.number
            elif item.kind == WINDOW_UPDATE:
                self.may_send += item.number
            elif item.kind == DATA:
                message = self.back[item.stream]
                size = len(item.payload)
                assert not message.come_to_end
                assert size == 0 or size <= min(message.may_come, self.may_come), "a window is overrun"
                message.may_come -= size
                self.may_come -= size
                message.came += item.payload
                message.come_to_end = item.ends
            elif item.kind == HEADERS:
                self.back[item.stream].come_to_end |= item.ends
            assert item.kind != RST_STREAM

    def send_some(self, stream: int, most: int, padding: int) -> None:
        """Send as much of a message as the windows and `most` allow, in one frame."""
        message = self.out[stream]
        room = min(message.may_send, self.may_send) - (padding + 1)
        size = min(most, room, message.size - message.sent, 16_384 - padding - 1)
        if size <= 0 or message.ended:
            return
        payload = _BODY[message.sent : message.sent + size]
        message.sent += size
        if padding:
            self.conn.receive(wire.padded_data(stream, payload, padding))
            size += padding + 1
        else:
            self.conn.receive(wire.data(stream, payload))
        message.may_send -= size
        self.may_send -= size

    def finish(self, stream: int, with_trailers: bool) -> None:
        self.out[stream].ended = True
        end = self.headers(stream, TRAILERS, end=True) if with_trailers else wire.data(stream, b"", end=True)
        self.conn.receive(end)

    def grant(self, stream: int, size: int) -> None:
        if stream:
            self.back[stream].may_come += size
        else:
            self.may_come += size
        self.conn.receive(wire.window_update(stream, size))

    def set_initial(self, size: int) -> None:
        for message in self.back.values():
            message.may_come += size - self.initial
        self.initial = size
        self.conn.receive(wire.settings((INITIAL_WINDOW_SIZE, size)))


class World:
    """client - Down = Up - server"""

    def __init__(self, stream_window: int) -> None:
        self.down, self.up = Down(stream_window, max_streams=5), Up(stream_window, max_streams=5)
        self.down.up, self.up.down = self.up, self.down
        self.client, self.server = End(self.down), End(self.up)
        self.stream_window = stream_window

    def read(self) -> None:
        self.client.read()
        self.server.read()
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            for stream, message in sender.out.items():
                came = receiver.back[stream].came
                assert message.sent - len(came) <= self.stream_window, "more is kept than was allowed"

    def request(self, size: int, response: int) -> None:
        stream = 2 * len(self.client.out) + 1
        if stream > 9:
            return
        self.client.out[stream] = Message(size, self.stream_window, 0)
        self.server.back[stream] = Message(size, 0, self.server.initial)
        self.client.conn.receive(self.client.headers(stream, REQUEST))
        self.server.out[stream] = Message(response, self.stream_window, 0)
        self.client.back[stream] = Message(response, 0, self.client.initial)
        self.server.conn.receive(self.server.headers(stream, RESPONSE))

    def step(self, at_client: bool, which: int, what: str, size: int, padding: int) -> None:
        end = self.client if at_client else self.server
        if what == "request":
            self.request(size % 250_000 if size > 20 else 0, padding * 1000)
        elif what == "initial":
            end.set_initial(size)
        elif what == "pause":
            end.conn.paused = True
        elif what == "resume":
            end.conn.resume()
        elif what == "grant all":
            end.grant(0, size)
        elif end.out:
            stream = 2 * (which % len(end.out)) + 1
            if what == "grant":
                end.grant(stream, size)
            elif what == "end":
                self.end(end, stream, padding % 2 == 0)
            else:
                end.send_some(stream, size, padding if what == "send padded" else 0)
        self.read()

    def end(self, sender: End, stream: int, with_trailers: bool) -> None:
        """End a message that was sent, a response not before its request: the rest of that would be refused."""
        message = sender.out[stream]
        asked = sender is self.client or self.server.back[stream].come_to_end
        if message.sent == message.size and not message.ended and asked:
            sender.finish(stream, with_trailers)

    def open_everything(self) -> None:
        for end in (self.client, self.server):
            end.set_initial(1_000_000)
            end.grant(0, 100_000_000)
            end.conn.resume()
            self.read()

    def send_everything(self) -> None:
        left = True
        while left:
            left = False
            for end in (self.client, self.server):
                for stream, message in end.out.items():
                    before = message.sent
                    end.send_some(stream, 16_384, 0)
                    end.conn.resume()
                    self.read()
                    assert message.sent > before or message.sent == message.size, "no credit came back"
                    left |= message.sent < message.size


@quick
@given(
    st.sampled_from([WINDOW, WINDOW + 1, 100_000]),
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 4),
            st.sampled_from(
                ["request", "send", "send", "send padded", "end", "grant", "grant all", "initial", "pause", "resume"]
            ),
            st.integers(1, 100) | st.integers(1, 300_000),
            st.integers(0, 255),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_bytes_and_credit_are_conserved(
    stream_window: int, steps: list[tuple[bool, int, str, int, int]], with_trailers: bool
) -> None:
    world = World(stream_window)
    world.request(100_000, 100_000)
    for step in steps:
        world.step(*step)
    world.open_everything()
    world.send_everything()
    for end, other in ((world.client, world.server), (world.server, world.client)):
        assert end.may_send > end.target // 2, "the connection's credit isn't back"
        for stream, message in end.out.items():
            assert bytes(other.back[stream].came) == _BODY[: message.size]
            assert other.back[stream].come_to_end == message.ended
            if message.ended:
                continue  # credit for what has ended is of no use
            assert message.may_send > stream_window // 2, "a stream's credit isn't back"
            assert message.may_send <= stream_window
    for end, other in ((world.client, world.server), (world.server, world.client)):
        for stream in end.out:
            world.end(end, stream, with_trailers)
        world.read()
        assert all(message.come_to_end for message in other.back.values())
    assert world.down.streams == world.up.streams == {}
    assert world.down.blocked == world.up.blocked == {}
    assert not world.down.closed
    assert not world.up.closed
