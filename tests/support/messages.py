"""Random OTLP messages, made from their descriptors, and their JSON as protobuf's own code writes it."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

IDS = ("traceId", "spanId", "parentSpanId")
_BOUNDS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """A message with any of its fields, at any level."""
    message = kind()
    _fill(draw, message, kind.DESCRIPTOR, depth=0)
    return message


def _fill(draw: st.DrawFn, message: Any, descriptor: Descriptor, depth: int) -> None:
    chosen: set[str] = set()
    for field in descriptor.fields:
        group = field.containing_oneof.name if field.containing_oneof else field.name
        # Outer levels are filled, or nearly every request would be empty.
        if group in chosen or (depth > 4 and not draw(st.booleans())) or (field.message_type and depth > 12):
            continue
        chosen.add(group)
        if field.is_repeated:
            for _ in range(draw(st.integers(0, 2))):
                if field.message_type:
                    _fill(draw, getattr(message, field.name).add(), field.message_type, depth + 1)
                else:
                    getattr(message, field.name).append(draw(scalar(field)))
        elif field.message_type:
            getattr(message, field.name).SetInParent()
            _fill(draw, getattr(message, field.name), field.message_type, depth + 1)
        else:
            setattr(message, field.name, draw(scalar(field)))


def scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type in _BOUNDS:
        return st.integers(*_BOUNDS[field.type])
    return {
        FieldDescriptor.TYPE_STRING: TEXT,
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=16),
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        # NaN as JSON has it: without the bits that a double may carry in it.
        FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False) | st.just(math.nan),
        FieldDescriptor.TYPE_ENUM: st.integers(0, 2),
    }[field.type]


def as_otlp_json(message: Message) -> dict[str, Any]:
    """What protobuf's own JSON mapping says, with the ids in hexadecimal."""
    return _hexadecimal(json_format.MessageToDict(message, use_integers_for_enums=True))


def otlp_json(message: Message) -> bytes:
    """The same as text."""
    return json.dumps(as_otlp_json(message)).encode()


def _hexadecimal(tree: Any) -> Any:
    match tree:
        case dict():
            return {
                key: base64.b64decode(value).hex() if key in IDS else _hexadecimal(value) for key, value in tree.items()
            }
        case list():
            return [_hexadecimal(item) for item in tree]
        case _:
            return tree
