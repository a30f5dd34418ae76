"""How much a tenant may send: points in a second, and streams that nobody has seen before in an hour.

Over the rate a request is refused as a whole, to be sent again when there is room: nothing of it was kept, nothing is
lost. What becomes no usage takes none of that rate, but time to be read; so all that is read, whatever becomes of it,
has a second rate, some times as high. Over the number of new streams, the points of those that exceed it go to
quarantine, whole and with a reason of their own; streams that are known go on. All count in this process alone: several
collectors let in as many times as much, and one that starts anew has everything to give.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn, Protocol

from tallymark_collector.access.lookups import REMEMBERED_SECONDS
from tallymark_collector.access.records import Tenant
from tallymark_collector.errors import Overloaded, TooLarge, TransientError
from tallymark_collector.model import Batch, Point, Reason, Refusal, Stream
from tallymark_collector.processors.pace import Pace
from tallymark_collector.processors.set_aside import SetAside
from tallymark_collector.resting import resting
from tallymark_collector.settings import Limits
from tallymark_collector.store.committing import Withdrawn
from tallymark_collector.store.samples import conflict

BURST_SECONDS: Final = 10.0
"""A tenant that was silent may send so many seconds' worth at once."""
MAX_DELAY: Final = 300.0
"""Seconds that a client is asked to wait at most; then it is told anew."""

READ_FACTOR: Final = 10.0
"""How much more may be read than stored. A tenant may send us all of its telemetry, most of which is no usage; to pass
over a span takes some percent of what it takes to store a point. Were it charged to the rate of usage, the same usage
would be refused because of what stands beside it."""
READ_AT_LEAST: Final = 1_000.0
"""Of points, spans and records a second, however low the limit: what it costs to read them is next to nothing, and one
service with tracing sends as many."""
BYTES_READ: Final = 1024
"""Of a request, what is as much work as a small span: what is large is more to read, and of what cannot be read there
is no other measure."""

PIECE: Final = 256
"""Points between two rests, each of which may be written out again, to be set aside;"""
LOOKED_THROUGH: Final = 4096
"""or streams that are only looked at."""

_HOUR: Final = 3600.0
_ROUNDING: Final = 1e-6


class Limiting(Protocol):
    """What the pipeline asks before it reads a request, and before it writes."""

    async def asking(self, tenant: str, size: int) -> None:
        """Raises Overloaded where the tenant may send nothing now: then a request is not even read. Else its bytes are
        charged, whatever becomes of it."""
        ...

    def has_read(self, tenant: str, size: int, items: int) -> None:
        """Charges a request for what was found in its bytes, where that is more."""
        ...

    def admitting(self, tenant: str, batch: Batch) -> AbstractAsyncContextManager[Batch]:
        """What of a batch is to be written, inside the context: what is raised in there says whether it was. Raises
        Overloaded where nothing is."""
        ...


class Unlimited:
    """Lets everything in."""

    async def asking(self, tenant: str, size: int) -> None:
        """Nothing."""

    def has_read(self, tenant: str, size: int, items: int) -> None:
        """Nothing."""

    @asynccontextmanager
    async def admitting(self, tenant: str, batch: Batch) -> AsyncIterator[Batch]:
        """The same batch."""
        del tenant
        yield batch


class Directory(Protocol):
    """Where limits are looked up, and which streams are known: the database, or a test."""

    async def tenant(self, name: str) -> Tenant:
        """A tenant's own limits. Raises TransientError."""
        ...

    async def unseen(self, streams: Iterable[Stream]) -> list[Stream]:
        """The streams that have never been written, each once, in their order. Raises TransientError."""
        ...


class Bucket:
    """A token bucket: `rate` a second flow in, up to `capacity`."""

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self._rate = rate
        self._capacity = capacity
        self._level = capacity
        self._at = now

    def take(self, amount: float, now: float) -> float:
        """Takes it and returns 0, or takes nothing and returns in how many seconds it is worth asking again.

        More than the bucket holds is taken when it is full: what is lacking is a debt, paid before anybody gets more.
        """
        self._flow(now)
        lacking = min(amount, self._capacity) - self._level
        if lacking > _ROUNDING:
            return lacking / self._rate
        self._level -= amount
        return 0.0

    def delay(self, now: float) -> float:
        """In how many seconds there is anything to be had, 0 where there is now."""
        self._flow(now)
        lacking = min(1.0, self._capacity) - self._level
        return lacking / self._rate if lacking > _ROUNDING else 0.0

    def spend(self, amount: float, now: float, most_debt: float) -> None:
        """Takes what is spent already, whether there is as much or not; no more is owed than so much."""
        self._flow(now)
        self._level = max(self._level - amount, min(self._level, -most_debt))

    def take_some(self, most: int, now: float) -> int:
        """Takes whole ones, as many as there are, at most so many; returns how many."""
        self._flow(now)
        taken = min(most, max(math.floor(self._level + _ROUNDING), 0))
        self._level -= taken
        return taken

    def give_back(self, amount: float) -> None:
        """What was taken has not been used."""
        self._level = min(self._level + amount, self._capacity)

    def _flow(self, now: float) -> None:
        self._level = min(self._level + max(now - self._at, 0.0) * self._rate, self._capacity)
        self._at = now


@dataclass(slots=True)
class _Allowance:
    """What one tenant may send, as long as its limits stay what they are."""

    points_per_second: float
    new_streams_per_hour: float
    points: Bucket
    streams: Bucket
    read_per_second: float
    read: Bucket
    let_in: dict[int, float] = field(default_factory=dict)
    """Streams of the last hour that were counted, though they may not be committed yet, and when."""


class Quotas:
    """Holds tenants to their limits. One event loop owns it."""

    def __init__(
        self,
        directory: Directory,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        seconds: float = REMEMBERED_SECONDS,
    ) -> None:
        """`limits` has what counts for tenants without their own; a change of theirs counts after `seconds`."""
        self._directory = directory
        self._limits = Limits() if limits is None else limits
        self._clock = clock
        self._seconds = seconds
        self._allowances: dict[str, _Allowance] = {}
        self._read_at: dict[str, float] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}

    async def asking(self, tenant: str, size: int) -> None:
        """Raises Overloaded while the tenant has to wait for its next point, whatever the request holds, or has had
        more read than it may."""
        allowance = await self._allowance(tenant)
        if allowance.points_per_second < math.inf:
            now = self._clock()
            _refuse_for(allowance.points.delay(now), tenant, allowance)
            _refuse_reading(allowance.read.delay(now), tenant, allowance)
            self._spend(allowance, size / BYTES_READ)

    def has_read(self, tenant: str, size: int, items: int) -> None:
        """Charges what was read. Nothing of it is given back: a request that is refused then, or whose write fails, was
        read all the same, and whoever sends it again at once, over and over, must not be read for nothing."""
        allowance = self._allowances.get(tenant)
        if allowance is not None and allowance.points_per_second < math.inf:
            self._spend(allowance, max(items - size / BYTES_READ, 0.0))

    def _spend(self, allowance: _Allowance, amount: float) -> None:
        # However much a request was, its tenant is read again before its clients give up what they hold meanwhile.
        allowance.read.spend(amount, self._clock(), allowance.read_per_second * MAX_DELAY - 1.0)

    @asynccontextmanager
    async def admitting(self, tenant: str, batch: Batch) -> AsyncIterator[Batch]:
        """What of a batch is to be written, inside the context. Raises Overloaded, TransientError."""
        allowance = await self._allowance(tenant)
        cost = _cost(batch)
        if allowance.points_per_second < math.inf:
            _refuse_for(allowance.points.take(cost, self._clock()), tenant, allowance)
        try:
            admitted = await self._known_streams(allowance, batch)
        except BaseException:
            allowance.points.give_back(cost)
            raise
        try:
            yield admitted
        except (TransientError, Withdrawn):
            # Nothing of it was kept; or nobody knows, and whoever is told so sends it again and pays then. After other
            # errors, and where a client hangs up while its request is written, it may be kept: it is paid for.
            allowance.points.give_back(cost)
            raise

    async def _known_streams(self, allowance: _Allowance, batch: Batch) -> Batch:
        if allowance.new_streams_per_hour == math.inf or not batch.points:
            return batch
        unseen = await self._directory.unseen(point.stream for point in batch.points)
        over = await resting(self._let_in(allowance, unseen))
        if not over:
            return batch
        refusal = Refusal(
            Reason.STREAMS_LIMITED,
            f"more than {allowance.new_streams_per_hour:g} streams an hour that were never seen: is there a dimension"
            " with too many values?",
        )
        try:
            return await resting(_without(batch, over, refusal))
        except TooLarge:
            # Nothing is wrong with these points: later, or fewer at once, there is room for them.
            error = Overloaded(f"{refusal.detail}; too many at once to be set aside: send fewer in a request")
            error.retry_after = MAX_DELAY
            raise error from None

    def _let_in(self, allowance: _Allowance, unseen: Sequence[Stream]) -> Generator[None, None, set[int]]:
        """The new streams that are too many, in pieces (see `resting`)."""
        now = self._clock()
        let_in = allowance.let_in
        pace = Pace(LOOKED_THROUGH)
        while let_in and next(iter(let_in.values())) <= now - _HOUR:
            del let_in[next(iter(let_in))]
            if pace.full(1):
                yield
        over: set[int] = set()
        for stream in unseen:
            identity = stream.id.int
            if identity in let_in:
                continue
            if over or not allowance.streams.take_some(1, now):
                over.add(identity)
            else:
                let_in[identity] = now
            if pace.full(1):
                yield
        return over

    async def _allowance(self, tenant: str) -> _Allowance:
        read_at = self._read_at.get(tenant)
        if read_at is None or self._clock() - read_at >= self._seconds:
            reading = self._reading.get(tenant)
            if reading is None:
                reading = self._reading[tenant] = asyncio.create_task(self._read(tenant))
                reading.add_done_callback(lambda task: self._was_read(tenant, task))
            # Others wait for the same answer.
            await asyncio.shield(reading)
        return self._allowances[tenant]

    def _was_read(self, tenant: str, task: asyncio.Task[None]) -> None:
        del self._reading[tenant]
        if not task.cancelled():
            task.exception()  # whoever asked may have hung up

    async def _read(self, tenant: str) -> None:
        now = self._clock()
        own = await self._directory.tenant(tenant)
        rate = _limit(own.points_per_second, self._limits.points_per_second)
        streams = _limit(own.new_streams_per_hour, self._limits.new_streams_per_hour)
        before = self._allowances.get(tenant)
        if before is None or (before.points_per_second, before.new_streams_per_hour) != (rate, streams):
            read = max(rate * READ_FACTOR, READ_AT_LEAST)
            self._allowances[tenant] = _Allowance(
                rate,
                streams,
                Bucket(rate, max(rate * BURST_SECONDS, 1.0), now),
                Bucket(streams / _HOUR, streams, now),
                read,
                Bucket(read, read * BURST_SECONDS, now),
                {} if before is None else before.let_in,
            )
        self._read_at[tenant] = now


def _without(batch: Batch, over: Set[int], refusal: Refusal) -> Generator[None, None, Batch]:
    """The batch less the points of some streams, which are kept aside; in pieces. Raises TooLarge."""
    aside = SetAside()
    left: list[Point] = []
    for start in range(0, len(batch.points), PIECE):
        if start:
            yield
        for point in batch.points[start : start + PIECE]:
            if point.stream.id.int in over:
                aside.keep([conflict(point, refusal)])
            else:
                left.append(point)
    return replace(batch, points=left, quarantined=[*batch.quarantined, *aside.quarantined])


def _refuse_for(delay: float, tenant: str, allowance: _Allowance) -> None:
    if delay:
        _refuse(f"the tenant {tenant!r} sends more than {allowance.points_per_second:g} points a second", delay)


def _refuse_reading(delay: float, tenant: str, allowance: _Allowance) -> None:
    if delay:
        _refuse(
            f"the tenant {tenant!r} has had more read than it may, usage or not: the collector reads at most"
            f" {allowance.read_per_second:g} points, spans and records a second of it, of {BYTES_READ} bytes each",
            delay,
        )


def _refuse(why: str, delay: float) -> NoReturn:
    asked = min(delay, MAX_DELAY)
    error = Overloaded(f"{why}: nothing of this request was kept, send it again in {asked:.3g} s")
    error.retry_after = asked
    raise error


def _limit(own: float | None, of_all: float | None) -> float:
    if own is not None:
        return own
    return math.inf if of_all is None else of_all


def _cost(batch: Batch) -> int:
    several = (batch.points, batch.evidence, batch.quarantined, batch.controls, batch.closings, batch.counts)
    return sum(map(len, several))
