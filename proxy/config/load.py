"""Gather the settings from a YAML file, the environment and flags, and report every fault at once.

Flags beat environment beats file. A fault is one line, 'key: what is wrong, and what would be right'; it never repeats
what could be a key or passphrase. Relative paths in the file start at the file's folder, elsewhere at the current one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from proxy.config import check, faults, yamlfile
from proxy.config.fields import Section, keys
from proxy.config.model import ConfigError, Leaf, Settings, coherence_faults, leaves

__all__ = ["PREFIX", "ConfigError", "Loaded", "load", "resolve"]

PREFIX = "TENSORGATE_"

# A Kubernetes service called "tensorgate" (or "tensorgate-grpc", …) puts such variables into every pod around it.
_SERVICE_LINK_NAME = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.*")

_Section = TypeVar("_Section", bound=Section)


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was found, and where: "file", "environment TENSORGATE_…" or "flag --…"."""

    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and each key's origin: {dotted key: "file" | "environment X" | "flag --x" | "default"}."""

    settings: Settings
    origins: Mapping[str, str]


def load(path: Path, env: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """The settings of a file, with environment (default: this process's) and overrides on top.

    `overrides` is {dotted key: value as on the command line}; None counts as not given.
    Raises ConfigError with all faults. The files named are looked at, the ports are not (`ports.port_faults`).
    """
    return resolve(path, env, overrides).settings


def resolve(path: Path, env: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None) -> Loaded:
    """As `load`, with the origin of each value."""
    found: list[str] = []
    given, broken = _from_file(path, found)
    given |= _from_environment(os.environ if env is None else env, found)
    given |= _from_flags(overrides or {})
    values, wrong = _typed(given, broken, path.absolute().parent, found)
    found += coherence_faults(values, wrong)
    found += check.file_faults(values)
    if found:
        raise ConfigError(found)
    return Loaded(_built(Settings, values), _origins(values, given))


def _from_file(path: Path, found: list[str]) -> tuple[dict[str, Given], set[str]]:
    try:
        content, duplicates = yamlfile.read(path)
    except yamlfile.FileFault as fault:
        raise ConfigError([f"{path}: {fault}"]) from None
    found += duplicates
    keys, broken = faults.flat_keys(content, found)
    return {key: Given(value, "file") for key, value in keys.items()}, broken


def _from_environment(env: Mapping[str, str], found: list[str]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    known = {leaf.key for leaf in leaves()}
    for name, value in sorted(env.items()):
        if not name.startswith(PREFIX) or _is_service_link(name, value) or value == "":
            continue
        key = name.removeprefix(PREFIX).lower().replace("__", ".")
        if key in known:
            given[key] = Given(value, f"environment {name}")
        else:
            found.append(faults.unknown_variable(name, key))
    return given


def _is_service_link(name: str, value: str) -> bool:
    return _SERVICE_LINK_NAME.fullmatch(name) is not None or _SERVICE_LINK_VALUE.fullmatch(value) is not None


def _from_flags(overrides: Mapping[str, object]) -> dict[str, Given]:
    return {
        key: Given(value, "flag --" + key.replace(".", "-").replace("_", "-"))
        for key, value in overrides.items()
        if value is not None
    }


def _typed(
    given: Mapping[str, Given], broken: set[str], folder: Path, found: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """({key: typed value, defaults included}, keys that are wrong or lacking)."""
    sections = {key.partition(".")[0] for key in given}
    values: dict[str, Any] = {}
    wrong: set[str] = set()
    for leaf in leaves():
        section = leaf.key.partition(".")[0]
        if leaf.key in given:
            _take(leaf, given[leaf.key], folder, values, wrong, found)
        elif section in broken:
            wrong.add(leaf.key)
        elif not leaf.optional_section or section in sections:
            _leave_out(leaf, values, wrong, found)
    return values, wrong


def _leave_out(leaf: Leaf, values: dict[str, Any], wrong: set[str], found: list[str]) -> None:
    if leaf.field.is_required():
        wrong.add(leaf.key)
        found.append(faults.missing(leaf))
    else:
        values[leaf.key] = leaf.field.get_default()


def _take(
    leaf: Leaf, given: Given, folder: Path, values: dict[str, Any], wrong: set[str], found: list[str]
) -> None:
    value, fault = faults.validate(leaf, given.value, given.origin)
    if fault is not None:
        wrong.add(leaf.key)
        found.append(fault)
        return
    if isinstance(value, Path):
        value = _absolute(value, folder if given.origin == "file" else Path.cwd())
    values[leaf.key] = value


def _absolute(path: Path, folder: Path) -> Path:
    try:
        path = path.expanduser()
    except RuntimeError:  # "~nobody/x": no such user; the missing file will be reported
        pass
    return folder / path


def _built(section: type[_Section], values: Mapping[str, Any], prefix: str = "") -> _Section:
    parts: dict[str, Any] = {}
    for name, field in keys(section).items():
        key = prefix + name
        if key in values:
            parts[name] = values[key]
        elif field.section is not None and any(known.startswith(f"{key}.") for known in values):
            parts[name] = _built(field.section, values, f"{key}.")
    return section(**parts)


def _origins(values: Mapping[str, Any], given: Mapping[str, Given]) -> dict[str, str]:
    return {key: given[key].origin if key in given else "default" for key in values}
