"""Rows for several tables with one message: all of them are kept, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from struct import pack

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from tallymark_collector.store.copying import Copy, copy
from tallymark_collector.store.database import Connection

MANY = 5000
"""Rows, more than are sent at once."""


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as found:
        await found.execute("CREATE TABLE one (n int PRIMARY KEY); CREATE TABLE other (n int CHECK (n < 10))")
        yield found
        assert found.info.transaction_status is TransactionStatus.IDLE, "it can be used again"


def into(table: str, numbers: Sequence[int]) -> Copy:
    return Copy(f"COPY {table} FROM STDIN (FORMAT binary)", [pack(">hii", 1, 4, n) for n in numbers])


async def kept(connection: Connection) -> tuple[int, int]:
    """Rows of both tables."""
    found = await connection.execute("SELECT (SELECT count(*) FROM one), (SELECT count(*) FROM other)")
    [(one, other)] = await found.fetchall()
    return one, other


async def test_all_rows_are_there_when_it_returns(connection: Connection, dsn: str) -> None:
    await copy(connection, into("one", range(MANY)), into("other", [1, 2]))
    async with await psycopg.AsyncConnection.connect(dsn) as another:
        assert await kept(another) == (MANY, 2)


async def test_no_rows_are_a_copy_too(connection: Connection) -> None:
    await copy(connection, into("one", []), into("other", [1]))
    assert await kept(connection) == (0, 1)


async def test_statements_before_a_copy_are_run_first(connection: Connection) -> None:
    made = Copy("CREATE TABLE IF NOT EXISTS third (n int); " + into("third", []).statement, into("third", [7]).rows)
    await copy(connection, into("one", [1]), made)
    await copy(connection, made)
    assert await (await connection.execute("SELECT n FROM third")).fetchall() == [(7,), (7,)]


async def test_in_a_transaction_its_end_decides(connection: Connection) -> None:
    async with connection.transaction(force_rollback=True):
        await copy(connection, into("one", [1]), into("other", [1]))
        assert await kept(connection) == (1, 1)
    assert await kept(connection) == (0, 0)


@pytest.mark.parametrize("rows", [[3, 4, 3], [*range(MANY), 3]])
async def test_a_row_that_is_there_already_leaves_nothing(connection: Connection, rows: list[int]) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation, match="one_pkey") as refused:
        await copy(connection, into("one", rows), into("other", [1]))
    assert refused.value.diag.table_name == "one"
    assert await kept(connection) == (0, 0)


async def test_what_fails_last_takes_the_first_with_it(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        await copy(connection, into("one", [1]), into("other", [10]))
    with pytest.raises(psycopg.errors.UndefinedTable):
        await copy(connection, into("one", [1]), into("nowhere", [1]))
    await connection.execute("ALTER TABLE other ADD UNIQUE (n) DEFERRABLE INITIALLY DEFERRED")
    with pytest.raises(psycopg.errors.UniqueViolation):  # at the commit
        await copy(connection, into("one", [1]), into("other", [2, 2]))
    assert await kept(connection) == (0, 0)


async def test_statements_that_do_not_fit_the_rows_are_refused(connection: Connection) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="no COPY FROM STDIN: SELECT 1"):
        await copy(connection, Copy("SELECT 1", [b""]))


async def test_who_stops_waiting_leaves_nothing(connection: Connection, dsn: str) -> None:
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute("LOCK TABLE other")
        copying = asyncio.ensure_future(copy(connection, into("one", range(MANY)), into("other", [1])))
        await waits(dsn, connection)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
    assert await kept(connection) == (0, 0)


async def test_a_session_that_is_ended_says_so_and_leaves_nothing(connection: Connection, dsn: str) -> None:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as holder:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as mine, holder.transaction():
            await holder.execute("LOCK TABLE other")
            copying = asyncio.ensure_future(copy(mine, into("one", range(MANY)), into("other", [1])))
            await waits(dsn, mine)
            await holder.execute("SELECT pg_terminate_backend(%s)", [mine.info.backend_pid])
            with pytest.raises(psycopg.errors.AdminShutdown):
                await copying
        assert await kept(holder) == (0, 0)


async def waits(dsn: str, connection: Connection) -> None:
    """Returns once the connection's session waits for a lock."""
    asked = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as looking:
        while True:  # pytest has a time-out
            if await (await looking.execute(asked, [connection.info.backend_pid])).fetchall():
                return
            await asyncio.sleep(0.01)
