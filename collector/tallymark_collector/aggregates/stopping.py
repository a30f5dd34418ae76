"""Transactions that writers wait for, and never for long.

What has to be done at last while nobody writes is short; that nothing makes it long after all (somebody's lock, a
question with more to read than was thought of) is held to here: then the transaction ends with nothing done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, Protocol

import psycopg
from psycopg.errors import LockNotAvailable, QueryCanceled
from psycopg.rows import TupleRow
from psycopg.sql import Composed

from tallymark_collector.store.database import Connection

STOPPED: Final = 2.0
"""Seconds that writers wait for such a transaction, waiting for others' locks included."""
LOCK_TIMEOUT: Final = "1s"
"""How long it waits for a lock, writers behind it."""

TOO_LONG: Final = (LockNotAvailable, QueryCanceled)
"""How it ends then; another time it may not."""


class Asking(Protocol):
    """Runs a statement."""

    def __call__(
        self, query: str | Composed, params: Sequence[Any] | Mapping[str, Any] | None = None
    ) -> Awaitable[psycopg.AsyncCursor[TupleRow]]:
        """As a connection does."""
        ...


class Stopping:
    """The statements of a transaction, from its first lock on."""

    def __init__(self, connection: Connection, seconds: float = STOPPED) -> None:
        self._connection = connection
        self._clock = asyncio.get_running_loop().time
        self._end = self._clock() + seconds

    async def execute(
        self, query: str | Composed, params: Sequence[Any] | Mapping[str, Any] | None = None
    ) -> psycopg.AsyncCursor[TupleRow]:
        """Runs a statement within the time that is left. Raises one of `TOO_LONG`."""
        left = self._end - self._clock()
        if left <= 0:
            raise QueryCanceled(f"writers had waited for {STOPPED:g} s, and there was more to do")
        await self._connection.execute(
            f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; SET LOCAL statement_timeout = {max(int(left * 1000), 1)}"
        )
        return await self._connection.execute(query, params)
