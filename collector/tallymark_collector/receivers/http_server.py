"""The HTTP server under OTLP/HTTP."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from typing import Final

from tallymark_collector.receivers.http_connections import Connections
from tallymark_collector.receivers.otlp_http import Receiver
from tallymark_collector.settings import Limits

READ_BUFFER: Final = 1 << 16
"""Bytes of a connection's body that may wait unread, twice; they are not counted as under way yet."""
LINGER: Final = 2.0
"""Seconds that a refused client may go on sending, so that it reads the answer instead of a reset connection."""


class HttpServer:
    """A running HTTP server on sockets that are listened on already."""

    def __init__(self, receiver: Receiver, limits: Limits, drain_seconds: float, max_age: float) -> None:
        self._connections = Connections(
            receiver.handle,
            most=limits.http_connections,
            head_seconds=limits.head_seconds,
            idle_seconds=limits.idle_seconds,
            max_age=max_age,
            auto_decompress=False,
            lingering_time=LINGER,
            read_bufsize=READ_BUFFER,
        )
        self._drain_seconds = drain_seconds

    async def start(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Takes requests from now on."""
        await self._connections.listen(sockets, tls)

    async def drain(self) -> None:
        """Takes no new connections, finishes requests under way within the drain's time, cuts off the others."""
        await self._connections.end(self._drain_seconds)
