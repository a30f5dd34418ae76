"""Damage of every kind, from a seed: the same number gives the same input."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from tests.delivery.fuzz.corpus import MESSAGES, Sample
from tests.delivery.fuzz.wire_format import BYTES, END, FIXED32, FIXED64, GROUP, VARINT, Unreadable, fields, varint


class Sent(NamedTuple):
    """What has to become of an input, where that is known from how it was made."""

    points: int
    evidence: int
    rejected: int
    """Points or spans."""
    items: int
    """In quarantine."""
    passed_over: int
    too_large: bool
    """What would be kept aside of it is too much: nothing of it is."""


class Input(NamedTuple):
    """Bytes for one of OTLP's services."""

    number: int
    signal: str
    media: str
    """"protobuf" or "json"."""
    body: bytes
    damage: str
    """How it came to be, for the table and for whoever looks for the reason."""
    by_file: bool = False
    """Whether the file of meters is asked."""
    sent: Sent | None = None


NUMBERS: Final = (
    *(0, 1, 2, 3, 7, 127, 128, 255, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1, 1_790_000_000_000_000_000),
)
DOUBLES: Final = (
    *(0.0, -0.0, 1.0, -1.0, 0.1, 0.5, 5e-324, 2.2e-308, 1e-30, 1e-31, 1e15, 1e16, 1e24, 1e25, 1e300, 1e308),
    *(1.7976931348623157e308, -1.7976931348623157e308, float("inf"), float("-inf"), float("nan"), 123456789.123456),
)
TEXTS: Final = (
    *("", "\0", "a\0b", "acme", "globex", "ä\U0001f600\u202e", "x" * 255, "x" * 256, "x" * 257, "\U0001f600" * 256),
    *("\\N", "\\.", "a\tb\nc\\", "'; DROP TABLE usage_point; --", "NaN", "Infinity", "-1", "1e24", "1e-30", "1e999999"),
    *("١٢", "1_000", " 5 ", "0x10", "12.5", "9" * 25, "0." + "3" * 30, "1e9999999999999999999", "sNaN123", "-0"),
    *("tallymark", "tallymark.control", "tallymark.mirror", "tallymark.account.id", "tallymark.meter.api.requests"),
    *("tallymark.usage", "tallymark.meter.", "service.instance.id", "service.name", "otel.metric.overflow"),
    *("http.response.status_code", "http.route", "tallymark.plan", "error.type", "user.id"),
    *("tallymark.control.total", "tallymark.control.evidence", "tallymark.control.closed", "tallymark.control.part"),
    *("tallymark.control.parts", "tallymark.control.meter", "tallymark.control.unit", "tallymark.control.account"),
)
NOT_UTF8: Final = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"acme\xfe", b"\x80" * 9)
VARINTS: Final = (
    b"\xff" * 9 + b"\x01",
    b"\xff" * 9 + b"\x7f",
    b"\x80" * 9 + b"\x00",
    b"\x80" * 12,
    b"\xff" * 4 + b"\x7f",
)


def input_of(samples: Sequence[Sample], seed: int, number: int, by_file: bool = False) -> Input:
    """The input of that number; the same for ever, as long as the corpus stays."""
    rng = random.Random(f"{seed}/{number}")
    sample = rng.choice(samples)
    json_instead = rng.random() < 0.2
    if not json_instead:
        body, names = sample.protobuf, []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 6))):
            name, damage = rng.choice(_PROTOBUF)
            body = damage(rng, body, samples, sample)
            names.append(name)
        return Input(number, sample.signal, "protobuf", body, "+".join(dict.fromkeys(names)), by_file)
    body, names = sample.json, []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name, damage = rng.choice(_JSON)
        body = damage(rng, body, samples, sample)
        names.append(name)
    return Input(number, sample.signal, "json", body, "+".join(dict.fromkeys(names)), by_file)


Damage = Callable[[random.Random, bytes, Sequence[Sample], Sample], bytes]


def flip(rng: random.Random, body: bytes, _all: Sequence[Sample] = (), _one: Sample | None = None) -> bytes:
    """A few bits."""
    found = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 8)) if found else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _overwrite(rng: random.Random, body: bytes, _all: Sequence[Sample], _one: Sample) -> bytes:
    at = rng.randint(0, len(body))
    new = rng.choice((*VARINTS, *NOT_UTF8, rng.randbytes(rng.randint(1, 9)), b"\0" * 8, varint(rng.choice(NUMBERS))))
    return body[:at] + new + body[at + rng.choice((0, 1, len(new))) :]


def cut(rng: random.Random, body: bytes, _all: Sequence[Sample] = (), _one: Sample | None = None) -> bytes:
    """Its beginning, or it without a piece of its middle."""
    at = rng.randint(0, len(body))
    return body[:at] if rng.random() < 0.6 else body[:at] + body[min(len(body), at + rng.randint(1, 9)) :]


def _splice(rng: random.Random, body: bytes, samples: Sequence[Sample], sample: Sample) -> bytes:
    other = rng.choice(samples)
    more = other.json if body[:1] == b"{" and sample.json[:1] == body[:1] else other.protobuf
    if rng.random() < 0.4:
        return body + more  # for protobuf both, one after the other
    return body[: rng.randint(0, len(body))] + more[rng.randint(0, len(more)) :]


def _structure(rng: random.Random, body: bytes, _all: Sequence[Sample], _one: Sample) -> bytes:
    """One field somewhere inside changed, with all lengths around it right."""
    try:
        found = fields(body)
    except Unreadable:
        return flip(rng, body)
    if not found:
        return body + _unknown(rng)
    one = rng.choice(found)
    field = body[one.start : one.end]
    value = body[one.value : one.end]
    if one.kind == BYTES and value and rng.random() < 0.85:
        try:
            fields(value)
        except Unreadable:
            pass
        else:
            inner = _structure(rng, value, _all, _one)
            return body[: one.start] + _bytes(one.number, inner) + body[one.end :]
    return body[: one.start] + _changed(rng, one.number, one.kind, field, value) + body[one.end :]


def _changed(rng: random.Random, number: int, kind: int, field: bytes, value: bytes) -> bytes:
    match rng.randrange(9):
        case 0:
            return b""
        case 1:
            return field * rng.choice((2, 2, 3, 70))
        case 2:
            return field + _unknown(rng)
        case 3:  # the same under another number, or as another wire type
            other = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16, 2**29 - 1))
            return varint(other << 3 | rng.choice((kind, kind, VARINT, FIXED64, BYTES, FIXED32, GROUP, END))) + value
        case 4:  # inside itself
            for _ in range(rng.choice((1, 3, 20, 98, 110))):
                field = _bytes(number, field)
            return field
        case 5 if kind == BYTES:  # a length that is not so
            return varint(number << 3 | BYTES) + rng.choice((*VARINTS, varint(len(value) + 1), b"\0")) + value
        case _:
            return _bytes_or_number(rng, number, kind)


def _bytes_or_number(rng: random.Random, number: int, kind: int) -> bytes:
    tag = varint(number << 3 | kind)
    if kind == VARINT:
        return tag + rng.choice((varint(rng.choice(NUMBERS)), rng.choice(VARINTS)))
    if kind == FIXED64:
        return tag + (
            struct.pack("<d", rng.choice(DOUBLES)) if rng.random() < 0.5 else struct.pack("<Q", rng.choice(NUMBERS))
        )
    if kind == FIXED32:
        return tag + struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
    if kind == BYTES:
        return _bytes(number, rng.choice((rng.choice(TEXTS).encode(), rng.choice(NOT_UTF8), rng.randbytes(8))))
    return tag


def _unknown(rng: random.Random) -> bytes:
    number = rng.choice((12, 19, 100, 2**20, 2**29 - 1))
    if rng.random() < 0.2:
        deep = rng.choice((1, 5, 99, 101))
        return varint(number << 3 | GROUP) * deep + varint(number << 3 | END) * (deep - (rng.random() < 0.2))
    return _bytes_or_number(rng, number, rng.choice((VARINT, FIXED64, BYTES, FIXED32)))


def _bytes(number: int, value: bytes) -> bytes:
    return varint(number << 3 | BYTES) + varint(len(value)) + value


def _values(rng: random.Random, body: bytes, _all: Sequence[Sample], sample: Sample) -> bytes:
    """Read as what it is, some fields changed to what their types just hold, written again."""
    message = MESSAGES[sample.signal]()
    try:
        message.ParseFromString(body)
    except Exception:
        message.CopyFrom(sample.message)
    for _ in range(rng.choice((1, 1, 2, 4, 10))):
        change_field(rng, message)
    return bytes(message.SerializeToString())


def change_field(rng: random.Random, message: Any, depth: int = 0) -> None:
    """Changes a field of a message, or of one inside of it."""
    descriptor: Descriptor = message.DESCRIPTOR
    there = [field for field, _ in message.ListFields()]
    inside = [field for field in there if field.message_type]
    if inside and rng.random() < 0.85:
        field = rng.choice(inside)
        part = getattr(message, field.name)
        if not _is_repeated(field):
            change_field(rng, part, depth + 1)
        elif rng.random() < 0.1:
            part.add().CopyFrom(rng.choice(part))
        elif rng.random() < 0.05:
            del part[rng.randrange(len(part))]
        else:
            change_field(rng, rng.choice(part), depth + 1)
        return
    field = rng.choice(there) if there and rng.random() < 0.7 else rng.choice(list(descriptor.fields))
    if field.message_type:
        part = getattr(message, field.name)
        if _is_repeated(field):
            part.add()
        elif descriptor.name == "AnyValue" and depth < 60:
            _nest(rng, message)
        else:
            part.SetInParent()
    elif _is_repeated(field):
        getattr(message, field.name).append(_scalar(rng, field))
    else:
        setattr(message, field.name, _scalar(rng, field))


def _nest(rng: random.Random, message: Any) -> None:
    inner = type(message)()
    inner.CopyFrom(message)
    for _ in range(rng.choice((1, 2, 15, 16, 17, 30))):
        outer = type(message)()
        if rng.random() < 0.5:
            outer.array_value.values.add().CopyFrom(inner)
        else:
            outer.kvlist_value.values.add(key="k").value.CopyFrom(inner)
        inner = outer
    message.CopyFrom(inner)


def _is_repeated(field: FieldDescriptor) -> bool:
    # protobuf 7 has the one and warns of the other, protobuf 5 has the other only.
    repeated = getattr(field, "is_repeated", None)
    return bool(getattr(field, "label", 0) == FieldDescriptor.LABEL_REPEATED if repeated is None else repeated)


def _scalar(rng: random.Random, field: FieldDescriptor) -> object:
    number = rng.choice((*NUMBERS, *(-one for one in NUMBERS)))
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice((b"", b"\0" * 16, b"x" * 8, b"x" * 16, rng.randbytes(16), b"y" * 5000))
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(TEXTS) if rng.random() < 0.97 else "long " * 1000
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice(DOUBLES)
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 3, 99, -1))
        case FieldDescriptor.CPPTYPE_UINT32:
            return number & 0xFFFFFFFF
        case FieldDescriptor.CPPTYPE_UINT64:
            return number & 0xFFFFFFFFFFFFFFFF
        case FieldDescriptor.CPPTYPE_INT32:
            return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
        case _:
            return ((number & 0xFFFFFFFFFFFFFFFF) ^ 1 << 63) - (1 << 63)


_LITERALS: Final = (
    *(
        "null",
        "true",
        "0",
        "-0",
        "1.0",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "1e308",
        "9007199254740993",
        '"1"',
        '"0x1"',
    ),
    *("9223372036854775808", "-1", "18446744073709551616", "1" * 5000, '"' + "1" * 30 + '"', '"1e400"', '"NaN"', "{}"),
    *(
        "[]",
        '""',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\ud83d\\ude00"',
        '"zz"',
        '"abc"',
        '"AAECAw=="',
        "[[]]",
    ),
    *('{"stringValue":1}', '{"intValue":"5","stringValue":"x"}', '[{"key":"tallymark.account.id"}]', "1e5", "2e-5"),
    *('{"arrayValue":{"values":[{"intValue":1.5}]}}', '{"kvlistValue":{}}', "AGGREGATION_TEMPORALITY_DELTA", "{", "]"),
)
_VALUE: Final = re.compile(rb'(?<=: )("(?:[^"\\]|\\.)*"|-?[0-9.eE+-]+|true|false|null)')
_KEY: Final = re.compile(rb'"([A-Za-z]+)": ')


def _json_value(rng: random.Random, body: bytes, _all: Sequence[Sample], _one: Sample) -> bytes:
    found = list(_VALUE.finditer(body))
    if not found:
        return flip(rng, body)
    one = rng.choice(found)
    new = (
        rng.choice(_LITERALS) if rng.random() < 0.7 else json.dumps(rng.choice(TEXTS), ensure_ascii=rng.random() < 0.5)
    )
    return body[: one.start()] + new.encode() + body[one.end() :]


def _json_twice(rng: random.Random, body: bytes, _all: Sequence[Sample], _one: Sample) -> bytes:
    """A key that is there again, also under its other name."""
    found = list(_KEY.finditer(body))
    if not found:
        return flip(rng, body)
    one = rng.choice(found)
    name = one.group(1)
    if rng.random() < 0.5:
        name = re.sub(rb"[A-Z]", lambda letter: b"_" + letter.group().lower(), name)
    at = one.start() if rng.random() < 0.7 else rng.choice(found).start()
    return body[:at] + b'"%s": %s, ' % (name, rng.choice(_LITERALS).encode()) + body[at:]


def _json_deep(rng: random.Random, body: bytes, _all: Sequence[Sample], _one: Sample) -> bytes:
    """Nesting, close to where readers give up."""
    deep = rng.choice((2, 15, 17, 44, 45, 89, 91, 100, 300, 900, 1500, 20_000, *[rng.randint(980, 1000)] * 3))
    opening, closing = rng.choice(
        ((b"[", b"]"), (b'{"a": ', b"}"), (b'{"arrayValue": {"values": [', b"]}}"), (b'{"kvlistValue": ', b"}"))
    )
    nested = opening * deep + rng.choice((b"1", b"{}", b"")) + closing * (deep - (rng.random() < 0.1))
    found = list(_VALUE.finditer(body))
    if not found or rng.random() < 0.1:
        return nested
    one = rng.choice(found)
    return body[: one.start()] + nested + body[one.end() :]


def _json_bytes(rng: random.Random, body: bytes, _all: Sequence[Sample], _one: Sample) -> bytes:
    at = rng.randint(0, len(body))
    new = rng.choice((*NOT_UTF8, b"\xef\xbb\xbf", b"\0", b"\\u12", b"//", b",", b'"', b"}", b"]", b"\xff\xfe"))
    return new + body if rng.random() < 0.1 else body[:at] + new + body[at + rng.choice((0, 1)) :]


_PROTOBUF: Final[Sequence[tuple[str, Damage]]] = (
    ("flip", flip),
    ("overwrite", _overwrite),
    ("cut", cut),
    ("splice", _splice),
    *[("structure", _structure)] * 4,
    *[("values", _values)] * 5,
)
_JSON: Final[Sequence[tuple[str, Damage]]] = (
    ("flip", flip),
    ("cut", cut),
    ("splice", _splice),
    *[("value", _json_value)] * 5,
    *[("twice", _json_twice)] * 2,
    ("deep", _json_deep),
    ("bytes", _json_bytes),
)
