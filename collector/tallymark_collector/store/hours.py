"""Keeps usage_hour equal to the points (the rules stand in sql/0002_aggregates.sql)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final

from tallymark_collector.store.database import Connection
from tallymark_collector.store.locks import lock_keys

BATCH: Final = 500
"""Account-hours recomputed in one transaction; each holds one advisory lock, of some thousands that a server has."""

_LOCK_SPACE: Final = "tallymark.usage_hour"

_MARK_SQL: Final = """
INSERT INTO usage_dirty (bucket, account, tenant)
SELECT * FROM unnest(%s::timestamptz[], %s::text[], %s::text[])"""

# The oldest marks first (a heap is read in the order in which it was written), so that an account that never rests
# cannot keep the others waiting.
_TAKE_SQL: Final = """
SELECT DISTINCT account, tenant, bucket
FROM (SELECT account, tenant, bucket FROM usage_dirty LIMIT 20000) oldest
LIMIT %s"""

_CLEAN_SQL: Final = """
WITH gone AS (
    DELETE FROM usage_dirty d
    USING unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
    WHERE d.account = k.account AND d.tenant = k.tenant AND d.bucket = k.bucket
    RETURNING d.bucket, d.account, d.tenant
)
INSERT INTO usage_unaudited (bucket, account, tenant) SELECT DISTINCT bucket, account, tenant FROM gone"""

_FORGET_SQL: Final = """
DELETE FROM usage_hour h
USING unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
WHERE h.account = k.account AND h.tenant = k.tenant AND h.bucket = k.bucket"""

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


async def mark(connection: Connection, keys: Iterable[tuple[datetime, str, str]]) -> None:
    """Says that (bucket, account, tenant) have to be recomputed; until then the views take them from the points."""
    columns = [list(column) for column in zip(*sorted(keys), strict=True)]
    if columns:
        await connection.execute(_MARK_SQL, columns)


async def refresh(connection: Connection, limit: int = BATCH) -> int:
    """Recomputes up to `limit` account-hours that have marks; returns how many. Safe beside writers and refreshers.

    Each statement is one of its own at READ COMMITTED: the recomputation must see what the deletion saw, and later.
    """
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        keys = await (await connection.execute(_TAKE_SQL, [limit])).fetchall()
        if not keys:
            return 0
        columns = [list(column) for column in zip(*keys, strict=True)]
        await lock_keys(connection, _LOCK_SPACE, columns)
        await connection.execute(_CLEAN_SQL, columns)
        await connection.execute(_FORGET_SQL, columns)
        await connection.execute(_RECOMPUTE_SQL, columns)
        return len(keys)
