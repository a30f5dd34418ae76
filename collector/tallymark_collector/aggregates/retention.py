"""Dropping what is old, and nothing that somebody still needs: whole pieces of a hypertable, and levels and totals.

Points go only when all of this holds: they are older than they have to be kept; no billing period that is open, or
ended less than `billing_grace` ago, or waits for its invoice (`unfinalized`) reaches into them; no open item of the
quarantine that could still be billed is of their time or older (`unsettled`); none of their hours has a mark or awaits
an audit; and their hours and days say what they say, which is compared one last time in the
transaction that drops them. What cannot be told from a point that was counted, because that was dropped, is refused by
the database itself (sql/0006_upkeep.sql); collectors with this retention set such points aside earlier
(`settings.Limits`). Hours and days stay for ever, and of billing periods that begin or end inside an hour the sums of those
pieces of hours.

Of running totals the last one of each epoch from before the dropped points stays: the next is counted from it. Of
levels the last one of each stream stays, which holds into the time after; they are in no hour, so they go by age,
periods, invoices and the quarantine alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final, NamedTuple

from tallymark_collector.aggregates.unfinalized import WAITING_SQL
from tallymark_collector.aggregates.unsettled import oldest_unsettled
from tallymark_collector.errors import UserError
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines.capabilities import state
from tallymark_collector.store.locks import KEPT, REFRESHING, held

LOCK_TIMEOUT: Final = "2s"
"""How long dropping may wait for readers and writers, others behind it; then it is tried again another time."""

# The newest end of a piece that nobody needs. A period's first hour may begin before the period does.
_CUT_SQL: Final = f"""
SELECT max(c.range_end)
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

# To the hour, so that a look now and then has something to do.
_LEVELS_CUT_SQL: Final = f"""
SELECT until FROM (
    SELECT date_bin('1 hour', least(
        %(wanted)s::timestamptz,
        (SELECT min(period_start) FROM billing_period WHERE period_end > %(billed)s),
        (SELECT min(period_start) FROM ({WAITING_SQL}) w WHERE %(keep_unfinalized)s),
        %(unsettled)s::timestamptz
    ), 'epoch') AS until
) cut, usage_kept
WHERE until > levels_from AND EXISTS (SELECT FROM usage_level WHERE time < until)"""  # noqa: S608 - a constant of ours

_DROP_LEVELS_SQL: Final = """
WITH old AS (
    SELECT ctid, row_number() OVER (PARTITION BY account, stream ORDER BY time DESC, part DESC) AS place
    FROM usage_level WHERE time < %s
)
DELETE FROM usage_level l USING old WHERE l.ctid = old.ctid AND old.place > 1"""

_DROP_TOTALS_SQL: Final = """
WITH old AS (
    SELECT ctid, row_number() OVER (
        PARTITION BY CASE WHEN source IS NULL THEN account END, coalesce(source, stream), source IS NULL, start_ns
        ORDER BY time_ns DESC
    ) AS place
    FROM usage_sample WHERE time_ns < (extract(epoch FROM %s::timestamptz) * 1000000000)::bigint
)
DELETE FROM usage_sample s USING old WHERE s.ctid = old.ctid AND old.place > 1"""

_DIFFERENT_SQL: Final = """
WITH raw AS (
    SELECT tenant, account, series, date_trunc('hour', time, 'UTC') AS bucket,
           sum(quantity) AS quantity, count(*) AS points
    FROM usage_point WHERE time < %(cut)s
    GROUP BY 1, 2, 3, 4
), cached AS (
    SELECT tenant, account, series, bucket, quantity, points FROM usage_hour
    WHERE bucket >= (SELECT points_from FROM usage_kept) AND bucket < %(cut)s
), kept AS (
    SELECT CASE WHEN points_from = '-infinity' THEN points_from
                ELSE date_bin('1 day', points_from + interval '24 hours' - interval '1 microsecond', 'epoch') END AS day
    FROM usage_kept
), raw_day AS (
    SELECT tenant, account, series, date_bin('1 day', bucket, 'epoch') AS bucket,
           sum(quantity) AS quantity, sum(points) AS points
    FROM raw WHERE bucket >= (SELECT day FROM kept) AND bucket < date_bin('1 day', %(cut)s::timestamptz, 'epoch')
    GROUP BY 1, 2, 3, 4
), cached_day AS (
    SELECT tenant, account, series, bucket, quantity, points FROM usage_day
    WHERE bucket >= (SELECT day FROM kept) AND bucket < date_bin('1 day', %(cut)s::timestamptz, 'epoch')
)
INSERT INTO usage_dirty (bucket, account, tenant)
SELECT bucket, account, tenant
FROM raw FULL JOIN cached USING (tenant, account, series, bucket)
WHERE raw.quantity IS DISTINCT FROM cached.quantity OR raw.points IS DISTINCT FROM cached.points
UNION
SELECT bucket, account, tenant
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

_EVIDENCE_CUT_SQL: Final = """
SELECT max(range_end) FROM timescaledb_information.chunks
WHERE hypertable_schema = 'tallymark' AND hypertable_name = 'usage_evidence' AND range_end <= %s"""


class Dropped(NamedTuple):
    """What one look came to."""

    points_before: datetime | None = None
    """All points before this are gone now."""
    differing: int = 0
    """Account-hours that did not say what their points say: nothing was dropped, they are made again first."""
    evidence: int = 0
    """Pieces of evidence that are gone now."""
    levels_before: datetime | None = None
    """All levels before this are gone now, but for the last one of each stream."""

    def sentences(self) -> Iterator[str]:
        """What a log should say."""
        if self.points_before is not None:
            yield f"points before {self.points_before.isoformat()} were dropped; their hours and days stay"
        if self.differing:
            yield f"no points were dropped: {self.differing} account-hours differ from them and are made again first"
        if self.evidence:
            yield f"{self.evidence} pieces of old evidence were dropped"
        if self.levels_before is not None:
            yield f"levels before {self.levels_before.isoformat()} were dropped, but for the last one of each stream"


async def check_possible(store: Store, retention: Retention) -> None:
    """Raises UserError where the database cannot do what is asked for."""
    asked = retention.points or retention.evidence
    if asked is None:
        return
    async with store.reading() as connection:
        if not (await state(connection)).hypertables:
            raise UserError(
                "dropping old points or evidence needs tables that are cut up by time, which this database has not:"
                " install TimescaleDB in it and run `tallymark migrate`, or leave out --keep-points and --keep-evidence"
            )


async def drop_old(store: Store, retention: Retention, now: datetime) -> Dropped:
    """Drops what may go. Safe to call from several processes at once. Raises StoreUnavailable."""
    dropped = Dropped()
    if retention.points is not None:
        bounds: dict[str, object] = {
            "wanted": now - retention.points,
            "billed": now - retention.billing_grace,
            "grace": retention.billing_grace,
            "keep_unfinalized": retention.keep_unfinalized,
            "unsettled": None,
        }
        if retention.keep_unsettled:
            async with store.session() as connection:
                item = await oldest_unsettled(connection, now - retention.points)
            bounds["unsettled"] = None if item is None else item.time
        async with store.session() as connection, held(connection, REFRESHING), connection.transaction():
            # Readers hold the pieces that they may look at; writers must not wait long behind us for one that is slow.
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
            # From here on no writer can add a mark or a level, so none can commit a point; each looks at usage_kept
            # when we are done.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [KEPT])
            levels_before = await _drop_levels(connection, bounds)
            dropped = (await _drop_points(connection, bounds))._replace(levels_before=levels_before)
    if retention.evidence is not None:
        async with store.transaction() as connection:
            dropped = dropped._replace(evidence=await _drop_evidence(connection, now - retention.evidence))
    return dropped


async def _drop_points(connection: Connection, bounds: dict[str, object]) -> Dropped:
    [until] = await (await connection.execute(_CUT_SQL, bounds)).fetchone() or [None]
    if until is None:
        return Dropped()
    if differing := (await connection.execute(_DIFFERENT_SQL, {"cut": until})).rowcount:
        return Dropped(differing=differing)
    await connection.execute(_FORGET_EDGES_SQL)
    await connection.execute(_EDGES_SQL, {"cut": until})
    # Nobody looks at a piece that is about to go, also not with a snapshot from before.
    await connection.execute("LOCK TABLE ONLY usage_point")
    await connection.execute("UPDATE usage_kept SET points_from = %s", [until])
    await connection.execute("SELECT drop_chunks('usage_point', older_than => %s::timestamptz)", [until])
    # One that comes late now, of before that time, is refused with the increase that it brings.
    await connection.execute(_DROP_TOTALS_SQL, [until])
    return Dropped(points_before=until)


async def _drop_levels(connection: Connection, bounds: dict[str, object]) -> datetime | None:
    [until] = await (await connection.execute(_LEVELS_CUT_SQL, bounds)).fetchone() or [None]
    if until is None:
        return None
    await connection.execute("UPDATE usage_kept SET levels_from = %s", [until])
    await connection.execute(_DROP_LEVELS_SQL, [until])
    return until  # type: ignore[no-any-return]


async def _drop_evidence(connection: Connection, wanted: datetime) -> int:
    [until] = await (await connection.execute(_EVIDENCE_CUT_SQL, [wanted])).fetchone() or [None]
    if until is None:
        return 0
    await connection.execute("UPDATE usage_kept SET evidence_from = greatest(evidence_from, %s)", [until])
    return (
        await connection.execute("SELECT drop_chunks('usage_evidence', older_than => %s::timestamptz)", [until])
    ).rowcount
