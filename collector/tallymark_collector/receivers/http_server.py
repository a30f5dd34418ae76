"""The HTTP server under OTLP/HTTP: connections that are bounded in number and in what they may be slow at."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from typing import Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from tallymark_collector.receivers.otlp_http import Receiver
from tallymark_collector.settings import Limits

READ_BUFFER: Final = 1 << 16
"""Bytes of a connection's body that may wait unread, twice; they are not counted as under way yet."""
LINGER: Final = 2.0
"""Seconds that a refused client may go on sending, so that it reads the answer instead of a reset connection."""

# What clients get wrong in HTTP itself is answered and no news to an operator; it would fill the log at will.
_protocol_log = logging.getLogger(f"{__name__}.protocol")
_protocol_log.addHandler(logging.NullHandler())
_protocol_log.propagate = False


class HttpServer:
    """A running HTTP server on sockets that are listened on already."""

    def __init__(self, receiver: Receiver, limits: Limits, drain_seconds: float) -> None:
        self._connections = _Connections(receiver, limits)
        self._runner = web.ServerRunner(self._connections, shutdown_timeout=drain_seconds)

    async def start(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Takes requests from now on."""
        await self._runner.setup()
        for one in sockets:
            await web.SockSite(self._runner, one, ssl_context=tls).start()

    async def drain(self) -> None:
        """Takes no new connections, finishes requests under way within the drain's time, cuts off the others."""
        await self._runner.cleanup()


class _Connections(web.Server):
    """Closes connections that send no whole head of a request in time, and those past the limit.

    The time between requests on a kept connection is bounded by aiohttp, the first head is not.
    """

    def __init__(self, receiver: Receiver, limits: Limits) -> None:
        self._receiver = receiver
        self._limits = limits
        self._waiting: dict[RequestHandler, asyncio.TimerHandle] = {}
        super().__init__(
            self._handle,
            keepalive_timeout=limits.idle_seconds,
            access_log=None,
            logger=_protocol_log,
            auto_decompress=False,
            lingering_time=LINGER,
            read_bufsize=READ_BUFFER,
        )

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        self._heard_of(request.protocol)
        return await self._receiver.handle(request)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """A client has connected."""
        super().connection_made(handler, transport)
        if len(self.connections) > self._limits.http_connections:
            transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._waiting[handler] = loop.call_later(self._limits.head_seconds, transport.abort)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """A client has gone."""
        self._heard_of(handler)
        super().connection_lost(handler, exc)

    def _heard_of(self, handler: RequestHandler) -> None:
        timer = self._waiting.pop(handler, None)
        if timer is not None:
            timer.cancel()
