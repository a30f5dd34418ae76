"""Whether the database takes writes, asked on a connection of its own: the pool's may all be at work."""

from __future__ import annotations

from typing import Final

import psycopg
from psycopg.rows import TupleRow

from tallymark_collector.store import migrations
from tallymark_collector.store.database import SCHEMA
from tallymark_collector.store.engines.moving import MOVING

CONNECT_SECONDS = 2

# Nobody finds the points while they are moved into a hypertable (engines/moving.py). Whoever moves them holds the lock
# of whoever migrates: without that the move was cut short. The catalogue, because everybody may read it.
_WRITABLE_SQL = """
SELECT CASE
    WHEN current_setting('transaction_read_only') = 'on' THEN 'read-only'
    WHEN NOT EXISTS (
        SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %(schema)s AND c.relname = %(moving)s
    ) THEN 'writable'
    WHEN EXISTS (
        SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
        WHERE l.locktype = 'advisory' AND l.granted AND d.datname = current_database()
          AND l.classid = 0 AND l.objid = %(migrating)s::bigint::oid AND l.objsubid = 1
    ) THEN 'moving'
    ELSE 'interrupted'
END"""

_TROUBLE: Final = {
    "writable": None,
    "read-only": "the database is read-only",
    "moving": "the points are being moved to TimescaleDB: no usage is taken until that is done",
    "interrupted": "a move of the points to TimescaleDB was interrupted: no usage is taken until the owner of the"
    " tables runs `tallymark migrate`",
}


class Presence:
    """Asks one database. Not for several tasks at once."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: psycopg.AsyncConnection[TupleRow] | None = None

    async def ask(self) -> str | None:
        """Why the database takes no writes, None where it does. The reason names neither host nor user."""
        try:
            if self._connection is None:
                self._connection = await psycopg.AsyncConnection.connect(
                    self._dsn, autocommit=True, connect_timeout=CONNECT_SECONDS, application_name="tallymark health"
                )
            wanted = {"schema": SCHEMA, "moving": MOVING, "migrating": migrations.LOCK}
            row = await (await self._connection.execute(_WRITABLE_SQL, wanted)).fetchone()
        except BaseException as error:
            # Also where the asking is given up: what a connection was in the middle of, nobody knows.
            await self.close()
            if isinstance(error, psycopg.Error):
                return "the database is not available"
            raise
        return _TROUBLE[row[0]] if row else None

    async def close(self) -> None:
        """Gives the connection back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
