"""The loop beside the server that recomputes hours with new points. Views are right without it, only slower."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from tallymark_collector.errors import TransientError

logger = logging.getLogger(__name__)


class Refreshing(Protocol):
    """What the loop needs of a store."""

    async def refresh(self) -> int:
        """Recomputes some account-hours; returns how many."""
        ...


async def keep_refreshed(store: Refreshing, interval: float) -> None:
    """Refreshes until cancelled: at once while there is work, every `interval` seconds while there is none."""
    while True:
        try:
            if await store.refresh():
                continue
        except TransientError as error:
            logger.warning("hours are not refreshed, the next try is in %s s: %s", interval, error)
        await asyncio.sleep(interval)
