"""An audit that cannot find anything is worth nothing: each test breaks the database by hand and must be told."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal

import psycopg

from tallymark_collector.aggregates.audit import Report, audit
from tallymark_collector.model import Batch, Temporality
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric

FIRST = datetime.fromtimestamp(BASE // SECOND, timezone.utc)


async def report(store: Store, **bounds: object) -> Report:
    async with store.reading() as connection:
        return await audit(connection, **bounds)  # type: ignore[arg-type]


async def fill(store: Store) -> None:
    names = [stream("acme"), stream("globex"), stream("acme", producer="two")]
    await store.write(Batch(points=[point(of, 3600 * h, 3600 * h + 10, 5) for of in names for h in range(4)]))
    while await store.refresh():
        pass


def breaking(dsn: str, statement: str) -> int:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        return connection.execute(statement).rowcount


async def test_nothing_to_find(store: Store) -> None:
    assert (await report(store)) == Report(0, 0, [], [], [])
    await fill(store)
    found = await report(store)
    assert found.clean
    assert (found.hours, found.points) == (8, 12)


async def test_a_wrong_cached_sum_is_found_and_mended(store: Store, dsn: str) -> None:
    await fill(store)
    assert breaking(dsn, f"UPDATE usage_hour SET quantity = 99 WHERE account = 'acme' AND bucket = '{FIRST}'") == 1
    found = await report(store)
    assert [(d.account, d.bucket, d.meter, d.raw, d.aggregated) for d in found.differences] == [
        ("acme", FIRST, "api.requests", Decimal(10), Decimal(99))
    ]
    await store.mark({(d.bucket, d.account, d.tenant) for d in found.differences})
    assert (await report(store)).clean, "right from the mark on, before any refresh"
    assert await store.refresh() == 1
    assert (await report(store)).clean


async def test_a_lost_and_an_invented_hour_are_found_and_mended(store: Store, dsn: str) -> None:
    await fill(store)
    breaking(dsn, f"DELETE FROM usage_hour WHERE account = 'globex' AND bucket = '{FIRST}'")
    breaking(
        dsn,
        "INSERT INTO usage_hour"
        " SELECT bucket + interval '1 day', series, account, tenant, 1, 1 FROM usage_hour LIMIT 1",
    )
    found = await report(store)
    assert sorted((d.raw, d.aggregated) for d in found.differences if d.raw is not None) == [(5, None)]
    assert [(d.raw, d.aggregated) for d in found.differences if d.raw is None] == [(None, 1)]
    await store.mark({(d.bucket, d.account, d.tenant) for d in found.differences})
    await store.refresh()
    assert (await report(store)).clean


async def test_a_lost_mark_is_found(store: Store, dsn: str) -> None:
    await fill(store)
    await store.write(Batch(points=[point(stream("acme"), 20, 30, 7)]))
    breaking(dsn, "DELETE FROM usage_dirty")
    assert [(d.raw, d.aggregated) for d in (await report(store)).differences] == [(17, 10)]


async def test_a_series_missing_from_the_dictionary_is_found(store: Store, dsn: str) -> None:
    await fill(store)
    breaking(dsn, "DELETE FROM usage_series WHERE account = 'globex'")
    found = await report(store)
    assert [(d.account, d.meter, d.aggregated) for d in found.differences] == [("globex", None, None)] * 4


async def test_bounds(store: Store, dsn: str) -> None:
    await fill(store)
    breaking(dsn, "UPDATE usage_hour SET quantity = 0")
    assert len((await report(store)).differences) == 8
    assert len((await report(store, account="globex")).differences) == 4
    found = await report(store, start=FIRST + timedelta(hours=1), end=FIRST + timedelta(hours=2))
    assert {d.bucket for d in found.differences} == {FIRST + timedelta(hours=1)}


async def test_increases_that_do_not_match_their_totals_are_found(store: Store, dsn: str) -> None:
    of = stream(temporality=Temporality.CUMULATIVE)
    await store.write(Batch(points=[point(of, 0, 10, 5), point(of, 0, 20, 9)]))
    assert (await report(store)).clean
    breaking(dsn, "DELETE FROM usage_point WHERE quantity = 4")
    breaking(dsn, "DELETE FROM usage_hour")
    found = await report(store)
    assert [(drift.account, drift.billed, drift.sampled) for drift in found.drifts] == [("acme", 5, 9)]


async def test_overlapping_intervals_of_one_stream_are_found(store: Store) -> None:
    await fill(store)
    await store.write(Batch(points=[point(stream("acme"), 5, 15, 1)]))
    found = await report(store)
    assert [(o.account, o.end - o.start) for o in found.overlaps] == [("acme", timedelta(seconds=10))]
    assert not found.differences


async def test_a_first_total_of_a_coarse_clock_is_no_drift(store: Store) -> None:
    """JavaScript's: it counts although it starts when it ends, and the audit agrees."""
    for language, total in (("nodejs", 50), ("go", 7)):
        sent = request(
            sum_metric([number(BASE, BASE, total, {"tallymark.account.id": language})], temporality=2),
            producer=language,
            **{"telemetry.sdk.language": language},
        )
        await Pipeline(store, now_ns=lambda: BASE + SECOND).metrics("default", sent.SerializeToString())
    found = await report(store)
    assert (found.differences, found.drifts) == ([], [])
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT account, quantity FROM usage_hourly")).fetchall()
    assert rows == [("nodejs", 50)]
