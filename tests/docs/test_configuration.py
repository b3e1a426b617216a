"""Promise: docs/configuration.md has every key, default, range and flag; examples and links of all documents work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from proxy import cli
from proxy.config.fields import keys
from proxy.config.load import ConfigError, load
from proxy.config.model import Address, Leaf, Settings, leaves
from tests.docs.markdown import DOCUMENTS, Block, anchors, code_blocks, links, names, table
from tests.peers import ROOT
from tests.support.certs import Authority, KeyPair

DOCUMENT = ROOT / "docs/configuration.md"
LEAVES = {leaf.key: leaf for leaf in leaves()}
TYPES: dict[str, set[Any]] = {
    "path": {Path},
    "address": {Address},
    "text": {str},
    "port": {int},
    "count": {int},
    "bytes": {int},
    "seconds": {float},
    "true or false": {bool},
    "list": {tuple},
}
STEP = {int: 1, float: 0.001}


def rows() -> dict[str, list[str]]:
    """{key: [type, default, range]}"""
    found = table(DOCUMENT, "key", "type", "default", "range", "meaning")
    return {names(key)[0]: cells for key, *cells, _ in found}


def kind(leaf: Leaf) -> Any:
    """The type of a key's value, None aside; Literal for a choice."""
    annotation = leaf.field.annotation
    if get_origin(annotation) is Literal:
        return Literal
    if get_origin(annotation) is tuple:
        return tuple
    members = [member for member in get_args(annotation) if member is not type(None)]
    bare = members[0] if members else annotation
    return get_args(bare)[0] if hasattr(bare, "__metadata__") else bare


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, authority: Authority, server_pair: KeyPair) -> dict[str, Path]:
    """Real files for the keys that name one."""
    models = tmp_path_factory.mktemp("models")
    return {
        "model_repository_path": models,
        "cert_file": server_pair.cert_file,
        "key_file": server_pair.key_file,
        "ca_file": authority.ca_file,
    }


@pytest.fixture
def config(tmp_path: Path, place: dict[str, Path], key: str) -> Path:
    """A settings file that is good, with the backend that `key` is for."""
    tls = {key: str(place[key]) for key in ("cert_file", "key_file", "ca_file")}
    file = tmp_path / "gate.yaml"
    embedded = {"model_repository_path": str(place["model_repository_path"])}
    behind = embedded if key.startswith("backend.") else {"upstream": {"grpc": "127.0.0.1:9001"}}
    file.write_text(yaml.safe_dump({**behind, "tls": tls}))
    return file


def test_the_table_has_every_key_in_the_order_of_the_settings() -> None:
    assert list(rows()) == list(LEAVES)


@pytest.mark.parametrize("key", LEAVES)
def test_the_default_of(key: str) -> None:
    leaf = LEAVES[key]
    said = rows()[key][1]
    if leaf.field.is_required():
        assert said == ("—" if leaf.optional_section else "required")
        return
    default = leaf.field.get_default()
    if default is None:
        assert said == "—"
    elif isinstance(default, tuple):
        assert yaml.safe_load(names(said)[0]) == list(default)
    elif isinstance(default, (bool, int, float)):
        assert yaml.safe_load(names(said)[0]) == default
    else:
        assert names(said)[0] == (str(default) or '""')


@pytest.mark.parametrize("key", LEAVES)
def test_the_type_of(key: str) -> None:
    said, found = rows()[key][0], kind(LEAVES[key])
    assert found is Literal if said == "choice" else found in TYPES[said]
    assert (said == "bytes") == ("bytes" in key.rpartition(".")[2].split("_"))
    assert (said == "port") == key.endswith("_port")


@pytest.mark.parametrize("key", LEAVES)
def test_the_range_of(key: str, config: Path) -> None:
    leaf, said = LEAVES[key], rows()[key][2]
    found = kind(leaf)
    if found is Literal:
        assert names(said) == list(get_args(leaf.field.annotation))
    elif found in STEP:
        check_range(key, said, STEP[found], config)
    else:
        assert said == ""


def check_range(key: str, said: str, step: float, config: Path) -> None:
    bounds = re.fullmatch(r"(above )?(\d+|0\.\d+) to (\d+)", said)
    assert bounds is not None
    least, most = yaml.safe_load(bounds[2]), int(bounds[3])
    if bounds[1]:
        assert not accepted(config, key, least)
        assert accepted(config, key, least + step)
    else:
        assert accepted(config, key, least)
        assert not accepted(config, key, least - step)
    assert accepted(config, key, most)
    assert not accepted(config, key, most + step)


def accepted(config: Path, key: str, value: float) -> bool:
    try:
        load(config, {}, {key: str(value)})
    except ConfigError as error:
        (fault,) = error.faults
        if not fault.startswith(f"{key}: "):
            raise
        return False
    return True


COMMANDS = ["", "serve", "check", "certs", "certs init", "certs issue", "certs show", "backend", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    flags = set(re.findall(r"--[a-z-]+", text))
    assert "--help" in flags
    assert [flag for flag in sorted(flags) if flag not in DOCUMENT.read_text()] == []
    # A command that is missing above would not have been looked at.
    listed = re.findall(r"^ {4}([a-z]+) ", text, flags=re.MULTILINE)
    assert [name for name in listed if f"{command} {name}".strip() not in COMMANDS] == []


def test_an_empty_mapping_and_the_environment_are_enough(tmp_path: Path, place: dict[str, Path]) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text("{}")
    env = {
        "TENSORGATE_UPSTREAM__GRPC": "unix:/run/triton.sock",
        "TENSORGATE_TLS__CERT_FILE": str(place["cert_file"]),
        "TENSORGATE_TLS__KEY_FILE": str(place["key_file"]),
    }
    assert load(file, env).upstream is not None


# A block with a setting at its left edge is settings; it may be a part that shows some keys only.
IS_SETTINGS = re.compile(rf"^({'|'.join(keys(Settings))}):", re.MULTILINE)
EXAMPLES = [block for file in DOCUMENTS for block in code_blocks(file) if IS_SETTINGS.search(block.text)]


@pytest.mark.parametrize("block", EXAMPLES, ids=str)
def test_an_example_is_accepted(block: Block, place: dict[str, Path], tmp_path: Path) -> None:
    text = re.sub(
        rf"\b({'|'.join(place)}):\s*([^\s,}}]+)",
        lambda found: f"{found[1]}: {place[found[1]]}",
        block.text,
    )
    given = yaml.safe_load(text)
    if "tls" not in given:
        text += f"tls: {{cert_file: {place['cert_file']}, key_file: {place['key_file']}}}\n"
    if "upstream" not in given and "model_repository_path" not in given:
        text += "upstream: {grpc: 127.0.0.1:9001}\n"
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    load(file, env={})


def test_the_examples_are_found() -> None:
    found = [block.file.name for block in EXAMPLES]
    assert found.count("README.md") >= 2
    assert found.count("configuration.md") >= 3
    yaml_blocks = [block for block in code_blocks(DOCUMENT) if block.language == "yaml"]
    assert [block for block in yaml_blocks if block not in EXAMPLES] == []


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    broken = []
    for path, anchor in links(file):
        target = file.parent / path if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    assert broken == []
