"""A message's fields in protobuf's encoding, without reading them: where each one begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

from tallymark_collector.errors import MalformedRequest

Bytes: TypeAlias = "bytes | memoryview"

DELIMITED: Final = 2
"""The wire type of texts, bytes and messages."""


class Field(NamedTuple):
    """Places of one field in its message."""

    number: int
    kind: int
    """The wire type."""
    begin: int
    """Of its tag."""
    value: int
    """Where its value begins; of texts, bytes and messages after their length."""
    end: int


def fields(message: Bytes) -> Iterator[Field]:
    """Each field, in the order in which they stand there. Raises MalformedRequest."""
    at = 0
    while at < len(message):
        tag, value = _varint(message, at)
        match tag & 7:
            case 0:
                _, end = _varint(message, value)
            case 1:
                end = value + 8
            case 2:
                size, value = _varint(message, value)
                end = value + size
            case 5:
                end = value + 4
            case other:
                raise MalformedRequest(f"a field has the wire type {other}")
        if end > len(message):
            raise MalformedRequest("a field is cut off")
        yield Field(tag >> 3, tag & 7, at, value, end)
        at = end


def head_of(number: int, size: int) -> bytes:
    """What stands before a text, bytes or a message of that many bytes: its tag and length."""
    return _as_varint(number << 3 | DELIMITED) + _as_varint(size)


def _varint(message: Bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise MalformedRequest("a number is cut off")


def _as_varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
