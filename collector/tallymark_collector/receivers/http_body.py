"""The body of an HTTP request: read, decompressed and counted piece by piece, so that its size is bounded at each."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

import aiohttp
from aiohttp import http_exceptions, web

from tallymark_collector.errors import MalformedRequest, TooLarge, UnsupportedMedia
from tallymark_collector.receivers.admission import Share

PIECE: Final = 1 << 20
"""Bytes that are decompressed at a time."""
_GZIP: Final = 16 + zlib.MAX_WBITS
ENCODINGS: Final = ("gzip", "identity")


def check_encoding(encoding: str) -> str:
    """A Content-Encoding that is read here, "" where nothing is to be done. Raises UnsupportedMedia."""
    found = encoding.strip().lower()
    if found in ("", "identity"):
        return ""
    if found in ("gzip", "x-gzip"):
        return "gzip"
    raise UnsupportedMedia(f"Content-Encoding {encoding[:40]!r} is not read here: send gzip, or none")


async def read_body(request: web.BaseRequest, encoding: str, limit: int, share: Share) -> bytes:
    """The whole body, decompressed. Raises MalformedRequest, Overloaded, and TooLarge past `limit` bytes, whether of
    the body or of what it decompresses to."""
    if (request.content_length or 0) > limit:
        raise TooLarge(f"the body has {request.content_length} bytes, at most {limit} are taken")
    pieces: list[bytes] = []
    size = 0
    async for piece in _decompressed(request, limit) if encoding else _received(request, limit):
        size += len(piece)
        if size > limit:
            raise TooLarge(f"the body has more than {limit} bytes{' after decompression' if encoding else ''}")
        share.take(len(piece))
        pieces.append(piece)
    return b"".join(pieces)


async def _received(request: web.BaseRequest, limit: int) -> AsyncIterator[bytes]:
    size = 0
    try:
        while piece := await request.content.readany():
            size += len(piece)
            if size > limit:
                raise TooLarge(f"the body has more than {limit} bytes")
            yield piece
    except (web.RequestPayloadError, http_exceptions.HttpProcessingError, aiohttp.ClientError, ConnectionError) as bad:
        raise MalformedRequest(f"the body did not arrive whole: {type(bad).__name__}") from None


async def _decompressed(request: web.BaseRequest, limit: int) -> AsyncIterator[bytes]:
    gunzip = _Gunzip()
    async for compressed in _received(request, limit):
        for piece in gunzip.feed(compressed):
            yield piece
            # A megabyte of zeros is a kilobyte of gzip: others have their turn while it is unfolded.
            await asyncio.sleep(0)
    gunzip.finish()


class _Gunzip:
    """Members of gzip after each other (RFC 1952), at most `PIECE` bytes at a time."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP)
        self._begun = False

    def feed(self, compressed: bytes) -> Iterator[bytes]:
        """What these bytes unfold to. Raises MalformedRequest."""
        while compressed:
            if self._member.eof:
                self._member = zlib.decompressobj(_GZIP)
            self._begun = True
            try:
                piece = self._member.decompress(compressed, PIECE)
            except zlib.error as error:
                raise MalformedRequest(f"the body is not gzip: {error}") from None
            compressed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if piece:
                yield piece

    def finish(self) -> None:
        """Raises MalformedRequest where the last member has no end."""
        if self._begun and not self._member.eof:
            raise MalformedRequest("the body's gzip ends before its end: it was cut off")
