"""What orchestrators and scrapers ask, on a port of its own: /livez, /readyz and /metrics over HTTP/1.1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from tallymark_collector.receivers.http_connections import Connections
from tallymark_collector.receivers.listening import listen

MAX_CONNECTIONS: Final = 32
"""When there are as many, an idle one is closed for each that comes."""
HEAD_SECONDS: Final = 5.0
"""From connecting to the end of the first question."""
IDLE_SECONDS: Final = 10.0
"""From an answer to the end of the next question."""
LINGER: Final = 1.0
"""Seconds that a client may go on with a body, which no question has, after its answer."""
MAX_PAGES: Final = 8
"""Questions for metrics that wait for each other; others are still told whether the collector lives."""
END_SECONDS: Final = 1.0

State = Callable[[], str]
"""Why usage is not taken now; "" where it is."""
Page = Callable[[], tuple[str, bytes]]
"""Content type and text of the metrics; called in a thread."""


def starting() -> str:
    """The state until there is another."""
    return "the collector is starting"


class Admin:
    """Answers for one process. `state` is set once there is somebody to ask."""

    def __init__(self, page: Page, state: State = starting) -> None:
        self.state = state
        self.port = 0
        """The port that is listened on."""
        self._page = page
        self._answering = asyncio.Lock()
        self._pages = 0

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """The answer to one request, whatever it is."""
        if request.path not in ("/livez", "/readyz", "/metrics"):
            return _text(404, "nothing is here: ask for /livez, /readyz or /metrics\n")
        if request.method not in ("GET", "HEAD"):
            return _text(405, f"{request.path} takes GET alone\n", {"Allow": "GET, HEAD"})
        if request.path == "/livez":
            return _text(200, "alive\n")
        if request.path == "/readyz":
            reason = self.state()
            return _text(503, f"{reason}\n") if reason else _text(200, "ready\n")
        if self._pages >= MAX_PAGES:
            return _text(503, f"{MAX_PAGES} others ask for metrics: ask again\n", {"Retry-After": "1"})
        self._pages += 1
        try:
            async with self._answering:  # one at a time, in a thread: nobody's requests wait for it
                kind, page = await asyncio.to_thread(self._page)
        finally:
            self._pages -= 1
        return web.Response(body=page, headers={"Content-Type": kind, "Server": "tallymark"})


@asynccontextmanager
async def administering(host: str, port: int | None, admin: Admin) -> AsyncIterator[Admin]:
    """Listens while the context lasts; not at all where there is no port. Raises UserError where it is taken."""
    if port is None:
        yield admin
        return
    sockets = listen(host, port)
    admin.port = sockets[0].getsockname()[1]
    connections = Connections(
        admin.handle,
        most=MAX_CONNECTIONS,
        head_seconds=HEAD_SECONDS,
        idle_seconds=IDLE_SECONDS,
        lingering_time=LINGER,
    )
    try:
        await connections.listen(sockets)
        yield admin
    finally:
        await connections.end(END_SECONDS)


def _text(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text, headers={"Server": "tallymark", **(headers or {})})
