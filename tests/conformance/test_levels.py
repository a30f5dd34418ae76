"""Levels: gauges and UpDownCounters, by their maximum, latest, average and integral, against a clock that stops at
every instant at which anything changes."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.billing import records
from tallymark_collector.billing.aggregated import aggregated
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.invoice import Invoice
from tallymark_collector.billing.plans import Aggregation
from tallymark_collector.model import Batch, Point, Reason, Temporality
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine.reading import read
from tallymark_collector.quarantine.rules import Kind, rule
from tallymark_collector.store import Store
from tests.support import calendar
from tests.support.usage import SECOND, number, request, stream, sum_metric

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICRO = timedelta(microseconds=1)
STALE = 1800
KINDS = ("max", "latest", "average", "integral")
METERS = {f"{kind}.{across}": (kind, across) for kind in KINDS for across in ("sum", "latest")}
DECLARED = {
    meter: Aggregation(aggregation=kind, across=across, stale_after=STALE) for meter, (kind, across) in METERS.items()
}


class Sample(NamedTuple):
    time: datetime
    value: Decimal
    region: str
    producer: str


def catalog(terms: str) -> str:
    meters = "".join(
        f"  {meter}: {{unit: '{{request}}', aggregation: {kind}, across: {across}, stale_after: 30m}}\n"
        for meter, (kind, across) in METERS.items()
    )
    charges = "".join(f"      - {{meter: {meter}, unit_price: '1'}}\n" for meter in METERS)
    return (
        f"currency: EUR\nmeters:\n{meters}  plain: {{unit: '{{request}}'}}\nplans:\n  pro:\n    charges:\n{charges}"
        f"      - {{meter: plain, unit_price: 1}}\naccounts:\n  acme: {terms}\n"
    )


def nanoseconds(time: datetime) -> int:
    return (time - EPOCH) // MICRO * 1000


def levels(samples: Iterable[Sample], meters: Iterable[str] = tuple(METERS)) -> list[Point]:
    """The same samples under each meter."""
    return [
        Point(
            stream("acme", meter, sample.producer, Temporality.LEVEL, region=sample.region),
            0,
            nanoseconds(sample.time),
            sample.value,
        )
        for sample in samples
        for meter in meters
    ]


class Clock:
    """What an account stood at, worked out anew for every instant."""

    def __init__(self, samples: Iterable[Sample], across: str) -> None:
        self.of: dict[tuple[str, ...], dict[datetime, Decimal]] = defaultdict(dict)
        for time, value, region, producer in samples:
            held = self.of[(region,) if across == "latest" else (region, producer)]
            held[time] = max(value, held.get(time, value))

    def level(self, now: datetime) -> Fraction:
        total = Fraction(0)
        for told in self.of.values():
            last = max((time for time in told if time <= now), default=None)
            if last is not None and now < last + timedelta(seconds=STALE):
                total += Fraction(told[last])
        return total

    def quantities(self, start: datetime, end: datetime) -> dict[str, Fraction]:
        """By aggregation; nothing where nobody has told anything."""
        times = {time for told in self.of.values() for time in told}
        inside = [time for time in times if start <= time < end]
        holding = any(start - timedelta(seconds=STALE) < time < start for time in times)
        if not inside and not holding:
            return {}
        ends = {time + timedelta(seconds=STALE) for time in times}
        stops = sorted({time for time in times | ends if start <= time < end} | {start, end})
        seconds = Fraction(0)
        for now, then in pairwise(stops):
            seconds += self.level(now) * ((then - now) // MICRO)
        seconds /= 10**6
        return {
            "max": max(self.level(now) for now in stops[:-1]),
            "latest": self.level(max(inside, default=start)),
            "integral": seconds / 3600,
            "average": seconds / Fraction((end - start) // MICRO, 10**6),
        }


def rounded(quantity: Fraction) -> Decimal:
    """To 18 decimals, half away from zero."""
    scaled = quantity * 10**18
    whole = int(abs(scaled) + Fraction(1, 2))
    return Decimal(whole if scaled >= 0 else -whole).scaleb(-18)


async def apply(store: Store, terms: str, now: datetime) -> None:
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(catalog(terms)), now)


async def invoice(store: Store, at: datetime) -> Invoice:
    async with store.reading() as connection:
        return await records.invoice(connection, "default", "acme", at)


async def between(store: Store, start: datetime, end: datetime) -> dict[str, Decimal | None]:
    async with store.reading() as connection:
        return {
            each.meter: each.quantity for each in await aggregated(connection, "default", None, start, end, DECLARED)
        }


def near(edges: list[datetime], chance: random.Random) -> list[Sample]:
    """Samples about the edges: minutes apart, at the very edges, with gaps that are longer than a level holds."""
    found = []
    for edge in edges:
        times = [edge, edge - MICRO, edge + MICRO, edge - timedelta(seconds=STALE), edge + timedelta(seconds=STALE)]
        times += [edge + timedelta(microseconds=chance.randrange(-9 * 10**9, 9 * 10**9)) for _ in range(6)]
        for time in times:
            for region, producer in (("eu", "one"), ("eu", "two"), ("us", "one")):
                if chance.random() < 0.6:
                    found.append(Sample(time, Decimal(chance.randrange(0, 2000)).scaleb(-1), region, producer))
    return found


@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes, see test_views.py
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    zone=st.sampled_from(sorted(calendar.AWKWARD_ZONES)),
    anchor=st.sampled_from([1, 15, 31]),
    seed=st.integers(0, 2**32),
)
def test_a_periods_levels_equal_those_of_a_clock(
    zone: str,
    anchor: int,
    seed: int,
    blocking_store: Store,
    event_loop_runner: asyncio.AbstractEventLoop,
    dsn: str,
) -> None:
    terms = {"plan": "pro", "since": "2024-02-10", "time_zone": zone, "anchor_day": anchor, "cycle": "monthly"}
    periods = calendar.periods(terms, date(2024, 5, 1))
    now = max(end for _, end in periods) + timedelta(days=1)
    chance = random.Random(seed)
    samples = near(sorted({edge for period in periods for edge in period}), chance)
    clocks = {across: Clock(samples, across) for across in ("sum", "latest")}
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("TRUNCATE usage_level, subscription, billing_period, plan_version")

    def expected(start: datetime, end: datetime) -> dict[str, Decimal]:
        return {
            meter: rounded(clocks[across].quantities(start, end)[kind])
            for meter, (kind, across) in METERS.items()
            if clocks[across].quantities(start, end)
        }

    async def run() -> None:
        await apply(blocking_store, "{" + ", ".join(f"{key}: {value}" for key, value in terms.items()) + "}", now)
        points = levels(samples)
        chance.shuffle(points)
        written = 0
        for first in range(0, len(points), 151):
            result = await blocking_store.write(Batch(points=points[first : first + 151]))
            written += result.inserted
            assert not result.conflicts
            again = await blocking_store.write(Batch(points=points[first : first + 20]))
            assert (again.inserted, again.duplicates) == (0, len(points[first : first + 20]))
        assert written == len(points)
        for start, end in periods:
            brute = expected(start, end)
            made = await invoice(blocking_store, start)
            assert {line.meter: line.quantity for line in made.lines if line.meter != "plain"} == {
                meter: brute.get(meter, Decimal(0)) for meter in METERS
            }
            first = chance.choice(samples).time
            last = first + timedelta(microseconds=chance.randrange(1, 10**10))
            assert await between(blocking_store, first, last) == expected(first, last)
        async with blocking_store.reading() as reading:
            for view in ("usage_hourly", "usage_daily", "usage_by_period"):
                row = await (await reading.execute(f"SELECT count(*) FROM {view}")).fetchone()
                assert row == (0,), "levels are in no sum"

    event_loop_runner.run_until_complete(run())


NOON = datetime(2026, 7, 10, 12, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)
TERMS = "{plan: pro, since: 2026-07-01}"


async def test_what_one_process_counts_up_another_counts_down(store: Store) -> None:
    samples = [Sample(NOON, Decimal(5), "eu", "in"), Sample(NOON, Decimal(-3), "eu", "out")]
    await store.write(Batch(points=levels(samples)))
    found = await between(store, NOON, NOON + HOUR)
    assert found == {
        **{"max.sum": 2, "latest.sum": 2, "average.sum": 1, "integral.sum": 1},
        **{"max.latest": 5, "latest.latest": 5, "average.latest": Decimal("2.5"), "integral.latest": Decimal("2.5")},
    }


async def test_a_process_that_died_is_billed_for_as_long_as_a_level_holds_and_no_longer(store: Store) -> None:
    await store.write(Batch(points=levels([Sample(NOON, Decimal(8), "eu", "one")])))
    for hours in (1, 24, 24 * 300):
        assert (await between(store, NOON - HOUR, NOON + hours * HOUR))["integral.sum"] == 4
    assert await between(store, NOON + timedelta(seconds=STALE), NOON + 5 * HOUR) == {}


async def test_where_nothing_is_told_a_level_is_0_also_for_one_that_is_below(store: Store) -> None:
    """Before its first sample as after its last one."""
    hour = timedelta(hours=1)
    await store.write(Batch(points=levels([Sample(NOON, Decimal(-5), "eu", "one")])))
    for start, end, most in (
        (NOON - hour, NOON + timedelta(minutes=1), 0),
        (NOON, NOON + hour, 0),
        (NOON, NOON + timedelta(minutes=1), -5),
    ):
        found = await between(store, start, end)
        assert (found["max.sum"], found["max.latest"], found["latest.sum"]) == (most, most, -5)


async def test_within_a_microsecond_the_later_sample_holds(store: Store) -> None:
    of = stream("acme", "latest.sum", temporality=Temporality.LEVEL)
    ns = nanoseconds(NOON)
    await store.write(Batch(points=[Point(of, 0, ns + 999, Decimal(1)), Point(of, 0, ns + 1, Decimal(7))]))
    assert await between(store, NOON, NOON + HOUR) == {"latest.sum": 1}


async def test_another_value_of_one_instant_goes_to_quarantine_and_the_first_stays(store: Store) -> None:
    first = levels([Sample(NOON, Decimal(8), "eu", "one")], ["latest.sum"])
    await store.write(Batch(points=first))
    again = await store.write(Batch(points=[*first, first[0]._replace(value=Decimal("8.5"))]))
    assert (again.inserted, again.duplicates) == (0, 1)
    [conflict] = again.conflicts
    assert not conflict.metered
    assert conflict.refusal.reason is Reason.VALUE_CONFLICT
    assert "was 8 before and is 8.5 now" in conflict.refusal.detail
    assert await between(store, NOON, NOON + HOUR) == {"latest.sum": 8}


async def test_two_values_of_one_instant_in_one_batch(store: Store) -> None:
    one = levels([Sample(NOON, Decimal(8), "eu", "one")], ["latest.sum"])[0]
    result = await store.write(Batch(points=[one, one._replace(value=Decimal(9)), one]))
    assert (result.inserted, result.duplicates, len(result.conflicts)) == (1, 1, 1)


async def test_writers_at_once_are_answered_each_for_its_own_levels(store: Store) -> None:
    """They may share a transaction: of the same level one is new, all others are duplicates."""
    same = levels([Sample(NOON + n * MICRO, Decimal(n), "eu", "one") for n in range(20)], ["latest.sum"])
    results = await asyncio.gather(*(store.write(Batch(points=same)) for _ in range(8)))
    assert (sum(r.inserted for r in results), sum(r.duplicates for r in results)) == (20, 140)
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT count(*), sum(value) FROM usage_levels")).fetchone()
        assert row == (20, 190)
        row = await (await connection.execute("SELECT count(*) FROM usage_point")).fetchone()
        assert row == (0,)


async def test_increases_and_levels_of_one_name_are_refused(store: Store) -> None:
    await apply(store, TERMS, NOON)
    increase = Point(stream("acme", "max.sum"), nanoseconds(NOON), nanoseconds(NOON) + 1000, Decimal(1))
    await store.write(Batch(points=[*levels([Sample(NOON, Decimal(8), "eu", "one")], ["max.sum"]), increase]))
    with pytest.raises(BillingError, match=r"'max\.sum' cannot be billed by its max: it has both increases and levels"):
        await invoice(store, NOON)


async def test_increases_have_no_average(store: Store) -> None:
    await apply(store, TERMS, NOON)
    increase = Point(stream("acme", "average.sum"), nanoseconds(NOON), nanoseconds(NOON) + 1000, Decimal(1))
    await store.write(Batch(points=[increase]))
    with pytest.raises(BillingError, match="by its average: it is made of levels"):
        await invoice(store, NOON)


async def test_levels_that_nobody_bills_are_told(store: Store) -> None:
    await apply(store, TERMS, NOON)
    await store.write(Batch(points=levels([Sample(NOON, Decimal(8), "eu", "one")], ["plain", "other"])))
    made = await invoice(store, NOON)
    assert (made.total, made.unpriced) == (0, ())
    assert made.remarks == (
        "1 levels of meter 'other' (unit '{request}') are on no line: the plan has no charge for it",
        "1 levels of meter 'plain' (unit '{request}') are on no line: levels have no sum; declare `aggregation:"
        " integral`, `average`, `max` or `latest`",
    )


def gauge(name: str, *points: object) -> Metric:
    metric = Metric(name=name, unit="{request}")
    metric.gauge.data_points.extend(points)  # type: ignore[arg-type]
    return metric


async def test_gauges_and_updowncounters_that_name_an_account_come_in(store: Store) -> None:
    await apply(store, TERMS, NOON)
    ns = nanoseconds(NOON)
    pipeline = Pipeline(store, now_ns=lambda: ns + SECOND)
    acme = {"tallymark.account.id": "acme"}
    body = request(
        gauge("max.sum", number(0, ns, 4, acme), number(0, ns, 2.5, {**acme, "region": "eu"}), number(0, ns, 9, {})),
        sum_metric([number(ns - SECOND, ns, 7, acme)], "latest.sum", temporality=2, monotonic=False),
        sum_metric([number(ns - SECOND, ns, 7, acme)], "integral.sum", temporality=1, monotonic=False),
        gauge("free", number(0, ns, 4, {})),
        scope="billing",
    ).SerializeToString()
    for repeated in range(2):
        outcome = await pipeline.metrics("default", body)
        assert outcome.rejected == 2
        assert "account_missing (1 of meter 'max.sum')" in outcome.message
        assert "have it sent with cumulative temporality" in outcome.message
        assert (pipeline.totals.points, pipeline.totals.duplicates) == (3, 3 * repeated)
    for name, other in (
        ("max.sum", gauge("max.sum", number(0, ns, 5, acme))),
        ("latest.sum", sum_metric([number(ns - SECOND, ns, 8, acme)], "latest.sum", temporality=2, monotonic=False)),
    ):
        outcome = await pipeline.metrics("default", request(other, scope="billing").SerializeToString())
        assert (outcome.rejected, f"value_conflict (1 of meter '{name}')" in outcome.message) == (1, True)
    made = await invoice(store, NOON)
    billed = {line.meter: line.quantity for line in made.lines if line.quantity}
    assert billed == {"max.sum": Decimal("6.5"), "latest.sum": 7}
    async with store.reading() as connection:
        rows = await (
            await connection.execute("SELECT meter, value, attributes FROM usage_levels ORDER BY meter, value")
        ).fetchall()
        kept = await (
            await connection.execute(
                "SELECT meter, reason, payload FROM usage_quarantine WHERE NOT metered ORDER BY 1, 2"
            )
        ).fetchall()
    assert rows == [("latest.sum", 7, {}), ("max.sum", Decimal("2.5"), {"region": "eu"}), ("max.sum", 4, {})]
    contents = {(meter, reason): read("metrics", payload) for meter, reason, payload in kept}
    assert {key: (found.kind, found.facts["type"], found.facts["value"]) for key, found in contents.items()} == {
        ("integral.sum", "type_unsupported"): (Kind.LEVEL, "sum, increase (delta), may fall", "7"),
        ("latest.sum", "value_conflict"): (Kind.LEVEL, "sum, running total (cumulative), may fall", "8"),
        ("max.sum", "account_missing"): (Kind.LEVEL, "gauge", "9"),
        ("max.sum", "value_conflict"): (Kind.LEVEL, "gauge", "5"),
    }
    assert {reason: rule(reason).refusal(Kind.LEVEL) is None for _, reason in contents} == {
        "type_unsupported": False,
        "value_conflict": False,
        "account_missing": True,
    }
