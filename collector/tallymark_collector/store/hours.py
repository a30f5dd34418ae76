"""Keeps usage_hour equal to the points (the rules stand in sql/0002_aggregates.sql)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final

from tallymark_collector.store import buckets
from tallymark_collector.store.buckets import Buckets
from tallymark_collector.store.database import Connection

BATCH: Final = 500
"""Account-hours recomputed in one transaction; each holds one advisory lock, of some thousands that a server has."""

_MARK_SQL: Final = """
INSERT INTO usage_dirty (bucket, account, tenant)
SELECT * FROM unnest(%s::timestamptz[], %s::text[], %s::text[])"""

# OFFSET 0: the points of one hour after the other are looked up. Left to itself, the planner read all points of an
# account for each of its hours: 11 s for 500 of 15 accounts with a million points, where this takes half a second.
_RECOMPUTE_SQL: Final = """
INSERT INTO usage_hour (bucket, series, account, tenant, quantity, points)
SELECT k.bucket, p.series, k.account, k.tenant, sum(p.quantity), count(*)
FROM unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
CROSS JOIN LATERAL (
    SELECT series, quantity FROM usage_point
    WHERE account = k.account AND tenant = k.tenant AND time >= k.bucket AND time < k.bucket + interval '1 hour'
    OFFSET 0
) p
GROUP BY k.bucket, p.series, k.account, k.tenant"""

_HOURS: Final = Buckets("usage_hour", "usage_dirty", "usage_unaudited", _RECOMPUTE_SQL)


async def mark(connection: Connection, keys: Iterable[tuple[datetime, str, str]]) -> None:
    """Says that (bucket, account, tenant) have to be recomputed; until then the views take them from the points."""
    columns = [list(column) for column in zip(*sorted(keys), strict=True)]
    if columns:
        await connection.execute(_MARK_SQL, columns)


async def refresh(connection: Connection, limit: int = BATCH) -> int:
    """Recomputes up to `limit` account-hours that have marks; returns how many."""
    return await buckets.refresh(connection, _HOURS, limit)
