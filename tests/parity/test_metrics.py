"""The metrics endpoint: the same families with the same labels, counting the same."""

from __future__ import annotations

import re
import urllib.request

import numpy as np

from tests.parity.clients import Client, covers
from tests.parity.servers import Server
from tests.parity.waiting import eventually

COUNTERS = (
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
)
GAUGES = ("nv_inference_pending_request_count",)
REASONS = ("BACKEND", "CANCELED", "OTHER", "REJECTED")


def scrape(server: Server) -> str:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=20) as response:
        assert response.headers.get_content_type() == "text/plain"
        assert response.headers.get_content_charset() == "utf-8"
        return str(response.read().decode())


def value(text: str, name: str, **labels: str) -> float:
    """The value of one series, whatever the order of its labels."""
    for line in text.splitlines():
        if found := re.fullmatch(rf"{name}{{(.*)}} (\S+)", line):
            told = dict(re.findall(r'(\w+)="([^"]*)"', found[1]))
            if told == labels:
                return float(found[2])
    raise AssertionError(f"no {name} with {labels} in:\n{text}")


def test_every_family_is_there_for_every_model(server: Server) -> None:
    text = scrape(server)
    for kind, names in (("counter", COUNTERS), ("gauge", GAUGES)):
        for name in names:
            assert f"# TYPE {name} {kind}\n" in text
            assert re.search(rf"^# HELP {name} \S", text, re.MULTILINE)
    for name in {*COUNTERS, *GAUGES} - {"nv_inference_request_failure"}:
        for model in ("simple", "repeat"):
            assert value(text, name, model=model, version="1") >= 0
    for reason in REASONS:
        assert value(text, "nv_inference_request_failure", model="simple", version="1", reason=reason) >= 0


@covers("infer")
async def test_requests_rows_executions_and_failures_are_counted(client: Client) -> None:
    def counts() -> list[float]:
        text = scrape(client.server)
        simple = [value(text, name, model="simple", version="1") for name in (COUNTERS[0], *COUNTERS[2:4])]
        return [*simple, value(text, "nv_inference_request_failure", model="fails", version="1", reason="BACKEND")]

    before = counts()
    rows = np.zeros((3, 16), np.int32)
    await client("infer", "simple", [client.input("INPUT0", rows), client.input("INPUT1", rows)])
    await client.refused("INTERNAL", "infer", "fails", [client.input("IN", np.array([5], np.int32))])
    await client.refused("INVALID_ARGUMENT", "infer", "simple", [client.input("INPUT0", rows)])  # counts nowhere

    async def counted() -> bool:
        return [after - first for first, after in zip(before, counts(), strict=True)] == [1, 3, 1, 1]

    await eventually(counted)
