"""The store: what is behind the acknowledgement.

    store.write(batch)    all of a batch or nothing; returns after the commit; the same batch again changes nothing
    store.refresh()       brings cached hours up to date; any number may run at once; nothing to do is fine
    store.migrate()       brings the schema to this version; several at once take turns
    store.reading()       a connection for queries; the views are right whether or not anything was refreshed
    store.open()/close()

One implementation, over psycopg 3; `engines` say where the PostgreSQL behind it comes from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.store import dictionaries, hours, migrations, writer
from tallymark_collector.store.database import Connection, Database, is_worth_another_try

MAX_ATTEMPTS: Final = 4
"""A transaction that was rolled back (deadlock), or that met a dead connection, is tried this often at once."""


class Store:
    """Usage in one database."""

    def __init__(self, dsn: str) -> None:
        self._database = Database(dsn)
        self._dictionaries = dictionaries.Dictionaries()

    async def open(self) -> None:
        """Connects. Raises UserError with the reason."""
        await self._database.open()

    async def close(self) -> None:
        """Gives the connections back."""
        await self._database.close()

    async def migrate(self) -> list[str]:
        """Applies what is pending and returns the migrations' names."""
        async with self._database.connection() as connection:
            return await migrations.migrate(connection)

    async def write(self, batch: Batch) -> WriteResult:
        """Writes a batch in one transaction; returns after its commit. Raises StoreUnavailable: nothing was kept."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                async with self._database.connection() as connection:
                    return await writer.write(connection, batch, self._dictionaries)
            except StoreUnavailable as error:
                if attempt == MAX_ATTEMPTS or not is_worth_another_try(error.__cause__):
                    raise
        raise AssertionError("the loop returns or raises")

    async def refresh(self, limit: int = hours.BATCH) -> int:
        """Recomputes up to `limit` account-hours that have new points; returns how many it did."""
        async with self._database.connection() as connection:
            return await hours.refresh(connection, limit)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Connection]:
        """A connection whose statements all see one moment of the database and cannot write."""
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection in a transaction, for plans and subscriptions."""
        async with self._database.connection() as connection, connection.transaction():
            yield connection
