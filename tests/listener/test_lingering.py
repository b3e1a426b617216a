"""Promise: clients that are told off and don't go can't fill the table of open files."""

from __future__ import annotations

from typing import cast

from proxy.listener import _MOST_LINGERING, Listener
from proxy.tls.handshakes import Handshakes
from proxy.tls.shell import Shell


class Ended:
    """A connection that waits for its client to close."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def test_those_that_have_waited_longest_make_room() -> None:
    listener = Listener.__new__(Listener)  # only what an ending connection concerns
    listener._lingering = {}
    listener.handshakes = Handshakes(lambda: 0, lambda shell: None)
    shells = [Ended() for _ in range(_MOST_LINGERING + 3)]
    for shell in shells:
        listener.ending(cast(Shell, shell))
    assert [shell.aborted for shell in shells] == 3 * [True] + _MOST_LINGERING * [False]
    assert len(listener._lingering) == _MOST_LINGERING
