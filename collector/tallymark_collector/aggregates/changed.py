"""The audit beside the collector: only hours that were made again since it last looked, compared with their points.

Whoever makes an hour again leaves a row in `usage_unaudited` in the transaction that deletes its marks. Here those
rows are deleted in the transaction that compares: an hour is looked at once after each change, whatever dies in
between. What differs is written to `audit_finding` and marked, so that views take it from the points at once and the
refresher makes it again. Days are looked at in the same way (`usage_day_unaudited`), continuous aggregates' with their
hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from tallymark_collector.aggregates.audit import Difference
from tallymark_collector.store import Store, keeping
from tallymark_collector.store.database import Connection

BATCH: Final = 5000
"""Account-hours that one look takes on."""

CLOSED_AFTER: Final = timedelta(hours=1, minutes=5)
"""After an hour's start; before that it is still written to, and would be looked at again and again."""


def _take(waiting: str) -> str:
    """As (account, tenant, bucket)."""
    return f"""
WITH gone AS (
    DELETE FROM {waiting}
    WHERE ctid IN (SELECT ctid FROM {waiting} WHERE bucket < %s LIMIT %s FOR UPDATE SKIP LOCKED)
    RETURNING bucket, account, tenant
)
SELECT DISTINCT g.account, g.tenant, g.bucket
FROM gone g
WHERE g.bucket >= (SELECT points_from FROM usage_kept)"""  # noqa: S608 - a relation of ours


def _different(marks: str) -> str:
    """Buckets with marks are left out: no view takes them from the aggregate, and they will be here again when they
    have been made."""
    return f"""
SELECT tenant, account, bucket, meter, raw, aggregated
FROM (
    SELECT coalesce(r.tenant, c.tenant) AS tenant, coalesce(r.account, c.account) AS account,
           coalesce(r.bucket, c.bucket) AS bucket, coalesce(r.series, c.series) AS series,
           r.quantity AS raw, c.quantity AS aggregated
    FROM raw r
    FULL JOIN cached c ON c.account = r.account AND c.bucket = r.bucket AND c.series = r.series AND c.tenant = r.tenant
    WHERE r.quantity IS DISTINCT FROM c.quantity OR r.points IS DISTINCT FROM c.points
) d
LEFT JOIN usage_series s USING (account, series, tenant)
WHERE NOT EXISTS (
    SELECT FROM {marks} m WHERE m.account = d.account AND m.tenant = d.tenant AND m.bucket = d.bucket
)
ORDER BY tenant, account, bucket, meter"""  # noqa: S608 - a relation of ours


# A collector makes single account-hours again: those are compared.
_KEYS_SQL: Final = f"""
WITH keys AS MATERIALIZED (
    SELECT * FROM unnest(%(accounts)s::text[], %(tenants)s::text[], %(buckets)s::timestamptz[])
        AS k (account, tenant, bucket)
), raw AS (
    SELECT k.tenant, k.account, k.bucket, p.series, sum(p.quantity) AS quantity, count(*) AS points
    FROM keys k
    JOIN usage_point p
      ON p.account = k.account AND p.tenant = k.tenant
     AND p.time >= k.bucket AND p.time < k.bucket + interval '1 hour'
    GROUP BY 1, 2, 3, 4
), cached AS (
    SELECT h.tenant, h.account, h.bucket, h.series, h.quantity, h.points
    FROM keys k JOIN usage_hour h ON h.account = k.account AND h.bucket = k.bucket AND h.tenant = k.tenant
) {_different("usage_dirty")}"""  # noqa: S608 - constants of ours

# A continuous aggregate is made again for all accounts of an hour: all are compared.
_HOURS_SQL: Final = f"""
WITH keys AS MATERIALIZED (
    SELECT DISTINCT bucket FROM unnest(%(buckets)s::timestamptz[]) AS k (bucket)
), raw AS (
    SELECT p.tenant, p.account, k.bucket, p.series, sum(p.quantity) AS quantity, count(*) AS points
    FROM keys k JOIN usage_point p ON p.time >= k.bucket AND p.time < k.bucket + interval '1 hour'
    GROUP BY 1, 2, 3, 4
), cached AS (
    SELECT h.tenant, h.account, h.bucket, h.series, h.quantity, h.points
    FROM keys k JOIN usage_hour h ON h.bucket = k.bucket
) {_different("usage_dirty")}"""  # noqa: S608

# Days against their hours, which are compared with the points themselves; in the same two ways.
_KEYED_DAYS_SQL: Final = f"""
WITH keys AS MATERIALIZED (
    SELECT * FROM unnest(%(accounts)s::text[], %(tenants)s::text[], %(buckets)s::timestamptz[])
        AS k (account, tenant, bucket)
), raw AS (
    SELECT k.tenant, k.account, k.bucket, h.series, sum(h.quantity) AS quantity, sum(h.points) AS points
    FROM keys k
    JOIN usage_hour h
      ON h.account = k.account AND h.tenant = k.tenant
     AND h.bucket >= k.bucket AND h.bucket < k.bucket + interval '24 hours'
    GROUP BY 1, 2, 3, 4
), cached AS (
    SELECT y.tenant, y.account, y.bucket, y.series, y.quantity, y.points
    FROM keys k JOIN usage_day y ON y.account = k.account AND y.bucket = k.bucket AND y.tenant = k.tenant
) {_different("usage_day_marked")}"""  # noqa: S608

_DAYS_SQL: Final = f"""
WITH keys AS MATERIALIZED (
    SELECT DISTINCT date_bin('1 day', bucket, 'epoch') AS bucket FROM unnest(%(buckets)s::timestamptz[]) AS k (bucket)
), raw AS (
    SELECT h.tenant, h.account, k.bucket, h.series, sum(h.quantity) AS quantity, sum(h.points) AS points
    FROM keys k JOIN usage_hour h ON h.bucket >= k.bucket AND h.bucket < k.bucket + interval '24 hours'
    GROUP BY 1, 2, 3, 4
), cached AS (
    SELECT y.tenant, y.account, y.bucket, y.series, y.quantity, y.points
    FROM keys k JOIN usage_day y ON y.bucket = k.bucket
) {_different("usage_day_marked")}"""  # noqa: S608

_FINDING_SQL: Final = """
INSERT INTO audit_finding (tenant, account, bucket, meter, raw, aggregated, width)
SELECT * FROM unnest(%s::text[], %s::text[], %s::timestamptz[], %s::text[], %s::numeric[], %s::numeric[],
                     %s::interval[])"""


class Looked(NamedTuple):
    """What one look came to."""

    hours: int
    """Account-hours that were waiting for it."""
    differences: Sequence[Difference]
    """What was found; it has been marked, so views are right again and the refresher makes it right."""


async def audit_changed(store: Store, now: datetime, limit: int = BATCH) -> Looked:
    """Compares up to `limit` closed hours that were made again since the last look. Safe beside everybody else.

    Raises StoreUnavailable; then they are still waiting.
    """
    async with store.auditing() as connection:
        hours, days = [
            await (await connection.execute(_take(waiting), [now - CLOSED_AFTER, limit])).fetchall()
            for waiting in ("usage_unaudited", "usage_day_unaudited")
        ]
        if await keeping.is_native(connection):
            found = await _compare(connection, hours, {"hour": _HOURS_SQL, "day": _DAYS_SQL})
        else:
            found = await _compare(connection, hours, {"hour": _KEYS_SQL})
            found += await _compare(connection, days, {"day": _KEYED_DAYS_SQL})
        if found:
            columns = [list(column) for column in zip(*((*d[:6], f"1 {d.width}") for d in found), strict=True)]
            await connection.execute(_FINDING_SQL, columns)
            await store.mark_in(connection, {(d.bucket, d.account, d.tenant) for d in found})
        return Looked(len(hours), found)


async def _compare(
    connection: Connection, keys: Sequence[tuple[object, ...]], queries: Mapping[str, str]
) -> list[Difference]:
    """Differences of keys, as `_take` gives them, by the query for each width."""
    if not keys:
        return []
    accounts, tenants, buckets = ([*column] for column in zip(*keys, strict=True))
    found = []
    for width, query in queries.items():
        arguments = {"accounts": accounts, "tenants": tenants, "buckets": buckets}
        rows = await (await connection.execute(query, arguments)).fetchall()
        found += [Difference(*row)._replace(width=width) for row in rows]
    return found
