"""Tenants' meters are remembered within bounds, read seldom, and never guessed where they cannot be read."""

from __future__ import annotations

import asyncio

import pytest

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.known_meters import REMEMBERED_SECONDS, KnownMeters
from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.pipeline import Pipeline
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 60 * SECOND
A, B, C = ("a", "1"), ("b", "1"), ("c", "1")


class Directory:
    """A database whose answers can be held up."""

    def __init__(self, **meters: set[tuple[str, str]]) -> None:
        self.found = meters
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.away = False

    async def meters(self, tenant: str, limit: int) -> list[tuple[str, str]]:
        self.asked.append(tenant)
        if self.away:
            raise StoreUnavailable("the database is away")
        found = sorted(self.found.get(tenant, ()))[:limit]
        await self.may_answer.wait()
        return found


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_database_is_asked_once_for_many_requests_and_again_after_a_while() -> None:
    directory, clock = Directory(us={A}), Clock()
    known = KnownMeters(directory, clock)
    directory.may_answer.clear()
    several = [asyncio.ensure_future(known.of("us")) for _ in range(50)]
    await asyncio.sleep(0)
    several[0].cancel()
    directory.may_answer.set()
    assert all(A in found for found in await asyncio.gather(*several[1:]))
    clock.now = REMEMBERED_SECONDS - 1
    assert B not in await known.of("us")
    assert directory.asked == ["us"]
    directory.found["us"] = {B}
    clock.now = REMEMBERED_SECONDS
    assert B in await known.of("us")
    assert A not in await known.of("us"), "the plans charge for it no more"
    assert directory.asked == ["us", "us"]


async def test_tenants_do_not_know_each_others_meters() -> None:
    known = KnownMeters(Directory(us={A}, them={B}))
    assert A in await known.of("us")
    assert A not in await known.of("them")


async def test_where_the_database_is_away_nothing_is_known_and_it_is_asked_again() -> None:
    directory, clock = Directory(us={A}), Clock()
    known = KnownMeters(directory, clock)
    directory.away = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await known.of("us")
    directory.away = False
    assert A in await known.of("us")
    clock.now = REMEMBERED_SECONDS
    directory.away = True
    with pytest.raises(StoreUnavailable):
        await known.of("us")


async def test_what_is_remembered_is_bounded() -> None:
    directory = Directory(**{f"t{n}": {A, B} for n in range(50)})
    known = KnownMeters(directory, limit=3, limit_of_all=9)
    for n in range(50):
        assert B in await known.of(f"t{n}")
        assert known.size <= 9
    await known.of("t47")
    await known.of("silent")
    assert directory.asked == [*(f"t{n}" for n in range(50)), "silent"], "t47 was among the last three"
    directory.found["many"] = {(f"{n}", "1") for n in range(100)}
    many = await known.of("many")
    assert sum((f"{n}", "1") in many for n in range(100)) == 3
    assert known.size <= 9


async def test_one_tenant_with_all_that_is_remembered_is_not_read_for_each_request() -> None:
    directory = Directory(us={A, B, C}, them={A})
    known = KnownMeters(directory, limit_of_all=2)
    for _ in range(5):
        assert C in await known.of("us")
    assert directory.asked == ["us"]
    await known.of("them")
    assert known.size == 2


class Written:
    """A store that takes everything."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    async def write(self, batch: Batch) -> WriteResult:
        self.batches.append(batch)
        return WriteResult(inserted=len(batch.points))


async def test_a_request_that_cannot_be_told_from_usage_is_refused_to_be_sent_again() -> None:
    directory, store = Directory(default={("u.route", "{request}")}), Written()
    pipeline = Pipeline(store, now_ns=lambda: NOW, known=KnownMeters(directory))
    points = [number(BASE, NOW, 700, {"otel.metric.overflow": True})]
    message = request(sum_metric(points, "u.route"), scope="shop").SerializeToString()
    directory.away = True
    with pytest.raises(StoreUnavailable):
        await pipeline.metrics("default", message)
    assert (store.batches, pipeline.totals.unmatched) == ([], {})
    directory.away = False
    outcome = await pipeline.metrics("default", message)
    assert (outcome.rejected, "attribute_overflow" in outcome.message) == (1, True)
