"""The words for what is wrong with one key: unknown, lacking, of a wrong type or out of range; and what would be right.

Does no I/O. Texts that may be key material are never repeated.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from proxy.config.fields import Key, Parse, Section, keys
from proxy.config.model import Address, Leaf, Settings, holds_key_material, leaves

_SHOWN_MAX = 60

# Attributes of a field's constraints, in the words for them.
_BOUNDS = {"ge": "from {}", "gt": "above {} and up", "le": "to {}"}

# Keys of coming versions. They stop the start: a rule that is written down and not enforced is worse than none.
_NOT_YET = {
    "policy": "rules are not available in this version, and nothing is started, because a rule that is not enforced "
    "would be worse than none; remove the key",
    "port": "one port for both protocols is not available in this version; use grpc_port",
}


def flat_keys(content: Mapping[Any, Any], found: list[str]) -> tuple[dict[str, object], set[str]]:
    """({dotted key: raw value} of the known keys of a file, names of sections that are no mappings).

    Each of these sections, and each key that is not known, adds a fault.
    """
    broken = {name for name, value in content.items() if _is_broken_section(name, value)}
    return dict(_known(content, Settings, "", found)), broken


def _is_broken_section(name: object, value: object) -> bool:
    field = keys(Settings).get(name) if isinstance(name, str) else None
    return field is not None and field.section is not None and not isinstance(value, Mapping | None)


def _known(
    content: Mapping[Any, Any], section: type[Section], prefix: str, found: list[str]
) -> Iterator[tuple[str, object]]:
    for name, value in content.items():
        field = keys(section).get(name) if isinstance(name, str) else None
        if field is None:
            found.append(_unknown_key(prefix, name, section))
        elif field.section is None:
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _known(value, field.section, f"{prefix}{name}.", found)
        elif value is not None:  # a section whose keys are all commented out is as good as absent
            names = ", ".join(keys(field.section))
            found.append(f"{prefix}{name}: {shown(value)} is not a mapping; give its keys on indented lines: {names}")


def _unknown_key(prefix: str, name: object, section: type[Section]) -> str:
    if not isinstance(name, str):
        return f"{prefix}{name}: is not a key (a key is text); known here: {', '.join(keys(section))}"
    if not prefix and name in _NOT_YET:
        return f"{name}: {_NOT_YET[name]}"
    line = name if not holds_key_material(name) else "(key material)"
    return f"{prefix}{line}: unknown key; {_suggestion(prefix, name, section)}"


def _suggestion(prefix: str, name: str, section: type[Section]) -> str:
    plain = name.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, list(keys(section)), 1, 0.7)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    by_last = {leaf.key.rpartition(".")[2]: leaf.key for leaf in reversed(list(leaves()))}
    elsewhere = difflib.get_close_matches(plain, list(by_last), 1, 0.8)
    if elsewhere:
        return f"did you mean {by_last[elsewhere[0]]}?"
    return f"known here: {', '.join(keys(section))}"


def unknown_variable(name: str, key: str) -> str:
    """The fault of an environment variable that no key answers to."""
    field = keys(Settings).get(key)
    if field is not None and field.section is not None:
        variables = ", ".join(f"{name}__{key.upper()}" for key in keys(field.section))
        return f"{name}: is a section and has no value of its own; there are: {variables}"
    if key.partition(".")[0] in _NOT_YET:
        return f"{name}: {_NOT_YET[key.partition('.')[0]]}"
    near = difflib.get_close_matches(key, [leaf.key for leaf in leaves()], 1, 0.7)
    hint = f"did you mean {variable(near[0])}?" if near else "remove it, or see tensorgate check for the keys"
    return f"{name}: no setting of that name; {hint}"


def variable(key: str) -> str:
    """The environment variable that sets a dotted key."""
    return "TENSORGATE_" + key.upper().replace(".", "__")


def missing(leaf: Leaf) -> str:
    """The fault of a key that must be given and is not."""
    return f"{leaf.key}: is missing; {wanted(leaf)}"


def validate(leaf: Leaf, value: object, origin: str) -> tuple[Any, str | None]:
    """(the typed value, None), or (None, the fault)."""
    whence = "" if origin == "file" else f" (from {origin.split(' ', 1)[1]})"
    field = leaf.field
    if value is None:
        return None, None if field.nullable else f"{leaf.key}: has no value; {wanted(leaf)}, or remove the key"
    if isinstance(value, str) and field.annotation is bool:
        value = value.strip().lower()
    if field.parse is not None and field.parse.many:
        return _validate_items(leaf, field.parse, value, whence)
    try:
        return (_adapter(field).validate_python(value) if field.parse is None else field.parse.read(value)), None
    except ValidationError as error:
        reason = _reason(leaf, error.errors()[0]["type"], value)
    except ValueError as fault:
        reason = str(fault)
    return None, f"{leaf.key}: {shown(value)}{whence} {reason}"


def _validate_items(leaf: Leaf, parse: Parse, value: object, whence: str) -> tuple[tuple[Any, ...] | None, str | None]:
    items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
    if not isinstance(items, list):
        return None, f"{leaf.key}: {shown(value)}{whence} is not a list; {wanted(leaf)}"
    typed = []
    for item in items:
        try:
            typed.append(parse.read(item))
        except ValueError as fault:
            return None, f"{leaf.key}: {shown(item)}{whence} {fault}"
    return tuple(typed), None


def _adapter(field: Key) -> TypeAdapter[Any]:
    annotation: Any = field.annotation
    if annotation in (int, float):
        bounds = field.bounds
        numbers = Field(ge=bounds.ge, gt=bounds.gt, le=bounds.le, allow_inf_nan=False if annotation is float else None)
        annotation = Annotated[annotation, BeforeValidator(_not_bool), numbers]
    return TypeAdapter(annotation)


def _not_bool(value: object) -> object:
    # pydantic takes true for 1, and YAML reads a bare `yes`, `no`, `on` and `off` as a truth value.
    if isinstance(value, bool):
        raise ValueError("is not a number")
    return value


def _reason(leaf: Leaf, kind: str, value: object) -> str:
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"is out of range; {wanted(leaf)}"
    if kind == "literal_error":
        hint = " (YAML reads a bare yes, no, on or off as a truth value)" if isinstance(value, bool) else ""
        return f"is not known here{hint}; {wanted(leaf)}"
    if leaf.field.annotation is bool:
        return "is neither true nor false; give one of the two"
    if leaf.field.annotation is float:
        return f"is not a number of seconds; {wanted(leaf)}"
    return f"is not a whole number; {wanted(leaf)}"


def wanted(leaf: Leaf) -> str:
    """What would be right for a key, as an imperative: "give a whole number from 0 to 65535"."""
    annotation = leaf.field.annotation
    if get_origin(annotation) is Literal:
        return f"give one of: {', '.join(get_args(annotation))}"
    if annotation is bool:
        return "give true or false"
    bounds = _bounds(leaf)
    if bounds:
        return f"give {'seconds' if annotation is float else 'a whole number'} {bounds}"
    if leaf.key == "host":
        return "give a host name, an IP address or '' for all"
    return f"give {_noun(leaf)} ({leaf.field.description})"


def _noun(leaf: Leaf) -> str:
    if leaf.field.annotation is Address:
        return "an address such as 127.0.0.1:9001"
    if leaf.field.parse is not None and leaf.field.parse.many:
        return "a list such as [one, two]"
    return "the path of a folder" if leaf.key == "model_repository_path" else "the path of a file"


def _bounds(leaf: Leaf) -> str:
    found = [(words, getattr(leaf.field.bounds, name)) for name, words in _BOUNDS.items()]
    return " ".join(words.format(bound) for words, bound in found if bound is not None)


def shown(value: object) -> str:
    """A value as it may stand in a message: short, one line, and never key material."""
    if isinstance(value, str):
        if holds_key_material(value):
            return "this value"
        text = repr(value)
        return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 1] + "…'"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, (int, float)):
        return str(value) if value is not None else "null"
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else repr(str(value))
