"""Promise: a host can't pass for many by the addresses that it may choose freely."""

from __future__ import annotations

import pytest

from proxy.tls.addresses import network


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("not:an:address", "not:an:address"),
        ("", ""),
    ],
)
def test_network(address: str, expected: str) -> None:
    assert network(address) == expected
