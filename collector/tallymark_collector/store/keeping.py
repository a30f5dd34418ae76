"""Who keeps hours and days: the collector in tables, or the database in continuous aggregates."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from tallymark_collector.store import days, hours
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines import native_hours
from tallymark_collector.store.locks import REFRESHING, shared_if_free

# Asked every time: a migration beside a running collector changes it.
_NATIVE_SQL: Final = "SELECT relkind = 'v' FROM pg_class WHERE oid = 'usage_hour'::regclass"


async def dropped_before(connection: Connection, instants: Sequence[datetime]) -> datetime | None:
    """Before when points have been dropped, where one of these instants lies there; then only whole hours are left of
    its time, and a sum of a piece of one would be too small."""
    row = await (
        await connection.execute(
            "SELECT points_from FROM usage_kept WHERE points_from > ANY (%s::timestamptz[])", [[*instants]]
        )
    ).fetchone()
    return None if row is None else row[0]


async def levels_dropped_before(connection: Connection, instant: datetime) -> datetime | None:
    """Before when levels have been dropped, where the instant lies there; of each stream the last one is left."""
    row = await (
        await connection.execute("SELECT levels_from FROM usage_kept WHERE levels_from > %s", [instant])
    ).fetchone()
    return None if row is None else row[0]


async def refresh(connection: Connection, limit: int | None = None) -> int:
    """Brings hours with new points up to date, and the days over them, `limit` of each at most; returns how many
    account-hours that were, or where none was left, how many account-days."""
    async with connection.transaction():
        if not await shared_if_free(connection, REFRESHING):
            return 0
        native = await is_native(connection)
        made = 0 if native else await hours.refresh(connection, limit or hours.BATCH)
    if not native:
        also = await _refresh_days(connection, limit or days.BATCH)
        return made or also
    return await native_hours.refresh(connection, min(limit or native_hours.BATCH, native_hours.BATCH))


async def _refresh_days(connection: Connection, limit: int) -> int:
    """In a transaction of their own: the hours are free meanwhile. A migration may have come between."""
    async with connection.transaction():
        if not await shared_if_free(connection, REFRESHING) or await is_native(connection):
            return 0
        return await days.refresh(connection, limit)


async def is_native(connection: Connection) -> bool:
    """True if the database keeps the hours."""
    return await (await connection.execute(_NATIVE_SQL)).fetchone() == (True,)
