"""Count, max, latest and unique by billing period, against plain loops over what was sent."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tallymark_collector.billing import records
from tallymark_collector.billing.aggregated import Aggregated, aggregated, in_force
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.invoice import Invoice
from tallymark_collector.billing.plans import Aggregation
from tallymark_collector.model import Batch, Point, Stream, Temporality, fingerprint
from tallymark_collector.query.by_aggregation import usage_as_billed
from tallymark_collector.store import Store
from tests.support import calendar
from tests.support.usage import SECOND, stream

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICRO = timedelta(microseconds=1)
EVENTS = {"events": "count", "peak": "max", "last": "latest"}
UNIQUE = Aggregation(aggregation="unique", of="user.id")
DECLARED = {**{meter: Aggregation(aggregation=how) for meter, how in EVENTS.items()}, "users": UNIQUE}
USERS = ["ann", "bob", 7, "7", "Ann", None]
"""7 and "7" are one value: they read the same."""


def catalog(terms: str, **changed: str) -> str:
    meters = {**EVENTS, "users": "unique, of: user.id", **changed}
    declared = "".join(f"  {name}: {{unit: '{{request}}', aggregation: {how}}}\n" for name, how in meters.items())
    charges = "".join(f"      - {{meter: {name}, unit_price: '1'}}\n" for name in [*meters, "plain"])
    return f"""currency: EUR
meters:
{declared}  plain: {{unit: "{{request}}"}}
plans:
  pro:
    charges:
{charges}accounts:
  acme: {terms}
"""


def foreign(meter: str, producer: str = "one", user: str | int | None = None, account: str = "acme") -> Stream:
    """Events of something that is not our SDK, a point each."""
    found = stream(account, meter, producer, **({} if user is None else {"user.id": user}))
    return replace(found, id=fingerprint("foreign", found.id.hex), scope_name="access.log")


def nanoseconds(time: datetime) -> int:
    return (time - EPOCH) // MICRO * 1000


def events(said: Iterable[tuple[datetime, Decimal, str | int | None, str]]) -> list[Point]:
    """The same events under each meter."""
    return [
        Point(foreign(meter, producer, user), nanoseconds(time), nanoseconds(time), value)
        for time, value, user, producer in said
        for meter in ("events", "peak", "last", "users", "plain")
    ]


async def apply(store: Store, text: str, now: datetime) -> records.Applied:
    async with store.transaction() as connection:
        return await records.apply(connection, "default", parse_catalog(text), now)


async def invoice(store: Store, at: datetime, account: str = "acme") -> Invoice:
    async with store.reading() as connection:
        return await records.invoice(connection, "default", account, at)


async def between(store: Store, start: datetime, end: datetime) -> dict[str, Aggregated]:
    async with store.reading() as connection:
        found = await aggregated(connection, "default", "acme", start, end, DECLARED)
    assert len({each.meter for each in found}) == len(found)
    return {each.meter: each for each in found}


def around(edges: Sequence[datetime], chance: random.Random) -> list[datetime]:
    """Instants at, beside and near the edges; no two equal."""
    found = set()
    for edge in edges:
        whole = edge.replace(minute=0, second=0, microsecond=0)
        found |= {edge + step * MICRO for step in (-1, 0, 1)}
        found |= {whole + timedelta(hours=hour) + step * MICRO for hour in (-1, 0, 1, 2) for step in (-1, 0)}
        found |= {edge + timedelta(microseconds=chance.randrange(-(10**10), 10**10)) for _ in range(8)}
    return sorted(found)


class Totals:
    """Running totals of each user with restarts, as samples (start, time, value); and what they come to."""

    def __init__(self, times: list[datetime], chance: random.Random) -> None:
        self.samples: list[tuple[str, datetime, datetime, int]] = []
        for user in ("ann", "cumulative", "late"):
            start, total = times[0] - timedelta(days=1), 0
            for time in sorted(chance.sample(times, len(times) // 3)):
                if chance.random() < 0.2:
                    start, total = time - MICRO, 0
                total += chance.choice([0, 0, 1, 5])
                self.samples.append((user, start, time, total))

    def points(self) -> list[Point]:
        streams = {
            user: stream("acme", "users", "counter", Temporality.CUMULATIVE, **{"user.id": user})
            for user in ("ann", "cumulative", "late")
        }
        return [Point(streams[u], nanoseconds(s), nanoseconds(t), Decimal(v)) for u, s, t, v in self.samples]

    def used(self, start: datetime, end: datetime) -> set[str]:
        """Users whose total grew at a sample in the range."""
        found, last = set(), {}
        for user, since, time, value in self.samples:
            if value > last.get((user, since), 0) and start <= time < end:
                found.add(user)
            last[user, since] = value
        return found


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes, see test_views.py
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    zone=st.sampled_from(sorted(calendar.AWKWARD_ZONES)),
    anchor=st.sampled_from([1, 15, 30, 31]),
    seed=st.integers(0, 2**32),
    refreshes=st.sampled_from([0, 1, 1000]),
)
def test_a_periods_quantities_equal_loops_over_what_was_sent(
    zone: str,
    anchor: int,
    seed: int,
    refreshes: int,
    blocking_store: Store,
    event_loop_runner: asyncio.AbstractEventLoop,
    dsn: str,
) -> None:
    terms = {"plan": "pro", "since": "2024-01-20", "time_zone": zone, "anchor_day": anchor, "cycle": "monthly"}
    periods = list(calendar.periods(terms, date(2024, 7, 1)))
    now = max(end for _, end in periods) + timedelta(days=1)
    chance = random.Random(seed)
    edges = sorted({edge for period in periods for edge in period})
    times = around(edges, chance)
    said = [
        (time, Decimal(chance.randrange(0, 50)).scaleb(-1), chance.choice(USERS), chance.choice(["one", "two"]))
        for time in times
    ]
    totals = Totals(times, chance)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(
            "TRUNCATE usage_point, usage_sample, usage_hour, usage_dirty, subscription, billing_period, plan_version"
        )

    async def run() -> None:
        written = ", ".join(f"{key}: {value}" for key, value in terms.items())
        await apply(blocking_store, catalog(f"{{{written}}}"), now)
        points = [*events(said), *totals.points()]
        chance.shuffle(points)
        for first in range(0, len(points), 97):
            await blocking_store.write(Batch(points=points[first : first + 97]))
            if chance.random() < 0.2:
                await blocking_store.write(Batch(points=chance.sample(points[: first + 97], 30)))
        for _ in range(refreshes):
            if not await blocking_store.refresh(50):
                break
        async with blocking_store.reading() as reading:
            rows = await (
                await reading.execute(
                    """SELECT period_start, period_end, meter, aggregation, quantity, problem
                       FROM usage_by_period_aggregated WHERE account = 'acme' AND period_end <= %s""",
                    [now],
                )
            ).fetchall()
        view: dict[tuple[datetime, datetime], dict[str, Decimal]] = defaultdict(dict)
        for start, end, meter, how, quantity, problem in rows:
            assert (how, problem) == (DECLARED[meter].aggregation, None)
            view[start, end][meter] = quantity
        for start, end in periods:
            inside = [item for item in said if start <= item[0] < end]
            named: defaultdict[str, Decimal] = defaultdict(Decimal)
            for _, value, user, _ in inside:
                named["" if user is None else str(user)] += value
            users = {user for user, value in named.items() if user and value} | totals.used(start, end)
            brute = {
                "events": Decimal(len(inside)),
                "peak": max((value for _, value, _, _ in inside), default=Decimal(0)),
                "last": max(inside)[1] if inside else Decimal(0),
                "users": Decimal(len(users)),
                "plain": sum((value for _, value, _, _ in inside), Decimal(0)),
            }
            made = await invoice(blocking_store, start)
            assert {line.meter: line.quantity for line in made.lines} == brute
            assert made.total == sum(brute.values())
            assert [named[""] > 0] == [bool(made.remarks)]
            assert {meter: view[start, end].get(meter, Decimal(0)) for meter in DECLARED} == {
                meter: brute[meter] for meter in DECLARED
            }
            # Any other range says the same as the loops, too: inside one hour, over whole hours, empty.
            first = chance.choice(times)
            for last in (first, first + 20 * 60 * 10**6 * MICRO, chance.choice([t for t in times if t >= first])):
                found = await between(blocking_store, first, last)
                expected = [item for item in said if first <= item[0] < last]
                assert bool(expected) == ("events" in found)
                if expected:
                    assert found["events"].quantity == found["events"].points == len(expected)
                    assert found["peak"].quantity == max(item[1] for item in expected)
                    assert found["last"].quantity == max(expected)[1]

    event_loop_runner.run_until_complete(run())


JUNE = datetime(2026, 6, 10, tzinfo=timezone.utc)
JULY = datetime(2026, 7, 10, tzinfo=timezone.utc)
AUGUST = datetime(2026, 8, 10, tzinfo=timezone.utc)
TERMS = "{plan: pro, since: 2026-06-01}"


def at(time: datetime, meter: str, value: int, producer: str = "one") -> Point:
    return Point(foreign(meter, producer), nanoseconds(time), nanoseconds(time), Decimal(value))


async def test_of_two_that_are_latest_the_greater_counts_whichever_came_first(store: Store) -> None:
    await apply(store, catalog(TERMS), JUNE)
    points = [at(JUNE, "last", 9), at(JULY, "last", 4, "one"), at(JULY, "last", 6, "two"), at(JULY - MICRO, "last", 99)]
    for each in points:
        await store.write(Batch(points=[each]))
        await store.write(Batch(points=[each]))
    july = {line.meter: line.quantity for line in (await invoice(store, JULY)).lines}
    assert july == {"last": 6, "events": 0, "peak": 0, "users": 0, "plain": 0}


async def test_a_changed_aggregation_leaves_closed_periods_as_they_were(store: Store) -> None:
    """June was billed by its largest, July is not over: it is billed as the file says now, like its prices."""
    await apply(store, catalog(TERMS), JUNE)
    for month in (JUNE, JULY):
        await store.write(Batch(points=[at(month + i * MICRO, "peak", value) for i, value in enumerate((3, 8, 5))]))
    before = await invoice(store, JUNE)
    applied = await apply(store, catalog(TERMS, peak="latest"), JULY)
    assert applied.new_versions == ("pro v2",)
    assert await invoice(store, JUNE) == before
    june, july = (
        {line.meter: (line.quantity, line.aggregation) for line in made.lines}
        for made in (before, await invoice(store, JULY))
    )
    assert (june["peak"], july["peak"]) == ((8, "max"), (5, "latest"))
    async with store.reading() as connection:
        rows = await (
            await connection.execute(
                "SELECT aggregation, quantity FROM usage_by_period_aggregated WHERE meter = 'peak' ORDER BY 2 DESC"
            )
        ).fetchall()
        assert rows == [("max", 8), ("latest", 5)]
        assert (await in_force(connection, "default"))["peak"] == Aggregation(aggregation="latest")
    applied = await apply(store, catalog(TERMS, peak="sum"), AUGUST)
    async with store.reading() as connection:
        assert "peak" not in await in_force(connection, "default")
    assert await invoice(store, JULY) != before
    assert {line.meter: line.quantity for line in (await invoice(store, JULY)).lines}["peak"] == 5


async def test_applying_again_changes_nothing_and_documents_without_aggregations_are_what_they_were(
    store: Store,
) -> None:
    await apply(store, catalog(TERMS), JUNE)
    assert (await apply(store, catalog(TERMS), JULY)).unchanged_plans == ("pro",)
    plain = parse_catalog(catalog(TERMS, events="sum", peak="sum", last="sum", users="sum")).plans["pro"]
    assert "aggregations" not in plain.to_document()
    assert plain.version != parse_catalog(catalog(TERMS)).plans["pro"].version


@pytest.mark.parametrize("meter", EVENTS)
@pytest.mark.parametrize("kind", ["running total", "of the SDK", "of another client, over an interval"])
async def test_what_is_no_single_event_is_refused(store: Store, meter: str, kind: str) -> None:
    """An increase between totals depends on when they were sent, the SDK's interval on how long an outage was, and of
    what other clients add up over an interval nobody knows how many events it was, nor how large the largest."""
    await apply(store, catalog(TERMS), JUNE)
    temporality = Temporality.CUMULATIVE if kind == "running total" else Temporality.DELTA
    of = stream("acme", meter, temporality=temporality)
    if kind != "of the SDK":
        of = replace(of, scope_name="access.log")
    ns = nanoseconds(JULY)
    await store.write(Batch(points=[Point(of, ns, ns + SECOND, Decimal(3)), at(JULY, meter, 1)]))
    with pytest.raises(BillingError, match=f"'{meter}' cannot be billed by its {EVENTS[meter]}: it needs points that"):
        await invoice(store, JULY)
    # Only that period, and only that account.
    await invoice(store, JUNE)
    async with store.reading() as connection:
        [found] = await aggregated(connection, "default", None, JUNE, AUGUST, DECLARED)
        assert (found.account, found.meter, found.quantity, found.points) == ("acme", meter, None, 2)
        billed = await usage_as_billed(connection, tenant="default")
    assert billed.usage.columns == ("account", "meter", "unit", "aggregation", "quantity", "points")
    assert [row[1:] for row in billed.usage.rows] == [
        (meter, "{event}" if meter == "events" else "{request}", EVENTS[meter], None, 2)
    ]
    assert "it needs points that stand for one event" in billed.remarks[0]


async def test_a_value_that_was_redacted_is_no_value_that_was_counted(store: Store) -> None:
    """Two keys that are one REDACTED would be one user."""
    await apply(store, catalog(TERMS), JUNE)
    said = [(JULY, Decimal(1), "ann", "one"), (JULY + MICRO, Decimal(1), "REDACTED", "one")]
    await store.write(Batch(points=events(said)))
    with pytest.raises(BillingError, match=r"'users' cannot be billed by its unique user\.id: values of its attribute"):
        await invoice(store, JULY)
    found = await between(store, JUNE, AUGUST)
    assert (found["users"].quantity, found["events"].quantity, found["peak"].quantity) == (None, 2, 1)


async def test_what_was_dropped_is_no_low_number(store: Store, dsn: str) -> None:
    await apply(store, catalog("{plan: pro, since: 2026-06-01, time_zone: Asia/Kolkata}"), JUNE)
    await store.write(Batch(points=events([(JUNE, Decimal(5), "ann", "one"), (JULY, Decimal(7), "bob", "one")])))
    while await store.refresh():
        pass
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("UPDATE usage_kept SET points_from = '2026-06-15T00:00Z'")
        connection.execute("DELETE FROM usage_point WHERE time < '2026-06-15T00:00Z'")
    with pytest.raises(BillingError, match="dropped"):
        await invoice(store, JUNE)
    found = await between(store, datetime(2026, 6, 1, tzinfo=timezone.utc), datetime(2026, 7, 1, tzinfo=timezone.utc))
    assert {meter: each.quantity for meter, each in found.items()} == {
        "users": 1,  # the hours still know who
        "events": None,
        "peak": None,
        "last": None,
    }
    assert {each.problem for each in found.values()} == {None, "points before 2026-06-15T00:00:00Z have been dropped"}
    half = await between(store, JUNE + timedelta(minutes=-30), JUNE + timedelta(hours=1))
    assert half["users"].quantity is None, "a piece of an hour is gone"
    july = await invoice(store, JULY)
    assert {line.meter: line.quantity for line in july.lines}["peak"] == 7


async def test_another_unit_is_on_no_line_as_it_is_for_sums(store: Store) -> None:
    await apply(store, catalog(TERMS).replace("peak: {unit: '{request}'", "peak: {unit: By"), JUNE)
    await store.write(Batch(points=[at(JULY, "peak", 3), at(JULY + MICRO, "peak", 4)]))
    made = await invoice(store, JULY)
    assert [(u.meter, u.unit, u.quantity) for u in made.unpriced] == [("peak", "{request}", 7)]
    assert {line.meter: line.quantity for line in made.lines}["peak"] == 0


async def test_accounts_and_tenants_are_apart(store: Store) -> None:
    await apply(store, catalog(TERMS), JUNE)
    ns = nanoseconds(JULY)
    other = replace(stream("acme", "peak", tenant="another"), scope_name="access.log")
    globex = foreign("peak", account="globex")
    await store.write(
        Batch(points=[at(JULY, "peak", 1), Point(other, ns, ns, Decimal(50)), Point(globex, ns, ns, Decimal(70))])
    )
    assert {line.meter: line.quantity for line in (await invoice(store, JULY)).lines}["peak"] == 1
    async with store.reading() as connection:
        billed = await usage_as_billed(connection, tenant="default")
    assert [(row[0], row[4]) for row in billed.usage.rows] == [("acme", 1), ("globex", 70)]


async def test_the_document_of_an_invoice_says_the_aggregation(store: Store) -> None:
    await apply(store, catalog(TERMS), JUNE)
    await store.write(
        Batch(points=events([(JULY, Decimal("2.5"), "ann", "one"), (JULY + MICRO, Decimal(1), None, "b")]))
    )
    document: dict[str, Any] = json.loads(json.dumps((await invoice(store, JULY)).to_document()))
    assert [(line["meter"], line["quantity"], line["unit"], line["aggregation"]) for line in document["lines"]] == [
        ("events", "2", "{event}", "count"),
        ("peak", "2.5", "{request}", "max"),
        ("last", "1", "{request}", "latest"),
        ("users", "1", "{user.id}", "unique user.id"),
        ("plain", "3.5", "{request}", "sum"),
    ]
    assert document["remarks"] == [
        "1 of meter 'users' (unit '{request}') have no attribute 'user.id' and are in no value that was counted"
    ]


async def test_a_day_of_a_zone_with_half_hours(store: Store) -> None:
    """18:29:59.999999 UTC is still June in Kolkata, a microsecond later is July."""
    await apply(store, catalog("{plan: pro, since: 2026-06-01, time_zone: Asia/Kolkata}"), JUNE)
    edge = datetime(2026, 7, 1, tzinfo=ZoneInfo("Asia/Kolkata")).astimezone(timezone.utc)
    await store.write(
        Batch(points=events([(edge - MICRO, Decimal(2), "ann", "one"), (edge, Decimal(9), "bob", "one")]))
    )
    assert {line.quantity for line in (await invoice(store, edge - MICRO)).lines} == {1, 2}
    assert {line.quantity for line in (await invoice(store, edge)).lines} == {1, 9}
