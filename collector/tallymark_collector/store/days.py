"""Keeps usage_day equal to the hours, where the collector keeps both (the rules stand in the migration `days`).

Marks come from the database: whoever deletes an hour's marks leaves one of its day.
"""

from __future__ import annotations

from typing import Final

from tallymark_collector.store import buckets
from tallymark_collector.store.buckets import Buckets
from tallymark_collector.store.database import Connection

BATCH: Final = 500
"""Account-days made again in one transaction; each holds one advisory lock."""

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

# Also days of which an hour waits, though they will have another mark when it has been made: a day that never rests
# would gather marks until midnight.
_DAYS: Final = Buckets("usage_day", "usage_day_dirty", "usage_day_unaudited", _SUM_SQL)


async def refresh(connection: Connection, limit: int = BATCH) -> int:
    """Makes up to `limit` account-days again that have marks; returns how many."""
    return await buckets.refresh(connection, _DAYS, limit)
