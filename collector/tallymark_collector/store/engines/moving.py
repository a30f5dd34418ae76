"""Points and evidence become hypertables while collectors write and people read.

TimescaleDB decides before a COPY waits for its table whether that is a hypertable; one that waited while it became one
would write where nobody reads, and commit. So nobody may wait for the points: while they are moved their table has
another name, and whoever writes finds none and is told to try again.

The name is changed, and committed, before the table is taken for the move, and giving it back takes the table alone,
too. A reader that came in between and stayed would have writers refused for as long: for that moment the views over the
points are kept, so that readers wait before they hold the table. Nothing here waits long for somebody else: after
`LOCK_TIMEOUT` the table has its old name, writers go on, and it is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Final, TypeAlias

import psycopg
from psycopg.errors import DeadlockDetected, LockNotAvailable

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines.capabilities import called, sql

logger = logging.getLogger(__name__)

INTERRUPTED: Final = "timescale_interrupted_move"
"""A step that is pending while the points have another name: they get theirs back."""

LOCK_TIMEOUT: Final = "2s"
"""How long everybody may wait behind us for somebody who holds a table or a view."""

ATTEMPTS: Final = 12
PAUSE: Final = 3.0
"""Seconds between attempts, in which writers go on."""

POINTS: Final = "usage_point"
MOVING: Final = "usage_point_moving"
EVIDENCE: Final = "usage_evidence"

Another: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]
"""Gives a second connection to the same database."""

_HELD: Final = (LockNotAvailable, DeadlockDetected)
"""Somebody else held what we wanted."""

_INTERRUPTED_SQL: Final = "SELECT to_regclass('tallymark.usage_point_moving') IS NOT NULL"

_IS_HYPERTABLE_SQL: Final = """
SELECT EXISTS (
    SELECT FROM timescaledb_information.hypertables WHERE hypertable_schema = 'tallymark' AND hypertable_name = %s
)"""


async def interrupted(connection: Connection) -> bool:
    """True if the points have the name that they have while they are moved."""
    return await (await connection.execute(_INTERRUPTED_SQL)).fetchone() == (True,)


async def pending(connection: Connection) -> list[str]:
    """What comes before every other step."""
    return [INTERRUPTED] if await interrupted(connection) else []


async def undo(connection: Connection) -> list[str]:
    """Gives the points their name back where a move was interrupted; returns the step's name if so. To be called by
    whoever migrates alone. Raises StoreUnavailable where somebody holds the table all the time."""
    steps = await pending(connection)
    if steps:
        await _patiently(connection, lambda: _rename(connection, MOVING, POINTS), [MOVING])
    return steps


async def cut_up(connection: Connection, another: Another) -> None:
    """Makes hypertables of points and evidence, where they are none. Raises StoreUnavailable where somebody holds one
    of them all the time."""
    if not await _is_hypertable(connection, POINTS):
        views = [view for (view,) in await (await connection.execute(sql("direct_views"))).fetchall()]
        await _patiently(connection, lambda: _move_points(connection, another, views), [POINTS, MOVING, *views])
    if not await _is_hypertable(connection, EVIDENCE):
        await _patiently(connection, lambda: _move_evidence(connection), [EVIDENCE])


async def _is_hypertable(connection: Connection, table: str) -> bool:
    return await (await connection.execute(_IS_HYPERTABLE_SQL, [table])).fetchone() == (True,)


async def _move_points(connection: Connection, another: Another, views: Sequence[str]) -> None:
    async with AsyncExitStack() as kept:
        await kept.enter_async_context(_readers_waiting(another, views))
        if not await interrupted(connection):
            await _rename(connection, POINTS, MOVING)
        try:
            async with connection.transaction():
                await _take(connection, MOVING)
                await kept.aclose()  # readers go on to the table, and wait there
                await connection.execute(await called(connection, sql("timescale_points")))
        except BaseException:
            # Also where a person interrupts us. What is cut short by the end of this process or of its connection, or
            # cannot be given back now, the next attempt or the next `migrate` gives back.
            if not connection.closed:
                with suppress(*_HELD):
                    await _rename(connection, MOVING, POINTS)
            raise


async def _move_evidence(connection: Connection) -> None:
    """No COPY goes straight into this table: whoever waits for it finds out afterwards what it has become."""
    async with connection.transaction():
        await _take(connection, EVIDENCE)
        await connection.execute(await called(connection, sql("timescale_evidence")))


@asynccontextmanager
async def _readers_waiting(another: Another, views: Sequence[str]) -> AsyncIterator[None]:
    """Nobody reads these views meanwhile. (LOCK TABLE would take the tables, too. This takes a view alone, and changes
    nothing: it is rolled back.)"""
    async with another() as connection, connection.transaction(force_rollback=True):
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        for view in views:
            statement = psycopg.sql.SQL("ALTER VIEW tallymark.{} RESET (security_barrier)")
            await connection.execute(statement.format(psycopg.sql.Identifier(view)))
        yield


async def _rename(connection: Connection, name: str, to: str) -> None:
    async with connection.transaction():
        await connection.execute(
            f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; ALTER TABLE tallymark.{name} RENAME TO {to}"
        )


async def _take(connection: Connection, table: str) -> None:
    await connection.execute(
        f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; LOCK TABLE tallymark.{table}; SET LOCAL lock_timeout = 0"
    )


async def _patiently(connection: Connection, work: Callable[[], Awaitable[None]], relations: Sequence[str]) -> None:
    """Does the work, again after a pause where somebody holds one of the relations. Raises StoreUnavailable."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await work()
        except (*_HELD, StoreUnavailable) as error:
            if not isinstance(error, _HELD) and not isinstance(error.__cause__, _HELD):
                raise
            held = await _holders(connection, relations)
            if attempt == ATTEMPTS:
                left = await interrupted(connection)
                raise StoreUnavailable(
                    f"nobody else may hold {relations[0]} while it is moved, and in {ATTEMPTS} attempts somebody"
                    f" always did: {held}. Let it end, or end it with SELECT pg_terminate_backend(…), and run"
                    " `tallymark migrate` again" + ("; nobody can write points until then" if left else "")
                ) from error
            logger.warning(
                "the move to TimescaleDB waits, attempt %s of %s is in %g s: %s", attempt + 1, ATTEMPTS, PAUSE, held
            )
        await asyncio.sleep(PAUSE)
    raise AssertionError("the loop returns or raises")


async def _holders(connection: Connection, relations: Sequence[str]) -> str:
    """Who is in the way, for a person."""
    wanted = {"relations": list(relations), "patience": LOCK_TIMEOUT}
    rows = await (await connection.execute(sql("holders"), wanted)).fetchall()
    found = []
    for pid, user, application, state, since in rows:
        about = [f"the user {user!r}", *([f"application {application!r}"] if application else [])]
        about += [str(state)] if state else []
        about += [f"in a transaction since {since.isoformat(timespec='seconds')}"] if since else []
        found.append(f"session {pid} ({', '.join(about)}) holds {relations[0]}")
    return "; ".join(found) or f"whoever held {relations[0]} has ended since"
