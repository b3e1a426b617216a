"""The backend's HTTP/2 connections: grpclib's, with settings for many streams and large messages.

grpclib announces h2's default of 100 concurrent streams and frames of 16 KiB; the gate multiplexes hundreds of calls
over one connection, and h2 costs about as much for a frame of 16 KiB as for one of a megabyte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.protocol import Connection, EventsProcessor, H2Protocol
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from proxy.backend.budget import Budget
from proxy.backend.services.rpc import CallHandler, Method

MOST_STREAMS = 16384
_STREAM_WINDOW = 8 * 2**20
_CONNECTION_WINDOW = 64 * 2**20
_LARGEST_FRAME = 2**20
_HEADER_LIST = 2**21  # h2 ends the connection, which calls share, for more; gates send less
_ENOUGH = 128 * 2**10
_HEADROOM = 65535  # the window that every connection starts with (RFC 9113, 6.9.2)

_CONFIG = Configuration().__for_server__()
_H2_CONFIG = H2Configuration(
    client_side=False,
    # Bytes: a header that isn't ASCII must not end the connection, which others share.
    header_encoding=None,
    validate_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_inbound_headers=False,
    normalize_outbound_headers=False,
)


class _Events(EventsProcessor):
    def process(self, event: Any) -> None:
        # RFC 9113, 5.5: frames of unknown types are ignored. EventsProcessor raises for an event that it doesn't know.
        if event.__class__ in getattr(self, "processors", ()):
            super().process(event)

    def process_data_received(self, event: Any) -> None:
        # grpclib's buffer takes a frame without data for the end of the stream; RFC 9113, 6.1 allows them anywhere.
        if event.flow_controlled_length:
            super().process_data_received(event)


class GatheringTransport:
    """A transport that writes once per turn of the event loop, or as soon as much has come together.

    grpclib writes after every frame, and uvloop makes a system call of every write: three for a small response.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _ENOUGH:
            # Now, not in the next turn: only what the transport holds counts towards pausing the writers.
            self.flush()

    def flush(self) -> None:
        if self._pieces:
            pieces, self._pieces, self._size = self._pieces, [], 0
            self._transport.write(b"".join(pieces))

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class ServerProtocol(H2Protocol):
    """One connection, registered in `open_connections` for as long as it lasts."""

    def __init__(
        self, methods: Mapping[bytes, Method], open_connections: set[ServerProtocol], budget: Budget
    ) -> None:
        self._methods = methods
        self._budget = budget
        self._open = open_connections
        # The parent's constructor wants a handler, which needs a connection: it is made in connection_made instead.
        self.config = _CONFIG
        self.h2_config = _H2_CONFIG

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        h2 = H2Connection(config=_H2_CONFIG)
        h2.local_settings = _settings()
        h2.max_inbound_frame_size = _LARGEST_FRAME
        h2.decoder.max_header_list_size = _HEADER_LIST
        h2.initiate_connection()
        h2.increment_flow_control_window(_CONNECTION_WINDOW - _HEADROOM)
        gathering = cast(asyncio.Transport, GatheringTransport(cast(asyncio.Transport, transport)))
        self.handler = self.calls = CallHandler(self._methods, h2, gathering, self._budget)
        self.connection = Connection(h2, gathering, config=_CONFIG)
        self.connection.flush()
        self.connection.initialize()
        self.processor = _Events(self.handler, self.connection)
        self._transport = gathering
        self._open.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._open.discard(self)
        super().connection_lost(exc)

    def go_away(self) -> None:
        """Ask the client to open no more streams here; those that are open go on."""
        if self.connection.is_closing():
            return
        # h2's own close_connection() would refuse to send anything after the GOAWAY.
        self.connection.flush()
        self._transport.write(GoAwayFrame(0, last_stream_id=2**31 - 1).serialize())

    def close(self) -> None:
        """Cancel the calls and close the connection."""
        self.processor.close("server is shutting down")


def _settings() -> Settings:
    return Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: MOST_STREAMS,
            SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
            SettingCodes.MAX_FRAME_SIZE: _LARGEST_FRAME,
            SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_LIST,
        },
    )
