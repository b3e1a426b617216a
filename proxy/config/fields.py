"""How settings are declared: a section is a frozen dataclass, a key one of its fields, with its bounds and its meaning.

Plain dataclasses, so that the gate can hold its settings without the library that checks them (see `apart`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, dataclass_transform, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Bounds:
    """The range of a number; None: no bound on that side."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None


@dataclass(frozen=True, slots=True)
class Parse:
    """How a value is read that is neither a number, nor a truth value, nor a choice. ValueError says what is wrong.

    many: the value is a list of what `read` reads, or a text with commas in between, and becomes a tuple.
    """

    read: Callable[[object], Any]
    many: bool = False


def Field(
    *,
    description: str,
    default: Any = MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """A key of a section; without a default it must be given."""
    marks = (Bounds(ge, gt, le),) if (ge, gt, le) != (None, None, None) else ()
    return dataclasses.field(default=default, metadata={"description": description, "marks": marks})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class Section:
    """A group of settings; frozen, and a key it does not know is an error."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True, slots=True)
class Key:
    """One field of a section. `annotation` is the bare type of a value, `nullable` whether it may be None instead."""

    annotation: Any
    nullable: bool
    description: str
    default: object
    bounds: Bounds
    parse: Parse | None

    @property
    def section(self) -> type[Section] | None:
        """The section that the field holds, if it is one."""
        return self.annotation if isinstance(self.annotation, type) and issubclass(self.annotation, Section) else None

    def is_required(self) -> bool:
        return self.default is MISSING

    def get_default(self) -> Any:
        return self.default


def keys(section: type[Section]) -> Mapping[str, Key]:
    """{name: key} of a section, in the order of the file."""
    hints = get_type_hints(section, include_extras=True)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(section)  # type: ignore[arg-type]
    return {field.name: _key(field, hints[field.name]) for field in fields}


def _key(field: dataclasses.Field[Any], hint: Any) -> Key:
    members = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    (annotation,) = (member for member in members if member is not NoneType)
    marks = list(field.metadata.get("marks", ()))
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        marks += more
    return Key(
        annotation=annotation,
        nullable=NoneType in members,
        description=field.metadata.get("description", ""),
        default=field.default,
        bounds=next((mark for mark in marks if isinstance(mark, Bounds)), Bounds()),
        parse=next((mark for mark in marks if isinstance(mark, Parse)), None),
    )
