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
from tallymark_collector.store.committing import APART, Committing, committing
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

    def let(self, times: int) -> None:
        """Lets so many groups go on."""
        for _ in range(times):
            self.go.release()

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
        queued = found.queued_requests + found.progress.refused.total()
        tasks.append(asyncio.create_task(found.write(one)))
        while found.queued_requests + found.progress.refused.total() == queued:  # noqa: ASYNC110
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
        store.let(9)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result.inserted for result in (results[0], results[2]) if isinstance(result, WriteResult)] == [1, 1]
    assert results[1] is error
    assert store.groups == [["first"], ["a", "bad", "b"], ["a"], ["bad", "b"], ["bad"], ["b"]]
    assert store.alone == ([] if isinstance(error, StoreUnavailable) else ["bad"]), "the others share transactions"
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
        store.poison["d"] = psycopg.DataError("one of them")
        store.poison["b"] = away
        tasks = await waiting(found, *map(batch, "adbc"))
        store.let(9)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [WriteResult, psycopg.DataError, *[StoreUnavailable] * 2]
    assert store.groups == [["first"], ["a", "d", "b", "c"], ["a", "d"], ["a"], ["d"], ["b", "c"]]
    assert store.alone == ["d"]


async def test_a_database_that_takes_nothing_for_now_is_not_asked_for_each() -> None:
    async with held() as (found, store):
        tasks = await waiting(found, *map(batch, "abcdefgh"))
        store.poison = {one: StoreUnavailable("read-only") for one in "abcdefgh"}
        store.let(99)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 8
    assert len(store.groups) == 1 + len(["abcdefgh", "abcd", "ab", "a", "b", "cd", "c"])
    assert len({id(result) for result in results}) == 8


async def test_one_bad_request_of_many_is_found_by_halves() -> None:
    async with held() as (found, store):
        names = [f"r{i}" for i in range(64)]
        store.poison["r41"] = ValueError("poison")
        tasks = await waiting(found, *map(batch, names))
        store.let(99)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [i for i, result in enumerate(results) if not isinstance(result, WriteResult)] == [41]
    assert len(store.groups) <= 2 + 2 * 6
    assert store.alone == ["r41"]


async def test_a_tenant_that_broke_a_group_is_written_apart_for_a_while() -> None:
    """Its requests break groups of its own; the others' are taken whole again and again."""
    store = Recorded()
    store.poison["bad0"] = ValueError("no row can hold it")
    async with committing(store, Limits()) as found:
        broken = []
        for turn in range(APART + 3):
            store.go = asyncio.Semaphore(0)
            block = asyncio.create_task(found.write(batch("block", tenant="quiet")))
            while found.queued_requests or not store.groups or store.groups[-1] != ["block"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            bad = f"bad{turn}" if turn == 0 else f"good{turn}"
            tasks = await waiting(found, batch("x", tenant="quiet"), batch(bad, tenant="loud"), batch("y", tenant="z"))
            del store.groups[:]
            store.let(20)
            await asyncio.gather(block, *tasks, return_exceptions=True)
            broken.append([sorted(group) for group in store.groups])
    assert len(broken[0]) > 2, "taken apart"
    assert broken[1] == [["x", "y"], ["good1"]]
    assert broken[-1] == [sorted([f"good{APART + 2}", "x", "y"])], "after a while they are taken together again"


async def test_a_group_that_was_given_up_is_half_as_large_the_next_time_and_grows_again() -> None:
    """A disk that takes eight points before the time-out gets them, though forty wait."""
    store = Slow(8)
    async with committing(store, Limits(group_points=40)) as found:
        left = {f"r{i}" for i in range(40)}
        tries = 0
        while left:
            tries += 1
            names = sorted(left)
            results = await asyncio.gather(*(found.write(batch(name)) for name in names), return_exceptions=True)
            for one, result in zip(names, results, strict=True):
                left -= {one} if isinstance(result, WriteResult) else set()
            assert tries < 40, "no progress"
        assert found.progress.shrunk > 0
        assert max(store.sizes[5:]) < 20, "it does not try the large ones again and again"
        store.most = 100
        for _ in range(40):
            await asyncio.gather(*(found.write(batch(f"r{i}")) for i in range(40)))
    assert max(store.sizes[-5:]) >= 39, "with a sound disk they are large again"


async def test_a_disk_that_takes_one_request_at_a_time_gets_one() -> None:
    store = Slow(1)
    async with committing(store, Limits(group_points=16)) as found:
        done = 0
        for _ in range(40):
            results = await asyncio.gather(*(found.write(batch(f"r{i}")) for i in range(16)), return_exceptions=True)
            done += sum(isinstance(result, WriteResult) for result in results)
        assert done > 16


class Slow:
    """A store that takes so many points in its time; a larger group is given up."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []

    async def write_together(self, group: Sequence[Encoded]) -> list[WriteResult]:
        self.sizes.append(sum(len(encoded.batch.points) for encoded in group))
        for _ in range(5):
            await asyncio.sleep(0)
        if self.sizes[-1] > self.most:
            error = StoreUnavailable("the database did not answer within 30 s")
            error.away = True
            raise error
        return [WriteResult(inserted=len(encoded.batch.points)) for encoded in group]

    async def write(self, batch: Batch) -> WriteResult:
        raise AssertionError(batch)


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
        store.let(9)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, asyncio.CancelledError, WriteResult]
    assert store.groups == [["first"], ["bad", "gone", "b"], ["bad"], ["b"]]


async def test_a_full_queue_refuses_retryably_and_takes_again_when_there_is_room() -> None:
    async with held(Limits(queued_points=10, retry_after=3.5)) as (found, store):
        tasks = await waiting(found, batch("a", 6), batch("b", 4))
        with pytest.raises(Overloaded) as caught:
            await found.write(batch("c"))
        assert caught.value.retry_after == 3.5
        assert (found.queued_points, found.progress.refused) == (10, {"default": 1})
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
        assert found.progress.refused == {"flood": 1}, "who gave way, not who asked"
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
