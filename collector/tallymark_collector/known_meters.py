"""The meters that tenants have, remembered: by their names usage that names nobody is told from what is no usage.

They are read when a tenant is first seen and every now and then from then on, and this process adds those that it has
written. So no request asks the database for them, and none of a process's own meters is unknown to it. What another
process has written first is unknown here until the next reading: then usage of it that names nobody, and comes without
any that does, is passed over.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field
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
    """What is known of one tenant. A meter stays one, so names are only ever added."""

    meters: set[Meter] = field(default_factory=set)
    read_at: float = float("-inf")


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

    def add(self, tenant: str, meters: Iterable[Meter]) -> None:
        """Says that points of these meters are committed."""
        known = self._tenants.get(tenant)
        if known is None:  # forgotten meanwhile: it will be read, with these
            return
        before = len(known.meters)
        for meter in meters:
            if len(known.meters) >= self._limit:
                break
            known.meters.add(meter)
        self._size += len(known.meters) - before
        if self._size > self._limit_of_all:
            self._forget(tenant)

    async def _read(self, tenant: str) -> _Known:
        at = self._clock()  # before the query: what is written after it began is not in it
        found = await self._directory.meters(tenant, self._limit)
        # What was known stays: this process may have written it after the query began.
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = _Known()
            self._size += 1
        known.read_at = at
        self._tenants.move_to_end(tenant)
        self.add(tenant, found)
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
