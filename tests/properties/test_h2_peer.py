"""Conversations with `h2`, an implementation of its own, which checks all that it is sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
from hypothesis import given
from hypothesis import strategies as st

from proxy.http2 import Buffer, RequestHead, ResponseHead, Stream, Trailers
from tests.http2.wire import REQUEST, RESPONSE, TRAILERS, Client, Fields, Server, block
from tests.properties.quick import quick
from tests.properties.traffic import chunked, extra_fields

_BODY = bytes(index * 7 % 251 for index in range(251 * 1000))
_SETTINGS = h2.settings.SettingCodes


@dataclass
class Plan:
    """What one side says in one message."""

    extra: Fields
    sizes: list[int]
    trailers: Fields | None
    informational: bool = False

    @property
    def body(self) -> bytes:
        return _BODY[: sum(self.sizes)]

    def pieces(self) -> list[bytes]:
        pieces, pos = [], 0
        for size in self.sizes:
            pieces.append(_BODY[pos : pos + size])
            pos += size
        return pieces


def by_name(fields: Fields) -> Fields:
    """Fields in an order that keeps what counts: that among fields of one name (RFC 9110 section 5.3)."""
    return sorted(fields, key=lambda field: field[0])


@dataclass
class Heard:
    """What has come of one message."""

    head: Fields = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: Fields | None = None
    informational: int = 0
    ended: bool = False

    def is_as(self, plan: Plan, start: Fields) -> None:
        assert by_name(self.head) == by_name(start + plan.extra)
        assert bytes(self.body) == plan.body
        assert by_name(self.trailers or []) == by_name(plan.trailers or [])
        assert self.ended


plans = st.builds(
    Plan,
    extra_fields,
    st.lists(st.integers(0, 100) | st.integers(0, 60_000), max_size=4),
    st.none() | extra_fields.map(lambda extra: TRAILERS + extra),
    st.booleans(),
)


class Other:
    """The end that `h2` is: sends its messages as far as the windows let it, and gives all credit back at once."""

    def __init__(self, client_side: bool, window: int, table: int, pad: int | None) -> None:
        self.conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=client_side, header_encoding=None))
        self.conn.local_settings = h2.settings.Settings(
            client=client_side,
            initial_values={_SETTINGS.INITIAL_WINDOW_SIZE: window, _SETTINGS.HEADER_TABLE_SIZE: table},
        )
        self.conn.initiate_connection()
        self.heard: dict[int, Heard] = {}
        self.left: dict[int, tuple[bytes, Fields | None]] = {}
        self.pad = pad

    def say(self, stream: int, head: Fields, plan: Plan) -> None:
        self.conn.send_headers(stream, head + plan.extra)
        self.left[stream] = (plan.body, plan.trailers)

    def send(self) -> None:
        for stream, (body, trailers) in list(self.left.items()):
            overhead = 0 if self.pad is None else self.pad + 1
            room = min(self.conn.local_flow_control_window(stream), self.conn.max_outbound_frame_size) - overhead
            while body and room > 0:
                self.conn.send_data(stream, body[:room], pad_length=self.pad)
                body = body[room:]
                room = min(self.conn.local_flow_control_window(stream), self.conn.max_outbound_frame_size) - overhead
            self.left[stream] = (body, trailers)
            if not body:
                if trailers is None:
                    self.conn.end_stream(stream)
                else:
                    self.conn.send_headers(stream, trailers, end_stream=True)
                del self.left[stream]

    def receive(self, data: bytes) -> list[h2.events.Event]:
        events = self.conn.receive_data(data)
        for event in events:
            stream = getattr(event, "stream_id", 0)
            heard = self.heard.setdefault(stream, Heard()) if stream else Heard()
            if isinstance(event, h2.events.RequestReceived | h2.events.ResponseReceived):
                heard.head = [(bytes(name), bytes(value)) for name, value in event.headers]
            elif isinstance(event, h2.events.InformationalResponseReceived):
                heard.informational += 1
            elif isinstance(event, h2.events.DataReceived):
                heard.body += event.data
                if event.flow_controlled_length:
                    self.conn.acknowledge_received_data(event.flow_controlled_length, stream)
            elif isinstance(event, h2.events.TrailersReceived):
                heard.trailers = [(bytes(name), bytes(value)) for name, value in event.headers]
            elif isinstance(event, h2.events.StreamEnded):
                heard.ended = True
            assert not isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated), event
        return events


class Listener:
    """What one of ours hears; it gives credit back as what it hears is used, which is at once."""

    heard: dict[int, Heard]

    def on_data(self, stream: Stream, chunk: Buffer, end: bool) -> None:
        heard = self.heard[stream.id]
        heard.body += chunk
        heard.ended = end
        self.credit(stream, len(chunk))  # type: ignore[attr-defined]
        if end:
            self.ended(stream)

    def on_trailers(self, stream: Stream, trailers: Trailers) -> None:
        heard = self.heard[stream.id]
        heard.trailers = stream.section(trailers)
        heard.ended = True
        self.ended(stream)

    def ended(self, stream: Stream) -> None:
        """The message is complete."""


class OurServer(Listener, Server):
    def __init__(self, plans: list[Plan]) -> None:
        self.heard = {}
        self.plans = plans
        super().__init__()

    def on_request(self, stream: Stream, head: RequestHead, end: bool) -> None:
        self.heard[stream.id] = Heard(stream.section(head), ended=end)
        if end:
            self.ended(stream)

    def ended(self, stream: Stream) -> None:
        plan = self.plans[stream.id // 2]
        if plan.informational:
            self.send_headers(stream, block([(b":status", b"103")]))
        self.send_headers(stream, block(RESPONSE + plan.extra))
        say(self, stream, plan)


class OurClient(Listener, Client):
    def __init__(self) -> None:
        self.heard = {}
        super().__init__()

    def on_response(self, stream: Stream, head: ResponseHead, end: bool) -> None:
        heard = self.heard.setdefault(stream.id, Heard())
        heard.head = stream.section(head)
        heard.ended = end

    def on_informational(self, stream: Stream, head: ResponseHead) -> None:
        self.heard.setdefault(stream.id, Heard()).informational += 1


def say(conn: Server | Client, stream: Stream, plan: Plan) -> None:
    for piece in plan.pieces():
        conn.send_data(stream, piece, end=False)
    if plan.trailers is None:
        conn.send_data(stream, b"", end=True)
    else:
        conn.send_trailers(stream, block(plan.trailers))


def converse(ours: Any, other: Other, cuts: list[int], on_events: Any = None) -> None:
    """Carry bytes to and fro, in pieces of any size, until nobody has any to send."""
    while True:
        other.send()
        there = other.conn.data_to_send()
        for piece in chunked(there, cuts):
            ours.receive(piece)
        back = b"".join(ours.take_output())
        if not there and not back:
            break
        for piece in chunked(back, cuts):
            events = other.receive(piece)
            if on_events is not None:
                on_events(events)
    assert not ours.closed


windows = st.sampled_from([65_535, 1, 100, 16_384, 1_000_000])
tables = st.sampled_from([4096, 0, 100, 65_536])
some_cuts = st.lists(st.integers(0, 2**20), max_size=6)


@quick
@given(
    st.lists(st.tuples(plans, plans), min_size=1, max_size=4),
    windows,
    tables,
    st.none() | st.integers(0, 255),
    some_cuts,
)
def test_an_h2_client_and_our_server(
    messages: list[tuple[Plan, Plan]], window: int, table: int, pad: int | None, cuts: list[int]
) -> None:
    window = max(window, 10_000) if any(sum(answer.sizes) > 3000 for _, answer in messages) else window
    ours = OurServer([answer for _, answer in messages])
    other = Other(True, window, table, pad)
    for number, (request, _) in enumerate(messages):
        other.say(2 * number + 1, REQUEST, request)
    converse(ours, other, cuts)
    for number, (request, answer) in enumerate(messages):
        ours.heard[2 * number + 1].is_as(request, REQUEST)
        heard = other.heard[2 * number + 1]
        heard.is_as(answer, RESPONSE)
        assert heard.informational == answer.informational
    assert ours.streams == {}


@quick
@given(
    st.lists(st.tuples(plans, plans), min_size=1, max_size=4),
    windows,
    tables,
    st.none() | st.integers(0, 255),
    some_cuts,
)
def test_our_client_and_an_h2_server(
    messages: list[tuple[Plan, Plan]], window: int, table: int, pad: int | None, cuts: list[int]
) -> None:
    window = max(window, 10_000) if any(sum(request.sizes) > 3000 for request, _ in messages) else window
    ours = OurClient()
    other = Other(False, window, table, pad)
    converse(ours, other, cuts)  # `h2` holds us to its settings from the start, not from their acknowledgement on
    for request, _ in messages:
        say(ours, ours.open_stream(block(REQUEST + request.extra), end=False), request)

    def answer_requests(events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.StreamEnded):
                plan = messages[event.stream_id // 2][1]
                if plan.informational:
                    other.conn.send_headers(event.stream_id, [(b":status", b"103")])
                other.say(event.stream_id, RESPONSE, plan)

    converse(ours, other, cuts, answer_requests)
    for number, (request, answer) in enumerate(messages):
        other.heard[2 * number + 1].is_as(request, REQUEST)
        heard = ours.heard[2 * number + 1]
        heard.is_as(answer, RESPONSE)
        assert heard.informational == answer.informational
    assert ours.streams == {}
