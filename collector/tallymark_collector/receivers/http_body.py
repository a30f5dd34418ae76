"""The body of an HTTP request: read, decompressed and counted piece by piece, so that its size is bounded at each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
from aiohttp import http_exceptions, web

from tallymark_collector.errors import MalformedRequest, UnsupportedMedia
from tallymark_collector.receivers.admission import Share
from tallymark_collector.receivers.decompression import Unfolding, too_large

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
        raise too_large("body", limit)
    pieces: list[bytes] = []
    size = 0
    async for piece in _decompressed(request, limit) if encoding else _received(request, limit):
        size += len(piece)
        if size > limit:
            raise too_large("body", limit, compressed=bool(encoding))
        share.take(len(piece))
        pieces.append(piece)
    return b"".join(pieces)


async def _received(request: web.BaseRequest, limit: int) -> AsyncIterator[bytes]:
    size = 0
    try:
        while piece := await request.content.readany():
            size += len(piece)
            if size > limit:
                raise too_large("body", limit)
            yield piece
    except (web.RequestPayloadError, http_exceptions.HttpProcessingError, aiohttp.ClientError, ConnectionError) as bad:
        raise MalformedRequest(f"the body did not arrive whole: {type(bad).__name__}") from None


async def _decompressed(request: web.BaseRequest, limit: int) -> AsyncIterator[bytes]:
    unfolding = Unfolding("body")
    async for compressed in _received(request, limit):
        for piece in unfolding.feed(compressed):
            yield piece
            # A megabyte of zeros is a kilobyte of gzip: others have their turn while it is unfolded.
            await asyncio.sleep(0)
    unfolding.finish()
