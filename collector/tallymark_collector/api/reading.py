"""Places and turns of those who ask, so that questions keep nobody who writes waiting, and nobody's the others'.

    a call: a place, from its head until its answer was read ─▶ a turn at the database ─▶ the answer, written

Readers have connections of their own. Three kinds of calls have places and turns apart in each tenant: of its customers
(credentials for one account), of the tenant itself, and of its administrators, who can so revoke a credential that
takes all there is. Of each credential there is a bound, too. Who waits comes to its turn in the order of coming.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

import psycopg

from tallymark_collector.access import Principal
from tallymark_collector.deadline import Deadline
from tallymark_collector.errors import Overloaded, StoreUnavailable, TakesTooLong
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection

AT_ONCE: Final = 4
"""Calls at the database, of all tenants together: connections of this process beside those that write."""
SECONDS: Final = 30.0
"""How long a call may take there."""


class Kind(enum.Enum):
    """Of calls."""

    CUSTOMERS = "customers"
    TENANT = "tenant"
    ADMINISTRATION = "administration"


TURNS: Final = {Kind.CUSTOMERS: 1, Kind.TENANT: 2, Kind.ADMINISTRATION: 1}
"""At once, of each tenant."""
PLACES: Final = {Kind.CUSTOMERS: 64, Kind.TENANT: 16, Kind.ADMINISTRATION: 16}
"""Calls of each tenant that arrive, wait, ask or are being read; more are told to come again."""
OF_CREDENTIAL: Final = 8
"""The same of each credential."""

_Whose: TypeAlias = "tuple[str, Kind]"


def kind_of(principal: Principal, *, administers: bool = False) -> Kind:
    """Of a call; `administers`: one that only administrators may make."""
    if administers:
        return Kind.ADMINISTRATION
    return Kind.TENANT if principal.account is None else Kind.CUSTOMERS


class Readers:
    """Who may ask the database now. One event loop owns it."""

    def __init__(self, store: Store, seconds: float = SECONDS) -> None:
        self.store: Final = store
        self._seconds = seconds
        self._all = asyncio.Semaphore(AT_ONCE)
        self._turns: WeakValueDictionary[_Whose, asyncio.Semaphore] = WeakValueDictionary()
        self._places: Counter[_Whose | str] = Counter()
        self._alone: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @contextmanager
    def place(self, principal: Principal, *, administers: bool = False) -> Iterator[None]:
        """For a call, until its answer was read. Raises Overloaded."""
        kind = kind_of(principal, administers=administers)
        whose = (principal.tenant, kind)
        for key, most in ((principal.credential, OF_CREDENTIAL), (whose, PLACES[kind])):
            if self._places[key] >= most:
                who = "this credential" if key == principal.credential else "this tenant"
                raise Overloaded(
                    f"{most} questions of {who} are under way, or their answers are not read: ask again when some are"
                )
        self._places.update((principal.credential, whose))
        try:
            yield
        finally:
            for key in (principal.credential, whose):
                self._places[key] -= 1
                if not self._places[key]:
                    del self._places[key]

    def alone(self, principal: Principal) -> asyncio.Semaphore:
        """For one call of the credential at a time."""
        found = self._alone.get(principal.credential)
        if found is None:
            found = self._alone[principal.credential] = asyncio.Semaphore(1)
        return found

    @asynccontextmanager
    async def turn(self, principal: Principal, *, administers: bool = False) -> AsyncIterator[None]:
        """Inside it a call may use the store. Raises TakesTooLong where that does not end in time."""
        kind = kind_of(principal, administers=administers)
        turns = self._turns.get((principal.tenant, kind))
        if turns is None:
            turns = self._turns[principal.tenant, kind] = asyncio.Semaphore(TURNS[kind])
        async with turns, self._all:
            with Deadline(self._seconds, self._too_long):
                yield

    @asynccontextmanager
    async def reading(self, principal: Principal, *, administers: bool = False) -> AsyncIterator[Connection]:
        """A connection that sees one moment and cannot write, in such a turn. Raises StoreUnavailable, too."""
        async with self.turn(principal, administers=administers):
            try:
                # The server gives up as well: where this process is lost, nobody is there to tell it to.
                async with self.store.reading(self._seconds) as connection:
                    yield connection
            except StoreUnavailable as error:
                if isinstance(error.__cause__, psycopg.errors.QueryCanceled):
                    raise self._too_long() from None
                raise

    def _too_long(self) -> TakesTooLong:
        return TakesTooLong(
            f"the answer takes more than {self._seconds:g} s: ask for a shorter range, one account or meter, or group"
            " by less; or somebody holds what it waits for"
        )
