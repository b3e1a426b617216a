"""What counts as one client where clients are told apart by address. No I/O."""

from __future__ import annotations

import ipaddress


def network(address: str) -> str:
    """The address itself, or its /64 for IPv6: a host has as many addresses of that as it likes (RFC 4291, 2.5.4)."""
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(ipaddress.IPv6Address(int(found) >> 64 << 64)) + "/64"
