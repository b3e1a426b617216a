"""What the shell of a connection needs: of what runs on top of it, and of what all shells share."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from proxy.telemetry.metrics import Counters
from proxy.tls.handshakes import Handshakes
from proxy.tls.reasons import Reason

if TYPE_CHECKING:
    from proxy.tls.shell import Shell


class Session(Protocol):
    """What runs on top of an open TLS connection."""

    paused: bool

    def receive(self, data: bytes | memoryview) -> None: ...

    def resume(self) -> None: ...

    def lost(self) -> None: ...


class Host(Protocol):
    """What all connections of a listener share."""

    context: ssl.SSLContext
    counters: Counters
    begin: Callable[[], float]  # -> the time
    reads: int  # how many there were
    worked: float  # seconds, on those that were measured
    flush: Callable[[], None]
    flush_soon: Callable[[], None]  # the same, where what was received is no view
    handshakes: Handshakes

    def opened(self, shell: Shell) -> None: ...

    def established(self, shell: Shell, tls: ssl.SSLObject) -> Session | Reason: ...

    def proved(self, shell: Shell) -> None: ...

    def failed(self, shell: Shell, reason: Reason) -> None: ...

    def unread(self, shell: Shell, limit: int) -> None: ...

    def empty_records(self, shell: Shell, limit: int) -> None: ...

    def unsettled(self, received: int) -> None: ...

    def ending(self, shell: Shell) -> None: ...

    def closed(self, shell: Shell) -> None: ...
