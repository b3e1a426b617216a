"""protobuf messages as JSON the way Triton shows them.

protobuf's own mapping writes 64-bit integers as strings, which Triton's clients don't expect.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, MutableSequence
from typing import Any

from google.protobuf.message import Message


def plain(message: Message) -> dict[str, Any]:
    """Fields under their own names, in the order of their definition; those without presence even if not set."""
    made: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        made[field.name] = _value(field, getattr(message, field.name))
    return made


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        of = field.message_type.fields_by_name["value"]
        return {str(key): _single(of, one) for key, one in sorted(value.items())}
    if isinstance(value, MutableSequence):
        return [_single(field, one) for one in value]
    return _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value
