"""Usage between two instants by any dimensions: from days and hours that are kept, pieces of hours from the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Final

from tallymark_collector.errors import UserError
from tallymark_collector.query import pages
from tallymark_collector.query.pages import Key, Page
from tallymark_collector.settings import SETTLED
from tallymark_collector.store.database import Connection
from tallymark_collector.store.keeping import dropped_before

DIMENSIONS: Final = {
    "account": "u.account",
    "meter": "s.meter",
    "unit": "s.unit",
    "plan": "s.plan",
    "route": "s.route",
    "method": "s.method",
    "status": "s.status_code",
    "error": "s.error_type",
    "hour": "u.bucket",
    "day": "date_bin('1 day', u.bucket, 'epoch')",
}
"""What usage can be grouped by, and the column behind it."""

_ALWAYS: Final = ("meter", "unit")
"""Quantities of different meters or units cannot be added."""

_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_FIRST: Final = datetime(1, 1, 2, tzinfo=timezone.utc)
_LAST: Final = datetime(9999, 12, 31, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class Usage:
    """Rows of usage, each as long as `columns`; the last two are `quantity` (exact) and `points`."""

    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    last: Key | None = None
    """The last row's key, where a page was asked for and more follow."""

    def total(self) -> Decimal:
        """Sum of the quantities, whatever they count."""
        return sum((row[-2] for row in self.rows if isinstance(row[-2], Decimal)), Decimal(0))


async def usage(
    connection: Connection,
    *,
    tenant: str,
    by: Sequence[str] = ("account", "meter"),
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
    meter: str | None = None,
    as_of: datetime | None = None,
    settled: timedelta = SETTLED,
    page: Page | None = None,
) -> Usage:
    """Usage of `[start, end)` (aware datetimes; None is unbounded), grouped by names of `DIMENSIONS`.

    Meter and unit are always among the columns. `as_of`: only what was recorded until then, summed from the points
    themselves, to which rows are only ever added. `page`: that part alone. Raises UserError for an unknown name, a
    naive or a reversed range; for an `as_of` that is not `settled` ago, and where points of the range have been dropped
    since.
    """
    columns = columns_of(by)
    whole, edges = split(start or _FIRST, end or _LAST)
    days, hours = ((whole[0], whole[0]), [whole]) if "hour" in by else split_hours(*whole)
    if as_of is None:
        await _check_kept(connection, edges)
    else:
        days, hours, edges = (whole[0], whole[0]), [], [(start or _FIRST, end or _LAST)]
        await _check_past(connection, as_of, edges[0], settled)
    groups = ", ".join(DIMENSIONS[name] for name in columns)
    names = ", ".join(f'{DIMENSIONS[name]} AS "{name}"' for name in columns)
    key = pages.key_sql({name: DIMENSIONS[name] for name in columns})
    order = key if page is not None else ", ".join(f"{DIMENSIONS[name]} NULLS FIRST" for name in columns)
    rows, more = await pages.rows(
        connection,
        page,
        f"""
            SELECT {names}, sum(u.quantity) AS quantity, sum(u.points)::bigint AS points
            FROM (
                SELECT account, bucket, series, quantity, points FROM usage_day_current
                WHERE tenant = %(tenant)s AND (%(account)s::text IS NULL OR account = %(account)s)
                  AND bucket >= %(day_start)s AND bucket < %(day_end)s
                UNION ALL
                SELECT h.account, h.bucket, h.series, h.quantity, h.points
                FROM unnest(%(hour_starts)s::timestamptz[], %(hour_ends)s::timestamptz[]) AS e (starts, ends)
                JOIN usage_hour_current h ON h.bucket >= e.starts AND h.bucket < e.ends
                WHERE h.tenant = %(tenant)s AND (%(account)s::text IS NULL OR h.account = %(account)s)
                UNION ALL
                SELECT p.account, date_bin('1 hour', p.time, 'epoch'), p.series, p.quantity, 1
                FROM unnest(%(edge_starts)s::timestamptz[], %(edge_ends)s::timestamptz[]) AS e (starts, ends)
                JOIN usage_point p ON p.time >= e.starts AND p.time < e.ends
                WHERE p.tenant = %(tenant)s AND (%(account)s::text IS NULL OR p.account = %(account)s)
                  AND (%(as_of)s::timestamptz IS NULL OR p.recorded_at <= %(as_of)s)
            ) u
            JOIN usage_series s ON s.account = u.account AND s.series = u.series
            WHERE %(meter)s::text IS NULL OR s.meter = %(meter)s
            GROUP BY {groups}
            HAVING {pages.AFTER_SQL.format(key=key)}
            ORDER BY {order}
            LIMIT %(limit)s
            """,  # noqa: S608 - names come from DIMENSIONS
        {
            "tenant": tenant,
            "account": account,
            "meter": meter,
            "as_of": as_of,
            "day_start": days[0],
            "day_end": days[1],
            "hour_starts": [part[0] for part in hours],
            "hour_ends": [part[1] for part in hours],
            "edge_starts": [edge[0] for edge in edges],
            "edge_ends": [edge[1] for edge in edges],
            **pages.arguments(page),
        },
    )
    last = pages.key(rows[-1][: len(columns)]) if more else None
    return Usage((*columns, "quantity", "points"), rows, last)


def columns_of(by: Sequence[str]) -> tuple[str, ...]:
    """What rows that are grouped so begin with. Raises UserError for an unknown name."""
    if unknown := [name for name in by if name not in DIMENSIONS]:
        raise UserError(f"cannot group by {', '.join(unknown)[:200]}: choose from {', '.join(DIMENSIONS)}")
    return tuple(dict.fromkeys([*by, *_ALWAYS]))


Span = tuple[datetime, datetime]


async def _check_past(connection: Connection, as_of: datetime, span: Span, settled: timedelta) -> None:
    """A point is dated by the beginning of its transaction, and there may be some under way."""
    _check_zone(as_of)
    [latest] = await (await connection.execute("SELECT now() - %s", [settled])).fetchone() or (as_of,)
    if as_of > latest:
        raise UserError(
            f"what was recorded until {as_of.isoformat()} may still change: transactions of that time can be under way"
            f" for {settled.seconds} s. Ask as of {latest.isoformat(timespec='seconds')} or before"
        )
    first = await dropped_before(connection, [span[0]])
    if first is not None:
        raise UserError(
            f"points before {first.isoformat()} have been dropped, and hours do not tell what was recorded when:"
            " begin the range there, or later"
        )


async def _check_kept(connection: Connection, edges: Sequence[Span]) -> None:
    """Pieces of hours are summed from points: where those have been dropped the sum would be too small."""
    dropped = await dropped_before(connection, [start for start, _ in edges])
    if dropped is not None:
        raise UserError(
            f"points before {dropped.isoformat()} have been dropped, and what is left of their time is whole hours:"
            " begin and end a range there on a whole hour (UTC)"
        )


def _check_zone(instant: datetime) -> None:
    if instant.tzinfo is None:
        raise UserError(f"{instant.isoformat()} has no time zone: add 'Z' or an offset such as '+02:00'")


def split(start: datetime, end: datetime) -> tuple[Span, list[Span]]:
    """`[start, end)` as a range of whole UTC hours and the pieces of hours beside it. Raises UserError."""
    for instant in (start, end):
        _check_zone(instant)
    if end < start:
        raise UserError(f"the range ends ({end.isoformat()}) before it starts ({start.isoformat()})")
    return _split(start, end, _HOUR)


def split_hours(start: datetime, end: datetime) -> tuple[Span, list[Span]]:
    """`[start, end)` of whole hours as a range of whole UTC days and the hours beside it."""
    return _split(start, end, _DAY)


def hour_until(instant: datetime) -> datetime:
    """The last whole UTC hour that begins at or before the instant."""
    return _until(instant, _HOUR)


def hour_from(instant: datetime) -> datetime:
    """The first whole UTC hour that begins at or after the instant."""
    return _from(instant, _HOUR)


def _split(start: datetime, end: datetime, width: timedelta) -> tuple[Span, list[Span]]:
    first, last = _from(start, width), _until(end, width)
    if first > last:
        return (last, last), [(start, end)]
    return (first, last), [edge for edge in ((start, first), (last, end)) if edge[0] < edge[1]]


def _until(instant: datetime, width: timedelta) -> datetime:
    return (instant - _EPOCH) // width * width + _EPOCH


def _from(instant: datetime, width: timedelta) -> datetime:
    return -(-(instant - _EPOCH) // width) * width + _EPOCH
