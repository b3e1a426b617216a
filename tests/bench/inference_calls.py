"""The calls that inference servers are measured with: what is sent, and what must come back.

One inference, as gRPC's ModelInfer with raw contents, as JSON over REST, or over REST with the binary extension (JSON
first, then the tensors' bytes). A call is made once by itself, and its answer compared number by number, before h2load
makes it many times.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

METHOD = "/inference.GRPCInferenceService/ModelInfer"
STATISTICS = "/inference.GRPCInferenceService/ModelStatistics"
HEADER_LENGTH = "Inference-Header-Content-Length"
PREFIX_BYTES = 5  # gRPC's, before each message
PATIENCE_SECONDS = 30.0

Array = npt.NDArray[Any]
Protocol = Literal["grpc", "json", "binary"]


class WrongAnswer(Exception):
    """A server answered otherwise than it should; the message says how."""


@dataclass(frozen=True)
class Tensors:
    """What goes into a model, and what comes out: name -> array."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Call:
    """One inference of `model` over `protocol`."""

    protocol: Protocol
    model: str
    tensors: Tensors

    @property
    def path(self) -> str:
        return METHOD if self.protocol == "grpc" else f"/v2/models/{self.model}/infer"

    def headers(self) -> dict[str, str]:
        """All that differs from one protocol to the other."""
        if self.protocol == "grpc":
            return {"content-type": "application/grpc", "te": "trailers"}
        if self.protocol == "json":
            return {"content-type": "application/json"}
        return {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(self._binary_head()))}

    def body(self) -> bytes:
        if self.protocol == "grpc":
            message = self._request().SerializeToString()
            return b"\0" + len(message).to_bytes(4, "big") + message
        if self.protocol == "json":
            return json.dumps({"inputs": self._described(lambda array: {"data": array.ravel().tolist()})}).encode()
        return self._binary_head() + b"".join(array.tobytes() for array in self.tensors.inputs.values())

    def make(self, port: int) -> int:
        """Make it; returns how many bytes of body its answer has. WrongAnswer, OSError or grpc.RpcError otherwise."""
        return self._by_grpc(port) if self.protocol == "grpc" else self._by_rest(port)

    def _request(self) -> service_pb2.ModelInferRequest:
        request = service_pb2.ModelInferRequest(model_name=self.model)
        for name, array in self.tensors.inputs.items():
            request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        return request

    def _binary_head(self) -> bytes:
        inputs = self._described(lambda array: {"parameters": {"binary_data_size": array.nbytes}})
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in self.tensors.outputs]
        return json.dumps({"inputs": inputs, "outputs": outputs}).encode()

    def _described(self, more: Any) -> list[dict[str, Any]]:
        return [
            {"name": name, "datatype": np_to_triton_dtype(array.dtype), "shape": array.shape, **more(array)}
            for name, array in self.tensors.inputs.items()
        ]

    def _by_grpc(self, port: int) -> int:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer: bytes = channel.unary_unary(METHOD)(self.body()[PREFIX_BYTES:], timeout=PATIENCE_SECONDS)
        response = service_pb2.ModelInferResponse.FromString(answer)
        contents = zip(response.outputs, response.raw_output_contents, strict=True)
        self._check({one.name: _from_raw(one.datatype, one.shape, raw) for one, raw in contents})
        return PREFIX_BYTES + len(answer)

    def _by_rest(self, port: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
        try:
            connection.request("POST", self.path, self.body(), self.headers())
            response = connection.getresponse()
            answer, head = response.read(), response.headers.get(HEADER_LENGTH)
        finally:
            connection.close()
        if response.status != 200:
            raise WrongAnswer(f"{self.path}: {response.status} {answer[:200]!r}")
        self._check(_rest_outputs(answer, int(head) if head else None))
        return len(answer)

    def _check(self, found: Mapping[str, Array]) -> None:
        if missing := self.tensors.outputs.keys() - found.keys():
            raise WrongAnswer(f"{self.model} gave no output {min(missing)}")
        for name, expected in self.tensors.outputs.items():
            if found[name].shape != expected.shape or not np.allclose(found[name], expected, rtol=1e-3, atol=1e-6):
                raise WrongAnswer(f"{self.model} gave {name} {found[name].tolist()}, not {expected.tolist()}")


def mean_batch(model: str, port: int, before: tuple[int, int] = (0, 0)) -> tuple[float, tuple[int, int]]:
    """How many rows each run of the network had since `before`, by the server's own count; and the count now."""
    request = service_pb2.ModelStatisticsRequest(name=model).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = channel.unary_unary(STATISTICS)(request, timeout=PATIENCE_SECONDS)
    found = service_pb2.ModelStatisticsResponse.FromString(answer).model_stats[0]
    rows, runs = found.inference_count - before[0], found.execution_count - before[1]
    return rows / max(runs, 1), (found.inference_count, found.execution_count)


def _rest_outputs(answer: bytes, head: int | None) -> dict[str, Array]:
    described, raw, outputs = json.loads(answer[:head]), answer[head:] if head else b"", {}
    for one in described["outputs"]:
        size = one.get("parameters", {}).get("binary_data_size")
        if size is None:
            data = np.array(one["data"], triton_to_np_dtype(one["datatype"]))
            outputs[one["name"]] = data.reshape(one["shape"])
        else:
            outputs[one["name"]] = _from_raw(one["datatype"], one["shape"], raw[:size])
            raw = raw[size:]
    return outputs


def _from_raw(datatype: str, shape: Any, raw: bytes) -> Array:
    return np.frombuffer(raw, triton_to_np_dtype(datatype)).reshape(list(shape))
