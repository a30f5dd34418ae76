"""Dropping points, one piece of their table at a time, the oldest first.

What takes long is done while everybody writes: the piece is compared with its hours and days, and the pieces of hours
at the ends of billing periods are summed. Meanwhile no hour is made again (`REFRESHING`), so whatever is written into
the piece, or was on its way, has left a mark when writers are stopped at last. Then there is nothing to do but to see
that there is none, nor a new item of the quarantine that could be billed (`unsettled`), to say from when points are
kept, and to drop.

A reader may hold the piece for as long as it likes. Writers wait for us no longer than `stopping.STOPPED`; then they go
on, and we try again with what was compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from tallymark_collector.aggregates.stopping import TOO_LONG, Stopping
from tallymark_collector.aggregates.unfinalized import WAITING_SQL
from tallymark_collector.aggregates.unsettled import opened_since, with_unsettled
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines.capabilities import called
from tallymark_collector.store.locks import KEPT, REFRESHING, TAKEN_SQL, held

DROP_SQL: Final = "SELECT {extension}.drop_chunks(%s::regclass, older_than => %s::timestamptz)"

LOCK_PAUSES: Final = (5.0, 15.0)
"""Seconds between tries to stop writers for a piece that has been compared. No hour is made again meanwhile."""

# The end of the oldest piece, where nobody needs it. A period's first hour may begin before the period does.
_OLDEST_SQL: Final = f"""
SELECT min(c.range_end)
FROM timescaledb_information.chunks c
WHERE c.hypertable_schema = 'tallymark' AND c.hypertable_name = 'usage_point'
  AND c.range_end > (SELECT points_from FROM usage_kept)
  AND c.range_end = date_bin('1 hour', c.range_end, 'epoch')
  AND c.range_end <= least(
      %(wanted)s::timestamptz,
      (SELECT date_bin('1 hour', min(period_start), 'epoch') FROM billing_period WHERE period_end > %(billed)s),
      (SELECT date_bin('1 hour', min(period_start), 'epoch') FROM ({WAITING_SQL}) w WHERE %(keep_unfinalized)s),
      date_bin('1 hour', %(unsettled)s::timestamptz, 'epoch'),
      (SELECT min(bucket) FROM usage_dirty),
      (SELECT min(bucket) FROM usage_day_dirty),
      (SELECT min(bucket) FROM usage_unaudited),
      (SELECT min(bucket) FROM usage_day_unaudited)
  )"""  # noqa: S608 - a constant of ours

# Before the snapshot: see `store._HOLD_SQL`.
_HOLD_SQL: Final = "LOCK TABLE usage_daily IN ACCESS SHARE MODE"

# A day may begin in a piece that was dropped before: of that part there are the hours, which were compared then.
_DIFFERENT_SQL: Final = """
WITH bounds AS (
    SELECT points_from, date_bin('1 day', %(cut)s::timestamptz, 'epoch') AS last_day,
           CASE WHEN points_from = '-infinity' THEN points_from
                ELSE date_bin('1 day', points_from, 'epoch') END AS first_day
    FROM usage_kept
), raw AS (
    SELECT tenant, account, series, date_trunc('hour', time, 'UTC') AS bucket,
           sum(quantity) AS quantity, count(*) AS points
    FROM usage_point WHERE time < %(cut)s
    GROUP BY 1, 2, 3, 4
), cached AS (
    SELECT tenant, account, series, bucket, quantity, points FROM usage_hour
    WHERE bucket >= (SELECT points_from FROM bounds) AND bucket < %(cut)s
), raw_day AS (
    SELECT tenant, account, series, date_bin('1 day', bucket, 'epoch') AS bucket,
           sum(quantity) AS quantity, sum(points) AS points
    FROM (
        SELECT tenant, account, series, bucket, quantity, points FROM raw
        WHERE bucket < (SELECT last_day FROM bounds)
        UNION ALL
        SELECT tenant, account, series, bucket, quantity, points FROM usage_hour
        WHERE bucket >= (SELECT first_day FROM bounds) AND bucket < (SELECT points_from FROM bounds)
    ) hours
    GROUP BY 1, 2, 3, 4
), cached_day AS (
    SELECT tenant, account, series, bucket, quantity, points FROM usage_day
    WHERE bucket >= (SELECT first_day FROM bounds) AND bucket < (SELECT last_day FROM bounds)
)
INSERT INTO usage_dirty (bucket, account, tenant)
SELECT bucket, account, tenant
FROM raw FULL JOIN cached USING (tenant, account, series, bucket)
WHERE raw.quantity IS DISTINCT FROM cached.quantity OR raw.points IS DISTINCT FROM cached.points
UNION
SELECT greatest(bucket, (SELECT points_from FROM bounds)), account, tenant
FROM raw_day r FULL JOIN cached_day c USING (tenant, account, series, bucket)
WHERE r.quantity IS DISTINCT FROM c.quantity OR r.points IS DISTINCT FROM c.points"""

_FORGET_EDGES_SQL: Final = "DELETE FROM usage_edge WHERE starts >= (SELECT points_from FROM usage_kept)"

# As the view usage_by_period cuts them.
_EDGES_SQL: Final = """
INSERT INTO usage_edge (starts, ends, account, tenant, series, quantity, points)
SELECT e.starts, e.ends, e.account, e.tenant,
       coalesce(array_agg(p.series ORDER BY p.series) FILTER (WHERE p.series IS NOT NULL), '{}'),
       coalesce(array_agg(p.quantity ORDER BY p.series) FILTER (WHERE p.series IS NOT NULL), '{}'),
       coalesce(array_agg(p.points ORDER BY p.series) FILTER (WHERE p.series IS NOT NULL), '{}')
FROM (
    SELECT b.account, b.tenant, x.starts, x.ends
    FROM billing_period b
    CROSS JOIN LATERAL (
        SELECT date_bin('1 hour', b.period_start + interval '1 hour' - interval '1 microsecond', 'epoch') AS first_hour,
               date_bin('1 hour', b.period_end, 'epoch') AS last_hour
    ) h
    CROSS JOIN LATERAL (
        VALUES (b.period_start, least(h.first_hour, b.period_end)),
               (greatest(h.first_hour, h.last_hour), b.period_end)
    ) x (starts, ends)
    WHERE x.starts < x.ends AND x.starts >= (SELECT points_from FROM usage_kept) AND x.starts < %(cut)s
    GROUP BY 1, 2, 3, 4
) e
LEFT JOIN LATERAL (
    SELECT p.series, sum(p.quantity) AS quantity, count(*) AS points
    FROM usage_point p
    WHERE p.account = e.account AND p.tenant = e.tenant AND p.time >= e.starts AND p.time < e.ends
    GROUP BY p.series
) p ON true
GROUP BY 1, 2, 3, 4"""

_TOUCHED_SQL: Final = """
SELECT EXISTS (SELECT FROM usage_dirty WHERE bucket < %(cut)s)
    OR EXISTS (SELECT FROM usage_day_dirty WHERE bucket < %(cut)s)
    OR EXISTS (SELECT FROM usage_unaudited WHERE bucket < %(cut)s)
    OR EXISTS (SELECT FROM usage_day_unaudited WHERE bucket < %(cut)s)"""


class Step(NamedTuple):
    """What became of the oldest piece."""

    until: datetime | None = None
    """Points before this are gone now; None: nothing was dropped."""
    differing: int = 0
    """Account-hours that did not say what their points say."""


async def drop_oldest(
    connection: Connection, wanted: datetime, asked: Mapping[str, object], pauses: Sequence[float]
) -> Step:
    """Drops the oldest piece where nobody needs it. The connection must be in autocommit mode and in no transaction.

    Raises one of `TOO_LONG` where readers or writers held it each time, or it took too long.
    """
    async with held(connection, REFRESHING):
        bounds = await with_unsettled(connection, asked, wanted)
        [until] = await (await connection.execute(_OLDEST_SQL, bounds)).fetchone() or [None]
        if until is None:
            return Step()
        async with connection.transaction():
            await connection.execute(_HOLD_SQL)
            if differing := (await connection.execute(_DIFFERENT_SQL, {"cut": until})).rowcount:
                return Step(differing=differing)
            await connection.execute(_FORGET_EDGES_SQL)
            await connection.execute(_EDGES_SQL, {"cut": until})
        for pause in pauses:
            try:
                return Step(until if await _drop(connection, bounds, until) else None)
            except TOO_LONG:
                await asyncio.sleep(pause)
        return Step(until if await _drop(connection, bounds, until) else None)


async def _drop(connection: Connection, bounds: Mapping[str, object], until: datetime) -> bool:
    """False where something was written into the piece since it was compared, or waits to be: it stays, for another
    time."""
    async with connection.transaction():
        stopping = Stopping(connection)
        # In the order of writers, who take the points before their marks. From the second one on nobody can add a mark,
        # so nobody who looked before can commit a point; each looks at usage_kept when we are done. Nor does anybody
        # look at a piece that is about to go, also not with a snapshot from before.
        await stopping.execute("LOCK TABLE ONLY usage_point")
        await stopping.execute(TAKEN_SQL, [KEPT])
        if await (await stopping.execute(_TOUCHED_SQL, {"cut": until})).fetchone() != (False,):
            return False
        if await opened_since(stopping.execute, bounds, until):
            return False
        await stopping.execute("UPDATE usage_kept SET points_from = %s", [until])
        await stopping.execute(await called(connection, DROP_SQL), ["usage_point", until])
        return True
