"""The loop beside the server that recomputes hours with new points. Views are right without it, only slower."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from tallymark_collector.errors import TransientError

logger = logging.getLogger(__name__)

MAX_PAUSE: Final = 60.0
"""Seconds between refreshes, however long one took."""


class Refreshing(Protocol):
    """What the loop needs of a store."""

    async def refresh(self) -> int:
        """Recomputes some account-hours; returns how many."""
        ...


async def keep_refreshed(store: Refreshing, interval: float) -> None:
    """Refreshes until cancelled: while there is work, with pauses as long as the work took (an hour that is written to
    is made again and again, and readers and writers want the database too); else every `interval` seconds."""
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        try:
            if await store.refresh():
                await asyncio.sleep(min(clock() - began, MAX_PAUSE))
                continue
        except TransientError as error:
            logger.warning("hours are not refreshed, the next try is in %s s: %s", interval, error)
        await asyncio.sleep(interval)
