"""Connections: a pool, what every connection of ours has set, and which of psycopg's errors are worth a retry."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from tallymark_collector.errors import StoreUnavailable, UserError

SCHEMA: Final = "tallymark"
MIN_SERVER_VERSION: Final = 140000
"""date_bin() came with PostgreSQL 14."""
POOL_SIZE: Final = 6
POOL_WAIT: Final = 5.0
"""Seconds to wait for a connection before the store counts as unavailable: less than the 10 s that OTLP exporters
wait for an answer, so that clients hear what is wrong and when to come back."""

RECONNECT_WAIT: Final = 2.0
"""Seconds after which the pool stops doubling its pause between attempts to connect; the next request begins anew. With
the pool's own 300 s, a database that was away for two minutes would stay "away" for minutes more."""

_TRANSIENT_CLASSES: Final = ("08", "25", "40", "53", "55", "57", "58")
"""SQLSTATE classes where the same statement may succeed later: connection, transaction state (a read-only standby),
rollback (deadlock), resources, object state (lock), operator intervention (shutdown), system error."""

_MOVING: Final = '"usage_point"'
"""The table that cannot be found while it is moved into a hypertable (see engines/timescale.py)."""

Connection = psycopg.AsyncConnection[TupleRow]


class Database:
    """A pool of connections to one database, each with our schema, UTC and durable commits."""

    def __init__(self, dsn: str, *, pool_size: int = POOL_SIZE, connected: Callable[[], None] = lambda: None) -> None:
        """`connected` is called after each new connection: the server behind it may be another one than before."""

        async def prepare(connection: Connection) -> None:
            await configure(connection)
            connected()

        self.dsn = dsn
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            dsn,
            min_size=1,
            max_size=pool_size,
            timeout=POOL_WAIT,
            reconnect_timeout=RECONNECT_WAIT,
            open=False,
            name="tallymark",
            kwargs={"autocommit": True, "application_name": "tallymark"},
            configure=prepare,
            # No check on the way out: it costs a round trip for every request and pauses for a second and more after
            # each connection that it finds dead. A dead one fails its first statement, and `Store` tries again.
        )

    async def open(self) -> None:
        """Connects. Raises UserError where the server cannot be reached or is too old."""
        try:
            # One plain connection first: the pool would keep the reason of a failure to itself and its log.
            async with await psycopg.AsyncConnection.connect(self.dsn, connect_timeout=int(POOL_WAIT)) as connection:
                version = connection.info.server_version
        except psycopg.Error as error:
            raise UserError(f"cannot connect to the database: {error}") from error
        if version < MIN_SERVER_VERSION:
            raise UserError(f"PostgreSQL {version // 10000} is too old: Tallymark needs 14 or newer")
        await self._pool.open()

    async def close(self) -> None:
        """Closes every connection."""
        await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit mode. Raises StoreUnavailable where a retry may help."""
        try:
            async with self._pool.connection() as connection:
                yield connection
        except psycopg.Error as error:
            if is_transient(error):
                unavailable = StoreUnavailable(f"the database did not answer: {error}")
                unavailable.away = error.sqlstate is None
                raise unavailable from error
            raise


async def configure(connection: Connection) -> None:
    """Sets what statements of ours rely on."""
    await connection.execute(
        f"SET search_path = {SCHEMA}, public; SET TimeZone = 'UTC'; SET synchronous_commit = on;"
        # A transaction that waits for a lock must see what was committed while it waited.
        " SET default_transaction_isolation = 'read committed';"
        " SET intervalstyle = 'iso_8601'; SET client_min_messages = warning"
    )
    # Where TimescaleDB is there. A late batch may touch any number of rows in columns: past TimescaleDB's limit it
    # would be refused for ever, as if the server were short of something. And SkipScan fails on some DISTINCTs.
    await connection.execute(
        """SELECT set_config(name, CASE name WHEN 'timescaledb.enable_skipscan' THEN 'off' ELSE '0' END, false)
           FROM pg_settings
           WHERE name IN ('timescaledb.max_tuples_decompressed_per_dml_transaction', 'timescaledb.enable_skipscan')"""
    )


def is_worth_another_try(error: BaseException | None) -> bool:
    """True if the same transaction may succeed at once: the server rolled it back, or the connection was a dead one."""
    if isinstance(error, (PoolTimeout, PoolClosed, TooManyRequests)):
        return False
    if not isinstance(error, psycopg.OperationalError):
        return False
    return error.sqlstate is None or error.sqlstate[:2] in ("40", "57")


def is_transient(error: psycopg.Error) -> bool:
    """True if the same statement may succeed later."""
    if isinstance(error, (PoolTimeout, PoolClosed, TooManyRequests)):
        return True
    if error.sqlstate is None:
        # No answer from a server at all: the connection was refused, cut, or closed under us.
        return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
    if isinstance(error, psycopg.errors.UndefinedTable):
        return _MOVING in (error.diag.message_primary or "")
    return error.sqlstate[:2] in _TRANSIENT_CLASSES
