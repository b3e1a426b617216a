"""Who gets room upstream, and a place to wait, when there is not enough of it for all. No I/O.

Rules:
- Addresses share first, and the connections of one address share what it gets: who opens hundreds of connections gains
  nothing by it where others come from elsewhere. While all come from one address, as they do behind a load balancer
  that hides them, its connections alone count.
- There is always some room left for the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

# How many times as many calls as there is room left a client may have upstream. One alone gets 8 of 9 places, each of
# ten gets a tenth, and there is always one left for the next: "dynamic thresholds" (Choudhury and Hahne, 1998).
SHARE = 8


class Accounts:
    """Every address that has connections."""

    def __init__(self) -> None:
        self._by_address: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._by_address)

    def join(self, address: str) -> Account:
        """A connection from this address begins."""
        account = self._by_address.get(address)
        if account is None:
            account = self._by_address[address] = Account(address, self)
        account.connections += 1
        return account

    def leave(self, account: Account) -> None:
        """A connection of this account has ended, and all its calls."""
        account.connections -= 1
        if account.connections == 0:
            del self._by_address[account.address]


class Account:
    """All connections of one address. `carried`: how many of their calls are on an upstream connection; `held_bytes`:
    what those that wait for one hold."""

    __slots__ = ("_all", "address", "carried", "connections", "held_bytes")

    def __init__(self, address: str, accounts: Accounts) -> None:
        self.address = address
        self.carried = 0
        self.held_bytes = 0
        self.connections = 0
        self._all = accounts

    @property
    def alone(self) -> bool:
        """Nobody comes from elsewhere."""
        return len(self._all) <= 1


class Owner(Protocol):
    """Whose calls they are: one client's connection. `carried`: how many of its calls are on an upstream connection."""

    carried: int
    account: Account


def party(owner: Owner) -> Any:
    """Who shares with others: an address, or a connection where all come from one address."""
    return owner if owner.account.alone else owner.account


def may_have(owner: Owner, room: int) -> bool:
    """Whether another call of this owner may take some of the room."""
    account = owner.account
    if not account.alone:
        room = min(room, room * SHARE - account.carried)
    return owner.carried < room * SHARE


class Waiter(Protocol):
    """A call that waits."""

    @property
    def owner(self) -> Owner: ...


Call = TypeVar("Call", bound=Waiter)


class Line(Generic[Call]):
    """Calls that wait, by address and connection, whose turn is next first."""

    def __init__(self) -> None:
        self._accounts: dict[Account, dict[Owner, dict[Call, None]]] = {}
        self._counts: dict[Account, int] = {}

    def __bool__(self) -> bool:
        return bool(self._accounts)

    def add(self, call: Call) -> None:
        owner = call.owner
        account = owner.account
        self._accounts.setdefault(account, {}).setdefault(owner, {})[call] = None
        self._counts[account] = self._counts.get(account, 0) + 1

    def remove(self, call: Call) -> None:
        """It waits no longer, for whatever reason."""
        owner = call.owner
        account = owner.account
        owners = self._accounts[account]
        del owners[owner][call]
        self._counts[account] -= 1
        if not owners[owner]:
            del owners[owner]
            if not owners:
                del self._accounts[account], self._counts[account]

    def clear(self) -> None:
        self._accounts.clear()
        self._counts.clear()

    def parties(self) -> dict[Any, int]:
        """Whose calls wait, and how many."""
        counts: dict[Any, int] = {}
        for owners in self._accounts.values():
            for owner, calls in owners.items():
                key = party(owner)
                counts[key] = counts.get(key, 0) + len(calls)
        return counts

    def next(self, may: Callable[[Owner], bool]) -> Call | None:
        """The call whose turn it is, of an owner that may have room; the next turn is another address's or owner's."""
        for account, owners in self._accounts.items():
            for owner, calls in owners.items():
                if may(owner):
                    del owners[owner], self._accounts[account]  # behind the others
                    owners[owner] = calls
                    self._accounts[account] = owners
                    return next(iter(calls))
        return None

    def has_place(self, owner: Owner, free: int) -> bool:
        """Whether a further call of this owner may wait: each has as many places as it leaves to others."""
        account = owner.account
        calls = self._accounts.get(account, {}).get(owner, {})
        return len(calls) < free and (account.alone or self._counts.get(account, 0) < free)

    def who_makes_place(self, owner: Owner) -> Call | None:
        """The latest call of who has most, if that is more than this owner would have with another one."""
        account = owner.account
        owners = self._accounts.get(account, {})
        most = max(self._counts, key=self._counts.__getitem__, default=account)
        least = len(owners.get(owner, {})) + 1
        if self._counts.get(most, 0) > self._counts.get(account, 0) + 1:
            owners, least = self._accounts[most], 0
        longest: dict[Call, None] = max(owners.values(), key=len, default={})
        return next(reversed(longest)) if len(longest) > least else None
