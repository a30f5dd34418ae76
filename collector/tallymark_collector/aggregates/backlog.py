"""What waits in the database for this collector or another one, looked at now and then for whoever watches."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from tallymark_collector.errors import TransientError
from tallymark_collector.store import Store

logger = logging.getLogger(__name__)

LOOK_INTERVAL: Final = 15.0
"""Seconds between looks."""
MOST: Final = 100_000
"""Marks and findings that a look reads; more count as so many."""
LOOK_TIMEOUT: Final = 5
"""Seconds that a look may take. It is read-only and waits for nobody's locks but a migration's."""

_LOOK_SQL: Final = f"""
SELECT (SELECT count(*) FROM (SELECT DISTINCT account, tenant, bucket FROM marks) hours),
       coalesce((SELECT extract(epoch FROM clock_timestamp() - min(marked_at)) FROM marks), 0)::float8,
       (SELECT count(*) FROM (SELECT FROM audit_finding LIMIT {MOST}) found)
FROM (SELECT) once"""  # noqa: S608 - a number of ours
_MARKS_SQL: Final = f"WITH marks AS (SELECT * FROM usage_dirty LIMIT {MOST})"  # noqa: S608


class Backlog:
    """What the last look saw."""

    def __init__(self) -> None:
        self.hours = 0
        """Account-hours that are to be made again."""
        self.findings = 0
        """Differences in audit_finding."""
        self._lag = 0.0
        self._looked_at = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the last look: it grows while the database is away."""
        return time.monotonic() - self._looked_at

    @property
    def lag(self) -> float:
        """Age of the oldest mark in seconds, 0 without one; it goes on growing between looks."""
        return self._lag + self.age if self.hours else 0.0

    async def look(self, store: Store) -> None:
        """Looks. Raises StoreUnavailable."""
        async with store.transaction() as connection:
            await connection.execute(f"SET LOCAL statement_timeout = '{LOOK_TIMEOUT}s'")
            row = await (await connection.execute(_MARKS_SQL + _LOOK_SQL)).fetchone()
        if row is not None:
            self.hours, self._lag, self.findings = row
            self._looked_at = time.monotonic()


async def keep_looking(store: Store, backlog: Backlog, interval: float = LOOK_INTERVAL) -> None:
    """Looks until cancelled."""
    while True:
        try:
            await backlog.look(store)
        except TransientError as error:
            logger.debug("the backlog cannot be looked at: %s", error)
        await asyncio.sleep(interval)
