"""What is dropped beside points: levels and running totals, so that whatever can still be asked is answered as before,
and whatever cannot is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import psycopg
import pytest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.retention import Dropped, drop_old
from tallymark_collector.billing.aggregated import aggregated
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.model import Batch, Point, Reason, Source, Temporality, fingerprint
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine import items
from tallymark_collector.quarantine.items import Filter
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import NotSettled, Person, release
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tests.conformance.test_levels import (
    DECLARED,
    HOUR,
    NOON,
    STALE,
    TERMS,
    Sample,
    apply,
    between,
    gauge,
    invoice,
    levels,
    nanoseconds,
)
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import SECOND, number, request, stream

DAY = timedelta(days=1)
pytestmark = pytest.mark.engines("timescale")


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        cursor = connection.execute(statement)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


async def test_a_source_that_was_billed_to_another_before_the_bound(store: Store, dsn: str) -> None:
    """Of each account's levels the last one stays, and that may be what ended them."""
    bound = NOON + 20 * DAY
    source = Source(fingerprint("seats"), Decimal(1))

    def told(account: str, offset: timedelta, value: int) -> Point:
        of = stream(account, "max.sum", "one", Temporality.LEVEL)
        return Point(replace(of, source=source), 0, nanoseconds(bound + offset), Decimal(value))

    early = [told("acme", -3 * HOUR, 5), told("acme", -2 * HOUR, 6), told("globex", -HOUR / 3, 6)]
    for point in [*early, told("globex", HOUR, 7)]:
        await store.write(Batch(points=[point]))

    async def stands() -> list[object]:
        async with store.reading() as connection:
            found = await aggregated(connection, "default", None, bound, bound + 3 * HOUR, DECLARED)
        return [(each.account, each.quantity) for each in found]

    before = await stands()
    assert before == [("acme", 0), ("globex", 7)]
    assert (await drop(store, 20)).levels_before == bound
    assert await stands() == before
    rows = execute(dsn, "SELECT account, value FROM usage_level ORDER BY time")
    assert rows == [("acme", 0), ("globex", 6), ("globex", 7)]
    # Late, under the file of before: as the time was billed that it comes into.
    result = await store.write(Batch(points=[told("acme", HOUR / 2, 9), told("acme", HOUR, 7)]))
    assert (result.inserted, result.duplicates) == (1, 1)
    assert await stands() == [("acme", 0), ("globex", 9)]


async def drop(store: Store, days: int, now: object = NOON + 40 * DAY) -> Dropped:
    while await store.refresh():
        pass
    await audit_changed(store, now)  # type: ignore[arg-type]
    return await drop_old(store, Retention(points=timedelta(days=days)), now)  # type: ignore[arg-type]


async def test_levels_of_what_is_kept_are_as_they_were(store: Store, dsn: str) -> None:
    """A level of ten minutes before the bound holds into the time after it."""
    bound = NOON + 20 * DAY
    told = [
        Sample(bound + offset, Decimal(value), "eu", producer)
        for producer, base in (("one", 10), ("two", 200))
        for value, offset in enumerate((-9 * DAY, -HOUR, -HOUR / 6, HOUR / 6, 5 * DAY), base)
    ]
    gone = Sample(bound - 10 * DAY, Decimal(7), "us", "three")
    await store.write(Batch(points=levels([*told, gone])))
    ranges = [
        (bound, bound + HOUR / 10),
        (bound, bound + HOUR),
        (bound + HOUR / 10, bound + 10 * DAY),
        (bound + 5 * DAY, bound + 6 * DAY),
    ]
    before = [await between(store, *each) for each in ranges]
    assert before[0]["max.sum"] == 12 + 202
    dropped = await drop(store, 20)
    assert (dropped.points_before, dropped.levels_before) == (None, bound)
    assert "but for the last one of each stream" in " ".join(dropped.sentences())
    assert [await between(store, *each) for each in ranges] == before
    kept = execute(dsn, "SELECT count(*) FROM usage_level WHERE time < (SELECT levels_from FROM usage_kept)")
    assert kept == [(3 * len(DECLARED),)], "the last one of each stream"
    # Nothing that begins before is answered, whether it ends before or after.
    for start, end in ((bound - HOUR, bound + HOUR), (bound - 12 * DAY, bound - 11 * DAY)):
        assert set((await between(store, start, end)).values()) == {None}
    assert (await drop(store, 20)).levels_before is None
    # What comes again, or late, of before the bound.
    again = await store.write(Batch(points=levels(told[2:4])))
    assert (again.inserted, again.duplicates) == (0, 2 * len(DECLARED))
    late = gauge("max.sum", number(0, nanoseconds(told[0].time), 10, {"tallymark.account.id": "acme"}))
    collector = Pipeline(store, now_ns=lambda: nanoseconds(NOON + 40 * DAY))
    outcome = await collector.metrics("default", request(late, scope="billing").SerializeToString())
    assert outcome.rejected == 1
    assert "not_storable (1 of meter 'max.sum'): the database cannot hold it: levels before" in outcome.message
    async with store.reading() as connection:
        [entry] = await items.open_items(connection, Filter("default"), 10)
        item = await items.find(connection, "default", entry.id)
    with pytest.raises(NotSettled, match="the database cannot hold it: levels before"):
        await release(store, item, Decision(), Person("anne"), nanoseconds(NOON + 40 * DAY))
    assert [await between(store, *each) for each in ranges] == before


async def test_periods_that_are_billed_keep_their_levels(store: Store) -> None:
    await apply(store, TERMS, NOON + 40 * DAY)
    await store.write(Batch(points=levels([Sample(NOON + n * DAY, Decimal(n), "eu", "one") for n in range(40)])))
    before = await invoice(store, NOON + 30 * DAY)
    # July's ended less than 35 days ago, so it is kept whatever its age.
    dropped = await drop(store, 8)
    assert dropped.levels_before is None
    dropped = await drop(store, 8, NOON + 70 * DAY)
    assert dropped.levels_before == NOON.replace(month=8, day=1, hour=0)
    with pytest.raises(BillingError, match="levels before 2026-08-01T00:00:00Z have been dropped"):
        await invoice(store, NOON + 10 * DAY)
    assert (await invoice(store, NOON + 30 * DAY)).lines == before.lines


async def test_a_meter_of_points_is_no_meter_of_levels(store: Store) -> None:
    """Levels that were dropped are no reason to refuse what is made of points."""
    import_ = stream("acme", "max.sum")
    import_ = type(import_)(import_.id, import_.series, import_.temporality, import_.resource, "log", import_.origin)
    at = nanoseconds(NOON)
    await store.write(Batch(points=[Point(import_, at, at, Decimal(5)), *levels([gone()], ["max.latest"])]))
    # Points whose hours wait to be made again stay.
    dropped = await drop_old(store, Retention(points=timedelta(days=20)), NOON + 40 * DAY)
    assert (dropped.points_before, dropped.levels_before) == (None, NOON + 20 * DAY)
    found = await between(store, NOON, NOON + HOUR)
    assert found == {"max.sum": 5, "max.latest": None}


def gone() -> Sample:
    return Sample(NOON + timedelta(seconds=STALE), Decimal(1), "eu", "one")


RULES = parse_rules("meters: {calls: {unit: '1', sources: [{metric: h, quantity: count, account: consumer}]}}")


def metered(at: int, count: int) -> bytes:
    start = nanoseconds(NOON) - SECOND
    point = histogram_point(start, at, count, None, {"consumer": "acme"})
    resource = {"service.name": "kong", "service.instance.id": "one"}
    return metrics_of(resource, histogram([point], "h", "s", 2)).SerializeToString()


async def test_totals_count_on_from_the_last_one_that_is_kept(store: Store, dsn: str) -> None:
    of = stream("acme", "jobs", temporality=Temporality.CUMULATIVE)
    start = nanoseconds(NOON) - SECOND
    now = NOON + 40 * DAY
    collector = Pipeline(store, now_ns=lambda: nanoseconds(now), metering=Metering(RULES))
    for day in range(40):
        at = nanoseconds(NOON + day * DAY)
        await store.write(Batch(points=[Point(of, start, at, Decimal(10 * day + 10))]))
        await collector.metrics("default", metered(at, 7 * day + 7))
    assert execute(dsn, "SELECT count(*) FROM usage_sample") == [(80,)]
    dropped = await drop(store, 15)
    assert dropped.points_before is not None
    days = (NOON + 39 * DAY - dropped.points_before) // DAY + 1
    assert execute(dsn, "SELECT count(*) FROM usage_sample") == [(2 * (days + 1),)]
    last = nanoseconds(now)
    await store.write(Batch(points=[Point(of, start, last, Decimal(415))]))
    await collector.metrics("default", metered(last, 290))
    # Of before the dropped points, late or again: refused with what it would bring.
    early = nanoseconds(NOON + 3 * DAY + HOUR)
    result = await store.write(Batch(points=[Point(of, start, early, Decimal(41))]))
    assert [one.refusal.reason for one in result.conflicts] == [Reason.NOT_STORABLE]
    outcome = await collector.metrics("default", metered(early, 29))
    assert outcome.rejected == 1
    # Between two that are kept.
    between_ = nanoseconds(dropped.points_before + 5 * DAY)
    await store.write(Batch(points=[Point(of, start, between_, Decimal(10 * (40 - days + 5)))]))
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT meter, sum(quantity) FROM usage_hourly GROUP BY 1")).fetchall()
        report = await audit(connection)
    assert dict(rows) == {"jobs": 415, "calls": 290}
    assert (report.differences, report.drifts) == ([], [])
