"""Whether the collector can take usage now: what health checks are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

logger = logging.getLogger(__name__)

ASK_INTERVAL: Final = 1.0
"""Seconds between questions."""
ASK_TIMEOUT: Final = 3.0
"""Seconds that the database has to answer."""
FAILURES: Final = 2
"""Failures in a row that count: a single one is a dropped connection or a moment of load."""

Ask = Callable[[], Awaitable[str | None]]
"""Why the database takes no writes; None where it does."""


class Readiness:
    """The state that health checks read. Changed by the loop below and by the end of the server alone."""

    def __init__(self) -> None:
        self.serving = True
        """True if requests are taken and can be written."""
        self.reason = ""
        """Why not, for a person; "" while serving."""
        self.drained = asyncio.Event()
        """Set once the collector ends; it never serves again."""
        self.told: Callable[[], None] = lambda: None
        """Is called after each change."""
        self._failures = 0
        self._trouble = ""
        self._deaf = ""

    @property
    def draining(self) -> bool:
        """True once the collector ends."""
        return self.drained.is_set()

    def drain(self) -> None:
        """The collector ends."""
        self.serving, self.reason = False, "the collector is stopping"
        self.drained.set()
        self.told()

    def note(self, trouble: str | None) -> bool:
        """Takes the database's answer; returns True where that changes the state."""
        if self.draining:
            return False
        if trouble is None:
            self._failures = 0
            self._trouble = ""
        else:
            self._failures += 1
            if self._failures >= FAILURES:
                self._trouble = trouble
        return self._become(self._trouble or self._deaf)

    def hears(self, *, everybody: bool) -> bool:
        """Takes whether somebody listens to clients; returns True where that changes the state."""
        if self.draining:
            return False
        self._deaf = "" if everybody else "nobody listens for gRPC: its server ended and is started again"
        return self._become(self._trouble or self._deaf)

    def _become(self, reason: str) -> bool:
        changed, self.serving, self.reason = self.serving is bool(reason), not reason, reason
        if changed:
            self.told()
        return changed


async def keep_asking(
    readiness: Readiness,
    ask: Ask,
    changed: Callable[[], Awaitable[None]],
    interval: float = ASK_INTERVAL,
    timeout: float = ASK_TIMEOUT,
) -> None:
    """Asks until the collector drains, and calls `changed` after each change of state."""
    drained = asyncio.ensure_future(readiness.drained.wait())
    asking: asyncio.Future[str | None] | None = None
    try:
        while not readiness.draining:
            # Never two questions at once; one that hangs is waited for, and is trouble.
            asking = asking or asyncio.ensure_future(ask())
            # Not wait_for: before Python 3.12 it can swallow the cancellation that ends the loop.
            await asyncio.wait({asking}, timeout=timeout)
            if not asking.done():
                trouble: str | None = f"the database did not answer within {timeout:g} s"
                asking.cancel()
                await asyncio.wait({asking}, timeout=timeout)
            else:
                trouble = _answer(asking)
            if asking.done():
                asking = None
            if readiness.note(trouble):
                if readiness.serving:
                    logger.warning("the database is back: usage is taken again")
                else:
                    logger.error("health checks are told that usage is not taken: %s", trouble)
                await changed()
            await asyncio.wait({drained}, timeout=interval)
    finally:
        drained.cancel()
        if asking is not None:
            asking.cancel()


def _answer(asked: asyncio.Future[str | None]) -> str | None:
    if asked.cancelled():
        return "the database could not be asked"
    error = asked.exception()
    if error is not None:  # whatever it is, the loop goes on: nobody else would notice the database's return
        return f"the database could not be asked: {type(error).__name__}"
    return asked.result()
