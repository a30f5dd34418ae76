"""A listening socket that tells of each connection as it is accepted, and what becomes of it where the process may
open no more files.

asyncio tells of a connection only once its TLS handshake is done, which is up to the client; what takes a descriptor
has to count before. And where there is none left asyncio tries as often as the queue is long, logs each time with a
traceback and sets a timer for each that does the same again: thousands of lines a second.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any, Final

logger = logging.getLogger(__name__)

TELL_INTERVAL: Final = 10.0
"""Seconds between lines of the log about connections that could not be accepted."""
_SAME_TRY: Final = 0.5
"""Seconds in which another failure is of the same try: asyncio itself waits for 1 s before the next."""
_LACKING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class NothingLeftError(OSError):
    """The process, or the machine, has no descriptor or memory for a connection."""


class Door(socket.socket):
    """A socket that is listened on, for asyncio's servers."""

    def __init__(
        self,
        listening: socket.socket,
        arrived: Callable[[socket.socket], bool],
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        """Takes `listening` over. `arrived` is told of each connection, and says whether it is taken. While `is_open`
        says no, connections wait for the loop's next turn."""
        super().__init__(fileno=listening.detach())
        self._arrived = arrived
        self._is_open = is_open
        self._failed_at = float("-inf")

    def accept(self) -> tuple[socket.socket, Any]:
        """As asyncio calls it, again and again. Raises OSError, of which it understands which is which."""
        if not self._is_open():
            raise BlockingIOError
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno not in _LACKING:
                raise
            now = time.monotonic()
            if now - self._failed_at < _SAME_TRY:
                raise BlockingIOError from None  # nothing to be had: it has set its timer already
            self._failed_at = now
            raise NothingLeftError(error.errno, error.strerror) from None
        if not self._arrived(connection):
            connection.close()
            raise ConnectionAbortedError
        return connection, address


class Troubles:
    """An event loop's handler of exceptions that nobody waits for: of connections that cannot be accepted it writes one
    line in a while, everything else is told as ever."""

    def __init__(self) -> None:
        self._tries = 0
        self._told = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """As asyncio calls it."""
        error = context.get("exception")
        if not isinstance(error, NothingLeftError):
            loop.default_exception_handler(context)
            return
        self._tries += 1
        now = time.monotonic()
        if now - self._told >= TELL_INTERVAL:
            self._told = now
            logger.error(
                "connections cannot be accepted (%s), %d tries until now: they wait. Raise the limit of open files"
                " (docs/operating.md), or see who holds so many connections",
                error.strerror,
                self._tries,
            )
