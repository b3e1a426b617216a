"""Promise: our protocol definitions are Triton's, and both can live in one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpclib.health.v1 import health_pb2 as grpclib_health
from tritonclient.grpc import model_config_pb2 as triton_config
from tritonclient.grpc import service_pb2 as triton_service

from proxy.backend.protos import health_pb2, inference_pb2, model_config_pb2
from tests.tools.generate_protos import FOLDER, NAMES

PAIRS = [
    pytest.param(inference_pb2.DESCRIPTOR, triton_service.DESCRIPTOR, id="inference"),
    pytest.param(model_config_pb2.DESCRIPTOR, triton_config.DESCRIPTOR, id="model_config"),
    pytest.param(health_pb2.DESCRIPTOR, grpclib_health.DESCRIPTOR, id="health"),
]


def _message(message: DescriptorProto, scope: str) -> dict[str, object]:
    name = f"{scope}.{message.name}"
    oneofs = [oneof.name for oneof in message.oneof_decl]
    fields = []
    for field in message.field:
        oneof = oneofs[field.oneof_index] if field.HasField("oneof_index") else None
        fields.append((field.name, field.number, field.type, field.type_name, field.label, oneof))
    found: dict[str, object] = {name: sorted(fields)}
    for enum in message.enum_type:
        found |= _enum(enum, name)
    for nested in message.nested_type:
        found |= _message(nested, name)
    return found


def _enum(enum: EnumDescriptorProto, scope: str) -> dict[str, object]:
    return {f"{scope}.{enum.name}": sorted((value.name, value.number) for value in enum.value)}


def _definitions(file: FileDescriptor) -> dict[str, object]:
    proto = FileDescriptorProto.FromString(file.serialized_pb)
    found: dict[str, object] = {}
    for message in proto.message_type:
        found |= _message(message, proto.package)
    for enum in proto.enum_type:
        found |= _enum(enum, proto.package)
    for service in proto.service:
        for rpc in service.method:
            streaming = rpc.client_streaming, rpc.server_streaming
            found[f"{proto.package}.{service.name}/{rpc.name}"] = (rpc.input_type, rpc.output_type, *streaming)
    return found


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_name_number_type_and_label_is_the_same(ours: FileDescriptor, theirs: FileDescriptor) -> None:
    assert _definitions(ours) == _definitions(theirs)
    assert len(_definitions(ours)) > 2


OURS = "from proxy.backend.protos import inference_pb2, health_pb2"
THEIRS = "import tritonclient.grpc, grpclib.health.v1.health_pb2"


@pytest.mark.parametrize("imports", [f"{THEIRS}\n{OURS}", f"{OURS}\n{THEIRS}"], ids=["theirs first", "ours first"])
def test_both_load_in_one_process(imports: str) -> None:
    check = (
        f"{imports}\nfrom tritonclient.grpc import service_pb2\n"
        "ours = inference_pb2.ModelInferRequest(model_name='m', raw_input_contents=[b'x'])\n"
        "theirs = service_pb2.ModelInferRequest.FromString(ours.SerializeToString())\n"
        "assert theirs.model_name == 'm' and theirs.raw_input_contents[0] == b'x'\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_generated_modules_are_those_of_the_proto_files(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="pip install grpcio-tools")
    target = tmp_path / "set"
    protos = [f"{name}.proto" for name in NAMES]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--descriptor_set_out={target}", *protos]
    subprocess.run(command, check=True)
    made = {file.name: file for file in FileDescriptorSet.FromString(target.read_bytes()).file}
    for module in (inference_pb2, model_config_pb2, health_pb2):
        committed = FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        compiled = made[committed.name]
        _drop_json_names(compiled.message_type)
        assert committed == compiled, f"{committed.name} changed: python -m tests.tools.generate_protos"


def _drop_json_names(messages: Iterable[DescriptorProto]) -> None:
    # protoc writes them into descriptor sets, and not into Python modules.
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        _drop_json_names(message.nested_type)


def test_generated_modules_load_with_the_oldest_protobuf_allowed() -> None:
    for name in NAMES:
        assert "# Protobuf Python Version: 6.30." in (FOLDER / f"{name}_pb2.py").read_text()
