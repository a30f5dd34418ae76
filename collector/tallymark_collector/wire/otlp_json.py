"""OTLP's JSON encoding to and from protobuf: the specification's "JSON Protobuf Encoding".

It is protobuf's own JSON mapping but for trace and span ids, which are hexadecimal, and enums, which are integers.
Unknown fields are ignored. Where more than the specification's form is unambiguous, it is taken: field and enum names
of the .proto files, 64-bit integers as numbers, NaN and Infinity as literals. A request is refused as a whole, with
where it was wrong: what is not the type that its field has cannot be told from what it would have meant.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, TypeVar

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tallymark_collector.errors import MalformedRequest, TooLarge

MAX_DEPTH: Final = 90
"""Messages inside each other; protobuf reads no more than 100."""
MAX_EXACT: Final = 2**53
"""Up to here a JSON number with a fraction or exponent is exact, whoever reads it."""

_INTEGER: Final = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_DOUBLE: Final = re.compile(r"-?(?:[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,4})?|Infinity)|NaN", re.ASCII)
_IDS: Final = frozenset({"trace_id", "span_id", "parent_span_id"})
_RANGES: Final = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
}
_MAX_SHOWN: Final = 40
_QUOTED: Final = ("an integer", "a number", "a string of hexadecimal")
"""Where one of these is expected, a text that is none is shown."""

Sent = TypeVar("Sent", bound=Message)
Convert = Callable[[Any], Any]
Setter = Callable[[Any, Any, int], None]


class _Misfit(Exception):  # noqa: N818
    """A JSON value that is not what its field takes; the path grows on its way up."""

    def __init__(self, expected: str, found: object) -> None:
        super().__init__(expected)
        self.path: list[str] = []
        self.expected = expected
        self.found = found

    def sentence(self) -> str:
        """Where, what and what instead."""
        where = "".join(reversed(self.path)).lstrip(".") or "the request"
        return f"{where} is {self._shown(where)} and has to be {self.expected}"

    def _shown(self, where: str) -> str:
        """What was found, unless that may be what nobody is to read in a log: texts of attributes, and what stands in
        the place of a message."""
        match self.found:
            case str() if "ttributes[" in where or not self.expected.startswith(_QUOTED):
                return "a string"
            case dict() if self.found:
                return "an object"
            case list() if self.found:
                return "an array"
            case _:
                return json.dumps(self.found, default=str)[:_MAX_SHOWN]


def values_at_most(text: bytes) -> int:
    """More JSON values than the text holds, without reading it: what bounds the memory that reading takes."""
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def to_protobuf(text: bytes, message: type[Message], max_values: int) -> bytes:
    """A request in JSON as the same request in protobuf. Raises MalformedRequest, saying where; TooLarge where it may
    hold more than `max_values` values."""
    if (count := values_at_most(text)) > max_values:
        raise TooLarge(f"about {count} JSON values in one request, at most {max_values} are taken: send smaller ones")
    return read(load(text), message).SerializeToString()


def load(text: bytes) -> Any:
    """A JSON text's value. Raises MalformedRequest."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the JSON is not UTF-8: byte {error.start} ({error.reason})") from None
    except RecursionError:
        raise MalformedRequest("the JSON is nested too deeply") from None
    except ValueError as error:
        raise MalformedRequest(f"not JSON: {error}") from None


def read(tree: Any, message: type[Sent]) -> Sent:
    """The request that a JSON value is. Raises MalformedRequest, saying where."""
    request = message()
    try:
        _fill(request, tree, 0)
    except _Misfit as misfit:
        raise MalformedRequest(f"not an OTLP {message.DESCRIPTOR.name} in JSON: {misfit.sentence()}") from None
    return request


def from_protobuf(message: Message) -> bytes:
    """An answer in JSON."""
    return json_format.MessageToJson(message, indent=None).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{json.dumps(twice)[:_MAX_SHOWN]} is in one object twice")
    return found


def _fill(message: Any, value: Any, depth: int) -> None:
    if type(value) is not dict:
        raise _Misfit("an object", value)
    if depth > MAX_DEPTH:
        raise _Misfit(f"nested less deeply, {MAX_DEPTH} levels at most", "deeper")
    setters, also = _fields(message.DESCRIPTOR)
    for key, item in value.items():
        setter = setters.get(key)
        if setter is None or item is None:
            continue
        if also.get(key) in value:
            raise _Misfit(f"without {key}: it has {also[key]}, the same field", value)
        try:
            setter(message, item, depth)
        except _Misfit as misfit:
            misfit.path.append(f".{key}")
            raise


@cache
def _fields(descriptor: Descriptor) -> tuple[Mapping[str, Setter], Mapping[str, str]]:
    """How each field is set, by both its names, and the JSON name of those that came by the other."""
    setters: dict[str, Setter] = {}
    also: dict[str, str] = {}
    for field in descriptor.fields:
        setters[field.json_name] = setters[field.name] = _setter(field)
        if field.name != field.json_name:
            also[field.name] = field.json_name
    return setters, also


def _setter(field: FieldDescriptor) -> Setter:
    name = field.name
    if _is_repeated(field):
        return _repeated(name, None if field.message_type else _converter(field))
    oneof = field.containing_oneof.name if field.containing_oneof is not None else None

    def check(message: Any, item: Any) -> None:
        if oneof is not None and (other := message.WhichOneof(oneof)) is not None:
            raise _Misfit(f"left out where there is {other} already", item)

    if field.message_type:

        def fill(message: Any, item: Any, depth: int) -> None:
            check(message, item)
            part = getattr(message, name)
            part.SetInParent()
            _fill(part, item, depth + 1)

        return fill

    convert = _converter(field)

    def put(message: Any, item: Any, _depth: int) -> None:
        check(message, item)
        setattr(message, name, convert(item))

    return put


def _repeated(name: str, convert: Convert | None) -> Setter:
    def extend(message: Any, items: Any, depth: int) -> None:
        if type(items) is not list:
            raise _Misfit("an array", items)
        into = getattr(message, name)
        for index, item in enumerate(items):
            try:
                if convert is None:
                    _fill(into.add(), item, depth + 1)
                else:
                    into.append(convert(item))
            except _Misfit as misfit:
                misfit.path.append(f"[{index}]")
                raise

    return extend


def _is_repeated(field: FieldDescriptor) -> bool:
    # protobuf 7 has the one and warns of the other, protobuf 5 has the other only.
    repeated: bool | None = getattr(field, "is_repeated", None)
    return bool(getattr(field, "label", 0) == FieldDescriptor.LABEL_REPEATED if repeated is None else repeated)


def _converter(field: FieldDescriptor) -> Convert:
    if field.type in _RANGES:
        return _integer(*_RANGES[field.type])
    if field.type == FieldDescriptor.TYPE_ENUM:
        return _enum(field)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _hexadecimal if field.name in _IDS else _base64
    return {
        FieldDescriptor.TYPE_STRING: _string,
        FieldDescriptor.TYPE_BOOL: _bool,
        FieldDescriptor.TYPE_DOUBLE: _double,
        FieldDescriptor.TYPE_FLOAT: _double,
    }[field.type]


def _integer(least: int, most: int) -> Convert:
    expected = f"an integer from {least} to {most}, as a number or a string of digits"

    def convert(item: Any) -> int:
        found: int | None = None
        if type(item) is int:
            found = item
        elif (type(item) is str and _INTEGER.fullmatch(item)) or (
            type(item) is float and abs(item) <= MAX_EXACT and item.is_integer()
        ):
            found = int(item)
        if found is None or not least <= found <= most:
            raise _Misfit(expected, item)
        return found

    return convert


def _enum(field: FieldDescriptor) -> Convert:
    assert field.enum_type is not None, "a field of type enum has one"
    names = {name: value.number for name, value in field.enum_type.values_by_name.items()}
    number = _integer(-(2**31), 2**31 - 1)

    def convert(item: Any) -> Any:
        if type(item) is str:
            if item not in names:
                raise _Misfit(f"an integer, or one of {', '.join(names)}", item)
            return names[item]
        return number(item)

    return convert


def _string(item: Any) -> str:
    if type(item) is not str:
        raise _Misfit("a string", item)
    try:
        item.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair: JavaScript writes it where text was cut. What that client's own protobuf encoding
        # would have sent is the replacement character; to refuse the request would lose all of its usage.
        return item.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return item


def _bool(item: Any) -> bool:
    if type(item) is not bool:
        raise _Misfit("true or false", item)
    return item


def _double(item: Any) -> float:
    if type(item) is float:
        return item
    try:
        if type(item) is int or (type(item) is str and _DOUBLE.fullmatch(item)):
            found = float(item)
            if math.isfinite(found) or item in ("NaN", "Infinity", "-Infinity"):
                return found
    except OverflowError:
        pass
    raise _Misfit('a number, or "NaN", "Infinity" or "-Infinity"', item)


def _hexadecimal(item: Any) -> bytes:
    if type(item) is str:
        try:
            return binascii.unhexlify(item)
        except ValueError:
            pass
    raise _Misfit("a string of hexadecimal digits, two for each byte", item)


def _base64(item: Any) -> bytes:
    if type(item) is str:
        try:
            # Both alphabets, with padding or without, as protobuf's JSON mapping has it.
            plain = item.replace("-", "+").replace("_", "/").rstrip("=")
            return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except ValueError:
            pass
    raise _Misfit("base64", item)
