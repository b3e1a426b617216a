"""Promise: no call ever gets another call's headers, whatever connections, table sizes and repetitions they come in.

Header compression has state on each of the gate's connections, and the gate remembers blocks that it has seen. A fault
there shows as a field that belongs to somebody else: requests are random, the upstream sends their fields back.
"""

from __future__ import annotations

import random

import h2.settings
import pytest

from tests.support.gate import GateMaker
from tests.support.h2_upstream import ANSWER, OK, Call, Script
from tests.support.rawh2 import Connect, grpc_headers, grpc_message

HEADER_TABLE_SIZE = h2.settings.SettingCodes.HEADER_TABLE_SIZE
TABLE_SIZES = (0, 64, 500, 4096, 65_536)
Field = tuple[str, str]


def send_back(call: Call) -> None:
    """Half of the request's own fields as headers, the others as trailers."""
    fields = [(name, value) for name, value in call.headers.items() if name.startswith("x-")]
    half = len(fields) // 2
    call.answer(bytes(call.body), headers=[*ANSWER, *fields[:half]], trailers=[*OK, *fields[half:]])


class Fields:
    """Random header fields, most of them seen before."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.pool = [(f"x-{number}", self._value()) for number in range(40)]

    def _value(self) -> str:
        length = self.dice.choice((0, 1, 5, 20, 100, 900))
        return "".join(self.dice.choices("abcdefghij 0123456789/=;", k=length)).strip()

    def some(self) -> list[Field]:
        chosen = self.dice.sample(self.pool, self.dice.randint(0, 12))
        return [
            (name, value if self.dice.random() < 0.7 else f"{value}{self.dice.randint(0, 99)}")
            for name, value in chosen
        ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_headers(make_gate: GateMaker, script: Script, connect: Connect, seed: int) -> None:
    dice = random.Random(seed)
    fields = Fields(dice)
    upstream = script(on_end=send_back)
    gate = make_gate(upstream.address)
    clients = [connect(gate) for _ in range(8)]
    for _ in range(60):
        asked = []
        for client in dice.sample(clients, dice.randint(1, len(clients))):
            if dice.random() < 0.1:
                client.h2.update_settings({HEADER_TABLE_SIZE: dice.choice(TABLE_SIZES)})
                client.flush()
            for _ in range(dice.randint(1, 4)):
                own, body = fields.some(), grpc_message(dice.randbytes(dice.choice((0, 3, 200, 5000))))
                asked.append((client, client.request(grpc_headers("/any/Method", *own), body), dict(own), body))
        if upstream.connections and dice.random() < 0.1:
            dice.choice(upstream.connections).change_settings({HEADER_TABLE_SIZE: dice.choice(TABLE_SIZES)})
        for client, stream, own, body in asked:
            reply = client.finish(stream)
            got = {name: value for name, value in (reply.headers | reply.trailers).items() if name.startswith("x-")}
            assert got == own
            assert bytes(reply.body) == body
