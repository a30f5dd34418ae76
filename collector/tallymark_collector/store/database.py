"""Connections: a pool, what every connection of ours has set, and which of psycopg's errors are worth a retry."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.settings import DATABASE_TIMEOUT

logger = logging.getLogger(__name__)

SCHEMA: Final = "tallymark"
APPLICATION: Final = "tallymark"
"""Our sessions' name in pg_stat_activity."""

MIN_SERVER_VERSION: Final = 140000
"""date_bin() came with PostgreSQL 14."""
POOL_SIZE: Final = 6
POOL_WAIT: Final = 5.0
"""Seconds to wait for a connection before the store counts as unavailable: less than the 10 s that OTLP exporters
wait for an answer, so that clients hear what is wrong and when to come back."""

_ALIVE: Final[Mapping[str, Any]] = {
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
}
"""How libpq finds out, over TCP, that nobody is at the other end (seconds; the last in milliseconds). What the
connection string says goes before it."""

RECONNECT_WAIT: Final = 2.0
"""Seconds after which the pool stops doubling its pause between attempts to connect; the next request begins anew. With
the pool's own 300 s, a database that was away for two minutes would stay "away" for minutes more."""

_TRANSIENT_CLASSES: Final = ("08", "25", "40", "53", "55", "57", "58")
"""SQLSTATE classes where the same statement may succeed later: connection, transaction state (a read-only standby),
rollback (deadlock), resources, object state (lock), operator intervention (shutdown), system error."""

_MOVING: Final = '"usage_point"'
"""The table that cannot be found while it is moved into a hypertable (see engines/moving.py)."""

_LEFT_SQL: Final = """
WITH RECURSIVE ahead (pid) AS (
    SELECT unnest(pg_blocking_pids(%(pid)s))
    UNION
    SELECT unnest(pg_blocking_pids(ahead.pid)) FROM ahead
)
SELECT pid FROM ahead JOIN pg_stat_activity USING (pid)
WHERE application_name = %(application)s AND usename = current_user
  AND wait_event_type = 'Client' AND clock_timestamp() - state_change > %(patience)s * interval '1 s'"""
"""Sessions of collectors ahead of ours that have waited for their client longer than it would: it was killed
behind a connection that carries nothing any more, or behind a proxy that keeps it open. A collector that lives is never
so long within one statement that it feeds, nor between two of one transaction."""

_END_SQL: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = ANY(%(pids)s) AND application_name = %(application)s AND usename = current_user"""

Connection = psycopg.AsyncConnection[TupleRow]


class Pool(NamedTuple):
    """Connections of a pool, and who waits for one."""

    used: int
    idle: int
    waiting: int


class Database:
    """A pool of connections to one database, each with our schema, UTC and durable commits."""

    def __init__(
        self,
        dsn: str,
        *,
        pool_size: int = POOL_SIZE,
        patience: float = DATABASE_TIMEOUT,
        connected: Callable[[], None] = lambda: None,
    ) -> None:
        """`connected` is called after each new connection: the server behind it may be another one than before."""

        async def prepare(connection: Connection) -> None:
            await configure(connection)
            connected()

        self.dsn = dsn
        self._patience = patience
        self._ending: set[asyncio.Task[None]] = set()
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            make_conninfo("", **{**_ALIVE, **conninfo_to_dict(dsn)}),
            min_size=1,
            max_size=pool_size,
            timeout=POOL_WAIT,
            reconnect_timeout=RECONNECT_WAIT,
            open=False,
            name="tallymark",
            kwargs={"autocommit": True, "application_name": APPLICATION},
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
        # One connection, and no other is made before it is used: see `find_schema`.
        try:
            await self._pool.open(wait=True, timeout=POOL_WAIT)
        except PoolTimeout as error:
            raise UserError(f"cannot connect to the database: {error}") from error

    def pool(self) -> Pool:
        """How many connections do what. Thread-safe."""
        stats = self._pool.get_stats()
        idle = stats.get("pool_available", 0)
        return Pool(max(stats.get("pool_size", 0) - idle, 0), idle, stats.get("requests_waiting", 0))

    async def close(self) -> None:
        """Closes every connection."""
        await self._pool.close()
        await asyncio.gather(*self._ending)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit mode. Raises StoreUnavailable where a retry may help."""
        try:
            async with self._pool.connection() as connection:
                yield connection
        except psycopg.Error as error:
            if is_transient(error):
                unavailable = StoreUnavailable(_reason(error))
                unavailable.away = error.sqlstate is None
                raise unavailable from error
            raise

    @asynccontextmanager
    async def prompt(self) -> AsyncIterator[Connection]:
        """The same for what is over within the patience. What takes longer ends as StoreUnavailable, whether it was
        committed or not, and its session is ended at the server too."""
        async with self.connection() as connection:
            loop = asyncio.get_running_loop()
            handle = loop.call_later(self._patience, self._give_up, connection)
            began = loop.time()
            try:
                yield connection
            except psycopg.Error as error:
                if loop.time() - began < self._patience:
                    raise
                # Not its cause: whoever looks for an error that is worth another try would wait as long again.
                unavailable = StoreUnavailable(f"the database did not answer within {self._patience:g} s: {error}")
                unavailable.away = True
                raise unavailable from None
            finally:
                handle.cancel()

    def _give_up(self, connection: Connection) -> None:
        """Shuts the connection's socket, which wakes whoever waits for it, and has the server end its session: that
        may wait for the rest of a COPY, with all of its locks."""
        logger.warning("the database has not answered for %g s: the connection is given up", self._patience)
        with socket.socket(fileno=os.dup(connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)
        ending = asyncio.get_running_loop().create_task(self._end(connection.info.backend_pid))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _end(self, pid: int) -> None:
        """Ends a session of ours, and those it waits for that nobody is behind any more."""
        mine = {"pid": pid, "application": APPLICATION, "patience": self._patience}
        try:
            # Not one of the pool: those may all wait for that session.
            async with await psycopg.AsyncConnection.connect(
                self.dsn, connect_timeout=int(POOL_WAIT), autocommit=True
            ) as other:
                left = await (await other.execute(_LEFT_SQL, mine)).fetchall()
                await other.execute(_END_SQL, {**mine, "pids": [pid, *(left_pid for (left_pid,) in left)]})
        except psycopg.Error as error:
            logger.warning("the session %s could not be ended at the server, which may do so itself: %s", pid, error)
            return
        for (left_pid,) in left:
            logger.warning(
                "the session %s held what a write waited for, and no collector was behind it any more: it was ended",
                left_pid,
            )


async def configure(connection: Connection) -> None:
    """Sets what statements of ours rely on."""
    await find_schema(connection)
    await connection.execute(
        "SET TimeZone = 'UTC'; SET synchronous_commit = on;"
        # A transaction that waits for a lock must see what was committed while it waited.
        " SET default_transaction_isolation = 'read committed';"
        " SET intervalstyle = 'iso_8601'; SET client_min_messages = warning;"
        # The server's side of `_ALIVE`: a collector that has lost its power must not hold locks for hours.
        " SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
    )
    # Where TimescaleDB is there. A late batch may touch any number of rows in columns: past TimescaleDB's limit it
    # would be refused for ever, as if the server were short of something. And SkipScan fails on some DISTINCTs.
    await connection.execute(
        """SELECT set_config(name, CASE name WHEN 'timescaledb.enable_skipscan' THEN 'off' ELSE '0' END, false)
           FROM pg_settings
           WHERE name IN ('timescaledb.max_tuples_decompressed_per_dml_transaction', 'timescaledb.enable_skipscan')"""
    )


async def find_schema(connection: Connection) -> None:
    """Has names without a schema looked up in ours.

    To be said again after the schema may have been made: a session that looks names up for the first time while another
    commits CREATE SCHEMA may miss it for good (PostgreSQL 18.4; 41 of 8,000 times when both came within 6 ms).
    """
    await connection.execute(f"SET search_path = {SCHEMA}, public")


def _reason(error: psycopg.Error) -> str:
    if isinstance(error, psycopg.errors.UndefinedTable):
        return (
            "the points are being moved to TimescaleDB, or such a move was interrupted: `tallymark status` says which"
        )
    return f"the database did not answer: {error}"


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
