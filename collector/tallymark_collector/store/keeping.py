"""Who keeps the hours: the collector in a table, or the database in a continuous aggregate."""

from __future__ import annotations

from typing import Final

from tallymark_collector.store import hours
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines import native_hours
from tallymark_collector.store.locks import REFRESHING, shared_if_free

# Asked every time: a migration beside a running collector changes it.
_NATIVE_SQL: Final = "SELECT relkind = 'v' FROM pg_class WHERE oid = 'usage_hour'::regclass"


async def refresh(connection: Connection, limit: int | None = None) -> int:
    """Brings hours with new points up to date, `limit` at most; returns how many account-hours that were."""
    async with connection.transaction():
        if not await shared_if_free(connection, REFRESHING):
            return 0
        if not await is_native(connection):
            return await hours.refresh(connection, limit or hours.BATCH)
    return await native_hours.refresh(connection, min(limit or native_hours.BATCH, native_hours.BATCH))


async def is_native(connection: Connection) -> bool:
    """True if the database keeps the hours."""
    return await (await connection.execute(_NATIVE_SQL)).fetchone() == (True,)
