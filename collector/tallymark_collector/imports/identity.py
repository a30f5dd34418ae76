"""What tells a line from every other of its source, whatever file it stands in and however that file is called.

An event with an id is that id. A line without one is its bytes and how often the same bytes stood before it in the
same input: two identical lines of one file are two calls; the same line in a copy, a renamed, compressed or cut file
is the same call. So of an identical line, a source bills as many as stand in that one of its files which has most.
"""

from __future__ import annotations

import hashlib
from typing import Final
from uuid import UUID

from tallymark_collector.billing.money import canonical
from tallymark_collector.imports.extraction import Line

WINDOW: Final = 100_000
"""Different lines after which a line may be forgotten. Identical ones have one time: they stand close."""


class Occurrences:
    """How often each line has come in one input. Holds between one and two windows of different lines."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._recent: dict[bytes, int] = {}
        self._before: dict[bytes, int] = {}

    def key(self, content: bytes) -> UUID:
        """The line's key."""
        digest = hashlib.blake2b(content, digest_size=16, person=b"line").digest()
        number = self._recent.get(digest) or self._before.get(digest, 0)
        if len(self._recent) >= self._window and digest not in self._recent:
            self._before, self._recent = self._recent, {}
        self._recent[digest] = number + 1
        return UUID(bytes=hashlib.blake2b(digest + number.to_bytes(8, "big"), digest_size=16, person=b"line").digest())


def key_of_id(text: str) -> UUID:
    """The key of an event with an id."""
    return UUID(bytes=hashlib.blake2b(text.encode(), digest_size=16, person=b"id").digest())


def cause(key: UUID) -> int:
    """`Point.cause` of a line's points: the first half of its key."""
    return int.from_bytes(key.bytes[:8], "big", signed=True) or 1


def digest(line: Line) -> int:
    """64 bits over what a line bills: the same id with another digest is a contradiction."""
    hasher = hashlib.blake2b(f"{len(line.account)} {line.account} {line.time_ns}".encode(), digest_size=8)
    amounts = sorted((stream.id.hex, canonical(value)) for stream, value in line.amounts)
    hasher.update(repr(amounts).encode())
    return int.from_bytes(hasher.digest(), "big", signed=True)
