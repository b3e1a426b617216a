"""What the transports of clients and of upstreams have in common. Knows no protocol."""

import asyncio
import fcntl
import termios


def let_others_read(transport: asyncio.Transport, seconds: float = 0.0) -> None:
    """Read on in the next turn of the event loop, which would go on while a socket has more, 32 times; or later."""
    transport.pause_reading()
    loop = asyncio.get_running_loop()
    if seconds:
        loop.call_later(seconds, _read_on, transport)
    else:
        loop.call_soon(_read_on, transport)


def _read_on(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        transport.resume_reading()


def untaken(transport: asyncio.Transport) -> int:
    """Bytes written that the peer has not acknowledged: in the transport's buffer, and in the kernel's, which can take
    millions for a peer that reads nothing."""
    sock = transport.get_extra_info("socket")
    waiting = transport.get_write_buffer_size()
    try:
        reply = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError, AttributeError):  # closed just now, or a transport without a socket
        return waiting
    return waiting + int.from_bytes(reply, "little")
