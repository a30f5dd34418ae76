"""The store: what is behind the acknowledgement.

    store.write(batch)    all of a batch or nothing; returns after the commit; the same batch again changes nothing
    store.mark(hours)     says that cached hours are out of date; marking twice is fine
    store.refresh()       brings cached hours up to date; any number may run at once; nothing to do is fine
    store.migrate()       brings the schema to this version; several at once take turns
    store.prepare()       the same where the user may, else sees that a writer can work; changes nothing the second time
    store.grant()         gives a writer's and a reader's role what they need; again is fine
    store.reading()       a connection for queries; the views are right whether or not anything was refreshed
    store.open()/close()

One implementation, over psycopg 3; `engines` say where the PostgreSQL behind it comes from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Final, TypeVar

import psycopg

from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.model import Batch, Reason, WriteResult
from tallymark_collector.store import dictionaries, hours, migrations, roles, writer
from tallymark_collector.store.database import POOL_SIZE, Connection, Database, is_worth_another_try

MAX_ATTEMPTS: Final = POOL_SIZE + 2
"""A transaction that was rolled back (deadlock), or that met a dead connection, is tried this often at once: after the
server's restart every connection of the pool may be dead."""


T = TypeVar("T")


class Store:
    """Usage in one database."""

    def __init__(self, dsn: str) -> None:
        self._dictionaries = dictionaries.Dictionaries()
        self._database = Database(dsn, connected=self._dictionaries.forget)

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

    async def prepare(self) -> list[str]:
        """Applies what is pending and returns the migrations' names.

        Raises UserError where something is pending that this user may not apply, or this user may not write.
        """
        async with self._database.connection() as connection:
            steps = await migrations.pending(connection)
            if steps and not await roles.may_migrate(connection):
                names = ", ".join(step.name for step in steps)
                raise UserError(
                    f"the database lacks {names} and the user {connection.info.user!r} does not own it: as its owner,"
                    f" run `tallymark migrate --writer {connection.info.user}`, then start again"
                )
            applied = await migrations.migrate(connection) if steps else []
            await roles.check_writer(connection)
            return applied

    async def grant(self, *, writer: str | None = None, reader: str | None = None) -> None:
        """Gives roles what they need in this version (see `roles`). Raises UserError."""
        async with self.transaction() as connection:
            await roles.grant(connection, writer=writer, reader=reader)

    async def write(self, batch: Batch) -> WriteResult:
        """Writes a batch in one transaction; returns after its commit. Raises StoreUnavailable: nothing was kept.

        Data that the database cannot hold, whatever it is, would be sent for ever by a client that is told to retry:
        the batch is then halved until what cannot be held stands alone, and that goes to quarantine.
        """
        try:
            return await _tried_again(lambda: self._write(batch))
        except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as error:
            halves = writer.halved(batch, error)
            apart = [q for half in halves for q in half.quarantined if q.refusal.reason is Reason.NOT_STORABLE]
            return sum([await self.write(half) for half in halves], WriteResult(conflicts=apart))

    async def _write(self, batch: Batch) -> WriteResult:
        async with self._database.connection() as connection:
            return await writer.write(connection, batch, self._dictionaries)

    async def refresh(self, limit: int = hours.BATCH) -> int:
        """Recomputes up to `limit` account-hours that have new points; returns how many it did."""
        async with self._database.connection() as connection:
            return await hours.refresh(connection, limit)

    async def mark(self, keys: Iterable[tuple[datetime, str, str]]) -> None:
        """Says that hours, as (bucket, account, tenant), have to be recomputed; views take them from the points now."""
        async with self._database.connection() as connection:
            await hours.mark(connection, keys)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Connection]:
        """A connection whose statements all see one moment of the database and cannot write."""
        async with AsyncExitStack() as stack:
            # Here dead connections are found and dropped: a reader's own statements cannot be tried again for it.
            yield await _tried_again(lambda: self._begin_reading(stack))

    async def _begin_reading(self, stack: AsyncExitStack) -> Connection:
        async with AsyncExitStack() as beginning:
            connection = await beginning.enter_async_context(self._database.connection())
            await beginning.enter_async_context(connection.transaction())
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            stack.push_async_exit(beginning.pop_all())
            return connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection in a transaction, for plans and subscriptions."""
        async with self._database.connection() as connection, connection.transaction():
            yield connection


async def _tried_again(work: Callable[[], Awaitable[T]]) -> T:
    """The work's result, tried up to `MAX_ATTEMPTS` times where another try may succeed at once."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return await work()
        except StoreUnavailable as error:
            if attempt == MAX_ATTEMPTS or not is_worth_another_try(error.__cause__):
                raise
    raise AssertionError("the loop returns or raises")
