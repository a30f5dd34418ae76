"""Raw points are the truth. The audit compares everything that is derived from them, by queries of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, NamedTuple

from tallymark_collector.processors.temporality import COARSE_CLOCKS, SDK_LANGUAGE
from tallymark_collector.store.database import Connection

MAX_OVERLAPS: Final = 1000
"""Overlaps that one report lists; that there are more is said."""


class Difference(NamedTuple):
    """An account-hour whose cached sum is not the sum of its points."""

    tenant: str
    account: str
    bucket: datetime
    meter: str | None
    """None where the points name a series that the dictionary lacks."""
    raw: Decimal | None
    """The points' sum; None where there is no point."""
    aggregated: Decimal | None
    """What the views say; None where they say nothing."""
    width: str = "hour"
    """Of the bucket: `hour` or `day`."""


class Drift(NamedTuple):
    """A cumulative stream whose increases are not what its totals say."""

    tenant: str
    account: str
    stream: str
    billed: Decimal
    sampled: Decimal


class Overlap(NamedTuple):
    """Two intervals of one delta stream that cover the same time: two writers under one name."""

    tenant: str
    account: str
    stream: str
    start: datetime
    end: datetime
    previous_end: datetime


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit looked at and what it found."""

    hours: int
    """Account-hours and series compared."""
    points: int
    differences: Sequence[Difference]
    drifts: Sequence[Drift]
    overlaps: Sequence[Overlap]

    @property
    def clean(self) -> bool:
        """True if nothing was found."""
        return not (self.differences or self.drifts or self.overlaps)


_COMPARE_SQL: Final = """
WITH raw AS (
    SELECT tenant, account, series, date_trunc('hour', time, 'UTC') AS bucket,
           sum(quantity) AS quantity, count(*) AS points
    FROM usage_point
    WHERE (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
      AND (%(account)s::text IS NULL OR account = %(account)s)
      AND time >= greatest(%(start)s, (SELECT points_from FROM usage_kept)) AND time < %(end)s
    GROUP BY 1, 2, 3, 4
), cached AS (
    SELECT h.tenant, h.account, h.series, h.bucket, h.quantity, h.points, s.meter
    FROM usage_hour_current h
    JOIN usage_series s ON s.account = h.account AND s.series = h.series AND s.tenant = h.tenant
    WHERE (%(tenant)s::text IS NULL OR h.tenant = %(tenant)s)
      AND (%(account)s::text IS NULL OR h.account = %(account)s)
      AND h.bucket >= greatest(%(start)s, (SELECT points_from FROM usage_kept)) AND h.bucket < %(end)s
), compared AS (
    SELECT tenant, account, bucket, cached.meter, raw.quantity AS raw, cached.quantity AS aggregated,
           raw.points AS points, cached.points AS cached_points
    FROM raw FULL JOIN cached USING (tenant, account, series, bucket)
)
SELECT tenant, account, bucket, meter, raw, aggregated, hours, points
FROM (SELECT count(*) AS hours, coalesce(sum(points), 0)::bigint AS points FROM compared) AS counted
LEFT JOIN (
    SELECT tenant, account, bucket, meter, raw, aggregated FROM compared
    WHERE raw IS DISTINCT FROM aggregated OR points IS DISTINCT FROM cached_points
) AS different ON true
ORDER BY tenant, account, bucket, meter"""

_DRIFT_SQL: Final = """
WITH stepped AS (
    SELECT account, stream, start_ns, time_ns, value, source, series, coalesce(since_ns, 0) AS since_ns,
           -- What was measured, times this total's factor: its digits are finite, and fewer than these.
           CASE WHEN factor = lag(factor) OVER w OR factor IS NULL THEN lag(value) OVER w
                ELSE round(lag(value) OVER w * factor, 200) / lag(factor) OVER w END AS before,
           lag(time_ns) OVER w AS before_ns, coalesce(lag(since_ns) OVER w, 0) AS before_since_ns
    FROM usage_sample
    WHERE %(account)s::text IS NULL OR account = %(account)s
       OR source IN (SELECT source FROM usage_sample WHERE account = %(account)s AND source IS NOT NULL)
    -- Whoever is billed for it, a source counts as one.
    WINDOW w AS (
        PARTITION BY CASE WHEN source IS NULL THEN account END, coalesce(source, stream), source IS NULL, start_ns
        ORDER BY time_ns
    )
), kept AS (
    SELECT points_from, (extract(epoch FROM greatest(points_from, 'epoch')) * 1e9)::bigint AS from_ns FROM usage_kept
), sampled AS (
    SELECT account, stream, sum(
        CASE WHEN time_ns <= since_ns OR before_ns <= since_ns AND before_since_ns <> since_ns THEN 0
             WHEN before IS NULL AND (start_ns = 0 OR start_ns < since_ns OR start_ns = time_ns AND NOT EXISTS (
                 -- Their clocks are too coarse to tell a start from a total: see processors/temporality.py.
                 SELECT FROM usage_stream j WHERE j.account = stepped.account AND j.stream = stepped.stream
                   AND j.resource ->> %(language)s = ANY (%(coarse)s::text[])
             )) THEN 0
             WHEN before IS NULL THEN value
             WHEN start_ns = 0 AND value < before THEN value
             ELSE value - before END) AS quantity
    FROM stepped
    WHERE time_ns >= (SELECT from_ns FROM kept) AND (source IS NULL OR series IS NOT NULL)
      AND (%(account)s::text IS NULL OR account = %(account)s)
    GROUP BY account, stream
), billed AS (
    SELECT p.account, p.stream, sum(p.quantity) AS quantity
    FROM usage_point p
    JOIN usage_stream s ON s.account = p.account AND s.stream = p.stream AND s.temporality = 2
    WHERE (%(account)s::text IS NULL OR p.account = %(account)s) AND p.time >= (SELECT points_from FROM kept)
    GROUP BY p.account, p.stream
)
SELECT s.tenant, s.account, s.stream::text, coalesce(billed.quantity, 0), coalesce(sampled.quantity, 0)
FROM (sampled FULL JOIN billed USING (account, stream))
JOIN usage_stream s USING (account, stream)
WHERE coalesce(billed.quantity, 0) <> coalesce(sampled.quantity, 0)
  AND (%(tenant)s::text IS NULL OR s.tenant = %(tenant)s)
ORDER BY 1, 2, 3"""

_OVERLAP_SQL: Final = f"""
SELECT tenant, account, stream::text, start_time, time, previous
FROM (
    SELECT p.tenant, p.account, p.stream, p.start_time, p.time,
           max(p.time) OVER (
               PARTITION BY p.account, p.stream ORDER BY p.start_time, p.time
               ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ) AS previous
    FROM usage_point p
    JOIN usage_stream s ON s.account = p.account AND s.stream = p.stream AND s.temporality = 1
    WHERE (%(tenant)s::text IS NULL OR p.tenant = %(tenant)s)
      AND (%(account)s::text IS NULL OR p.account = %(account)s)
      AND p.time >= %(start)s AND p.time < %(end)s
) ordered
WHERE start_time < previous
ORDER BY tenant, account, stream, start_time
LIMIT {MAX_OVERLAPS}"""  # noqa: S608 - a constant of ours


async def audit(
    connection: Connection,
    *,
    tenant: str | None = None,
    account: str | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
) -> Report:
    """Compares the views with the points, cumulative increases with their totals, and looks for overlaps; of all
    tenants, or of one.

    `start` and `end` bound the hours (by whole hours, `[start, end)`); totals of cumulative streams are compared over
    all time. What is older than the points that are kept is left out. The connection must be a `store.reading()`: all
    queries have to see the same moment.
    """
    bounds = {"tenant": tenant, "account": account, "start": start or "-infinity", "end": end or "infinity"}
    rows = await (await connection.execute(_COMPARE_SQL, bounds)).fetchall()
    differences = [Difference(*row[:6]) for row in rows if row[0] is not None]
    clocks = {"language": SDK_LANGUAGE, "coarse": [*COARSE_CLOCKS]}
    drifts = [Drift(*row) for row in await (await connection.execute(_DRIFT_SQL, bounds | clocks)).fetchall()]
    overlaps = [Overlap(*row) for row in await (await connection.execute(_OVERLAP_SQL, bounds)).fetchall()]
    return Report(rows[0][6], rows[0][7], differences, drifts, overlaps)
