"""Limits while something else goes on: clients hang up, writes fail, and other tenants wait for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import psycopg
import pytest

from tallymark_collector.access import quotas as quota_rules
from tallymark_collector.access.quotas import Quotas
from tallymark_collector.errors import Overloaded
from tallymark_collector.model import Batch, Stream, WriteResult
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.settings import Limits
from tallymark_collector.store.committing import committing
from tallymark_collector.store.samples import conflict
from tallymark_collector.store.writer import Encoded
from tests.collector.access.conftest import Clock
from tests.collector.access.test_quotas import NOW, Limited, admitted, batch, delay
from tests.support.usage import BASE, number, point, request, stream, sum_metric


class Slow:
    """A store whose transactions end when they are let."""

    def __init__(self) -> None:
        self.written = 0
        self.entered = asyncio.Semaphore(0)
        self.go = asyncio.Semaphore(0)

    async def write_together(self, group: Sequence[Encoded]) -> list[WriteResult]:
        self.entered.release()
        await self.go.acquire()
        self.written += sum(len(encoded.batch.points) for encoded in group)
        return [WriteResult(inserted=len(encoded.batch.points)) for encoded in group]

    async def write(self, batch: Batch) -> WriteResult:
        raise AssertionError(batch)


async def hung_up(task: asyncio.Task[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_client_that_hangs_up_pays_for_what_is_written_and_for_nothing_else(clock: Clock) -> None:
    slow = Slow()
    body = request(sum_metric([number(BASE, NOW, 5, {"tallymark.account.id": "acme"})] * 100)).SerializeToString()
    async with committing(slow, Limits()) as writing:
        pipeline = Pipeline(
            writing, now_ns=lambda: NOW, quotas=Quotas(Limited(), Limits(points_per_second=10), clock=clock)
        )
        first = asyncio.create_task(pipeline.metrics("default", body))
        await slow.entered.acquire()
        await hung_up(first)
        with pytest.raises(Overloaded):
            await pipeline.metrics("default", body)  # its group is under way, and is written whoever hangs up
        clock.seconds += 10
        for _ in range(20):  # these wait behind it, and are taken out of the queue
            waiting = asyncio.create_task(pipeline.metrics("default", body))
            while not writing.queued_requests:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await hung_up(waiting)
        last = asyncio.create_task(pipeline.metrics("default", body))
        while not writing.queued_requests:  # noqa: ASYNC110
            await asyncio.sleep(0)
        slow.go.release()
        slow.go.release()
        await last
    assert slow.written == 200


async def test_whoever_hangs_up_before_its_turn_pays_nothing(clock: Clock) -> None:
    """Also while its new streams are being looked up."""
    asked = asyncio.Event()

    class Stuck(Limited):
        async def unseen(self, streams: Iterable[Stream]) -> list[Stream]:
            asked.set()
            await asyncio.Event().wait()
            return []

    limits = Limits(points_per_second=10, new_streams_per_hour=10)
    quotas = Quotas(Stuck(), limits, clock=clock)
    for _ in range(5):
        task: asyncio.Task[object] = asyncio.create_task(admitted(quotas, batch(100)))
        await asked.wait()
        asked.clear()
        await hung_up(task)


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), psycopg.DataError("what no row can hold")])
async def test_what_fails_otherwise_may_have_been_kept_and_is_paid_for(clock: Clock, error: Exception) -> None:
    quotas = Quotas(Limited(), Limits(points_per_second=10), clock=clock)
    with pytest.raises(type(error)):
        async with quotas.admitting("default", batch(100)):
            raise error
    assert await delay(quotas, batch(1)) == pytest.approx(0.1)


@pytest.mark.parametrize("allowed", [1.0, 19_999.0])
async def test_others_have_their_turn_while_new_streams_are_set_aside(clock: Clock, allowed: float) -> None:
    """100,000 of them held up everybody for more than a second."""
    count = 20_000
    what = Batch(points=[point(stream(n=i), 0, 1, 1) for i in range(count)])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    quotas = Quotas(Limited(), Limits(new_streams_per_hour=allowed), clock=clock)
    await admitted(quotas, Batch())
    beside = asyncio.create_task(others())
    found = await admitted(quotas, what)
    beside.cancel()
    assert (len(found.points), len(found.quarantined)) == (allowed, count - allowed)
    assert turns >= count // quota_rules.PIECE + count // quota_rules.LOOKED_THROUGH - 2
    assert [kept.digest() for kept in found.quarantined] == [
        conflict(point, found.quarantined[0].refusal).digest() for point in what.points[int(allowed) :]
    ]


async def test_requests_at_one_time_share_what_is_left_of_new_streams(clock: Clock) -> None:
    """Each rests while it is looked through."""
    quotas = Quotas(Limited(), Limits(new_streams_per_hour=9_000.0), clock=clock)
    batches = [Batch(points=[point(stream(n=i, of=of), 0, 1, 1) for i in range(5_000)]) for of in range(3)]
    found = await asyncio.gather(*(admitted(quotas, one) for one in (*batches, batches[0])))
    let_in = {one.stream.id for some in found for one in some.points}
    assert len(let_in) == 9_000
