"""The loop beside the server that recomputes hours with new points. Views are right without it, only slower."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

from tallymark_collector.errors import TransientError

logger = logging.getLogger(__name__)

MAX_PAUSE: Final = 60.0
"""Seconds between refreshes, however long one took."""
MAX_POSTPONED: Final = 5.0
"""Seconds that a refresh is put off at most while points are being written."""


class Refreshing(Protocol):
    """What the loop needs of a store."""

    async def refresh(self) -> int:
        """Recomputes some account-hours; returns how many."""
        ...


async def keep_refreshed(store: Refreshing, interval: float, writing: Callable[[], float] = lambda: 0.0) -> None:
    """Refreshes until cancelled: while there is work, with pauses as long as the work took (an hour that is written to
    is made again and again, and readers and writers want the database too); else every `interval` seconds.

    `writing` says how many seconds have been spent on transactions with points since the start. Where that was half of
    the time since the last refresh began, the next one is put off, `MAX_POSTPONED` at most.
    """
    clock = asyncio.get_running_loop().time
    while True:
        began, spent = clock(), writing()
        pause = interval
        try:
            if await store.refresh():
                pause = min(clock() - began, MAX_PAUSE)
        except TransientError as error:
            logger.warning("hours are not refreshed, the next try is in %s s: %s", interval, error)
        await asyncio.sleep(pause)
        postponed = 0.0
        while postponed < MAX_POSTPONED and writing() - spent > (clock() - began) / 2:
            began, spent = clock(), writing()
            await asyncio.sleep(min(interval, MAX_POSTPONED - postponed))
            postponed += interval
