"""HTTP connections: how many, how long one may say nothing, and which of them goes when another comes.

Strangers who connect and say nothing, or little and slowly, must not keep others out. So the number is not what
refuses: when it is reached, whoever does the least for its place is cut off. First those without a request under way,
the longest idle one before others; where all have one, those whose body is still coming, the slowest first. Only when
every request has arrived and is being answered, the new connection is closed.

A connection counts from the moment that it is accepted, so its TLS handshake is within all of this: one that does not
get through it is idle, and has as long as any other to send its first head.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler
from google.rpc.status_pb2 import Status

from tallymark_collector.receivers.accepting import Door
from tallymark_collector.receivers.listening import BACKLOG
from tallymark_collector.wire import otlp_json

logger = logging.getLogger(__name__)

# What clients get wrong in HTTP itself is answered and no news to an operator; it would fill the log at will.
_protocol_log = logging.getLogger(f"{__name__}.protocol")
_protocol_log.addHandler(logging.NullHandler())
_protocol_log.propagate = False

MOST_ENDING: Final = 32
"""Connections that were cut off and still have their descriptors: asyncio closes them in its next turns, and could
accept far more in each of these."""

VARIED: Final = 0.1
"""Of a connection's age: by how much, as gRPC does it."""

_INVALID_ARGUMENT: Final = 3  # google.rpc.Code
_INTERNAL: Final = 13

Handle = Callable[[web.BaseRequest], Awaitable[web.Response]]

_BROKEN: Final = (
    "this is no HTTP/1.1 request that can be read, nothing of it was taken: look at its first line, its headers (name,"
    " colon, printable characters; 128 at most) and its length"
)
_TOO_LONG: Final = (
    "the head of the request is too long, nothing of it was taken: its first line and each header may have 8,190 bytes"
)


class _Handler(RequestHandler):
    """One connection."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is answered to what is no HTTP, and where nobody else has an answer. Nothing of what came: aiohttp's
        own message has the line that it could not read, where a token may stand."""
        del message
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("unforeseen error while a request over HTTP is answered", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun: there is no other one")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            said = Status(code=_INTERNAL, message="unforeseen error in the collector: its log has the particulars")
        else:
            why = _TOO_LONG if isinstance(exc, LineTooLong) else _BROKEN
            said = Status(code=_INVALID_ARGUMENT, message=why)
        answer = web.Response(
            status=status,
            body=otlp_json.from_protobuf(said),
            content_type="application/json",
            headers={"Server": "tallymark"},
        )
        answer.force_close()
        return answer


class _Place:
    """What one connection takes."""

    __slots__ = ("connection", "descriptor", "old_at", "timer", "transport")

    def __init__(self, connection: socket.socket, old_at: float) -> None:
        self.old_at = old_at
        """The loop's time from which on an answer is its last."""
        self.connection = connection
        self.descriptor = connection.fileno()
        self.transport: asyncio.Transport | None = None
        """None until it is connected: its handshake is under way."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends it, unless its first head comes."""

    @property
    def is_closed(self) -> bool:
        """Whether it has no descriptor any more. Of a handshake that fails nothing else is heard."""
        return self.connection.fileno() < 0

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def end(self) -> None:
        """Cuts it off; asyncio hears of it in the loop's next turn."""
        if self.transport is not None:
            self.transport.abort()
        else:
            with suppress(OSError):  # the client has gone before
                self.connection.shutdown(socket.SHUT_RDWR)


class Connections(web.Server):
    """Those of one server."""

    def __init__(
        self,
        handle: Handle,
        *,
        most: int,
        head_seconds: float,
        idle_seconds: float,
        max_age: float = math.inf,
        **more: Any,
    ) -> None:
        """At most `most` at a time. `head_seconds` from connecting to the end of the first head; `idle_seconds` from an
        answer to the end of the next head, which aiohttp sees to. After `max_age` seconds an answer is a connection's
        last. `more` goes to aiohttp."""
        self._answer = handle
        self._most = most
        self._head_seconds = head_seconds
        self._max_age = max_age
        self._servers: list[asyncio.Server] = []
        self._arriving: dict[int, _Place] = {}
        """By descriptor: accepted, and not connected yet. They are among the idle ones, too."""
        self._places: dict[RequestHandler, _Place] = {}
        self._idle: dict[_Place, None] = {}
        self._at_work: dict[_Place, web.BaseRequest] = {}
        self._ending: list[_Place] = []
        super().__init__(self._handle, keepalive_timeout=idle_seconds, access_log=None, logger=_protocol_log, **more)

    def __call__(self) -> RequestHandler:
        """What talks to a client that connects."""
        return _Handler(self, loop=self._loop, **self._kwargs)

    async def listen(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None = None) -> None:
        """Takes connections to these sockets, which are its own from now on."""
        loop = asyncio.get_running_loop()
        for one in sockets:
            door = Door(one, self._arrived, self._is_open)
            handshake = None if tls is None else self._head_seconds
            self._servers.append(
                await loop.create_server(self, sock=door, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=handshake)
            )

    async def end(self, seconds: float) -> None:
        """Takes no new connections, finishes requests under way within so many seconds, cuts off the others."""
        for server in self._servers:
            server.close()
        await asyncio.sleep(0)  # what has just arrived begins to be handled
        for place in list(self._arriving.values()):
            self._cut_off(place)
        self.pre_shutdown()
        await self.shutdown(seconds)

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        place = self._places.get(request.protocol)
        known = place is not None and place in self._idle
        if place is not None and known:
            place.stop_timer()
            del self._idle[place]
            self._at_work[place] = request
        try:
            answer = await self._answer(request)
            if place is not None and self._loop.time() >= place.old_at:
                answer.force_close()  # and says so: its client makes another
            return answer
        finally:
            # From here on it may go: nobody waits for a client that does not read its answer.
            if place is not None and self._at_work.pop(place, None) is not None:
                self._idle[place] = None

    def _is_open(self) -> bool:
        """Whether another connection may come now."""
        if len(self._ending) >= MOST_ENDING:
            self._ending = [place for place in self._ending if not place.is_closed]
        return len(self._ending) < MOST_ENDING

    def _arrived(self, connection: socket.socket) -> bool:
        """Gives an accepted connection a place; False where there is none."""
        if len(self._idle) + len(self._at_work) >= self._most:
            self._forget_failed()
        if len(self._idle) + len(self._at_work) >= self._most:
            least = self._least()
            if least is None:
                return False
            self._cut_off(least)
        # Varied, or clients that came together would come again together.
        age = self._max_age * random.uniform(1 - VARIED, 1 + VARIED)  # noqa: S311 - no secret
        place = _Place(connection, asyncio.get_running_loop().time() + age)
        former = self._arriving.get(place.descriptor)
        if former is not None:  # it is gone, or its descriptor would not be free
            self._forget(former)
        place.timer = asyncio.get_running_loop().call_later(self._head_seconds, self._cut_off, place)
        self._idle[place] = None
        self._arriving[place.descriptor] = place
        return True

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """A client has connected, and shaken hands where there is TLS."""
        super().connection_made(handler, transport)
        place = self._arriving.pop(transport.get_extra_info("socket").fileno(), None)
        if place is None:  # cut off meanwhile; aiohttp begins before it ends
            asyncio.get_running_loop().call_soon(transport.abort)
            return
        place.transport = transport
        self._places[handler] = place

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """A client has gone."""
        place = self._places.pop(handler, None)
        if place is not None:
            self._forget(place)
        super().connection_lost(handler, exc)

    def _least(self) -> _Place | None:
        slow = (place for place, request in self._at_work.items() if not request.content.is_eof())
        return next(iter(self._idle), None) or next(slow, None)

    def _cut_off(self, place: _Place) -> None:
        # It has no place from now on.
        self._forget(place)
        self._ending.append(place)
        place.end()

    def _forget_failed(self) -> None:
        for place in [one for one in self._arriving.values() if one.is_closed]:
            self._forget(place)

    def _forget(self, place: _Place) -> None:
        place.stop_timer()
        self._idle.pop(place, None)
        self._at_work.pop(place, None)
        if self._arriving.get(place.descriptor) is place:
            del self._arriving[place.descriptor]
