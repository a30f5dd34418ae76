"""Turns of those who read, so that questions keep nobody who writes waiting, and one tenant's not the others'.

Readers have connections of their own. How many questions are under way is bounded, of each tenant too; so is how many
of a tenant wait, and how long a statement takes. The order among those who wait is the one in which they came.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from weakref import WeakValueDictionary

import psycopg

from tallymark_collector.errors import Overloaded, StoreUnavailable, TakesTooLong
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection

AT_ONCE: Final = 4
"""Questions under way, all tenants together: connections of this process beside those that write."""
OF_TENANT: Final = 2
"""The same of one tenant."""
WAITING: Final = 16
"""Calls of a tenant that wait or are under way; more are told to come again."""
SECONDS: Final = 30.0
"""How long a statement may take."""


class Readers:
    """Who may ask the database now. One event loop owns it."""

    def __init__(self, store: Store, seconds: float = SECONDS) -> None:
        self.store: Final = store
        self._seconds = seconds
        self._all = asyncio.Semaphore(AT_ONCE)
        self._of_tenant: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._here: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Inside it one of the tenant's calls may use the store. Raises Overloaded."""
        if self._here[tenant] >= WAITING:
            raise Overloaded(f"{WAITING} questions of this tenant wait or are under way: ask again when some are done")
        turns = self._of_tenant.get(tenant)
        if turns is None:
            turns = self._of_tenant[tenant] = asyncio.Semaphore(OF_TENANT)
        self._here[tenant] += 1
        try:
            async with turns, self._all:
                yield
        finally:
            self._here[tenant] -= 1
            if not self._here[tenant]:
                del self._here[tenant]

    @asynccontextmanager
    async def reading(self, tenant: str) -> AsyncIterator[Connection]:
        """A connection that sees one moment and cannot write, in the tenant's turn. Raises Overloaded, TakesTooLong
        where a statement does not end in time, and StoreUnavailable."""
        async with self.turn(tenant):
            try:
                async with self.store.reading() as connection:
                    await connection.execute(
                        "SELECT set_config('statement_timeout', %s, true)", [f"{self._seconds * 1000:.0f}"]
                    )
                    yield connection
            except StoreUnavailable as error:
                if isinstance(error.__cause__, psycopg.errors.QueryCanceled):
                    raise TakesTooLong(
                        f"the answer takes more than {self._seconds:g} s: ask for a shorter range, one account or"
                        " meter, or group by less"
                    ) from None
                raise
