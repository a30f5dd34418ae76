"""Group commit: requests that arrive while a transaction is under way are written together by the next one.

There is one writer in a process. It waits for nobody: whatever is there when a transaction has ended becomes the next
group, so requests that come alone are written alone, and the busier it gets, the more of them share a commit. A
request is answered after the commit of its group, with the result of its own points.

Requests of a group are nothing to each other. What the database does not take as a group is written by halves, so that
a request it cannot hold, or that fails for any reason of its own, fails alone: one among n costs about 2 log2 n
transactions more. For some groups afterwards its tenant's requests are written apart from the others', who then have
nothing to do with it. One whose client hangs up while it waits is taken out; once its group is under way it is written,
and the client's retry will be a duplicate.

A group that the database did not answer for in time would be given up again, were the next one as large: so the next
one has half as much, down to one request, and each success lets it grow again, quickly while it is small.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import psycopg

from tallymark_collector.errors import Overloaded, StoreUnavailable
from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.resting import resting
from tallymark_collector.settings import Limits
from tallymark_collector.store import weighing, writer
from tallymark_collector.store.queueing import FairQueue, Request, Room
from tallymark_collector.telemetry.tenants import Tenants

APART: Final = 16
"""Groups for which a tenant is written apart, after one of its requests has broken one."""
IN_VAIN: Final = 3
"""Requests that the database does not take one after the other, for now, before it is left alone with the group."""
GROWTH: Final = 16
"""A group that had to shrink grows by this part of its bounds at each success, or doubles where that is less."""


class Withdrawn(asyncio.CancelledError):
    """Whoever sent a request has hung up before it was its turn: nothing of it is kept. It is told to nobody, and ends
    a task as any cancellation does."""


class WritingTogether(Protocol):
    """What is needed of a store."""

    async def write_together(self, group: Sequence[writer.Encoded]) -> list[WriteResult]:
        """Writes all of them or raises; returns after the commit."""
        ...

    async def write(self, batch: Batch) -> WriteResult:
        """Writes one, apart from what the database cannot hold; or raises."""
        ...


@dataclass(slots=True)
class Progress:
    """What has been done since the start."""

    groups: int = 0
    """Transactions that were tried for one or more requests together."""
    requests: int = 0
    """Requests in them: `requests / groups` shared a commit on average."""
    broken_groups: int = 0
    """Groups that were written by halves, since the database did not take them together."""
    shrunk: int = 0
    """Groups that were given up, so that the next one was half as large."""
    refused: Counter[str] = field(default_factory=Counter)
    """Requests that found no room to wait, or gave it to another tenant's; by tenant, as metrics name them."""
    commit_seconds: float = 0.0
    """Time that the groups took, from the first statement to the answer."""


class _Waiting(Request):
    __slots__ = ("answer", "encoded")

    def __init__(self, encoded: writer.Encoded, of_points: int) -> None:
        batch = encoded.batch
        said = (batch.points, batch.evidence, batch.quarantined, batch.controls, batch.closings, batch.counts)
        size = of_points + weighing.of_others(batch, encoded.lines)
        super().__init__(batch.tenant, sum(map(len, said)), size, time.monotonic())
        self.encoded: Final = encoded
        self.answer: Final[asyncio.Future[WriteResult]] = asyncio.get_running_loop().create_future()


class Committing:
    """A process's way to its store; what the pipeline writes to. `committing` starts and ends one."""

    def __init__(self, store: WritingTogether, limits: Limits, tenants: Tenants | None = None) -> None:
        """`tenants` has their names in what is counted."""
        self.progress = Progress()
        self.running: asyncio.Task[None]
        """What writes; it ends only at the end."""
        self._store = store
        self._limits = limits
        self._tenants = tenants or Tenants()
        self._queue: FairQueue[_Waiting] = FairQueue(Room(limits.queued_points, limits.queued_bytes))
        self._whole = Room(limits.group_points, limits.group_bytes)
        self._group = self._whole
        """What the next group may have."""
        self._apart: dict[str, int] = {}
        """Tenants that are written apart, each for so many groups more."""
        self._arrived = asyncio.Event()
        self._ending = False

    @property
    def queued_requests(self) -> int:
        """Requests that wait for the next transaction."""
        return len(self._queue)

    @property
    def queued_points(self) -> int:
        """Their points, and whatever else they hold."""
        return self._queue.points

    @property
    def queued_bytes(self) -> int:
        """About what they keep in memory."""
        return self._queue.bytes

    @property
    def oldest_seconds(self) -> float:
        """How long the oldest of them has waited."""
        oldest = self._queue.oldest
        return 0.0 if oldest is None else time.monotonic() - oldest

    async def write(self, batch: Batch) -> WriteResult:
        """Writes a batch together with others'; returns after the commit. Raises StoreUnavailable or Overloaded, and
        Withdrawn where the caller is cancelled before it was its turn: nothing of it was kept."""
        try:
            of_points = await resting(weighing.of_points(batch.points))
            waiting = _Waiting(await resting(writer.encoding(batch)), of_points)
        except psycopg.DataError:
            return await self._store.write(batch)  # which finds out what it is that no row can hold
        except asyncio.CancelledError as error:
            raise Withdrawn from error
        try:
            if self._ending:
                raise Overloaded("the collector is being stopped")  # noqa: TRY301 - refused like the others
            displaced = self._queue.put(waiting)
        except Overloaded as error:
            self._count_refused(waiting)
            error.retry_after = self._limits.retry_after
            raise
        for gone in displaced:
            self._refuse(gone, "another tenant needed the room in the queue")
        self._arrived.set()
        try:
            return await waiting.answer
        except asyncio.CancelledError as error:
            if self._queue.discard(waiting):
                raise Withdrawn from error
            raise  # its group is under way, and is written

    async def run(self) -> None:
        """Writes what waits, until `end` was called and nothing waits any more."""
        try:
            while True:
                group = self._queue.take(self._group)
                if group:
                    await self._write(group)
                elif self._ending:
                    return
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:
            self._ending = True
            for left in self._queue.take(Room(2**62, 2**62)):
                self._refuse(left, "the collector was stopped before it was written")

    def end(self) -> None:
        """Takes no more; `run` returns when what was taken is written."""
        self._ending = True
        self._arrived.set()

    def _refuse(self, waiting: _Waiting, why: str) -> None:
        if waiting.answer.done():
            return
        self._count_refused(waiting)
        error = Overloaded(why)
        error.retry_after = self._limits.retry_after
        _fail(waiting, error)

    def _count_refused(self, waiting: _Waiting) -> None:
        self.progress.refused[self._tenants.label(waiting.tenant)] += 1

    def _parts(self, group: Sequence[_Waiting]) -> list[list[_Waiting]]:
        """The group, and apart from it those tenants' requests that broke one lately."""
        parts: dict[str | None, list[_Waiting]] = {None: []}
        for waiting in group:
            apart = waiting.tenant if waiting.tenant in self._apart else None
            parts.setdefault(apart, []).append(waiting)
        self._apart = {tenant: left - 1 for tenant, left in self._apart.items() if left > 1}
        return [part for part in parts.values() if part]

    async def _write(self, group: Sequence[_Waiting]) -> None:
        start = time.monotonic()
        try:
            await self._write_by_halves(group)
        finally:
            self.progress.commit_seconds += time.monotonic() - start
            for waiting in group:  # only where the writer itself is ended: a retry finds out what was committed
                self._refuse(waiting, "the collector was stopped while it was written")

    async def _write_by_halves(self, group: Sequence[_Waiting]) -> None:
        self.progress.groups += 1
        self.progress.requests += len(group)
        left = self._parts(group)[::-1]
        whole, in_vain = True, 0
        while left:
            # Who has hung up while others were tried is left out.
            part = [waiting for waiting in left.pop() if not waiting.answer.done()]
            if not part:
                continue
            try:
                await self._try(part)
            except StoreUnavailable as error:
                in_vain += len(part) == 1
                if error.away:
                    self._shrink(part)
                if error.away or in_vain == IN_VAIN:  # the others would fare no better
                    for others in (part, *left):
                        _fail_all(others, error)
                    return
                broken: Exception = error
            except Exception as error:
                broken = error
            else:
                in_vain = 0
                self._grow()
                continue
            if len(part) == 1:
                self._apart[part[0].tenant] = APART
                _fail(part[0], broken)
                continue
            self.progress.broken_groups += whole
            whole = False
            middle = len(part) // 2
            left += [part[middle:], part[:middle]]

    async def _try(self, part: Sequence[_Waiting]) -> None:
        """Writes them together and tells them; or raises, and nothing of them was kept."""
        try:
            results = await self._store.write_together([waiting.encoded for waiting in part])
        except StoreUnavailable:
            raise
        except Exception:
            if len(part) > 1:
                raise
            self._apart[part[0].tenant] = APART
            results = [await self._store.write(part[0].encoded.batch)]  # apart from what no row can hold
        for waiting, result in zip(part, results, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(result)

    def _shrink(self, part: Sequence[_Waiting]) -> None:
        points, size = sum(one.points for one in part), sum(one.bytes for one in part)
        self.progress.shrunk += 1
        self._group = Room(max(min(self._group.points, points) // 2, 1), max(min(self._group.bytes, size) // 2, 1))

    def _grow(self) -> None:
        now, whole = self._group, self._whole
        if now != whole:
            self._group = Room(
                min(now.points + max(min(now.points, whole.points // GROWTH), 1), whole.points),
                min(now.bytes + max(min(now.bytes, whole.bytes // GROWTH), 1), whole.bytes),
            )


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def _fail_all(group: Sequence[_Waiting], error: StoreUnavailable) -> None:
    for waiting in group:
        # One each: an exception collects the traces of all who raise it.
        own = StoreUnavailable(str(error))
        own.__cause__ = error.__cause__
        own.away = error.away
        _fail(waiting, own)


@asynccontextmanager
async def committing(
    store: WritingTogether, limits: Limits, tenants: Tenants | None = None
) -> AsyncIterator[Committing]:
    """Group commit while the context lasts; at its end what was accepted is written, and nothing more accepted."""
    found = Committing(store, limits, tenants)
    found.running = asyncio.create_task(found.run(), name="tallymark committing")
    try:
        yield found
    finally:
        found.end()
        # Shielded: whoever is cancelled here must not take with it what others wait for.
        await asyncio.shield(found.running)
