"""Sends the lines of an access log (Apache's combined format) to the replay endpoint, over real connections."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import NamedTuple

import aiohttp
from yarl import URL

CONNECTIONS = 16
TIMEOUT = aiohttp.ClientTimeout(total=60)

# Up to the size; what follows (referrer, user agent, a quote that is never closed) does not matter here.
LINE = re.compile(r'(\S+) \S+ \S+ \[[^\]]*\] "([A-Z]+) (\S+) [^"]*" (\d{3}) (\d+|-) ')


class Request(NamedTuple):
    address: str
    method: str
    target: str
    status: int
    size: int


def read(lines: Iterable[str]) -> list[Request]:
    """Every line, or a ValueError: none may be passed over."""
    found = []
    for number, line in enumerate(lines, 1):
        match = LINE.match(line)
        if match is None:
            raise ValueError(f"line {number} is none of an access log: {line!r}")
        address, method, target, status, size = match.groups()
        found.append(Request(address, method, target, int(status), 0 if size == "-" else int(size)))
    return found


async def replay(url: str, requests: Iterable[Request]) -> int:
    """Makes the requests and returns the bytes that came back. Every answer has to be the one that was asked for."""
    waiting = iter(requests)

    async def work(session: aiohttp.ClientSession) -> int:
        return sum([await _make(session, url, request) for request in waiting])

    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT, auto_decompress=False) as session:
        return sum(await asyncio.gather(*(work(session) for _ in range(CONNECTIONS))))


async def _make(session: aiohttp.ClientSession, url: str, request: Request) -> int:
    headers = {
        "x-client-address": request.address,
        "x-status": str(request.status),
        "x-size": str(request.size),
    }
    target = URL(f"{url}/replay{request.target}", encoded=True)  # as logged, not tidied up
    received = 0
    async with session.request(request.method, target, headers=headers, allow_redirects=False) as response:
        async for piece in response.content.iter_any():
            received += len(piece)
    assert (response.status, received) == (request.status, request.size), request
    return received
