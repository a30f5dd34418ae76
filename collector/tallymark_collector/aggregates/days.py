"""The days of the views against the points."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final

from tallymark_collector.aggregates.audit import Difference, Report
from tallymark_collector.store.database import Connection

# A day whose first points have been dropped has no sum to compare with; neither has a day at the edge of the range.
_COMPARE_SQL: Final = """
WITH bounds AS (
    SELECT date_bin(
               '1 day', greatest(%(start)s, points_from) + interval '1 day' - interval '1 microsecond', 'epoch'
           ) AS first,
           date_bin('1 day', %(end)s::timestamptz, 'epoch') AS until
    FROM (SELECT CASE WHEN points_from = '-infinity' THEN 'epoch' ELSE points_from END AS points_from FROM usage_kept) k
), raw AS (
    SELECT p.tenant, p.account, s.meter, date_trunc('day', p.time, 'UTC') AS bucket,
           sum(p.quantity) AS quantity, count(*) AS points
    FROM usage_point p
    LEFT JOIN usage_series s ON s.account = p.account AND s.series = p.series
    WHERE (%(tenant)s::text IS NULL OR p.tenant = %(tenant)s)
      AND (%(account)s::text IS NULL OR p.account = %(account)s)
      AND p.time >= (SELECT first FROM bounds) AND p.time < (SELECT until FROM bounds)
    GROUP BY 1, 2, 3, 4
), days AS (
    SELECT tenant, account, meter, bucket, sum(quantity) AS quantity, sum(points) AS points
    FROM usage_daily
    WHERE (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
      AND (%(account)s::text IS NULL OR account = %(account)s)
      AND bucket >= (SELECT first FROM bounds) AND bucket < (SELECT until FROM bounds)
    GROUP BY 1, 2, 3, 4
)
SELECT tenant, account, bucket, meter, raw.quantity, days.quantity
FROM raw FULL JOIN days USING (tenant, account, meter, bucket)
WHERE meter IS NOT NULL AND (raw.quantity IS DISTINCT FROM days.quantity OR raw.points IS DISTINCT FROM days.points)
ORDER BY 1, 2, 3, 4"""


async def with_days(
    connection: Connection,
    report: Report,
    *,
    tenant: str | None = None,
    account: str | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
) -> Report:
    """The report with the days that differ from their points, less those of which an hour differs already. The
    connection is the report's."""
    bounds = {"tenant": tenant, "account": account, "start": start or "epoch", "end": end or "9999-12-31"}
    rows = await (await connection.execute(_COMPARE_SQL, bounds)).fetchall()
    known = {(found.tenant, found.account, found.bucket.date()) for found in report.differences}
    days = [Difference(*row)._replace(width="day") for row in rows if (row[0], row[1], row[2].date()) not in known]
    return replace(report, differences=[*report.differences, *days])
