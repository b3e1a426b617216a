"""What tests of the wire core share: a peer in either role, and a stop for endless loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http2.wire import Peer, client, no_longer_than, server


@pytest.fixture(autouse=True)
def _no_endless_loop() -> Iterator[None]:
    with no_longer_than(60):
        yield


@pytest.fixture(params=[server, client], ids=["server", "client"])
def peer(request: pytest.FixtureRequest) -> Peer:
    """The peer of a server under test and of a client under test: for rules that hold for both."""
    made: Peer = request.param()
    return made
