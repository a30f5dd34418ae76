"""What was committed, by tenant, and how long transactions took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.telemetry.tenants import Tenants

Committed = Callable[[float, int, int], None]
"""Is told of each transaction: seconds, requests and points in it."""


class Writing(Protocol):
    """A way to the store."""

    async def write(self, batch: Batch) -> WriteResult:
        """Writes all of the batch or raises; returns after the commit."""
        ...


class Encoded(Protocol):
    """A batch in the form that the database takes."""

    @property
    def batch(self) -> Batch: ...


E_contra = TypeVar("E_contra", bound=Encoded, contravariant=True)
E = TypeVar("E", bound=Encoded)


class WritingTogether(Writing, Protocol[E_contra]):
    """A store that writes batches of several requests in one transaction."""

    async def write_together(self, group: Sequence[E_contra]) -> list[WriteResult]:
        """Writes all of them or raises; returns after the commit."""
        ...


class Written:
    """What was committed, by tenant."""

    def __init__(self, tenants: Tenants) -> None:
        self.points: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.evidence: Counter[str] = Counter()
        self.quarantined: Counter[tuple[str, str]] = Counter()
        """By tenant and reason."""
        self._tenants = tenants

    def add(self, batch: Batch, result: WriteResult) -> None:
        """Counts a batch that was committed."""
        tenant = self._tenants.label(batch.tenant)
        self.points[tenant] += result.inserted
        if result.duplicates:
            self.duplicates[tenant] += result.duplicates
        if result.evidence:
            self.evidence[tenant] += result.evidence
        for refused in (batch.quarantined, result.conflicts):
            for item in refused:
                self.quarantined[tenant, item.refusal.reason.value] += 1


class Counted:
    """A way to the store, of which is counted what was committed."""

    def __init__(self, behind: Writing, written: Written) -> None:
        self._behind = behind
        self._written = written

    async def write(self, batch: Batch) -> WriteResult:
        """Writes and counts; raises what the way behind raises, and then nothing is counted."""
        result = await self._behind.write(batch)
        self._written.add(batch, result)
        return result


class Timed(Generic[E]):
    """A store that tells of each of its transactions that was committed."""

    def __init__(self, store: WritingTogether[E], committed: Committed) -> None:
        self._store = store
        self._committed = committed

    async def write(self, batch: Batch) -> WriteResult:
        """Writes one request's batch."""
        with self._transaction(1, len(batch.points)):
            return await self._store.write(batch)

    async def write_together(self, group: Sequence[E]) -> list[WriteResult]:
        """Writes several requests' batches."""
        with self._transaction(len(group), sum(len(each.batch.points) for each in group)):
            return await self._store.write_together(group)

    @contextmanager
    def _transaction(self, requests: int, points: int) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._committed(time.monotonic() - began, requests, points)
