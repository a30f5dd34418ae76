"""Whether the database takes writes, asked on a connection of its own: the pool's may all be at work."""

from __future__ import annotations

import psycopg
from psycopg.rows import TupleRow

CONNECT_SECONDS = 2

_WRITABLE_SQL = "SELECT current_setting('transaction_read_only')"


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
            row = await (await self._connection.execute(_WRITABLE_SQL)).fetchone()
        except BaseException as error:
            # Also where the asking is given up: what a connection was in the middle of, nobody knows.
            await self.close()
            if isinstance(error, psycopg.Error):
                return "the database is not available"
            raise
        return "the database is read-only" if row == ("on",) else None

    async def close(self) -> None:
        """Gives the connection back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
