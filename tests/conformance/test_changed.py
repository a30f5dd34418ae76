"""The audit beside the collector: an hour is broken by hand after it was made again, and the next look must tell."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import psycopg
import pytest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.aggregates.schedule import keep_audited, keep_retained
from tallymark_collector.model import Batch, Point
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, point, stream

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
NOW = ZERO + timedelta(hours=12)


async def fill(store: Store) -> None:
    names = [stream("acme"), stream("globex"), stream("acme", producer="two")]
    await store.write(Batch(points=[point(of, 3600 * h, 3600 * h + 10, 5) for of in names for h in range(4)]))
    while await store.refresh():
        pass


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


async def is_right(store: Store) -> bool:
    async with store.reading() as connection:
        return (await with_days(connection, await audit(connection))).clean


async def test_each_change_is_looked_at_once(store: Store) -> None:
    assert await audit_changed(store, NOW) == (0, [])
    await fill(store)
    assert await audit_changed(store, NOW) == (8, [])
    assert await audit_changed(store, NOW) == (0, [])
    await store.write(Batch(points=[point(stream("acme"), 20, 30, 7)]))
    assert await audit_changed(store, NOW) == (0, []), "read from the points until it is made again"
    await store.refresh()
    assert await audit_changed(store, NOW) == (1, [])


async def test_hours_that_are_written_to_are_left_for_later(store: Store) -> None:
    await fill(store)
    assert (await audit_changed(store, ZERO + timedelta(hours=1))).hours == 0
    assert (await audit_changed(store, ZERO + timedelta(hours=2, minutes=6))).hours == 4
    assert (await audit_changed(store, NOW)).hours == 4


async def test_a_limit_leaves_the_rest(store: Store) -> None:
    await fill(store)
    assert [(await audit_changed(store, NOW, 3)).hours for _ in range(4)] == [3, 3, 2, 0]


@pytest.mark.parametrize(
    ("broken", "raw", "aggregated"),
    [
        ("UPDATE usage_hour SET quantity = 99 WHERE account = 'acme' AND bucket = '{}'", 10, 99),
        ("UPDATE usage_hour SET points = 1 WHERE account = 'acme' AND bucket = '{}'", 10, 10),
        ("DELETE FROM usage_hour WHERE account = 'acme' AND bucket = '{}'", 10, None),
        ("DELETE FROM usage_point WHERE account = 'acme' AND time < timestamptz '{}' + interval '1 hour'", None, 10),
    ],
)
async def test_a_wrong_hour_is_told_right_at_once_and_made_again(
    store: Store, dsn: str, broken: str, raw: int | None, aggregated: int | None
) -> None:
    await fill(store)
    execute(dsn, broken.format(ZERO))
    assert not await is_right(store)
    looked = await audit_changed(store, NOW)
    hours = [d for d in looked.differences if d.width == "hour"]
    assert [(d.account, d.bucket, d.raw, d.aggregated) for d in hours] == [("acme", ZERO, raw, aggregated)]
    assert await is_right(store), "from the look on, before any refresh"
    kept = execute(dsn, "SELECT account, bucket, meter, raw, aggregated FROM audit_finding WHERE width = '1 hour'")
    assert kept == [("acme", ZERO, "api.requests", raw, aggregated)]
    while await store.refresh():
        pass
    assert await is_right(store)
    assert (await audit_changed(store, NOW)).differences == []


async def test_a_wrong_day_is_told_and_made_again(store: Store, dsn: str) -> None:
    await fill(store)
    execute(dsn, "UPDATE usage_day SET quantity = quantity + 1 WHERE account = 'globex'")
    async with store.reading() as connection:
        report = await with_days(connection, await audit(connection))
    assert [(d.width, d.account, d.raw, d.aggregated) for d in report.differences] == [
        ("day", "globex", Decimal(20), Decimal(21))
    ]
    [found] = (await audit_changed(store, NOW)).differences
    assert (found.width, found.account, found.raw, found.aggregated) == ("day", "globex", 20, 21)
    assert await is_right(store)
    while await store.refresh():
        pass
    assert await is_right(store)
    rows = execute(dsn, "SELECT sum(quantity) FROM usage_day")
    assert rows == [(60,)]


async def test_the_loop_tells_what_it_found(store: Store, dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    end = (int(time.time()) - 3 * 3600) * SECOND
    await store.write(Batch(points=[Point(stream("acme"), end - SECOND, end, Decimal(4))]))
    await store.refresh()
    execute(dsn, "UPDATE usage_hour SET quantity = 99")
    loop = asyncio.create_task(keep_audited(store, 0.05))
    for _ in range(1600):
        if execute(dsn, "SELECT 1 FROM audit_finding") and "says 99 where its points say 4" in caplog.text:
            break
        await asyncio.sleep(0.05)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert "account 'acme', meter api.requests, says 99 where its points say 4" in caplog.text
    assert await is_right(store)


@pytest.mark.engines("timescale")
async def test_the_loop_drops_what_is_old(store: Store, dsn: str) -> None:
    now = int(time.time())
    ends = [(now - days * 86_400) * SECOND for days in (40, 39, 1)]
    await store.write(Batch(points=[Point(stream("acme"), end - SECOND, end, Decimal(4)) for end in ends]))
    while await store.refresh():
        pass
    while (await audit_changed(store, datetime.now(timezone.utc))).hours:
        pass
    execute(dsn, "DELETE FROM usage_unaudited")
    loop = asyncio.create_task(keep_retained(store, Retention(points=timedelta(days=10)), 0.05))
    for _ in range(1600):
        # In a thread: it may wait for the loop's transaction, which must be able to go on.
        if await asyncio.to_thread(execute, dsn, "SELECT count(*) FROM usage_point") == [(1,)]:
            break
        await asyncio.sleep(0.05)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert execute(dsn, "SELECT count(*) FROM usage_point") == [(1,)]
    assert execute(dsn, "SELECT sum(quantity) FROM usage_daily") == [(12,)]
    assert await is_right(store)
