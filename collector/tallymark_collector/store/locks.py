"""Advisory locks that order what collectors do beside each other. One place, so that no two mean the same number."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from tallymark_collector.store.database import Connection

REFRESHING: Final = "tallymark.refreshing"
"""Alone: whoever refreshes a continuous aggregate, moves hours into one, or drops points. Shared: whoever recomputes
hours or days in a table. So a mark is never deleted by one of them while another counts on it."""

KEPT: Final = "tallymark.usage_kept"
"""Shared by every writer (the trigger of sql/0006_upkeep.sql takes it, and `writer` for what it sets aside), alone by
whoever drops points or levels."""

SOURCES: Final = "tallymark.sources"
"""Shared by whoever writes increases that a file of meters takes, alone by whoever gives one of their sources a further
stream (`source_streams`)."""

QUARANTINE: Final = "tallymark.quarantine"
"""With an item's id behind it: whoever settles that item. With a stream's: whoever bills something of that stream, so
that what one of them bills the next one sees."""

CREDENTIALS: Final = "tallymark.credentials"
"""With a tenant behind it: whoever makes a credential of which the tenant has a bounded number."""

# In one order, so that two refreshers never wait for each other. A hash collision only locks more than needed.
_KEYS_SQL: Final = """
SELECT pg_advisory_xact_lock(key) FROM (
    SELECT DISTINCT hashtextextended(concat_ws(chr(31), %s::text, tenant, account, bucket), 0) AS key
    FROM unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
    ORDER BY key
) keys"""


async def lock_keys(connection: Connection, space: str, columns: Sequence[Sequence[object]]) -> None:
    """The transaction has these buckets alone until its end, against others of the same `space`; waits for them.
    `columns`: accounts, tenants, buckets."""
    await connection.execute(_KEYS_SQL, [space, *columns])


async def taken(connection: Connection, name: str) -> None:
    """The transaction has the lock alone until its end; waits for it."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])


async def shared(connection: Connection, name: str) -> None:
    """The transaction shares the lock until its end; waits for it."""
    await connection.execute("SELECT pg_advisory_xact_lock_shared(hashtextextended(%s, 0))", [name])


@asynccontextmanager
async def held(connection: Connection, name: str) -> AsyncIterator[None]:
    """The session has the lock alone; waits for it."""
    await connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [name])
    try:
        yield
    finally:
        await _release(connection, name)


@asynccontextmanager
async def held_if_free(connection: Connection, name: str) -> AsyncIterator[bool]:
    """Whether the session has the lock alone; does not wait."""
    row = await (await connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [name])).fetchone()
    if row != (True,):
        yield False
        return
    try:
        yield True
    finally:
        await _release(connection, name)


async def shared_if_free(connection: Connection, name: str) -> bool:
    """Whether the transaction shares the lock until its end; does not wait."""
    row = await (
        await connection.execute("SELECT pg_try_advisory_xact_lock_shared(hashtextextended(%s, 0))", [name])
    ).fetchone()
    return row == (True,)


async def _release(connection: Connection, name: str) -> None:
    if not connection.closed:
        await connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [name])
