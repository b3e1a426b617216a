"""The gate for ten minutes under mixed load: whether it keeps anything of what has come and gone.

    python -m tests.bench.soak                                10 minutes, all kinds of clients
    python -m tests.bench.soak --minutes 3 --svg soak.svg --json soak.json
    python -m tests.bench.soak --kinds bursts,attacks --attacks ping,slow-reader      which of them keeps something?

The gate at its defaults in front of nghttpd; good clients (soak_clients.py) from 127.0.0.1; the attacks of `attacks`
one after another, each for some seconds, from an address of their own. In the middle nghttpd is killed, and comes back
a second later. Once a second the gate's memory, files, streams and connections are looked at. At the end all clients
go, and the gate has to be as it was: the exit code is 1 where a check fails.

It needs `nghttpd` (Debian: nghttp2-server).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from tests.support.ports import free_port

from . import machine, peers, soak_chart, soak_record
from .attack_kinds import ATTACKS
from .connection import CIPHER
from .processes import Server, ServerError, running
from .soak_clients import KINDS
from .soak_record import Attacked, Loss, Record, Sample

ATTACK_KIND = "attacks"
ATTACK_SECONDS, PAUSE_SECONDS = 4.0, 2.0
DOWN_SECONDS = 1.0
GONE_SECONDS = 15.0  # that the gate has for noticing that all clients have gone
REST_SECONDS = 10.0  # and that its memory has for coming to rest
METRICS_SECONDS = 5.0
_SAMPLE_SECONDS = 1.0
_SAID_EVERY = 15
# The one cipher suite that connection.py takes; the ssl module can't choose it.
_OPENSSL = f"""\
openssl_conf = init
[init]
ssl_conf = modules
[modules]
system_default = tls
[tls]
Ciphersuites = {CIPHER}
"""
_WRONG = (b"Traceback", b"internal error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every check holds; 1: one does not, or something didn't start; 2: usage."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        record = _run(options)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(soak_record.text(record))
    if options.json:
        options.json.write_text(json.dumps(record.as_json(), indent=1) + "\n")
    if options.svg:
        options.svg.write_text(soak_chart.draw(record))
    return 1 if record.failures() else 0


def _end(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # `timeout` sends two: the second must not end the cleaning up
    raise SystemExit(128 + number)


def _run(options: argparse.Namespace) -> Record:
    record = Record(machine.facts() | {"minutes": f"{options.minutes:g}"}, kinds=list(options.kinds))
    for setting in machine.gate_environment():
        print(f"gate NOT at its defaults: {setting}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorgate-soak-")))
        upstream = stack.enter_context(contextlib.closing(Upstream(folder)))
        site = peers.make_site(folder, upstream.port)
        (server,) = stack.enter_context(peers.proxies(site, [peers.GATE]))
        admin = json.loads((folder / "gate.yaml").read_text())["admin"]["address"]
        soak = Soak(record, Gate(server, admin), upstream, options)
        stack.enter_context(contextlib.closing(soak.clients))
        soak.start(site.certificate)
        soak.load(options.minutes * 60)
        soak.rest()
    return record


class Upstream:
    """nghttpd, which can be killed and started again on the same port.

    Its windows are its defaults, 64 KiB: other than in the benchmark, requests wait in the gate for them.
    """

    def __init__(self, folder: Path) -> None:
        program = machine.find_program("nghttpd")
        if program is None:
            raise ServerError("nghttpd isn't installed (Debian: apt-get install nghttp2-server)")
        self.port = free_port()
        self._folder = folder
        self._command = [*peers.in_memory_tmp(), program, "--no-tls", "--echo-upload", "--trailer", "grpc-status: 0"]
        self._command += ["-a", "127.0.0.1", "-m", "10000", str(self.port)]
        self._stack = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        self.server = self._stack.enter_context(running("upstream", self._command, self.port, self._folder))

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()
        self._stack.close()

    def close(self) -> None:
        self._stack.close()


class Gate:
    """The gate under test, as its process and its own metrics show it."""

    def __init__(self, server: Server, admin: str) -> None:
        self.server = server
        self._admin = admin
        self._process = psutil.Process(server.process.pid)
        self._read = 0  # bytes of its log

    def sample(self, at: float) -> Sample:
        """ServerError when it is gone."""
        if (death := self.server.death()) is not None:
            raise ServerError(death)
        values = self.metrics()
        return Sample(
            at=at,
            rss=self._process.memory_info().rss,
            files=self._process.num_fds(),
            streams=None if values is None else int(values["tensorgate_streams_open"]),
            connections=None if values is None else int(values["tensorgate_connections_open"]),
            upstream=None if values is None else int(values["tensorgate_upstream_connections/connected"]),
        )

    def metrics(self) -> dict[str, float] | None:
        """{name, or name/label of what has one: value}; None where the page doesn't come in time."""
        try:
            with urllib.request.urlopen(f"http://{self._admin}/metrics", timeout=METRICS_SECONDS) as page:
                text = page.read().decode()
        except OSError:
            return None
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                label = next((value for key, value in sample.labels.items() if key in ("state", "kind", "limit")), "")
                found["/".join(filter(None, (sample.name, label)))] = sample.value
        return found

    def wrong_lines(self) -> list[str]:
        """What its log says of errors of its own since the last call; what was read is cut off when it is long."""
        with self.server.log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        size = self.server.log.stat().st_size
        self.server.trim_log()
        if self.server.log.stat().st_size < size:
            self._read = 0
        return [line.decode(errors="replace") for line in text.splitlines() if any(word in line for word in _WRONG)]


@dataclass
class Client:
    """A process of clients, and what of its output is not a whole line yet."""

    kind: str
    process: "subprocess.Popen[bytes]"
    partial: bytes = b""
    until: float = field(default=float("inf"))  # of an attack: when it must have ended


class Clients:
    """All client processes; closing it ends those that are left."""

    def __init__(self) -> None:
        self.all: list[Client] = []

    def start(self, kind: str, *arguments: str, settings: Path | None = None) -> Client:
        """settings: OpenSSL's."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.soak_clients", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=peers.REPOSITORY,
            env={**os.environ, "OPENSSL_CONF": str(settings)} if settings else None,
            start_new_session=True,  # a Ctrl-C is for the soak, which then ends them in order
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.all.append(Client(kind, process))
        return self.all[-1]

    def lines(self, client: Client) -> Iterator[dict[str, Any]]:
        """What it has printed since the last call."""
        assert client.process.stdout is not None
        while data := client.process.stdout.read(65_536):
            client.partial += data
        *lines, client.partial = client.partial.split(b"\n")
        yield from (json.loads(line) for line in lines if line.startswith(b"{"))

    def tell(self, client: Client) -> None:
        """The end of its input tells it to end."""
        assert client.process.stdin is not None
        with contextlib.suppress(OSError):
            client.process.stdin.close()

    def end(self, client: Client, patience: float) -> None:
        """By force where it takes too long."""
        assert client.process.stdout is not None
        self.tell(client)
        with contextlib.suppress(subprocess.TimeoutExpired):
            client.process.wait(patience)
        client.process.kill()
        client.process.wait()
        client.process.stdout.close()
        self.all.remove(client)

    def close(self) -> None:
        for client in self.all:
            client.process.kill()
        for client in list(self.all):
            self.end(client, 0.0)


class Soak:
    """One run: who is when started, asked and ended."""

    def __init__(self, record: Record, gate: Gate, upstream: Upstream, options: argparse.Namespace) -> None:
        self.clients = Clients()
        self._record = record
        self._gate = gate
        self._upstream = upstream
        self._attacks = self._in_turn(options.attacks, options.seed) if ATTACK_KIND in options.kinds else iter(())
        self._began = time.monotonic()
        self._attack: Client | None = None
        self._next_attack = PAUSE_SECONDS
        self._back = float("inf")  # when the upstream comes back
        self._said = 0

    def _now(self) -> float:
        return time.monotonic() - self._began

    @staticmethod
    def _in_turn(names: Sequence[str], seed: int) -> Iterator[str]:
        """All of them, in an order that is another each time around."""
        dice, names = random.Random(seed), list(names)
        while names:
            dice.shuffle(names)
            yield from names

    def start(self, certificate: Path) -> None:
        self._began = time.monotonic()
        self._record.samples.append(self._gate.sample(0.0))
        settings = certificate.with_name("openssl.cnf")
        settings.write_text(_OPENSSL)
        for kind in self._record.kinds:
            if kind != ATTACK_KIND:
                self.clients.start(kind, kind, str(self._gate.server.port), str(certificate), settings=settings)

    def load(self, seconds: float) -> None:
        """All clients at work, for so long."""
        killed = False
        while (now := self._now()) < seconds:
            if not killed and now >= seconds / 2:
                killed = True
                self._upstream.kill()
                self._record.outage = (now, float("inf"))
                self._back = now + DOWN_SECONDS
            if now >= self._back:
                self._back = float("inf")
                self._upstream.start()
                self._record.outage = (self._record.outage[0], self._now())
            self._turn_of_attacks(now, seconds)
            self._look()
            time.sleep(max(0.0, min(_SAMPLE_SECONDS, self._record.samples[-1].at + _SAMPLE_SECONDS - self._now())))
        self._record.loaded = self._now()

    def rest(self) -> None:
        """Without a client: until the gate has noticed, and then some seconds more."""
        if self._attack is not None:
            self._end_attack(self._attack, self._now())
        for client in self.clients.all:
            self._hear(client)  # what was lost while there was load counts; what is cut off now does not
            self.clients.tell(client)
        for client in list(self.clients.all):
            self.clients.end(client, 5.0)
        gone = self._now()
        while self._now() < gone + GONE_SECONDS:
            self._look()
            last = self._record.samples[-1]
            if last.streams == last.connections == 0:
                break
            time.sleep(0.2)
        self._record.gone_after = self._now() - gone
        until = self._now() + REST_SECONDS
        while self._now() < until:
            time.sleep(_SAMPLE_SECONDS)
            self._look()
        self._record.metrics = self._gate.metrics() or {}

    def _look(self) -> None:
        record = self._record
        sample = self._gate.sample(self._now())
        record.samples.append(sample)
        record.wrong_lines += self._gate.wrong_lines()
        for client in self.clients.all:
            self._hear(client)
        if sample.at - self._said >= _SAID_EVERY:
            self._said = int(sample.at)
            print(soak_record.line(record), file=sys.stderr, flush=True)

    def _hear(self, client: Client) -> None:
        for said in self.clients.lines(client):
            if "lost" in said:
                self._record.losses.append(Loss(client.kind, said["at"] - self._began, said["lost"]))
            elif "calls" in said and client.kind != ATTACK_KIND:
                self._record.answered(client.kind, self._now(), said["calls"])

    def _turn_of_attacks(self, now: float, end: float) -> None:
        attack = self._attack
        if attack is not None and (attack.process.poll() is not None or now >= attack.until):
            self._end_attack(attack, now)
        if self._attack is None and self._next_attack <= now < end - ATTACK_SECONDS - PAUSE_SECONDS:
            name = next(self._attacks, None)
            if name is None:
                return
            where = str(self._gate.server.port)
            self._attack = attack = self.clients.start(ATTACK_KIND, "attack", name, where, f"{ATTACK_SECONDS:g}")
            attack.until = now + 2 * ATTACK_SECONDS + 5
            assert attack.process.stdin is not None
            attack.process.stdin.write(b"go\n")
            attack.process.stdin.flush()
            self._record.attacks.append(Attacked(name, now, end))

    def _end_attack(self, attack: Client, now: float) -> None:
        self.clients.end(attack, 0.0)
        self._attack = None
        self._record.attacks[-1] = Attacked(self._record.attacks[-1].name, self._record.attacks[-1].began, now)
        self._next_attack = now + PAUSE_SECONDS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description="The gate under mixed load.")
    parser.add_argument("--minutes", type=_minutes, default=10.0, metavar="M", help="of load (default: 10)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw memory, connections and streams over time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    kinds = [*KINDS, ATTACK_KIND]
    parser.add_argument("--kinds", type=_known(kinds), default=kinds, metavar="KIND,...",
                        help=f"only these clients, of {', '.join(kinds)}")  # fmt: skip
    parser.add_argument("--attacks", type=_known(list(ATTACKS)), default=list(ATTACKS), metavar="NAME,...",
                        help="only these attacks (see python -m tests.bench.attacks --list)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of the attacks' order (default: 1)")
    return parser


def _known(known: list[str]) -> Any:
    def read(words: str) -> list[str]:
        names = [name.strip() for name in words.split(",") if name.strip()]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return read


def _minutes(words: str) -> float:
    try:
        value = float(words)
    except ValueError:
        value = 0.0
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{words!r} isn't a number of minutes up to a day")
    return value


if __name__ == "__main__":
    sys.exit(main())
