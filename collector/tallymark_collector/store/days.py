"""Keeps usage_day equal to the hours, where the collector keeps both (the rules stand in the migration `days`).

Marks come from the database: whoever deletes an hour's marks leaves one of its day.
"""

from __future__ import annotations

from typing import Final

from tallymark_collector.store.database import Connection
from tallymark_collector.store.locks import lock_keys

BATCH: Final = 500
"""Account-days made again in one transaction; each holds one advisory lock."""

_LOCK_SPACE: Final = "tallymark.usage_day"

# The oldest marks first. Also days of which an hour waits, though they will have another mark when it has been made: a
# day that never rests would gather marks until midnight.
_TAKE_SQL: Final = """
SELECT DISTINCT account, tenant, bucket
FROM (SELECT account, tenant, bucket FROM usage_day_dirty LIMIT 20000) oldest
LIMIT %s"""

_CLEAN_SQL: Final = """
WITH gone AS (
    DELETE FROM usage_day_dirty d
    USING unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
    WHERE d.account = k.account AND d.tenant = k.tenant AND d.bucket = k.bucket
    RETURNING d.bucket, d.account, d.tenant
)
INSERT INTO usage_day_unaudited (bucket, account, tenant) SELECT DISTINCT bucket, account, tenant FROM gone"""

_FORGET_SQL: Final = """
DELETE FROM usage_day y
USING unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
WHERE y.account = k.account AND y.tenant = k.tenant AND y.bucket = k.bucket"""

_SUM_SQL: Final = """
INSERT INTO usage_day (bucket, series, account, tenant, quantity, points)
SELECT k.bucket, h.series, k.account, k.tenant, sum(h.quantity), sum(h.points)
FROM unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
CROSS JOIN LATERAL (
    SELECT series, quantity, points FROM usage_hour
    WHERE account = k.account AND tenant = k.tenant
      AND bucket >= k.bucket AND bucket < k.bucket + interval '24 hours'
    OFFSET 0
) h
GROUP BY k.bucket, h.series, k.account, k.tenant"""


async def refresh(connection: Connection, limit: int = BATCH) -> int:
    """Makes up to `limit` account-days again that have marks; returns how many. Safe beside writers and refreshers.

    Each statement is one of its own at READ COMMITTED: the sums must see the hours of every mark that was deleted.
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
        await connection.execute(_SUM_SQL, columns)
        return len(keys)
