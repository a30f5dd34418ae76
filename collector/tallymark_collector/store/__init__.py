"""The store: what is behind the acknowledgement.

    store.write(batch)    all of a batch or nothing; returns after the commit; the same batch again changes nothing
    store.settle(work)    one transaction that reads, decides and writes; tried again where the server rolled it back
    store.write_together  the same for encoded batches of several requests, in one transaction
    store.mark(hours)     says that cached hours are out of date; marking twice is fine
    store.refresh()       brings cached hours up to date; any number may run at once; nothing to do is fine
    store.migrate()       brings the schema to this version; several at once take turns
    store.prepare()       the same where the user may, else sees that a writer can work; changes nothing the second time
    store.grant()         gives a writer's and a reader's role what they need; again is fine
    store.meters(tenant)  the names and units that a tenant's usage comes by
    store.ask(work)       short questions about anything but the views
    store.reading()       a connection for queries; the views are right whether or not anything was refreshed
    store.presence()      answers whether the database takes writes now
    store.open()/close()

One implementation, over psycopg 3; `engines` say where the PostgreSQL behind it comes from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Final, TypeVar

import psycopg

from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.model import Batch, Reason, Stream, WriteResult
from tallymark_collector.processors.meters import Meter
from tallymark_collector.resting import resting
from tallymark_collector.settings import DATABASE_TIMEOUT
from tallymark_collector.store import dictionaries, hours, keeping, meters, migrations, roles, writer
from tallymark_collector.store.database import POOL_SIZE, Connection, Database, Pool, is_worth_another_try
from tallymark_collector.store.engines import moving, timescale
from tallymark_collector.store.locks import held
from tallymark_collector.store.presence import Presence

MAX_ATTEMPTS: Final = POOL_SIZE + 2
"""A transaction that was rolled back (deadlock), or that met a dead connection, is tried this often at once: after the
server's restart every connection of the pool may be dead."""

_MIGRATED_SQL: Final = "SELECT to_regclass('usage_daily') IS NOT NULL"

# Before the transaction's snapshot is taken. Making a hypertable, dropping a piece of it, and laying one out as columns
# move or remove rows in ways that a snapshot from before does not see: it would find them missing, or find what was
# committed later. Whoever does that takes usage_point alone. A lock on a view is one on all that is behind it.
_HOLD_SQL: Final = "LOCK TABLE usage_daily IN ACCESS SHARE MODE"

T = TypeVar("T")
Note = Callable[[str], None]
"""Is told what is under way, as a line for a log."""


def quiet(_: str) -> None:
    """Says nothing."""


class Store:
    """Usage in one database."""

    def __init__(
        self,
        dsn: str,
        *,
        wants_timescale: bool = False,
        patience: float = DATABASE_TIMEOUT,
        connections: int = POOL_SIZE,
    ) -> None:
        """`wants_timescale`: without TimescaleDB in the database, `migrate` installs it or raises UserError.
        `patience`: seconds after which a write without an answer is given up. `connections`: at most."""
        self._wants_timescale = wants_timescale
        self._dictionaries = dictionaries.Dictionaries()
        self._database = Database(dsn, pool_size=connections, patience=patience, connected=self._dictionaries.forget)

    async def open(self) -> None:
        """Connects. Raises UserError with the reason."""
        await self._database.open()

    async def close(self) -> None:
        """Gives the connections back."""
        await self._database.close()

    def pool(self) -> Pool:
        """How many connections do what. Thread-safe."""
        return self._database.pool()

    @asynccontextmanager
    async def presence(self) -> AsyncIterator[Presence]:
        """What can be asked whether this database takes writes."""
        found = Presence(self._database.dsn)
        try:
            yield found
        finally:
            await found.close()

    async def migrate(self, note: Note = quiet) -> list[str]:
        """Applies what is pending, also what the database's engine adds, and returns the steps' names. Tells `note` of
        what may take long. Raises UserError, or StoreUnavailable where somebody holds a table all the time."""
        async with self._database.connection() as connection:
            return await self._migrate(connection, note)

    async def _migrate(self, connection: Connection, note: Note) -> list[str]:
        async with migrations.alone(connection):
            # First, because migrations name the table by the name that it has lost.
            undone = await moving.undo(connection)
            if self._wants_timescale:
                await timescale.provide(connection)
            await timescale.check_callable(connection)
            names = await migrations.migrate(connection)
            if names:
                await timescale.views(connection)
            return undone + names + await timescale.apply(connection, self._database.connection, note)

    async def pending(self) -> list[str]:
        """The names of what `migrate` would apply. Raises UserError where the database and this code do not fit."""
        async with self._database.connection() as connection:
            return await self._pending(connection)

    async def _pending(self, connection: Connection) -> list[str]:
        names = await moving.pending(connection)
        names += [migration.name for migration in await migrations.pending(connection)]
        return names + await timescale.pending(connection, wanted=self._wants_timescale)

    async def prepare(self, note: Note = quiet) -> list[str]:
        """Applies what is pending, as `migrate` does, and returns the steps' names.

        Raises UserError where something is pending that this user may not apply, or this user may not write.
        """
        async with self._database.connection() as connection, migrations.alone(connection):
            names = await self._pending(connection)
            if names and not await roles.owns(connection):
                user = connection.info.user
                named = " with 'timescale:' before the database's name" if timescale.EXTENSION in names else ""
                raise UserError(
                    f"the database lacks {', '.join(names)} and the user {user!r} does not own it: as its owner,"
                    f" run `tallymark migrate --writer {user}`{named}, then start again"
                )
            applied = await self._migrate(connection, note) if names else []
            await roles.check_writer(connection)
            return applied

    async def check_columns(self) -> None:
        """Raises UserError where the database cannot lay out points as columns."""
        async with self._database.connection() as connection:
            await timescale.check_columns(connection)

    async def lay_out(self, before: datetime) -> int:
        """Lays out points before that time as columns; returns how many pieces of the table. Changes no answer."""
        async with self._database.connection() as connection:
            return await timescale.lay_out(connection, before)

    async def grant(
        self,
        *,
        writer: str | None = None,
        reader: str | None = None,
        account_reader: roles.AccountReader | None = None,
    ) -> None:
        """Gives roles what they need in this version (see `roles`). Raises UserError."""
        async with self.transaction() as connection:
            await roles.grant(connection, writer=writer, reader=reader, account_reader=account_reader)

    async def write(self, batch: Batch, beside: writer.Beside | None = None) -> WriteResult:
        """Writes a batch in one transaction; returns after its commit. Raises StoreUnavailable: nothing was kept.

        `beside` is called with the connection, last in the same transaction: both are committed, or neither. It may be
        called again after a transaction whose end nobody knows, and has to tell by itself whether its work is done.

        Data that the database cannot hold, whatever it is, would be sent for ever by a client that is told to retry:
        the batch is then halved until what cannot be held stands alone, and that goes to quarantine. `beside` is
        then committed with the last part.
        """
        try:
            [result] = await self.write_together([writer.encode(batch)], beside)
        except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as error:
            halves = writer.halved(batch, error)
            apart = [q for half in halves for q in half.quarantined if q.refusal.reason is Reason.NOT_STORABLE]
            done = WriteResult(conflicts=apart)
            for half in halves[:-1]:
                done += await self.write(half)
            return done + await self.write(halves[-1], beside)
        return result

    async def write_together(
        self, group: Sequence[writer.Encoded], beside: writer.Beside | None = None
    ) -> list[WriteResult]:
        """Writes batches in one transaction, as if one after the other; returns their results after its commit.

        Raises StoreUnavailable, or psycopg.Error where the group holds what the database does not take: nothing was
        kept.
        """
        return await _tried_again(lambda: self._write(group, beside))

    async def _write(self, group: Sequence[writer.Encoded], beside: writer.Beside | None) -> list[WriteResult]:
        async with self._database.prompt() as connection:
            return await writer.write(connection, group, self._dictionaries, beside)

    async def unseen(self, streams: Iterable[Stream]) -> list[Stream]:
        """The streams that have never been written, each once, in their order."""
        new = await resting(self._unknown(streams))
        there = await self.ask(lambda connection: dictionaries.there(connection, new)) if new else ()
        return [stream for stream in new if stream.id not in there]

    def _unknown(self, streams: Iterable[Stream]) -> Generator[None, None, list[Stream]]:
        wanted: dict[int, Stream] = {}
        for done, stream in enumerate(streams, 1):
            wanted[stream.id.int] = stream
            if done % dictionaries.LOOKED_THROUGH == 0:
                yield
        unknown = yield from self._dictionaries.unknown(wanted.values())
        new = {stream.id.int for stream in unknown}
        return [stream for identity, stream in wanted.items() if identity in new]

    async def meters(self, tenant: str, limit: int) -> list[Meter]:
        """The meters that a tenant has, by its usage and by its plans, so many at most. Raises StoreUnavailable."""
        return await self.ask(lambda connection: meters.of_tenant(connection, tenant, limit))

    async def refresh(self, limit: int | None = None) -> int:
        """Brings hours that have new points up to date, `limit` of them at most; returns how many account-hours."""
        async with self._database.connection() as connection:
            return await keeping.refresh(connection, limit)

    async def mark(self, keys: Iterable[tuple[datetime, str, str]]) -> None:
        """Says that hours, as (bucket, account, tenant), have to be recomputed; views take them from the points now."""
        async with self._database.connection() as connection:
            await hours.mark(connection, keys)

    async def mark_in(self, connection: Connection, keys: Iterable[tuple[datetime, str, str]]) -> None:
        """The same in a transaction that is under way."""
        await hours.mark(connection, keys)

    async def ask(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """The result of statements that write nothing and see a moment each: unlike a reader of the views they wait for
        nobody who changes the tables behind those. Raises StoreUnavailable."""
        return await _tried_again(lambda: self._ask(work))

    async def _ask(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._database.prompt() as connection:
            return await work(connection)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Connection]:
        """A connection in no transaction, for what holds a lock of its session."""
        async with self._database.connection() as connection:
            yield connection

    @asynccontextmanager
    async def reading(self, seconds: float | None = None) -> AsyncIterator[Connection]:
        """A connection whose statements all see one moment of the database and cannot write. `seconds`: none of them
        takes longer."""
        async with AsyncExitStack() as stack:
            # Here dead connections are found and dropped: a reader's own statements cannot be tried again for it.
            yield await _tried_again(lambda: self._begin(stack, "READ ONLY", seconds=seconds))

    @asynccontextmanager
    async def auditing(self, alone: str | None = None) -> AsyncIterator[Connection]:
        """A connection whose statements all see one moment of the database, and may write what they found. `alone`: a
        lock that nobody else has from before that moment until after the commit; waits for it."""
        async with AsyncExitStack() as stack:
            yield await _tried_again(lambda: self._begin(stack, "READ WRITE", alone))

    async def _begin(
        self, stack: AsyncExitStack, access: str, alone: str | None = None, seconds: float | None = None
    ) -> Connection:
        async with AsyncExitStack() as beginning:
            connection = await beginning.enter_async_context(self._database.connection())
            if alone is not None:
                await beginning.enter_async_context(held(connection, alone))
            row = await (await connection.execute(_MIGRATED_SQL)).fetchone()
            await beginning.enter_async_context(connection.transaction())
            await connection.execute(f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, {access}")
            if seconds is not None:
                await connection.execute(f"SET LOCAL statement_timeout = {seconds * 1000:.0f}")
            if row == (True,):
                await connection.execute(_HOLD_SQL)
            stack.push_async_exit(beginning.pop_all())
            return connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection in a transaction, for plans and subscriptions."""
        async with self._database.connection() as connection, connection.transaction():
            yield connection

    async def settle(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """The result of `work` in one transaction; tried again where the server rolled it back, so it must read what it
        decides by. Returns after the commit. Raises StoreUnavailable: nothing was kept, unless the answer to the commit
        was lost."""
        return await _tried_again(lambda: self._settle(work))

    async def _settle(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self.transaction() as connection:
            return await work(connection)


async def _tried_again(work: Callable[[], Awaitable[T]]) -> T:
    """The work's result, tried up to `MAX_ATTEMPTS` times where another try may succeed at once."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return await work()
        except StoreUnavailable as error:
            if attempt == MAX_ATTEMPTS or not is_worth_another_try(error.__cause__):
                raise
    raise AssertionError("the loop returns or raises")
