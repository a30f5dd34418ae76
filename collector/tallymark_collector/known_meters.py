"""The meters that tenants charge for, remembered: by their names usage that names nobody is told from what is no usage.

They are read when a tenant is first seen and every now and then from then on, so that no request asks the database for
them. It is the plans that say which they are, not what was sent: else one point of some other software's metric that
names an account would make all points of it that name none usage of nobody, for good.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass
from typing import Final, Protocol

from tallymark_collector.processors.meters import Meter

REMEMBERED_SECONDS: Final = 60.0
"""How long what was read counts."""
MAX_METERS: Final = 10_000
"""Of one tenant; what is beyond is known by the accounts that it names alone."""
MAX_REMEMBERED: Final = 200_000
"""Of all tenants, each of which counts for one too; at the limit those of whoever has been silent for longest are
forgotten, and read again."""


class Directory(Protocol):
    """Where a tenant's meters are looked up: the database, or a test."""

    async def meters(self, tenant: str, limit: int) -> Collection[Meter]:
        """So many at most. Raises TransientError."""
        ...


@dataclass(slots=True)
class _Known:
    """What is known of one tenant."""

    meters: frozenset[Meter]
    read_at: float


class KnownMeters:
    """Tenants' meters. One event loop owns it."""

    def __init__(
        self,
        directory: Directory,
        clock: Callable[[], float] = time.monotonic,
        seconds: float = REMEMBERED_SECONDS,
        *,
        limit: int = MAX_METERS,
        limit_of_all: int = MAX_REMEMBERED,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._seconds = seconds
        self._limit = limit
        self._limit_of_all = limit_of_all
        self._tenants: OrderedDict[str, _Known] = OrderedDict()
        self._reading: dict[str, asyncio.Task[_Known]] = {}
        self._size = 0

    @property
    def size(self) -> int:
        """Meters and tenants that are remembered now."""
        return self._size

    async def of(self, tenant: str) -> Container[Meter]:
        """The tenant's meters, as far as they are known. Raises TransientError where they cannot be read now: then
        nothing could be written either."""
        known = self._tenants.get(tenant)
        if known is not None and self._clock() - known.read_at < self._seconds:
            self._tenants.move_to_end(tenant)
            return known.meters
        reading = self._reading.get(tenant)
        if reading is None:
            reading = self._reading[tenant] = asyncio.create_task(self._read(tenant))
            reading.add_done_callback(lambda task: self._was_read(tenant, task))
        # Others wait for the same answer: that one of them hangs up must not take it from them.
        return (await asyncio.shield(reading)).meters

    async def _read(self, tenant: str) -> _Known:
        at = self._clock()  # before the query: what is applied after it began is not in it
        known = _Known(frozenset(await self._directory.meters(tenant, self._limit)), at)
        before = self._tenants.pop(tenant, None)
        self._size += len(known.meters) - len(before.meters) if before else len(known.meters) + 1
        self._tenants[tenant] = known
        if self._size > self._limit_of_all:
            self._forget(tenant)
        return known

    def _forget(self, present: str) -> None:
        """Makes room, whatever is left of it for this tenant."""
        for tenant in list(self._tenants):
            if self._size <= self._limit_of_all:
                break
            if tenant != present:
                self._size -= 1 + len(self._tenants.pop(tenant).meters)

    def _was_read(self, tenant: str, task: asyncio.Task[_Known]) -> None:
        del self._reading[tenant]
        if not task.cancelled():
            task.exception()  # whoever asked may have hung up
