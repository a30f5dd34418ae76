"""Requests that share transactions: who is written with whom, what each is told, what becomes of it at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import psycopg
import pytest

from tallymark_collector.errors import Overloaded, StoreUnavailable
from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.settings import Limits
from tallymark_collector.store.committing import Committing, committing
from tallymark_collector.store.writer import Encoded
from tests.support.usage import point, stream


class Recorded:
    """A store that writes nothing: it says who came with whom, waits to be let go, and raises what it is told to."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.alone: list[str] = []
        self.entered = asyncio.Semaphore(0)
        self.go = asyncio.Semaphore(0)
        self.together_fails: Exception | None = None
        self.poison: dict[str, Exception] = {}

    async def write_together(self, group: Sequence[Encoded]) -> list[WriteResult]:
        names = [name(encoded.batch) for encoded in group]
        self.groups.append(names)
        self.entered.release()
        await self.go.acquire()
        if self.together_fails is not None:
            raise self.together_fails
        if found := [self.poison[one] for one in names if one in self.poison]:
            raise found[0]
        return [WriteResult(inserted=len(encoded.batch.points)) for encoded in group]

    async def write(self, batch: Batch) -> WriteResult:
        self.alone.append(name(batch))
        if error := self.poison.get(name(batch)):
            raise error
        return WriteResult(inserted=len(batch.points))


def name(batch: Batch) -> str:
    return batch.points[0].stream.series.account


def batch(account: str, points: int = 1, tenant: str = "default") -> Batch:
    of = stream(account, tenant=tenant)
    return Batch(points=[point(of, i, i + 1, 1) for i in range(points)])


@asynccontextmanager
async def held(limits: Limits | None = None) -> AsyncIterator[tuple[Committing, Recorded]]:
    """A pipeline whose first transaction is under way, with the request "first" in it."""
    store = Recorded()
    async with committing(store, limits or Limits()) as found:
        first = asyncio.ensure_future(found.write(batch("first")))
        await store.entered.acquire()
        yield found, store
        for _ in range(100):
            store.go.release()
        assert (await first).inserted == 1


async def waiting(found: Committing, *batches: Batch) -> list[asyncio.Task[WriteResult]]:
    """Tasks that have each handed in their batch."""
    tasks = []
    for one in batches:
        queued = found.queued_requests + found.progress.refused
        tasks.append(asyncio.create_task(found.write(one)))
        while found.queued_requests + found.progress.refused == queued:  # noqa: ASYNC110
            await asyncio.sleep(0)
    return tasks


async def test_what_arrives_during_a_transaction_is_written_by_the_next() -> None:
    async with held() as (found, store):
        tasks = await waiting(found, batch("a", 1), batch("b", 2), batch("c", 3))
        assert (found.queued_requests, found.queued_points) == (3, 6)
        assert found.oldest_seconds > 0
        store.go.release()
        store.go.release()
        assert [result.inserted for result in await asyncio.gather(*tasks)] == [1, 2, 3]
        assert (found.queued_requests, found.queued_points, found.oldest_seconds) == (0, 0, 0)
    assert store.groups == [["first"], ["a", "b", "c"]]
    assert (found.progress.groups, found.progress.requests, found.progress.broken_groups) == (2, 4, 0)
    assert found.progress.commit_seconds > 0


async def test_a_group_is_bounded() -> None:
    async with held(Limits(group_points=10)) as (found, store):
        tasks = await waiting(found, *(batch(one, 4) for one in "abcde"), batch("large", 50))
        for _ in range(9):
            store.go.release()
        await asyncio.gather(*tasks)
    assert store.groups == [["first"], ["a", "b"], ["c", "d"], ["e"], ["large"]]


@pytest.mark.parametrize("error", [psycopg.DataError("poison"), ValueError("poison"), StoreUnavailable("its own")])
async def test_a_poison_request_harms_nobody_else(error: Exception) -> None:
    async with held() as (found, store):
        store.poison["bad"] = error
        tasks = await waiting(found, batch("a"), batch("bad"), batch("b"))
        store.go.release()
        store.go.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result.inserted for result in (results[0], results[2]) if isinstance(result, WriteResult)] == [1, 1]
    assert results[1] is error
    assert store.alone == ["a", "bad", "b"]
    assert found.progress.broken_groups == 1


async def test_a_database_that_is_away_is_asked_once_for_a_group() -> None:
    async with held() as (found, store):
        tasks = await waiting(found, batch("a"), batch("b"))
        store.go.release()
        await store.entered.acquire()
        away = StoreUnavailable("gone")
        away.away = True
        store.together_fails = away
        store.go.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        store.together_fails = None
    assert [type(result) for result in results] == [StoreUnavailable] * 2
    assert results[0] is not results[1], "an exception belongs to one who raises it"
    assert store.alone == []


async def test_a_database_that_goes_away_while_a_group_is_taken_apart_is_left_alone() -> None:
    async with held() as (found, store):
        away = StoreUnavailable("gone")
        away.away = True
        store.poison["b"] = away
        tasks = await waiting(found, *map(batch, "abcd"))
        store.together_fails = None
        store.go.release()
        await store.entered.acquire()
        store.together_fails = psycopg.DataError("one of them")
        store.go.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        store.together_fails = None
    assert isinstance(results[0], WriteResult)
    assert [type(result) for result in results[1:]] == [StoreUnavailable] * 3
    assert store.alone == ["a", "b"]


async def test_who_hangs_up_while_waiting_is_not_written_and_nobody_else_notices() -> None:
    async with held() as (found, store):
        tasks = await waiting(found, batch("a"), batch("gone"), batch("b"))
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert found.queued_requests == 2
        store.go.release()
        store.go.release()
        assert [(await task).inserted for task in (tasks[0], tasks[2])] == [1, 1]
    assert store.groups == [["first"], ["a", "b"]]


async def test_who_hangs_up_during_the_transaction_cancels_nobody() -> None:
    async with held() as (found, store):
        tasks = await waiting(found, batch("a"), batch("gone"), batch("b"))
        store.go.release()
        await store.entered.acquire()
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        store.go.release()
        assert [(await task).inserted for task in (tasks[0], tasks[2])] == [1, 1]
    assert store.groups == [["first"], ["a", "gone", "b"]]


async def test_who_hung_up_is_left_out_when_a_group_is_taken_apart() -> None:
    async with held() as (found, store):
        store.poison["bad"] = ValueError("poison")
        tasks = await waiting(found, batch("bad"), batch("gone"), batch("b"))
        store.go.release()
        await store.entered.acquire()
        tasks[1].cancel()
        store.go.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, asyncio.CancelledError, WriteResult]
    assert store.alone == ["bad", "b"]


async def test_a_full_queue_refuses_retryably_and_takes_again_when_there_is_room() -> None:
    async with held(Limits(queued_points=10, retry_after=3.5)) as (found, store):
        tasks = await waiting(found, batch("a", 6), batch("b", 4))
        with pytest.raises(Overloaded) as caught:
            await found.write(batch("c"))
        assert caught.value.retry_after == 3.5
        assert (found.queued_points, found.progress.refused) == (10, 1)
        store.go.release()
        store.go.release()
        await asyncio.gather(*tasks)
        store.go.release()
        assert (await found.write(batch("c"))).inserted == 1


async def test_a_flood_of_one_tenant_leaves_room_and_turns_for_the_others() -> None:
    async with held(Limits(queued_points=10, group_points=4)) as (found, store):
        flood = await waiting(found, *(batch(f"flood-{i}", tenant="flood") for i in range(10)))
        quiet = await waiting(found, batch("quiet", tenant="quiet"))
        with pytest.raises(Overloaded, match="another tenant"):
            await flood[-1]
        for _ in range(9):
            store.go.release()
        assert (await quiet[0]).inserted == 1
        await asyncio.gather(*flood[:-1])
    assert store.groups[1] == ["flood-0", "quiet", "flood-1", "flood-2"]


async def test_at_the_end_what_was_accepted_is_written_and_then_nothing_more_is() -> None:
    store = Recorded()
    async with committing(store, Limits(group_points=1)) as found:
        first = asyncio.ensure_future(found.write(batch("first")))
        await store.entered.acquire()
        tasks = await waiting(found, batch("a"), batch("b"))
        asyncio.get_running_loop().call_soon(lambda: [store.go.release() for _ in range(3)])
    assert [task.result().inserted for task in (first, *tasks)] == [1, 1, 1]
    assert store.groups == [["first"], ["a"], ["b"]]
    with pytest.raises(Overloaded, match="stopped"):
        await found.write(batch("late"))


async def test_a_writer_that_ends_early_leaves_nobody_waiting() -> None:
    """Whatever ends it is a fault of ours; `serve` ends with it, and until then clients are told to come back."""
    store = Recorded()
    with pytest.raises(asyncio.CancelledError):  # noqa: PT012 - it is raised at the context's end
        async with committing(store, Limits()) as found:
            first = asyncio.ensure_future(found.write(batch("first")))
            await store.entered.acquire()
            [task] = await waiting(found, batch("a"))
            found.running.cancel()
            with pytest.raises(Overloaded, match="while it was written"):
                await first
            with pytest.raises(Overloaded, match="before it was written"):
                await task
            with pytest.raises(Overloaded):
                await found.write(batch("b"))


async def test_a_point_that_no_row_can_hold_is_left_to_the_store() -> None:
    store = Recorded()
    bad = batch("bad")
    bad = replace(bad, points=[bad.points[0]._replace(value=bad.points[0].value.scaleb(-20_000))])
    async with committing(store, Limits()) as found:
        assert (await found.write(bad)).inserted == 1
    assert (store.groups, store.alone) == ([], ["bad"])
