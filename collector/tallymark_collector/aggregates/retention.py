"""Dropping what is old, and nothing that somebody still needs: whole pieces of a hypertable, and levels and totals.

Points go only when all of this holds: they are older than they have to be kept; no billing period that is open, or
ended less than `billing_grace` ago, or waits for its invoice (`unfinalized`) reaches into them; no open item of the
quarantine that could still be billed is of their time or older (`unsettled`); none of their hours has a mark or awaits
an audit; and their hours and days say what they say, which is compared one last time before (`pieces`). What cannot be
told from a point that was counted, because that was dropped, is refused by the database itself (sql/0006_upkeep.sql);
collectors with this retention set such points aside earlier (`settings.Limits`). Hours and days stay for ever, and of
billing periods that begin or end inside an hour the sums of those pieces of hours.

Of totals from before the dropped points those stay from which something is counted (`totals`). Of levels the last one
of each stream stays, which holds into the time after; they are in no hour, so they go by age, periods, invoices and the
quarantine alone. With spans go the counts of what is on them. Nobody is stopped while all those are deleted: what is
asked of them is answered as before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from tallymark_collector.aggregates import pieces
from tallymark_collector.aggregates.stopping import LOCK_TIMEOUT, Stopping
from tallymark_collector.aggregates.totals import drop_totals
from tallymark_collector.aggregates.unfinalized import WAITING_SQL
from tallymark_collector.aggregates.unsettled import opened_since, with_unsettled
from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tallymark_collector.store.engines.capabilities import called, state
from tallymark_collector.store.locks import KEPT, TAKEN_SQL

MAX_PAUSE: Final = 60.0
"""Seconds between two pieces, at most: as long as the one before took, so that hours are made again and readers and
writers have the database as well."""

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

_EVIDENCE_CUT_SQL: Final = """
SELECT max(range_end) FROM timescaledb_information.chunks
WHERE hypertable_schema = 'tallymark' AND hypertable_name = 'usage_evidence' AND range_end <= %s"""


# What of it was not done is done after the next piece.
_DROP_COUNTS_SQL: Final = "DELETE FROM usage_evidence_count WHERE time < (SELECT evidence_from FROM usage_kept)"


class Dropped(NamedTuple):
    """What one look came to."""

    points_before: datetime | None = None
    """All points before this are gone now."""
    differing: int = 0
    """Account-hours that did not say what their points say: those stay, and they are made again first."""
    evidence: int = 0
    """Pieces of evidence that are gone now."""
    levels_before: datetime | None = None
    """All levels before this are gone now, but for the last one of each stream."""
    cut_short: str | None = None
    """Why there was no more, where the database did not let us."""

    def sentences(self) -> Iterator[str]:
        """What a log should say."""
        if self.points_before is not None:
            yield f"points before {self.points_before.isoformat()} were dropped; their hours and days stay"
        if self.differing:
            no = "no" if self.points_before is None else "no more"
            yield f"{no} points were dropped: {self.differing} account-hours differ from them and are made again first"
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


async def drop_old(
    store: Store, retention: Retention, now: datetime, pauses: Sequence[float] = pieces.LOCK_PAUSES
) -> Dropped:
    """Drops what may go. Safe to call from several processes at once. `pauses`: seconds between tries where somebody
    holds a piece of points. Raises StoreUnavailable where nothing was dropped for it."""
    done = Dropped()
    try:
        if retention.points is not None:
            wanted = now - retention.points
            bounds = _bounds(retention, wanted, now)
            done = done._replace(levels_before=await _drop_levels(store, wanted, bounds))
            async for step in _pieces(store, wanted, bounds, pauses):
                done = done._replace(points_before=step.until or done.points_before, differing=step.differing)
            if done.points_before is not None:
                async with store.session() as connection:
                    await drop_totals(connection, done.points_before)
        if retention.evidence is not None:
            done = done._replace(evidence=await _drop_evidence(store, now - retention.evidence))
            if done.evidence:
                async with store.session() as connection:
                    await connection.execute(_DROP_COUNTS_SQL)
    except StoreUnavailable as error:
        if done == Dropped():
            raise
        done = done._replace(cut_short=str(error))
    return done


async def _pieces(
    store: Store, wanted: datetime, bounds: dict[str, object], pauses: Sequence[float]
) -> AsyncIterator[pieces.Step]:
    """Drops one after the other, until nothing was dropped."""
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        async with store.session() as connection:
            step = await pieces.drop_oldest(connection, wanted, bounds, pauses)
        yield step
        if step.until is None:
            return
        await asyncio.sleep(min(clock() - began, MAX_PAUSE))


def _bounds(retention: Retention, wanted: datetime, now: datetime) -> dict[str, object]:
    return {
        "wanted": wanted,
        "billed": now - retention.billing_grace,
        "grace": retention.billing_grace,
        "keep_unfinalized": retention.keep_unfinalized,
        "keep_unsettled": retention.keep_unsettled,
    }


async def _drop_levels(store: Store, wanted: datetime, asked: dict[str, object]) -> datetime | None:
    async with store.session() as connection:
        bounds = await with_unsettled(connection, asked, wanted)
        async with connection.transaction():
            [until] = await (await connection.execute(_LEVELS_CUT_SQL, bounds)).fetchone() or [None]
            if until is None:
                return None
            # No writer adds a level while it is said from when they are kept; each looks there afterwards.
            stopping = Stopping(connection)
            await stopping.execute(TAKEN_SQL, [KEPT])
            if await opened_since(stopping.execute, bounds, until, of_levels=True):
                return None
            await stopping.execute("UPDATE usage_kept SET levels_from = greatest(levels_from, %s)", [until])
        await connection.execute(_DROP_LEVELS_SQL, [until])
    return until  # type: ignore[no-any-return]


async def _drop_evidence(store: Store, wanted: datetime) -> int:
    async with store.session() as connection, connection.transaction():
        [until] = await (await connection.execute(_EVIDENCE_CUT_SQL, [wanted])).fetchone() or [None]
        if until is None:
            return 0
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        drop = await called(connection, pieces.DROP_SQL)
        dropped = (await connection.execute(drop, ["usage_evidence", until])).rowcount
        # Last, and before the counts are deleted: whoever drops points waits for this row, and all writers for them.
        # Whoever compares spans begins behind that, with the counts as well (`reconciliation`).
        await connection.execute("UPDATE usage_kept SET evidence_from = greatest(evidence_from, %s)", [until])
        return dropped
