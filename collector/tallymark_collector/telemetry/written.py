"""What was committed, by tenant, and how long transactions took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.telemetry import requests
from tallymark_collector.telemetry.tenants import Tenants

Committed = Callable[[float, int, int], None]
"""Is told of each transaction: seconds, requests and points in it."""


class Writing(Protocol):
    """A way to the store."""

    async def write(self, batch: Batch) -> WriteResult:
        """Writes all of the batch or raises; returns after the commit."""
        ...


class Written:
    """A way to the store that counts what was committed for the current request's tenant."""

    def __init__(self, behind: Writing, tenants: Tenants) -> None:
        self.points: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.evidence: Counter[str] = Counter()
        self.quarantined: Counter[tuple[str, str]] = Counter()
        """By tenant and reason."""
        self._behind = behind
        self._tenants = tenants

    async def write(self, batch: Batch) -> WriteResult:
        """Writes and counts; raises what the way behind raises, and then nothing is counted."""
        result = await self._behind.write(batch)
        call = requests.current()
        tenant = self._tenants.label("" if call is None else call.tenant)
        self.points[tenant] += result.inserted
        if result.duplicates:
            self.duplicates[tenant] += result.duplicates
        if result.evidence:
            self.evidence[tenant] += result.evidence
        for refused in (batch.quarantined, result.conflicts):
            for item in refused:
                self.quarantined[tenant, item.refusal.reason.value] += 1
        return result


class Timed:
    """A store that tells of each of its transactions that was committed."""

    def __init__(self, store: Writing, committed: Committed) -> None:
        self._store = store
        self._committed = committed

    async def write(self, batch: Batch) -> WriteResult:
        """Writes one request's batch."""
        with self._transaction(1, len(batch.points)):
            return await self._store.write(batch)

    @contextmanager
    def _transaction(self, requests: int, points: int) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._committed(time.monotonic() - began, requests, points)
