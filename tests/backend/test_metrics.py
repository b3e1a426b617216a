"""Promise: dashboards made for Triton work: its names, types and labels, with the numbers of our statistics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from proxy.backend import exposition, metrics
from proxy.backend.budget import Budget
from proxy.backend.dataplane import InputTensor, Request
from proxy.backend.errors import InferenceError
from proxy.backend.exposition import Machine, escaped
from proxy.backend.loaded import Loaded
from proxy.backend.looplag import LoopLag
from proxy.backend.metrics import MetricsServer
from proxy.backend.repository import Model, State
from proxy.backend.server import Backend
from proxy.config.model import Address
from tests.backend import rendezvous
from tests.backend.models import ECHO, FAILS, NUMBER_TO_NUMBER, WAITS, write_model
from tests.support.processes import LIVENESS

# What tritonserver 2.x says of a CPU-only machine, but for its pool of pinned memory: name, type, help, labels.
TRITON = {
    "nv_inference_request_success": (
        "counter", "Number of successful inference requests, all batch sizes", {"model", "version"}
    ),
    "nv_inference_request_failure": (
        "counter", "Number of failed inference requests, all batch sizes", {"model", "reason", "version"}
    ),
    "nv_inference_count": (
        "counter", "Number of inferences performed (does not include cached requests)", {"model", "version"}
    ),
    "nv_inference_exec_count": (
        "counter", "Number of model executions performed (does not include cached requests)", {"model", "version"}
    ),
    "nv_inference_request_duration_us": (
        "counter",
        "Cumulative inference request duration in microseconds (includes cached requests)",
        {"model", "version"},
    ),
    "nv_inference_queue_duration_us": (
        "counter",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
        {"model", "version"},
    ),
    "nv_inference_compute_input_duration_us": (
        "counter",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        {"model", "version"},
    ),
    "nv_inference_compute_infer_duration_us": (
        "counter",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        {"model", "version"},
    ),
    "nv_inference_compute_output_duration_us": (
        "counter",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
        {"model", "version"},
    ),
    "nv_inference_pending_request_count": (
        "gauge", "Instantaneous number of pending requests awaiting execution per-model.", {"model", "version"}
    ),
    "nv_cpu_utilization": ("gauge", "CPU utilization rate [0.0 - 1.0]", set()),
    "nv_cpu_memory_total_bytes": ("gauge", "CPU total memory (RAM), in bytes", set()),
    "nv_cpu_memory_used_bytes": ("gauge", "CPU used memory (RAM), in bytes", set()),
}  # fmt: skip

OURS = {
    "tensorgate_backend_model_held_bytes": "gauge",
    "tensorgate_backend_event_loop_lag_seconds": "histogram",
    "tensorgate_backend_event_loop_lag_max_seconds": "gauge",
    "tensorgate_backend_held_bytes": "gauge",
    "tensorgate_backend_held_bytes_limit": "gauge",
    "tensorgate_backend_models": "gauge",
    "tensorgate_backend_build_info": "gauge",
}

QUEUE = """
max_batch_size: 1
input { name: "IN" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
dynamic_batching { default_queue_policy { max_queue_size: 1 } }
"""


@dataclass
class Page:
    """A scrape. series: (name, label, label, ...), values of labels sorted by their names -> value."""

    text: str
    types: dict[str, str] = field(default_factory=dict)
    helps: dict[str, str] = field(default_factory=dict)
    labels: dict[str, set[frozenset[str]]] = field(default_factory=dict)
    series: dict[tuple[str, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.text.splitlines():
            match line.split(" ", 3):
                case ["#", "HELP", name, help]:
                    self.helps[name] = help
                case ["#", "TYPE", name, kind]:
                    assert name not in self.types, f"{name} is there twice"
                    self.types[name] = kind
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                # The parser gives every counter's name this end; what is in the text is what HELP and TYPE say.
                bare = sample.name.removesuffix("_total")
                name = bare if bare in self.types else sample.name
                self.labels.setdefault(name, set()).add(frozenset(sample.labels))
                key = (name, *(value for _, value in sorted(sample.labels.items())))
                assert key not in self.series, f"{key} is there twice"
                self.series[key] = sample.value


@dataclass
class Scraped:
    """A backend in the test's own event loop, and its metrics page."""

    backend: Backend
    lag: LoopLag
    server: MetricsServer
    url: str
    http: aiohttp.ClientSession

    async def scrape(self) -> Page:
        async with self.http.get(f"{self.url}/metrics") as response:
            assert response.status == 200
            return Page(await response.text())

    def loaded(self, name: str) -> Loaded:
        return self.backend.repository.find(name, "")


@pytest.fixture
async def scraped(folder: Path) -> AsyncIterator[Scraped]:
    rendezvous.reset()
    repository = folder / "models"
    every_version = NUMBER_TO_NUMBER + "version_policy { all {} }"
    write_model(repository, "echo", every_version, {"1/model.py": ECHO, "3/model.py": ECHO})
    write_model(repository, "fails", NUMBER_TO_NUMBER, {"1/model.py": FAILS})
    write_model(repository, "waits", QUEUE, {"1/model.py": WAITS.replace('["IN"][0]', '["IN"][0, 0]')})
    write_model(repository, "broken", NUMBER_TO_NUMBER, {"1/model.py": "import no_such_module\n"})
    write_model(repository, "empty", NUMBER_TO_NUMBER, {})
    backend = Backend(repository)
    lag = LoopLag()
    lag.start()
    server = MetricsServer(backend.repository, backend.budget, lag)
    address = await server.start(Address("127.0.0.1", 0, ""))
    await backend.load()
    async with aiohttp.ClientSession() as http:
        yield Scraped(backend, lag, server, f"http://{address}", http)
    rendezvous.release.set()
    await server.stop()
    lag.stop()
    await backend.stop(grace=5)


async def call(loaded: Loaded, number: int = 7) -> None:
    shape = (1, 1) if loaded.spec.max_batch_size else (1,)
    await loaded.infer(Request([InputTensor("IN", "INT32", shape, raw=number.to_bytes(4, "little"))]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIVENESS):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def ended(*tasks: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        rendezvous.release.set()
        await asyncio.gather(*tasks, return_exceptions=True)


def failures(page: Page, model: str) -> dict[str, float]:
    return {
        key[2]: value
        for key, value in page.series.items()
        if key[0] == "nv_inference_request_failure" and key[1] == model
    }


async def test_names_types_and_labels_are_those_of_triton(scraped: Scraped) -> None:
    page = await scraped.scrape()
    assert {name for name in page.types if name.startswith("nv_")} == set(TRITON)
    for name, (kind, help, labels) in TRITON.items():
        assert (page.types[name], page.helps[name]) == (kind, help)
        assert page.labels[name] == {frozenset(labels)}, name
    assert {name: kind for name, kind in page.types.items() if name.startswith("tensorgate_")} == OURS
    assert page.series["process_resident_memory_bytes",] > 0


async def test_every_version_counts_from_zero(scraped: Scraped) -> None:
    page = await scraped.scrape()
    versions = {("echo", "1"), ("echo", "3"), ("fails", "1"), ("waits", "1")}
    for name, (_, _, labels) in TRITON.items():
        found = {key: value for key, value in page.series.items() if key[0] == name}
        if "reason" in labels:
            reasons = ("BACKEND", "CANCELED", "OTHER", "REJECTED")
            assert found == {(name, model, reason, version): 0 for model, version in versions for reason in reasons}
        elif labels:
            assert found == {(name, model, version): 0 for model, version in versions}
    assert '\nnv_inference_count{model="echo",version="3"} 0\n' in page.text
    assert '\nnv_inference_request_failure{model="echo",reason="OTHER",version="3"} 0\n' in page.text


async def test_the_numbers_are_those_of_the_statistics(scraped: Scraped) -> None:
    for _ in range(5):
        await call(scraped.loaded("echo"))
    page = await scraped.scrape()
    statistics = scraped.loaded("echo").scheduler.statistics
    expected = {
        "request_success": 5,
        "count": 5,
        "exec_count": 5,
        "request_duration_us": statistics.success.ns // 1000,
        "queue_duration_us": statistics.queue.ns // 1000,
        "compute_input_duration_us": statistics.compute_input.ns // 1000,
        "compute_infer_duration_us": statistics.compute_infer.ns // 1000,
        "compute_output_duration_us": statistics.compute_output.ns // 1000,
    }
    assert {name: page.series[f"nv_inference_{name}", "echo", "3"] for name in expected} == expected
    assert page.series["nv_inference_request_duration_us", "echo", "3"] > 0
    assert page.series["nv_inference_request_success", "echo", "1"] == 0


async def test_a_model_that_raises_fails_in_the_backend(scraped: Scraped) -> None:
    for _ in range(2):
        with pytest.raises(InferenceError, match="boom"):
            await call(scraped.loaded("fails"))
    page = await scraped.scrape()
    assert failures(page, "fails") == {"BACKEND": 2, "CANCELED": 0, "OTHER": 0, "REJECTED": 0}
    assert page.series["nv_inference_request_success", "fails", "1"] == 0


async def test_requests_refused_left_and_waiting(scraped: Scraped) -> None:
    waits = scraped.loaded("waits")
    runs = asyncio.ensure_future(call(waits, 1))
    assert await asyncio.to_thread(rendezvous.running.acquire, timeout=LIVENESS)
    queued = asyncio.ensure_future(call(waits, 2))
    async with ended(runs, queued):
        await until(lambda: waits.scheduler.waiting == 1)
        with pytest.raises(InferenceError, match="exceeds maximum queue size"):
            await call(waits, 3)
        page = await scraped.scrape()
        assert failures(page, "waits") == {"BACKEND": 0, "CANCELED": 0, "OTHER": 0, "REJECTED": 1}
        assert page.series["nv_inference_pending_request_count", "waits", "1"] == 1
        assert page.series["tensorgate_backend_model_held_bytes", "waits", "1"] == waits.scheduler.held_bytes > 0
        queued.cancel()
        await asyncio.wait([queued])
        page = await scraped.scrape()
        assert failures(page, "waits") == {"BACKEND": 0, "CANCELED": 1, "OTHER": 0, "REJECTED": 1}
        assert page.series["nv_inference_pending_request_count", "waits", "1"] == 0


async def test_models_by_state_and_bytes_held(scraped: Scraped) -> None:
    scraped.backend.budget.take(1234)
    page = await scraped.scrape()
    scraped.backend.budget.give(1234)
    states = {key[1]: value for key, value in page.series.items() if key[0] == "tensorgate_backend_models"}
    assert states == dict.fromkeys((state.name.lower() for state in State), 0) | {"ready": 4, "unavailable": 2}
    assert page.series["tensorgate_backend_held_bytes",] == 1234
    assert page.series["tensorgate_backend_held_bytes_limit",] == scraped.backend.budget.limit


async def test_an_unloaded_version_is_gone(scraped: Scraped) -> None:
    version = scraped.backend.repository.models["echo"].versions[1]
    loaded, version.loaded = version.loaded, None
    page = await scraped.scrape()
    version.loaded = loaded
    assert {key[2] for key in page.series if key[:2] == ("nv_inference_count", "echo")} == {"3"}


async def test_the_lag_is_a_histogram(scraped: Scraped) -> None:
    await until(lambda: sum(scraped.lag.counts) >= 2)
    scraped.lag.stop()
    page = await scraped.scrape()
    name = "tensorgate_backend_event_loop_lag_seconds"
    buckets = [value for key, value in page.series.items() if key[0] == f"{name}_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == page.series[f"{name}_count",] == sum(scraped.lag.counts) >= 2
    assert page.series[f"{name}_sum",] == pytest.approx(scraped.lag.total / 1e9)
    assert page.series["tensorgate_backend_event_loop_lag_max_seconds",] == pytest.approx(scraped.lag.most / 1e9)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/metrics", 200),
        ("HEAD", "/metrics", 405),
        ("POST", "/metrics", 405),
        ("DELETE", "/", 405),
        ("GET", "/metrics/", 404),
        ("GET", "/v2/health/ready", 404),
    ],
)
async def test_the_page_and_nothing_else(scraped: Scraped, method: str, path: str, status: int) -> None:
    async with scraped.http.request(method, scraped.url + path) as response:
        assert response.status == status
        text = await response.text()
        assert (response.content_type, response.charset) == ("text/plain", "utf-8")
    if path == "/" and status == 200:
        assert "/metrics" in text


async def test_one_page_for_all_who_ask_at_the_same_time(scraped: Scraped) -> None:
    ask = cast(Callable[[None], Awaitable[web.Response]], scraped.server._metrics)
    first, *others = [answer.body for answer in await asyncio.gather(*(ask(None) for _ in range(20)))]
    assert all(body is first for body in others)
    assert (await ask(None)).body is not first


async def test_models_may_come_and_go_while_the_page_is_written(
    scraped: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "_SLICE", 0)  # a break after every model
    models = scraped.backend.repository.models
    page = asyncio.ensure_future(scraped.server._write())
    echo: Model | None = None
    while not page.done():
        await asyncio.sleep(0)
        if echo is None:
            echo = models.pop("echo")
        else:
            models["echo"], echo = echo, None
    if echo is not None:
        models["echo"] = echo
    assert {key[1] for key in Page((await page).decode()).series if key[0] == "nv_inference_count"} >= {"waits"}


async def test_connections_are_bounded(scraped: Scraped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MOST_CONNECTIONS", 2)
    host, port = scraped.url.removeprefix("http://").split(":")
    open_ones = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
    refused, writer = open_ones[2]
    async with asyncio.timeout(LIVENESS):
        assert await refused.read() == b""
    served, asks = open_ones[0]
    asks.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(LIVENESS):
        assert await served.readline() == b"HTTP/1.1 200 OK\r\n"
    for _, writer in open_ones:
        writer.close()


async def test_an_address_that_cannot_be_had(scraped: Scraped) -> None:
    other = MetricsServer(scraped.backend.repository, Budget(1), LoopLag())
    taken = Address.parse(scraped.url.removeprefix("http://"))
    with pytest.raises(OSError):
        await other.start(taken)
    with pytest.raises(OSError, match="HOST:PORT"):
        await other.start(Address(path="/tmp/metrics"))
    await other.stop()


@pytest.mark.parametrize(
    ("value", "text"), [("a b", "a b"), ('"\\\n', '\\"\\\\\\n'), ("é", "é"), ("x\udcff", "x\\\\udcff")]
)
def test_a_strange_name_spoils_nothing(value: str, text: str) -> None:
    assert escaped(value) == text
    assert escaped(value).encode()


def machine(folder: Path, stat: str, meminfo: str) -> Machine:
    (folder / "stat").write_text(stat)
    (folder / "meminfo").write_text(meminfo)
    return Machine(folder)


def values(text: bytes) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text.decode()):
        yield family.name, family.samples[0].value


def test_processors_and_memory_of_the_machine(tmp_path: Path) -> None:
    memory = "MemTotal: 8 kB\nMemFree: 1 kB\nMemAvailable: 3 kB\n"
    made = machine(tmp_path, "cpu  10 0 10 70 10 0 0 0 5 0\ncpu0 1\n", memory)
    (tmp_path / "stat").write_text("cpu  30 2 14 140 14 0 0 0 9 0\n")
    expected = {"nv_cpu_memory_total_bytes": 8192, "nv_cpu_memory_used_bytes": 5120, "nv_cpu_utilization": 0.26}
    assert dict(values(made.write())) == expected
    assert dict(values(made.write())) == expected  # no time has passed


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu a b c d e\n", "MemTotal\n", "MemTotal: x kB\n"])
def test_a_machine_that_cannot_be_read_is_left_out(tmp_path: Path, text: str) -> None:
    made = machine(tmp_path, text, text)
    assert made.write() == b""
    (tmp_path / "stat").unlink()
    (tmp_path / "meminfo").unlink()
    assert made.write() == b""
