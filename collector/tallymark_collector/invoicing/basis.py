"""What a document stands on: a period's sums by points, by hours and by days, and a digest over its points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from tallymark_collector.billing.fields import OF_LEVELS
from tallymark_collector.billing.metered import Key
from tallymark_collector.billing.money import exact, plain
from tallymark_collector.billing.periods import Period
from tallymark_collector.billing.plans import Plan
from tallymark_collector.settings import SETTLED
from tallymark_collector.store.database import Connection
from tallymark_collector.store.keeping import dropped_before, levels_dropped_before

# A document stands on what was recorded until `SETTLED` before it, so what is recorded later can be told from what was
# billed. A point's `recorded_at` is when its transaction began, by the same clock.
_MOMENT_SQL: Final = "SELECT now(), now() - %s::interval"

_DAYS_SQL: Final = """
WITH bounds AS (
    SELECT date_bin('1 hour', %(start)s::timestamptz + interval '1 hour' - interval '1 microsecond', 'epoch')
               AS first_hour,
           date_bin('1 hour', %(end)s::timestamptz, 'epoch') AS last_hour
), pieces AS (
    SELECT h.bucket AS time, h.series, h.quantity, h.points
    FROM usage_hour_current h, bounds b
    WHERE h.account = %(account)s AND h.tenant = %(tenant)s AND h.bucket >= b.first_hour AND h.bucket < b.last_hour
    UNION ALL
    SELECT p.time, p.series, p.quantity, 1
    FROM usage_point p, bounds b
    WHERE p.account = %(account)s AND p.tenant = %(tenant)s
      AND p.time >= %(start)s AND p.time < least(b.first_hour, %(end)s)
    UNION ALL
    SELECT p.time, p.series, p.quantity, 1
    FROM usage_point p, bounds b
    WHERE p.account = %(account)s AND p.tenant = %(tenant)s
      AND p.time >= greatest(b.first_hour, b.last_hour) AND p.time < %(end)s
)
SELECT s.meter, s.unit, (p.time AT TIME ZONE 'UTC')::date, sum(p.quantity), sum(p.points)::bigint
FROM pieces p JOIN usage_series s ON s.account = %(account)s AND s.series = p.series
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"""

_BY_DAYS_SQL: Final = """
SELECT meter, unit, quantity, points FROM usage_by_period
WHERE tenant = %(tenant)s AND account = %(account)s AND period_start = %(start)s AND period_end = %(end)s"""

_BY_POINTS_SQL: Final = """
SELECT s.meter, s.unit, sum(p.quantity), count(*)
FROM usage_point p LEFT JOIN usage_series s ON s.account = p.account AND s.series = p.series
WHERE p.account = %(account)s AND p.tenant = %(tenant)s AND p.time >= %(start)s AND p.time < %(end)s
GROUP BY 1, 2"""

_ARRIVED_SQL: Final = """
SELECT (SELECT count(*) FROM usage_point WHERE account = %(account)s AND tenant = %(tenant)s
          AND time >= %(start)s AND time < %(end)s AND recorded_at > %(until)s)
     + (SELECT count(*) FROM usage_level WHERE account = %(account)s AND tenant = %(tenant)s
          AND time >= %(levels)s AND time < %(end)s AND recorded_at > %(until)s)"""


@dataclass(frozen=True, slots=True)
class Basis:
    """Of one account and period, at one moment."""

    document: dict[str, Any]
    """JSON-able: docs/invoices.md has the fields."""
    arriving: int
    """Points and levels that came within `SETTLED` of the moment."""
    dropped: datetime | None
    """Points before this have been dropped, and some of the period's were among them."""
    disagreeing: tuple[Key, ...]
    """Meters whose points, hours and days have not the same sum or number."""


async def basis(
    connection: Connection, tenant: str, account: str, period: Period, plan: Plan, settled: timedelta = SETTLED
) -> Basis:
    """What is stored of the period. The connection sees one moment."""
    moment, until = await (await connection.execute(_MOMENT_SQL, [settled])).fetchone() or (None, None)
    levels_from = period.start - _longest_held(plan)
    bounds = {
        "tenant": tenant,
        "account": account,
        "start": period.start,
        "end": period.end,
        "until": until,
        "levels": levels_from,
    }
    days = await (await connection.execute(_DAYS_SQL, bounds)).fetchall()
    by_hours = _added((row[:2], row[3], row[4]) for row in days)
    by_days = _added((row[:2], row[2], row[3]) for row in await _rows(connection, _BY_DAYS_SQL, bounds))
    by_points = _added((row[:2], row[2], row[3]) for row in await _rows(connection, _BY_POINTS_SQL, bounds))
    dropped = await dropped_before(connection, [period.start])
    [[arriving]] = await _rows(connection, _ARRIVED_SQL, bounds)
    points, digest = await digest_of(connection, "points", tenant, account, period.start, period.end, until)
    levels, levels_digest = await digest_of(connection, "levels", tenant, account, levels_from, period.end, until)
    told = [by_hours, by_days] if dropped is not None else [by_hours, by_days, by_points]
    keys = sorted({key for sums in told for key in sums}, key=lambda key: tuple(map(str, key)))
    return Basis(
        {
            "snapshot_at": _iso(moment),
            "recorded_until": _iso(until),
            "points": points if dropped is None else sum(count for _, count in by_hours.values()),
            "digest": digest if dropped is None else None,
            "points_dropped_before": None if dropped is None else _iso(dropped),
            "levels": levels,
            "levels_from": _iso(levels_from),
            "levels_dropped_before": _iso(await levels_dropped_before(connection, levels_from)),
            "levels_digest": levels_digest,
            "sums": [
                {
                    "meter": key[0],
                    "unit": key[1],
                    "points": by_hours.get(key, _NONE)[1],
                    "by_points": None if dropped is not None else plain(by_points.get(key, _NONE)[0]),
                    "by_hours": plain(by_hours.get(key, _NONE)[0]),
                    "by_days": plain(by_days.get(key, _NONE)[0]),
                }
                for key in keys
            ],
            "days": [
                {"day": day.isoformat(), "meter": meter, "unit": unit, "quantity": plain(quantity), "points": count}
                for meter, unit, day, quantity, count in days
            ],
        },
        int(arriving),
        dropped,
        tuple(key for key in keys if len({sums.get(key) for sums in told}) > 1),
    )


async def digest_of(
    connection: Connection, what: str, tenant: str, account: str, start: datetime, end: datetime, until: datetime | None
) -> tuple[int, str]:
    """How many points or levels of `[start, end)` were recorded until then, and the digest over them."""
    function = {"points": "invoice_points", "levels": "invoice_levels"}[what]
    rows = await _rows(
        connection,
        f"SELECT points, digest FROM {function}(%(tenant)s, %(account)s, %(start)s, %(end)s, %(until)s)",  # noqa: S608
        {"tenant": tenant, "account": account, "start": start, "end": end, "until": until},
    )
    return int(rows[0][0]), str(rows[0][1])


_NONE: Final = (Decimal(0), 0)


async def _rows(connection: Connection, statement: str, bounds: Mapping[str, object]) -> list[tuple[Any, ...]]:
    return await (await connection.execute(statement, bounds)).fetchall()


def _added(rows: Iterable[tuple[Key, Decimal, int]]) -> dict[Key, tuple[Decimal, int]]:
    found: dict[Key, tuple[Decimal, int]] = {}
    with exact():
        for key, quantity, points in rows:
            before = found.get(key, _NONE)
            found[key] = (before[0] + quantity, before[1] + points)
    return found


def _longest_held(plan: Plan) -> timedelta:
    """How long before a period a level may lie that holds into it."""
    held = [how.stale_after for how in plan.aggregations.values() if how.aggregation in OF_LEVELS]
    return timedelta(seconds=max(held, default=0))


def _iso(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat().replace("+00:00", "Z")
