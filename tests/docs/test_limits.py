"""Promise: docs/limits.md has every limit with its default, every kind of abuse, and a sum that adds up."""

from __future__ import annotations

import re

import pytest

from proxy import listener
from proxy.config.model import Limits, Timeouts, leaves
from proxy.http2 import guards
from proxy.relay import kept
from proxy.telemetry.metrics import CONNECTION_LIMITS, Counters
from proxy.tls import pacing, reasons
from tests.docs.markdown import names, table
from tests.peers import ROOT

DOCUMENT = ROOT / "docs/limits.md"
TEXT = DOCUMENT.read_text()
DEFAULTS = {f"limits.{leaf.key}": leaf.field.get_default() for leaf in leaves(Limits)}
TIMES = {f"timeouts.{leaf.key}": leaf.field.get_default() for leaf in leaves(Timeouts)}


def rows() -> dict[str, list[str]]:
    """{key or words: [default, unit, why]} of all tables of limits."""
    found = [re.split(r" *\| *", line.strip("| ")) for line in TEXT.splitlines() if line.startswith("| ")]
    return {cells[0].strip("`"): cells[1:] for cells in found if len(cells) == 4}


@pytest.mark.parametrize("key", DEFAULTS)
def test_the_default_of(key: str) -> None:
    default, unit, why = rows()[key]
    assert int(default.replace(",", "")) == DEFAULTS[key]
    assert (unit == "bytes") == ("bytes" in key)
    assert why


@pytest.mark.parametrize("key", TIMES)
def test_the_time(key: str) -> None:
    cells = {names(cells[0])[0]: cells[1:] for cells in table(DOCUMENT, "limit", "default", "why")}
    assert float(cells[key][0].split()[0]) == TIMES[key]
    assert cells[key][1]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("handshakes that wait for their client", pacing.MIDWAY),
        ("ClientHello", reasons.MAX_HELLO),
        ("connections that linger", listener._MOST_LINGERING),
    ],
)
def test_constants(words: str, value: int) -> None:
    assert int(rows()[words][0].replace(",", "")) == value


def test_the_shares_of_handshakes() -> None:
    shares = {cells[0]: cells[1] for cells in table(DOCUMENT, "share of the time", "default", "why")}
    assert shares["all handshakes"] == f"1/{pacing.PRICE:g}"
    assert shares["handshakes of one address"] == f"1/{pacing.ADDRESS_PRICE:g}"
    assert shares["new connections"] == f"{listener._ACCEPTED_AT_ONCE} each {listener._PAUSE_SECONDS * 1000:g} ms"
    assert f"there for {listener._SETTLED_SECONDS:g} s" in TEXT


def test_every_kind_of_abuse_has_its_budget() -> None:
    budgets = {names(cells[0])[0]: cells[1] for cells in table(DOCUMENT, "kind", "budget", "what it is against")}
    assert sorted(budgets) == sorted(Counters().abuse)
    for kind, budget in guards.BUDGETS.items():
        assert int(re.match(r"[\d,]+", budgets[kind])[0].replace(",", "")) == budget  # type: ignore[index]


def test_the_upstream_has_twenty_times_as_much() -> None:
    assert {kind: 20 * guards.BUDGETS[kind] for kind in guards.OF_SERVERS} == guards.OF_SERVERS
    (paragraph,) = [part for part in TEXT.split("\n\n") if part.startswith("The upstream has twenty times")]
    assert sorted(re.findall(r"`(\w+)`", paragraph)) == sorted(guards.OF_SERVERS)


def test_what_one_connection_holds_adds_up() -> None:
    *parts, (last, total, _) = table(DOCUMENT, "part", "at most", "made of")
    assert last == "sum"
    assert sum(float(size.removesuffix(" MiB")) for _, size, _ in parts) == pytest.approx(float(total.split()[0]))
    limits = Limits()
    megabytes = {name: float(size.removesuffix(" MiB")) for name, size, _ in parts}
    streams, waiting = limits.streams_per_connection, limits.waiting_bytes_per_connection
    assert megabytes["header fields of calls"] * 2**20 >= 2 * streams * kept.SMALL
    assert megabytes["requests that the upstream doesn't take"] * 2**20 >= waiting + 131_072
    assert megabytes["answers that the client doesn't take"] * 2**20 >= waiting + streams * 4096


def test_every_reason_to_refuse_a_connection_is_a_key_or_explained() -> None:
    for limit in CONNECTION_LIMITS:
        assert f"limits.{limit}" in DEFAULTS or limit == "open_files"
