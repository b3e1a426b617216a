"""Read one YAML mapping from a file, and say where it is wrong. Knows no settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_SIZE_MAX = 1024 * 1024
_LEAST = "set at least tls.cert_file, tls.key_file, and model_repository_path or upstream.grpc"
_HINTS = (
    ("'\\t'", "indent with spaces, not tabs"),
    ("<stream end>", "a bracket or a quote is not closed"),
    ("mapping values are not allowed", "put a text that holds ': ' in quotes, and check the indentation"),
    ("expected <block end>", "check the indentation"),
    ("the node content", "put an address such as '[::1]:9090' in quotes"),
    ("constructor for the tag", "write the value without a tag"),
)


class FileFault(ValueError):
    """What is wrong with the file as a whole, in one line, with the line number where there is one."""


def read(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """(the file's mapping, one fault 'key: …' for each key that is given twice). Raises FileFault."""
    text = _text(path)
    node, content = _parsed(text)
    if content is None:
        raise FileFault(f"holds no setting; {_LEAST}")
    if not isinstance(content, dict):
        raise FileFault(f"is not a mapping of keys to values but {_kind(content, text)}; write 'key: value' lines")
    return content, list(_duplicates(node, "", set()))


def _parsed(text: str) -> tuple[yaml.Node | None, object]:
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise FileFault(_located(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise FileFault(f"line {line}: is not YAML: holds the character U+{ord(text[error.position]):04X}") from None
    except RecursionError:
        raise FileFault("is nested too deeply to be a settings file") from None
    except ValueError as error:  # a date such as 2024-99-99
        raise FileFault(f"holds a date that does not exist ({error}); put it in quotes") from None


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(_SIZE_MAX + 1)
    except FileNotFoundError:
        raise FileFault("does not exist; give the path of a settings file") from None
    except IsADirectoryError:
        raise FileFault("is a folder; give the path of a settings file") from None
    except PermissionError:
        raise FileFault(f"cannot be read by user {os.geteuid()}; change its owner or mode") from None
    except OSError as error:
        raise FileFault(f"cannot be read ({(error.strerror or str(error)).lower()})") from None
    if len(raw) > _SIZE_MAX:
        raise FileFault("is larger than 1 MiB; that is no settings file")
    if not raw.strip():
        raise FileFault(f"is empty; {_LEAST}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FileFault(f"line {line}: is not UTF-8 text; save it as UTF-8") from None


def _located(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = error.problem or error.context or "cannot be read"
    if "another document" in problem:
        return f"{place}a second document starts here; keep one, and no further line ---"
    hint = next((f"; {words}" for part, words in _HINTS if part in problem), "")
    return f"{place}is not YAML: {problem}{hint}"


def _kind(content: object, text: str) -> str:
    if "-----BEGIN" in text:
        return "a PEM file"
    if isinstance(content, list):
        return "a list"
    return "a single text" if isinstance(content, str) else "a single value"


def _duplicates(node: yaml.Node | None, prefix: str, seen: set[int]) -> Iterator[str]:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:  # an alias may lead back to its own anchor
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        line = key.start_mark.line + 1
        if name in lines and name:
            yield f"{prefix}{name}: is given twice, in lines {lines[name]} and {line}; keep one of them"
        lines[name] = line
        yield from _duplicates(value, f"{prefix}{name}.", seen)
