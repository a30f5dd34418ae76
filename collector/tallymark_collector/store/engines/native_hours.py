"""Keeps continuous aggregates equal to the points, for databases that have them.

The marks say which hours have new points. They are taken before a refresh begins, so the points of each are committed
and in the refresh's snapshot; the marked hours are made again by force, whatever TimescaleDB's own log of changes
says; and exactly the marks that were taken are deleted, after the hours and the days over them are done. Until then
views take those hours from the points, and whatever commits meanwhile has a mark of its own.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Final

import psycopg
from psycopg.errors import LockNotAvailable

from tallymark_collector.errors import UserError
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines.capabilities import called, sql
from tallymark_collector.store.locks import REFRESHING, held_if_free

BATCH: Final = 24
"""Hours that one refresh takes on; those that touch are one window."""

MAX_ATTEMPTS: Final = 8
FIRST_PAUSE: Final = 0.05
"""Seconds before a window that somebody else refreshes by hand is tried again; doubled each time."""

LOCK_TIMEOUT: Final = "2s"
"""How long readers may wait behind us for one that is slow."""

WIDTHS: Final = {"usage_hour": timedelta(hours=1), "usage_day": timedelta(days=1)}
"""Continuous aggregates and their buckets, each after the one that it is made from."""

_TAKEN_SQL: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS taken_mark (place tid, writer xid, bucket timestamptz, account text, tenant text);
TRUNCATE taken_mark"""

_REFRESH_SQL: Final = """
CALL {extension}.refresh_continuous_aggregate(%s::regclass, %s::timestamptz, %s::timestamptz, force => true)"""


async def refresh(connection: Connection, limit: int = BATCH) -> int:
    """Makes up to `limit` marked hours again; returns how many account-hours that were. One at a time: 0 where somebody
    else is at it. The connection must be in autocommit mode and in no transaction."""
    async with held_if_free(connection, REFRESHING) as alone:
        if not alone:
            return 0
        await connection.execute(_TAKEN_SQL)
        if not (await connection.execute(sql("native_take"), [limit])).rowcount:
            return 0
        for aggregate, width in WIDTHS.items():
            windows = await (await connection.execute(sql("native_windows"), {"width": width})).fetchall()
            for start, end in windows:
                await refresh_window(connection, aggregate, start, end)
        await _outlast_older_plans(connection)
        row = await (await connection.execute(sql("native_clean"))).fetchone()
        return row[0] if row else 0


async def _outlast_older_plans(connection: Connection) -> None:
    """Waits until no statement is under way that was planned before a new piece of an aggregate was there.

    A plan knows the pieces of its moment, and the statement's snapshot is taken after that: it would see that a mark is
    gone and not look where the hour is now. Every statement holds its aggregates from before it is planned. Raises
    psycopg.errors.LockNotAvailable where one takes too long; the marks are still there then.
    """
    if await (await connection.execute(sql("native_young"))).fetchone() != (True,):
        return
    for aggregate in WIDTHS:  # one at a time, so that nobody waits for us in a circle
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
            await connection.execute(f"LOCK TABLE {aggregate} IN ACCESS EXCLUSIVE MODE")


async def refresh_window(connection: Connection, aggregate: str, start: datetime, end: datetime) -> None:
    """Makes the buckets of `[start, end)` again, whether or not TimescaleDB thinks that they changed. Raises
    psycopg.errors.LockNotAvailable where somebody else is at them all the time."""
    statement = await called(connection, _REFRESH_SQL)
    for attempt in range(MAX_ATTEMPTS):
        try:
            await connection.execute(statement, [aggregate, start, end])
        except LockNotAvailable:
            if attempt + 1 == MAX_ATTEMPTS:
                raise
            await asyncio.sleep(FIRST_PAUSE * 2**attempt)
        except psycopg.errors.FeatureNotSupported as error:
            raise UserError(
                "the hours of this database are continuous aggregates, which the server no longer refreshes: run it"
                f" with TimescaleDB's community license (timescaledb.license = 'timescale'): {error}"
            ) from error
        else:
            return
