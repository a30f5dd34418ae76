"""HTTP connections: how many, how long one may say nothing, and which of them goes when another comes.

Strangers who connect and say nothing, or little and slowly, must not keep others out. So the number is not what
refuses: when it is reached, whoever does the least for its place is cut off. First those without a request under way,
the longest idle one before others; where all have one, those whose body is still coming, the slowest first. Only when
every request has arrived and is being answered, the new connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

# What clients get wrong in HTTP itself is answered and no news to an operator; it would fill the log at will.
_protocol_log = logging.getLogger(f"{__name__}.protocol")
_protocol_log.addHandler(logging.NullHandler())
_protocol_log.propagate = False

Handle = Callable[[web.BaseRequest], Awaitable[web.Response]]


class Connections(web.Server):
    """Those of one server."""

    def __init__(self, handle: Handle, *, most: int, head_seconds: float, idle_seconds: float, **more: Any) -> None:
        """At most `most` at a time. `head_seconds` from connecting to the end of the first head; `idle_seconds` from an
        answer to the end of the next head, which aiohttp sees to. `more` goes to aiohttp."""
        self._answer = handle
        self._most = most
        self._head_seconds = head_seconds
        self._timers: dict[RequestHandler, asyncio.TimerHandle] = {}
        self._idle: dict[RequestHandler, None] = {}
        self._at_work: dict[RequestHandler, web.BaseRequest] = {}
        super().__init__(self._handle, keepalive_timeout=idle_seconds, access_log=None, logger=_protocol_log, **more)

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        handler = request.protocol
        self._stop_timer(handler)
        known = handler in self._idle
        self._idle.pop(handler, None)
        if known:
            self._at_work[handler] = request
        try:
            return await self._answer(request)
        finally:
            # From here on it may go: nobody waits for a client that does not read its answer.
            if self._at_work.pop(handler, None) is not None:
                self._idle[handler] = None

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """A client has connected."""
        super().connection_made(handler, transport)
        if len(self._idle) + len(self._at_work) >= self._most:
            gone = self._least()
            if gone is None:
                transport.abort()
                return
            self._cut_off(gone)
        self._idle[handler] = None
        self._timers[handler] = asyncio.get_running_loop().call_later(self._head_seconds, transport.abort)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """A client has gone."""
        self._forget(handler)
        super().connection_lost(handler, exc)

    def _least(self) -> RequestHandler | None:
        slow = (handler for handler, request in self._at_work.items() if not request.content.is_eof())
        return next(iter(self._idle), None) or next(slow, None)

    def _cut_off(self, handler: RequestHandler) -> None:
        # It counts no more from now on; aiohttp hears of it in the loop's next turn.
        self._forget(handler)
        if handler.transport is not None:
            handler.transport.abort()

    def _forget(self, handler: RequestHandler) -> None:
        self._stop_timer(handler)
        self._idle.pop(handler, None)
        self._at_work.pop(handler, None)

    def _stop_timer(self, handler: RequestHandler) -> None:
        timer = self._timers.pop(handler, None)
        if timer is not None:
            timer.cancel()
