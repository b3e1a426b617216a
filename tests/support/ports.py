"""Ports for servers that must be told one before they start."""

import errno
import random
import socket

# Below the ports that the kernel hands to outgoing connections (Linux: from 32,768; the range that IANA names begins at
# 49,152): one of those can be taken by any client between the look here and the server's own bind.
_LOWEST, _HIGHEST = 12_000, 32_000
_given: set[int] = set()


def free_port() -> int:
    """A TCP port on which nothing listens now, on any address; never the same one twice in a process."""
    while True:
        port = random.randrange(_LOWEST, _HIGHEST)
        if port not in _given and _is_free(port):
            _given.add(port)
            return port


def _is_free(port: int) -> bool:
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family) as probe:
                probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            if family == socket.AF_INET:
                raise  # only IPv6 may be missing here
    return True
