"""Promises: targets elsewhere are refused, the bytes are what they are said to be, and a run has all its figures."""

import ssl
from pathlib import Path

import pytest

from proxy.http2 import frames
from proxy.http2.hpack import Decoder
from tests.bench import attack_run, attack_shake, attacks, peers
from tests.bench.attack_kinds import ATTACKS
from tests.bench.attack_run import Own, Result
from tests.bench.attack_wire import REQUEST, Attack, Link, Windows, literal, loopback
from tests.support.ports import free_port


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:8001", ("127.0.0.1", 8001)), ("127.9.9.9:1", ("127.9.9.9", 1)), ("[::1]:443", ("::1", 443))],
)
def test_loopback_targets(text: str, address: tuple[str, int]) -> None:
    assert loopback(text) == address


@pytest.mark.parametrize("text", ["192.0.2.1:443", "[2001:db8::1]:443", "0.0.0.0:80", "127.0.0.1", "127.0.0.1:0"])
def test_other_targets_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        loopback(text)
    with pytest.raises(SystemExit) as ended:
        attacks.main(["--target", text])
    assert ended.value.code == 2
    assert "--target" in capsys.readouterr().err


def test_every_attack_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert attacks.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ATTACKS)


def test_the_request_is_a_grpc_request_without_the_dynamic_table() -> None:
    decoder = Decoder(65_536)
    fields = dict(decoder.decode(REQUEST))
    assert fields[b":method"] == b"POST"
    assert fields[b"content-type"] == b"application/grpc"
    assert fields[b"te"] == b"trailers"
    assert decoder.generation == 0


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 3900])
def test_literals(length: int) -> None:
    decoder = Decoder(65_536)
    assert decoder.decode(literal(b"x", b"v" * length)) == [(b"x", b"v" * length)]
    assert decoder.generation == 0
    decoder.decode(literal(b"x", b"v" * length, index=True))
    assert decoder.generation == 1


def test_a_long_first_message_is_one_that_a_server_answers(tmp_path: Path) -> None:
    site = peers.make_site(tmp_path, 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.certificate, site.key)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    hello = attack_shake.padded(attack_shake.client_hello(Attack(("127.0.0.1", 1), 0.0)), 16_000)
    assert len(hello) == 16_000
    incoming.write(hello)
    with pytest.raises(ssl.SSLWantReadError):
        server.do_handshake()
    assert outgoing.pending


def test_windows_are_read_from_frames_in_pieces() -> None:
    link = Link.__new__(Link)  # only what Windows sets on it
    windows = Windows(link)
    data = frames.settings({3: 7, 4: 1000}) + frames.window_update(0, 5) + frames.window_update(1, 9)
    assert link.received is not None
    for at in range(len(data)):
        link.received(data[at : at + 1])
    assert (windows.settled, windows.max_streams, windows.connection) == (True, 7, frames.DEFAULT_WINDOW + 5)
    assert windows.of(1) == 1009
    windows.spend(1, 1000)
    assert windows.of(1) == 9


def result(**other: object) -> Result:
    values: dict[str, object] = {
        "attack": "ping", "proxy": "gate", "unit": "frames", "calm_rate": 100.0, "rate": 70.0, "calls": 70, "lost": 0,
        "lost_why": [], "calm_p99": 0.001, "p50": 0.001, "p99": 0.025, "slowest": 0.1, "rss": 1,
        "growth_peak": 11_999_999, "growth_after": 0, "attack_rate": 1.0, "connections": 1,
    }  # fmt: skip
    return Result(**(values | other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "misses"),
    [
        ({}, []),
        ({"lost": 1}, ["lost"]),
        ({"rate": 69.0}, ["kept"]),
        ({"p99": 0.026}, ["p99"]),
        ({"growth_peak": 12_000_000}, ["peak"]),
        ({"growth_after": 6_000_000}, ["not back"]),
        ({"problem": "it ended"}, ["problem"]),
        ({"growth_peak": None, "growth_after": None}, []),
    ],
)
def test_bounds(other: dict[str, object], misses: list[str]) -> None:
    assert result(**other).misses() == misses
    assert result(**other).verdict() == (", ".join(misses) or "ok")
    assert (", ".join(misses) or "ok") in attacks.text([result(**other)])


def test_a_verdict_on_a_busy_machine_is_marked() -> None:
    assert result(noise=attack_run.NOISE).verdict() == "ok?"
    assert result(noise=attack_run.NOISE, lost=1).verdict() == "lost?"


def test_proxies_stand_side_by_side() -> None:
    results = [result(), result(proxy="envoy", lost=2), result(attack="churn", proxy="envoy")]
    lines = attacks.side_by_side(results).splitlines()
    cells = [" ".join(line.split()) for line in lines]
    good, bad = "70% / 25.0 / 12.0 ok", "70% / 25.0 / 12.0 lost"
    assert cells == ["kept / p99 ms / MB gate envoy", f"ping {good} {bad}", f"churn - failed {good}"]


@pytest.mark.nghttp2
def test_a_run_on_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_run, "SETTLE_SECONDS", 0.0)
    with peers.upstream(tmp_path) as echo, peers.proxies(peers.make_site(tmp_path, echo.port), ["gate"]) as servers:
        found = attack_run.run(ATTACKS["ping"], Own(servers[0], echo), 0.5)
    assert found.problem == ""
    assert found.calls > 0
    assert found.rss > 0
    assert found.attack_rate > 0
    assert sum(found.endings.values()) == found.connections


def test_an_attack_on_a_closed_port_ends_with_its_time() -> None:
    attack = Attack(("127.0.0.1", free_port()), 0.2)
    ATTACKS["ping"].run(attack)
    assert attack.sent == attack.connections == 0
    assert attack.endings["no TCP connection"] > 0
