"""Compressed requests, unfolded piece by piece, so that their size is bounded at each.

Over HTTP a head says what a body is compressed by. Over gRPC a message is compressed or not whatever its call's head
says, and gRPC, which knows, tells nobody; but it can be seen (`scheme_of`): no OTLP request begins as gzip or zlib do.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from tallymark_collector.errors import MalformedRequest, TooLarge

PIECE: Final = 1 << 20
"""Bytes that are decompressed at a time."""
GZIP: Final = 16 + zlib.MAX_WBITS
"""As zlib's functions take it."""
DEFLATE: Final = zlib.MAX_WBITS
"""gRPC's "deflate", which is zlib's format."""
_NAMES: Final = {GZIP: "gzip", DEFLATE: "deflate"}
_GZIP_BEGINS: Final = b"\x1f\x8b"  # as protobuf a field of a kind that there is not
_ZLIB_BEGINS: Final = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")  # field 15; OTLP's requests have field 1


def scheme_of(message: bytes) -> int | None:
    """What a gRPC message is compressed by; None of one that is not."""
    begins = message[:2]
    if begins == _GZIP_BEGINS:
        return GZIP
    return DEFLATE if begins in _ZLIB_BEGINS else None


def too_large(what: str, limit: int, *, compressed: bool = False) -> TooLarge:
    """Of the "body" or the "message". (By "larger than max" Tallymark's SDK, and others that know gRPC's own words,
    tell a limit that smaller requests keep to.)"""
    after = " after decompression" if compressed else ""
    return TooLarge(
        f"the {what} is larger than max: more than {limit} bytes{after}. Send less at once, in more requests"
    )


async def unfolded(message: bytes, limit: int, take: Callable[[int], None] = lambda _size: None) -> bytes:
    """A gRPC message, decompressed where it was compressed. `take` is told of bytes before they are kept, of those of
    the message itself and of what it unfolds to whichever are more. Raises MalformedRequest, TooLarge past `limit`
    bytes of either, and what `take` raises."""
    if len(message) > limit:
        raise too_large("message", limit)
    take(len(message))
    scheme = scheme_of(message)
    if scheme is None:
        return message
    unfolding = Unfolding("message", scheme)
    pieces: list[bytes] = []
    size, taken = 0, len(message)
    for start in range(0, len(message), PIECE):
        for piece in unfolding.feed(message[start : start + PIECE]):
            size += len(piece)
            if size > limit:
                raise too_large("message", limit, compressed=True)
            if size > taken:
                take(size - taken)
                taken = size
            pieces.append(piece)
            if len(piece) == PIECE:  # a large one: others have their turn meanwhile
                await asyncio.sleep(0)
    unfolding.finish()
    return b"".join(pieces)


class Unfolding:
    """What was compressed, at most `PIECE` bytes at a time; of gzip any number of members (RFC 1952)."""

    def __init__(self, what: str, scheme: int = GZIP) -> None:
        self._what = what
        self._scheme = scheme
        self._member = zlib.decompressobj(scheme)
        self._begun = False

    def feed(self, compressed: bytes) -> Iterator[bytes]:
        """What these bytes unfold to. Raises MalformedRequest."""
        while compressed:
            if self._member.eof:
                self._member = zlib.decompressobj(self._scheme)
            self._begun = True
            try:
                piece = self._member.decompress(compressed, PIECE)
            except zlib.error as error:
                raise MalformedRequest(f"the {self._what} is not {_NAMES[self._scheme]}: {error}") from None
            compressed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if piece:
                yield piece

    def finish(self) -> None:
        """Raises MalformedRequest where the last member has no end."""
        if self._begun and not self._member.eof:
            raise MalformedRequest(f"the {self._what}'s {_NAMES[self._scheme]} ends before its end: it was cut off")
