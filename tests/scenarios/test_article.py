"""Promise: the set-up that people copy for a Triton with TLS works as it stands: a configuration of seven lines, a
client of a few, and each way in which it is known to go wrong fails with the error that is known for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.conftest import SAMPLES
from tests.support.certs import Authority
from tests.support.gate import Gate
from tests.support.ports import free_port

# As in the documentation. Only paths and a free port are put in: another server may hold 8001 where the tests run.
CONFIG = """\
model_repository_path: /models
grpc_port: 8001
http_port: 8000
tls:
  cert_file: /etc/ssl/certs/triton.pem
  key_file: /etc/ssl/private/triton.key
  ca_file: /etc/ssl/certs/ca.pem
"""


def start(
    folder: Path, authority: Authority, *, hosts: tuple[str, ...] = ("localhost",), expired: bool = False
) -> Gate:
    pair = authority.server(folder.name, hosts, expired=expired)
    put_in = {
        "/models": str(SAMPLES),
        "8001": "0",
        "/etc/ssl/certs/triton.pem": str(pair.cert_file),
        "/etc/ssl/private/triton.key": str(pair.key_file),
        "/etc/ssl/certs/ca.pem": str(authority.ca_file),
    }
    config = CONFIG
    for name, value in put_in.items():
        assert config.count(name) == 1
        config = config.replace(name, value)
    # The admin page's own default port is left to whoever has it.
    return Gate(folder, config, authority.pem, args=("--admin-address", "127.0.0.1:0"))


@pytest.fixture(scope="module")
def article(run_folder: Path, authority: Authority) -> Iterator[Gate]:
    folder = run_folder / "article"
    folder.mkdir()
    gate = start(folder, authority)
    yield gate
    gate.process.kill()  # its drain would wait five seconds, as the file says nothing else


def model_config(target: str, credentials: grpc.ChannelCredentials | None) -> service_pb2.ModelConfigResponse:
    """The client: a channel, the stub, the ModelConfig call."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, credentials, options=options)
    with channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return stub.ModelConfig(service_pb2.ModelConfigRequest(name="simple"), timeout=20)


def fails_with(target: str, credentials: grpc.ChannelCredentials | None, *words: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        model_config(target, credentials)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    details = raised.value.details()
    for word in words:
        assert word in details


def test_the_model_config_call(article: Gate, authority: Authority) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=authority.ca_file.read_bytes())
    answer = model_config(f"localhost:{article.port}", credentials)
    assert answer.config.name == "simple"
    assert [tensor.name for tensor in answer.config.input] == ["INPUT0", "INPUT1"]
    assert [tensor.name for tensor in answer.config.output] == ["OUTPUT0", "OUTPUT1"]


def test_the_http_port_is_said_not_to_be_served(article: Gate) -> None:
    article.wait_log(r"http_port.* not served")


def test_it_listens_on_every_address(article: Gate, authority: Authority) -> None:
    # The certificate is for localhost only, so that the name is put in by hand.
    options = [("grpc.ssl_target_name_override", "localhost")]
    for host in ("127.0.0.1", "[::1]"):
        credentials = grpc.ssl_channel_credentials(root_certificates=authority.pem)
        with grpc.secure_channel(f"{host}:{article.port}", credentials, options=options) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=20).live


def test_without_root_certificates(article: Gate) -> None:
    fails_with(f"localhost:{article.port}", grpc.ssl_channel_credentials(), "CERTIFICATE_VERIFY_FAILED")


def test_with_the_root_certificates_of_another_ca(article: Gate, other_authority: Authority) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=other_authority.pem)
    fails_with(f"localhost:{article.port}", credentials, "CERTIFICATE_VERIFY_FAILED")


def test_with_an_expired_certificate(folder: Path, authority: Authority) -> None:
    gate = start(folder, authority, expired=True)
    gate.wait_log(r"certificate.*expired")
    credentials = grpc.ssl_channel_credentials(root_certificates=authority.pem)
    fails_with(f"localhost:{gate.port}", credentials, "CERTIFICATE_VERIFY_FAILED", "certificate has expired")
    gate.process.kill()


def test_with_a_certificate_for_another_host(folder: Path, authority: Authority) -> None:
    gate = start(folder, authority, hosts=("triton.example",))
    credentials = grpc.ssl_channel_credentials(root_certificates=authority.pem)
    fails_with(f"localhost:{gate.port}", credentials, "Hostname Verification Check failed")
    gate.process.kill()


def test_with_no_server_on_the_port(authority: Authority) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=authority.pem)
    fails_with(f"localhost:{free_port()}", credentials, "failed to connect to all addresses", "Connection refused")


def test_with_an_insecure_channel(article: Gate) -> None:
    mark = article.process.mark()
    fails_with(f"localhost:{article.port}", None, "failed to connect to all addresses")
    article.wait_log(r"plaintext HTTP/2 .*on a TLS port", since=mark)
