"""Usage by period in the database against a sum in Python over the same points, whatever the zone, cycle and anchor."""

from __future__ import annotations

import asyncio
import random
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.local_days import exists, zone_names
from tallymark_collector.model import Batch, Point
from tallymark_collector.store import Store
from tallymark_collector.store.database import Database
from tallymark_collector.store.migrations import available, migrate
from tests.support import calendar
from tests.support.usage import SECOND, stream

HOUR = timedelta(hours=1)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
STAGED = 40
"""Points around each edge."""


def catalog(*subscriptions: dict[str, Any]) -> str:
    lines = "".join(
        "    - {" + ", ".join(f"{key}: {value}" for key, value in terms.items() if value is not None) + "}\n"
        for terms in subscriptions
    )
    plans = "".join(
        f"  {plan}:\n    charges: [{{meter: api.requests, unit_price: '0.01'}}]\n" for plan in ("one", "two")
    )
    return f"""currency: EUR
meters:
  api.requests: {{unit: "{{request}}"}}
plans:
{plans}accounts:
  acme:
{lines}"""


def quantity(points: list[tuple[datetime, Decimal]], start: datetime, end: datetime) -> Decimal:
    return sum((value for time, value in points if start <= time < end), Decimal(0))


def points_near(edges: list[datetime], chance: random.Random) -> list[tuple[datetime, Decimal]]:
    """Instants at, just before and after each edge, at whole hours around it, and anywhere between; no two equal."""
    found = {}
    for edge in edges:
        whole = edge.replace(minute=0, second=0, microsecond=0)
        exact = [edge + timedelta(microseconds=step) for step in (-1, 0, 1)]
        hours = [
            whole + hour * HOUR + timedelta(microseconds=step)
            for hour in (-25, -24, -1, 0, 1, 2, 24)
            for step in (-1, 0)
        ]
        near = [edge + timedelta(microseconds=chance.randrange(-7_200_000_000, 7_200_000_000)) for _ in range(STAGED)]
        far = [edge + timedelta(seconds=chance.randrange(86_400 * 3)) for _ in range(5)]
        for time in [*exact, *hours, *near, *far]:
            found[time] = Decimal(chance.randrange(1, 10**9)).scaleb(-3)
    return list(found.items())


def as_points(written: list[tuple[datetime, Decimal]]) -> list[Point]:
    streams = [stream("acme", route=route) for route in ("/a", "/b")]
    times = [(time - EPOCH) // timedelta(microseconds=1) * 1000 for time, _ in written]
    return [
        Point(streams[number % 2], time - SECOND, time, value)
        for number, (time, (_, value)) in enumerate(zip(times, written, strict=True))
    ]


async def by_period(store: Store) -> dict[tuple[datetime, datetime], tuple[str, Decimal, int]]:
    async with store.reading() as connection:
        rows = await (
            await connection.execute(
                "SELECT period_start, period_end, plan, quantity, points FROM usage_by_period WHERE account = 'acme'"
            )
        ).fetchall()
    assert len({row[:2] for row in rows}) == len(rows)
    return {row[:2]: row[2:] for row in rows}


anchors = st.one_of(
    st.fixed_dictionaries({"cycle": st.just("monthly"), "anchor_day": st.sampled_from([1, 15, 28, 29, 30, 31])}),
    st.dates(date(2000, 1, 1), date(2000, 12, 31)).map(
        lambda day: {"cycle": "yearly", "anchor_month": day.month, "anchor_day": day.day}
    ),
    st.just({"cycle": "yearly", "anchor_month": 2, "anchor_day": 29}),
    st.fixed_dictionaries({"cycle": st.just("weekly"), "anchor_weekday": st.sampled_from(calendar.WEEKDAYS)}),
)


@st.composite
def accounts(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One subscription, or two with a change of plan, cycle, anchor and zone on some day between."""
    zones = st.sampled_from(sorted(calendar.AWKWARD_ZONES)) | st.sampled_from(sorted(zone_names()))
    # Years in which the awkward zones changed their clocks at midnight, left out a day, had no whole hours.
    year = draw(st.sampled_from([1971, 2009, 2011, 2018, 2024, 2025]))
    since = draw(st.dates(date(year, 1, 1), date(year, 12, 28)))
    changed = since + timedelta(days=draw(st.integers(1, 400))) if draw(st.booleans()) else None
    # One zone: a day of two zones would begin at two instants.
    zone = draw(zones)
    if not all(exists(day, ZoneInfo(zone)) for day in (since, changed) if day):
        zone = "Asia/Kathmandu"
    spans = [(since, changed), (changed, None)] if changed else [(since, None)]
    return [
        {
            **draw(anchors),
            "plan": plan,
            "time_zone": zone,
            "since": start.isoformat(),
            "until": end and end.isoformat(),
        }
        for plan, (start, end) in zip(["one", "two"], spans, strict=False)
        if start
    ]


@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes, see test_views.py
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(account=accounts(), seed=st.integers(0, 2**32), refreshes=st.sampled_from([0, 1, 1000]))
def test_sums_by_period_equal_a_sum_over_the_points(
    account: list[dict[str, Any]],
    seed: int,
    refreshes: int,
    blocking_store: Store,
    event_loop_runner: asyncio.AbstractEventLoop,
    dsn: str,
) -> None:
    stop = date.fromisoformat(account[0]["since"]) + timedelta(days=800)
    expected = {
        period: terms["plan"] for terms in account for period in calendar.periods(terms, stop) if period[0] < period[1]
    }
    # A day after the last boundary of the model, so that the last period in the database is complete.
    now = max(end for _, end in expected) + timedelta(days=1)
    chance = random.Random(seed)
    edges = sorted({edge for period in expected for edge in period})
    chosen = sorted(chance.sample(edges, min(len(edges), 12)))
    written = points_near(chosen, chance)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("TRUNCATE usage_point, usage_hour, usage_dirty, subscription, billing_period, plan_version")

    async def run() -> None:
        async with blocking_store.transaction() as transaction:
            await records.apply(transaction, "default", parse_catalog(catalog(*account)), now)
        await blocking_store.write(Batch(points=as_points(written)))
        for _ in range(refreshes):
            if not await blocking_store.refresh(50):
                break
        found = {span: row for span, row in (await by_period(blocking_store)).items() if span[1] <= now}
        brute = {span: (plan, quantity(written, *span)) for span, plan in expected.items()}
        assert {span: (plan, total) for span, (plan, total, _) in found.items()} == {
            span: row for span, row in brute.items() if row[1]
        }
        counted = {span: sum(span[0] <= time < span[1] for time, _ in written) for span in found}
        assert {span: row[2] for span, row in found.items()} == counted

        (start, end), (plan, total) = chance.choice([item for item in brute.items() if item[1][1]])
        async with blocking_store.reading() as reading:
            invoice = await records.invoice(reading, "default", "acme", start)
            assert await records.invoice(reading, "default", "acme", end - timedelta(microseconds=1)) == invoice
        assert (invoice.plan, [line.quantity for line in invoice.lines]) == (plan, [total])

    event_loop_runner.run_until_complete(run())


WEEKLY = {"plan": "one", "cycle": "weekly", "anchor_weekday": "wednesday", "since": "2026-06-01"}
YEARLY = {"plan": "one", "cycle": "yearly", "anchor_month": 2, "anchor_day": 29, "since": "2024-01-10"}


@pytest.mark.parametrize("terms", [WEEKLY, YEARLY], ids=lambda terms: str(terms["cycle"]))
async def test_a_cycle_is_stored_and_comes_back(store: Store, terms: dict[str, Any]) -> None:
    wanted = parse_catalog(catalog(terms))
    now = datetime(2026, 9, 20, tzinfo=timezone.utc)
    for changed in (("acme",), ()):
        async with store.transaction() as connection:
            applied = await records.apply(connection, "default", wanted, now)
        assert applied.changed_accounts == changed
    async with store.reading() as connection:
        assert (await records.subscriptions(connection, "default"))["acme"] == list(wanted.subscriptions)


@pytest.mark.parametrize("change", [{"anchor_weekday": "thursday"}, {"cycle": "monthly", "anchor_weekday": None}])
async def test_a_change_of_cycle_that_moves_a_closed_period_is_refused(store: Store, change: dict[str, Any]) -> None:
    now = datetime(2026, 9, 20, tzinfo=timezone.utc)
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(catalog(WEEKLY)), now)
    with pytest.raises(records.ClosedPeriodError, match="is closed and would change"):
        async with store.transaction() as connection:
            await records.apply(connection, "default", parse_catalog(catalog({**WEEKLY, **change})), now)


async def test_a_running_year_may_become_months(store: Store) -> None:
    """The year has not ended: nothing that was billed changes."""
    now = datetime(2024, 2, 20, tzinfo=timezone.utc)
    yearly = {**YEARLY, "since": "2024-02-01", "anchor_month": 2, "anchor_day": 1}
    monthly = {**yearly, "cycle": "monthly", "anchor_month": None}
    for terms, periods in ((yearly, 1), (monthly, 3)):
        async with store.transaction() as connection:
            await records.apply(connection, "default", parse_catalog(catalog(terms)), now)
            row = await (await connection.execute("SELECT count(*) FROM billing_period")).fetchone()
        assert row == (periods,)


@pytest.mark.parametrize(
    "values",
    [
        "'monthly', NULL, NULL, NULL",
        "'monthly', 1, 1, NULL",
        "'yearly', 1, NULL, NULL",
        "'yearly', 1, 1, 1",
        "'weekly', NULL, NULL, NULL",
        "'weekly', 1, NULL, 1",
        "'daily', NULL, NULL, NULL",
        "'weekly', NULL, NULL, 8",
        "'yearly', 1, 13, NULL",
    ],
)
async def test_an_anchor_that_is_not_the_cycles_own_cannot_be_stored(store: Store, values: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        async with store.transaction() as connection:
            await connection.execute(
                "INSERT INTO subscription (account, tenant, since, plan, time_zone, cycle, anchor_day, anchor_month,"
                f" anchor_weekday) VALUES ('a', 't', '2026-01-01', 'p', 'UTC', {values})"
            )


async def test_a_database_from_before_the_cycles_keeps_its_subscriptions_and_periods(unmigrated: str) -> None:
    before = [step for step in available() if step.version < 4]
    database = Database(unmigrated)
    await database.open()
    async with database.connection() as connection:
        await migrate(connection, before)
        await connection.execute(
            "INSERT INTO subscription (account, tenant, since, plan, anchor_day, time_zone)"
            " VALUES ('acme', 'default', '2026-01-31', 'one', 31, 'Asia/Kolkata')"
        )
        await connection.execute(
            "INSERT INTO billing_period (period_start, period_end, account, tenant, since, number, plan)"
            " VALUES ('2026-01-30T18:30Z', '2026-02-27T18:30Z', 'acme', 'default', '2026-01-31', 0, 'one')"
        )
        await migrate(connection)
        [kept] = (await records.subscriptions(connection, "default"))["acme"]
        assert (kept.cycle, kept.anchor_day, kept.anchor_month, kept.anchor_weekday) == ("monthly", 31, None, None)
        async with connection.transaction():
            later = datetime(2026, 3, 1, tzinfo=timezone.utc)
            assert await records.extend_periods(connection, "default", later) == 3
        row = await (await connection.execute("SELECT period_end FROM billing_period WHERE number = 0")).fetchone()
        assert row == (datetime(2026, 2, 27, 18, 30, tzinfo=timezone.utc),)
    await database.close()
