"""Promise: Triton's own HTTP clients work with the REST side: what isn't inference, and the server itself."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from proxy.backend.budget import Budget
from proxy.backend.control import Control
from proxy.backend.repository import Repository
from proxy.backend.services.rest import RestService
from proxy.backend.sockets import SocketFile
from proxy.config.model import Address
from tests.backend.models import ECHO, NUMBER_TO_NUMBER, echo_config, write_model, write_repository
from tests.support.processes import LIVENESS

T = TypeVar("T")
MEMORY = 64 * 2**20  # bytes of the budget under test
LABELS = """
max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: 4 }
output { name: "OUT" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }
"""
BATCH_TEXT = """
max_batch_size: 4
input { name: "text_input" data_type: TYPE_STRING dims: 1 }
input { name: "count" data_type: TYPE_INT32 dims: 1 optional: true }
input { name: "stream" data_type: TYPE_BOOL dims: 1 optional: true }
output { name: "text_output" data_type: TYPE_STRING dims: 1 }
output { name: "numbers" data_type: TYPE_FP32 dims: -1 }
"""
GENERATES = """
import numpy as np

class Model:
    def execute(self, batch):
        count = int(batch["count"][0, 0]) if "count" in batch else 1
        return {"text_output": batch["text_input"], "numbers": np.arange(count, dtype=np.float32)[None]}
"""
TOKENS = """
input { name: "text_input" data_type: TYPE_STRING dims: 1 }
input { name: "count" data_type: TYPE_INT32 dims: 1 }
output { name: "text_output" data_type: TYPE_STRING dims: 1 }
model_transaction_policy { decoupled: true }
"""
TOKENIZES = """
import numpy as np

from tests.backend import rendezvous

class Model:
    def execute(self, batch):
        number = int(batch["count"][0])
        try:
            for at in range(abs(number)):
                yield {"text_output": np.array([batch["text_input"][0] + b"%d" % at], object)}
            if number < 0:
                raise ValueError("counted enough")
        finally:
            rendezvous.finalized.append("tokens")
"""
CONSTANT = """
import numpy as np

class Model:
    def execute(self, batch):
        return {"OUT": np.full(1, %d, np.int32)}
"""


@dataclass
class Rest:
    """A REST server in a thread, with a loop of its own."""

    loop: asyncio.AbstractEventLoop
    service: RestService
    repository: Repository
    budget: Budget
    host: str = ""
    port: int = 0

    @property
    def target(self) -> str:
        return f"{self.host}:{self.port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """In the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LIVENESS)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, header fields in lower case, body); a body that isn't bytes is sent as JSON."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=LIVENESS)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, sent, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def json(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> Any:
        """The value of an answer that has to be 200 and JSON."""
        status, fields, answer = self.ask(path, body, headers, method)
        assert (status, fields["content-type"]) == (200, "application/json"), answer
        return json.loads(answer)

    def refused(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> str:
        """`status text` of an answer that has to be an error."""
        status, fields, answer = self.ask(path, body, headers, method)
        assert fields["content-type"] == "application/json", answer
        (text,) = json.loads(answer).values()
        return f"{status} {text}"

    def quiet(self) -> int:
        """Bytes held, once every request has ended."""

        async def ended() -> int:
            async with asyncio.timeout(LIVENESS):
                while self.service.running:
                    await asyncio.sleep(0.005)
            return self.budget.held

        return self.run(ended())


def serve(repository: Repository, patience: float = LIVENESS, memory: int = MEMORY) -> Iterator[Rest]:
    """A server over a repository that isn't loaded yet."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="rest", daemon=True)
    thread.start()
    budget = Budget(memory)
    service = RestService(repository, lambda: repository.loaded, budget, patience)
    rest = Rest(loop, service, repository, budget)
    rest.run(repository.load())
    address = rest.run(service.start(Address("127.0.0.1", 0, "")))
    rest.host, rest.port = address.host, address.port
    try:
        yield rest
    finally:
        rest.run(service.stop(LIVENESS))
        repository.close(LIVENESS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def write_rest_repository(folder: Path) -> Path:
    """What all protocols are tested with, and models of text and labels."""
    path = write_repository(folder)
    write_model(path, "labels", LABELS, {"1/model.py": ECHO, "labels.txt": "cat\ndog\nbird\n"})
    write_model(path, "gen", BATCH_TEXT, {"1/model.py": GENERATES})
    write_model(path, "tokens", TOKENS, {"1/model.py": TOKENIZES})
    write_model(path, "raw", echo_config(), {"1/model.py": ECHO})
    two = NUMBER_TO_NUMBER + "version_policy { all {} }"
    write_model(path, "versions", two, {"1/model.py": CONSTANT % 1, "3/model.py": CONSTANT % 3})
    write_model(path, "with space", NUMBER_TO_NUMBER, {"1/model.py": CONSTANT % 7})
    return path


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    yield from serve(Repository(write_rest_repository(tmp_path_factory.mktemp("rest") / "models")))


@pytest.fixture(scope="module")
def client(rest: Rest) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(rest.target) as client:
        yield client


def tensor(name: str, array: np.ndarray, binary: bool = True, datatype: str = "") -> triton.InferInput:
    made = triton.InferInput(name, array.shape, datatype or np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def simple(binary: bool = True) -> list[triton.InferInput]:
    row = np.arange(16, dtype=np.int32).reshape(1, 16)
    return [tensor("INPUT0", row, binary), tensor("INPUT1", row, binary)]


SIMPLE = {
    "inputs": [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "data": list(range(16))} for name in ("INPUT0", "INPUT1")
    ]
}
INFER = "/v2/models/simple/infer"


# -- what isn't inference


def test_health(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("versions", "3")
    assert not client.is_model_ready("versions", "2")
    assert not client.is_model_ready("nope")
    assert not client.is_model_ready("broken_code")


def test_a_model_that_is_not_ready_is_400_and_says_why(rest: Rest) -> None:
    assert rest.refused("/v2/models/nope/ready") == "400 Request for unknown model: 'nope' is not found"
    assert "no_such_module" in rest.refused("/v2/models/broken_code/ready")


def test_a_server_that_is_not_ready_is_400(tmp_path: Path) -> None:
    repository = Repository(write_model(tmp_path / "models", "one", NUMBER_TO_NUMBER, {"1/model.py": ECHO}).parent)
    for rest in serve(repository):
        repository.loaded = False
        assert rest.ask("/v2/health/ready")[0::2] == (400, b"")
        repository.loaded = True
        assert rest.ask("/v2/health/ready")[0::2] == (200, b"")


def test_server_metadata(client: triton.InferenceServerClient) -> None:
    found = client.get_server_metadata()
    assert found["name"] == "tensorgate"
    assert {"binary_tensor_data", "classification", "statistics", "generate"} <= set(found["extensions"])


def test_model_metadata_and_config(client: triton.InferenceServerClient, rest: Rest) -> None:
    assert client.get_model_metadata("versions") == {
        "name": "versions",
        "versions": ["1", "3"],
        "platform": "numpy",
        "inputs": [{"name": "IN", "datatype": "INT32", "shape": [1]}],
        "outputs": [{"name": "OUT", "datatype": "INT32", "shape": [1]}],
    }
    config = client.get_model_config("labels", "1")
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("labels", "numpy", 4)
    assert config["input"][0]["dims"] == [4]  # numbers, also those of 64 bits
    assert config["output"][0]["data_type"] == "TYPE_FP32"
    assert config["output"][0]["label_filename"] == "labels.txt"
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert "dynamic_batching" not in config
    assert rest.json("/v2/models/counts/config")["model_transaction_policy"] == {"decoupled": True}


def test_statistics(client: triton.InferenceServerClient) -> None:
    before = client.get_inference_statistics("simple")["model_stats"][0]
    client.infer("simple", simple())
    (after,) = client.get_inference_statistics("simple", "1")["model_stats"]
    assert after["inference_count"] == before["inference_count"] + 1
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["batch_stats"][0]["batch_size"] == 1
    everything = client.get_inference_statistics()["model_stats"]
    assert {"simple", "versions"} <= {one["name"] for one in everything}


def test_a_name_is_percent_decoded(rest: Rest, client: triton.InferenceServerClient) -> None:
    assert client.is_model_ready("with space")
    assert rest.json("/v2/models/with%20space?x=1")["name"] == "with space"


def test_repository_index(client: triton.InferenceServerClient) -> None:
    index = {(one["name"], one.get("version")): one for one in client.get_model_repository_index()}
    assert index["simple", "1"] == {"name": "simple", "version": "1", "state": "READY"}
    assert "no_such_module" in index["broken_code", "1"]["reason"]


def test_index_of_what_is_ready(rest: Rest) -> None:
    states = {one["state"] for one in rest.json("/v2/repository/index", {"ready": True})}
    assert states == {"READY"}
    assert rest.json("/v2/repository/any/index", b"", method="POST")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/v2/systemsharedmemory/region/r/status"),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        ("POST", "/v2/systemsharedmemory/unregister"),
        ("GET", "/v2/cudasharedmemory/region/r/status"),
        ("POST", "/v2/cudasharedmemory/region/r/unregister"),
        ("GET", "/v2/logging"),
        ("POST", "/v2/logging"),
        ("GET", "/v2/trace/setting"),
        ("POST", "/v2/trace/setting"),
        ("GET", "/v2/models/simple/trace/setting"),
    ],
)
def test_what_is_not_served_says_what_to_do_instead(rest: Rest, method: str, path: str) -> None:
    text = rest.refused(path, method=method)
    assert text.startswith("501 this server has no" if "logging" not in path else "501 the log")


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/v2/", "/v2/models", "/v2/models/", "/v2/models/simple/", "/v2/models/simple/foo", "/metrics",
        "/v2/models/simple/versions", "/v2/models/simple/versions/x", "/v2/models/simple/versions/1/x",
        "/v2/repository", "/v2/repository/models/m", "/v2/repository/a/b/index", "/v2/models//infer", "//v2",
        "/v2/systemsharedmemory/x", "/v2/models/simple/versions/%31",
    ],
)  # fmt: skip
def test_unknown_paths(rest: Rest, path: str) -> None:
    assert rest.refused(path).startswith("404 '")
    assert rest.refused(path, b"{}", method="POST").startswith("404 '")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v2", "GET"),
        ("POST", "/v2/health/live", "GET"),
        ("GET", "/v2/repository/index", "POST"),
        ("GET", INFER, "POST"),
        ("DELETE", "/v2/models/simple", "GET"),
        ("PUT", "/v2/logging", "GET, POST"),
        ("GET", "/v2/models/nope/generate", "POST"),
    ],
)
def test_wrong_methods(rest: Rest, method: str, path: str, allowed: str) -> None:
    status, fields, body = rest.ask(path, b"" if method != "GET" else None, method=method)
    assert (status, fields["allow"]) == (405, allowed)
    assert method in json.loads(body)["error"]


def test_no_version_of_the_server_is_told(rest: Rest) -> None:
    for path in ("/v2", "/nowhere", "/v2/health/live"):
        assert rest.ask(path)[1]["server"] == "tensorgate"


# -- loading


def test_load_and_unload(tmp_path: Path) -> None:
    path = write_model(tmp_path / "models", "one", NUMBER_TO_NUMBER, {"1/model.py": ECHO}).parent
    for rest in serve(Repository(path, Control("explicit"))):
        with triton.InferenceServerClient(rest.target) as client:
            assert not client.is_model_ready("one")
            client.load_model("one")
            assert client.is_model_ready("one")
            client.unload_model("one")
            assert not client.is_model_ready("one")
            config = {
                "backend": "numpy",
                "input": [{"name": "IN", "data_type": "TYPE_INT32", "dims": [2]}],
                "output": [{"name": "OUT", "data_type": "TYPE_INT32", "dims": [2]}],
            }
            files = {"file:5/model.py": ECHO.encode()}
            client.load_model("made", config=json.dumps(config), files=files)
            assert client.get_model_metadata("made")["inputs"][0]["shape"] == [2]
            assert client.is_model_ready("made", "5")
            with pytest.raises(InferenceServerException, match="nope"):
                client.load_model("nope")
        load = "/v2/repository/models/one/load"
        for parameters, says in (
            ({"foo": 1}, "'foo'"),
            ({"config": 1}, "'config' is 1"),
            ({"config": "{}", "file:1/model.py": "*"}, "not base64"),
            ([], "'parameters' is a list"),
        ):
            text = rest.refused(load, {"parameters": parameters})
            assert text.startswith("400 ")
            assert says in text
        assert rest.quiet() == 0


def test_over_a_unix_socket(tmp_path: Path, rest: Rest) -> None:
    path = tmp_path / "rest.sock"
    service = RestService(rest.repository, lambda: True, rest.budget)
    file = SocketFile(path)
    rest.run(service.start(Address("", 0, str(path)), sock=file.bind()))

    async def ask() -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    assert rest.run(ask()).startswith(b"HTTP/1.1 200 OK\r\n")
    rest.run(service.stop(1))
    file.remove()


