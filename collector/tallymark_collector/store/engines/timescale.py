"""TimescaleDB: what `tallymark migrate` does with it, step by step, while collectors write.

Both editions cut points and evidence up by time. The community edition also keeps the hours (and days over them) as
continuous aggregates, and can lay old points out as columns. Each step is skipped where it has been done; one that was
interrupted is undone, or done again from its beginning. Nothing is lost or counted twice on the way:

- points and evidence become hypertables as `moving` says;
- the continuous aggregates are filled beside the collector's hours while no refresher may delete a mark, so whatever is
  written meanwhile is marked when the views switch over, in one short transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

import psycopg

from tallymark_collector.errors import UserError
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines.capabilities import (
    Capabilities,
    callable_schema,
    called,
    capabilities,
    sql,
    state,
)
from tallymark_collector.store.engines.moving import Another, cut_up
from tallymark_collector.store.engines.native_hours import refresh_window
from tallymark_collector.store.locks import REFRESHING, held

EXTENSION: Final = "timescaledb"
HYPERTABLES: Final = "timescale_hypertables"
AGGREGATES: Final = "timescale_aggregates"

FILL_WINDOW: Final = timedelta(days=7)
"""Of points that one refresh sums while aggregates are filled for the first time; whole days."""

LOCK_TIMEOUT: Final = "2s"
"""How long everybody may wait behind us for a reader that is slow; then it is tried again another time."""

_SPAN_SQL: Final = """
SELECT date_bin('1 day', greatest(min(time), (SELECT points_from FROM usage_kept)), 'epoch'), max(time)
FROM usage_point HAVING min(time) IS NOT NULL"""

_OWNER_SQL: Final = """
SELECT pg_get_userbyid(relowner), current_user FROM pg_class
WHERE relnamespace = 'tallymark'::regnamespace AND relname IN ('usage_point', 'usage_point_moving')
  AND NOT pg_has_role(relowner, 'USAGE')"""


async def pending(connection: Connection, *, wanted: bool = False) -> list[str]:
    """The steps that this database could take and has not. Where TimescaleDB is `wanted` and cannot be used yet, that
    is the first of them."""
    can, done = await capabilities(connection), await state(connection)
    if wanted and not can.hypertables:
        return [EXTENSION]
    steps = [HYPERTABLES] if can.hypertables and not done.hypertables else []
    if can.continuous_aggregates and not done.continuous_aggregates:
        steps.append(AGGREGATES)
    return steps


async def provide(connection: Connection) -> None:
    """Installs the extension where it was asked for and is missing. Raises UserError where that cannot be."""
    can = await capabilities(connection)
    if not can.installed:
        await _install(connection, can)
        can = await capabilities(connection)
    if not can.hypertables:
        raise UserError(
            f"the TimescaleDB in this database ({await _version(connection)}) is too old: it cannot make a hypertable"
            " by dimension; update it (ALTER EXTENSION timescaledb UPDATE), or leave 'timescale:' out to do without"
        )


async def check_callable(connection: Connection) -> None:
    """Raises UserError where steps are pending that take functions which this role may not call."""
    if await pending(connection):
        await callable_schema(connection)


async def apply(connection: Connection, another: Another, note: Callable[[str], None] = lambda _: None) -> list[str]:
    """Takes the pending steps and returns their names. `another` gives a second connection. Raises UserError, or
    StoreUnavailable where somebody holds a table all the time."""
    steps = await pending(connection)
    if not steps:
        return []
    if stranger := await (await connection.execute(_OWNER_SQL)).fetchone():
        raise UserError(
            f"{', '.join(steps)} must be done by the owner of the tables: run `tallymark migrate` as {stranger[0]}, not"
            f" as {stranger[1]}"
        )
    if HYPERTABLES in steps:
        note("cutting points up by time; writers are told to come back until that is done")
        await cut_up(connection, another)
    if AGGREGATES in steps:
        await _aggregate(connection, note)
    return steps


async def views(connection: Connection) -> None:
    """Makes the views over continuous aggregates again, where there are such."""
    if (await state(connection)).continuous_aggregates:
        async with connection.transaction():
            for step in ("views_alone", "timescale_views"):
                await connection.execute(sql(step))


async def check_columns(connection: Connection) -> None:
    """Raises UserError where points cannot be laid out as columns."""
    can, done = await capabilities(connection), await state(connection)
    if not (can.columnstore and done.continuous_aggregates):
        raise UserError(
            "this database cannot lay out old points as columns (that takes TimescaleDB's community edition, and"
            " `tallymark migrate`): leave out --columnstore-after"
        )


async def lay_out(connection: Connection, before: datetime) -> int:
    """Lays out points before that time as columns, by whole pieces, also those that got rows since they were; returns
    how many pieces. The connection must be in autocommit mode and in no transaction.

    Not by a policy of TimescaleDB's: that commits whenever it is done. A reader whose snapshot is older then misses the
    points, and so does a statement that looked at the piece before and waited for it (2.29.2). Here everybody waits
    before they look, while one piece is laid out: some seconds for a million points.
    """
    statement = await called(connection, sql("columnstore_pieces"))
    pieces = await (await connection.execute(statement, {"before": before})).fetchall()
    for (piece,) in pieces:
        # A piece that somebody dropped since it was listed needs nothing.
        with suppress(psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject):
            await _lay_out_piece(connection, piece)
    return len(pieces)


async def _lay_out_piece(connection: Connection, piece: str) -> None:
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; LOCK TABLE ONLY usage_point")
        await connection.execute(await called(connection, "SELECT {extension}.compress_chunk(%s::regclass)"), [piece])


async def _aggregate(connection: Connection, note: Callable[[str], None]) -> None:
    async with held(connection, REFRESHING):
        async with connection.transaction():
            await connection.execute(sql("timescale_columnstore"))
            await connection.execute(await called(connection, sql(AGGREGATES)))
        first, last = await (await connection.execute(_SPAN_SQL)).fetchone() or (None, None)
        for aggregate in ("usage_hour_native", "usage_day_native"):
            for start, end in _windows(first, last):
                note(f"filling {aggregate} from {start:%Y-%m-%d}")
                await refresh_window(connection, aggregate, start, end)
        async with connection.transaction():
            for step in (
                "timescale_dropped",
                "views_alone",
                "timescale_switch",
                "timescale_views",
                "timescale_emptying",
            ):
                await connection.execute(sql(step))


def _windows(first: datetime | None, last: datetime | None) -> Iterator[tuple[datetime, datetime]]:
    while first is not None and last is not None and first <= last:
        yield first, first + FILL_WINDOW
        first += FILL_WINDOW


async def _install(connection: Connection, can: Capabilities) -> None:
    otherwise = "or leave 'timescale:' out of the database's name to do without TimescaleDB"
    if not can.available:
        raise UserError(f"this server has no TimescaleDB: install its package for the server's version, {otherwise}")
    if not can.preloaded:
        raise UserError(
            "this server was started without TimescaleDB: add it to shared_preload_libraries in postgresql.conf and"
            f" restart the server, {otherwise}"
        )
    try:
        await connection.execute(f"CREATE EXTENSION IF NOT EXISTS {EXTENSION} SCHEMA public")
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"the user {connection.info.user} may not install TimescaleDB in this database: have an administrator run"
            f" CREATE EXTENSION {EXTENSION}, {otherwise}"
        ) from error


async def _version(connection: Connection) -> str:
    row = await (
        await connection.execute("SELECT extversion FROM pg_extension WHERE extname = %s", [EXTENSION])
    ).fetchone()
    return row[0] if row else "none"
