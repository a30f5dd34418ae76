"""Periods, plans and invoices in the database, against sums over the same points by other means."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from zoneinfo import ZoneInfo

import psycopg
import pytest

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.plans import Catalog
from tallymark_collector.model import Batch, Point
from tallymark_collector.store import Store
from tests.support.usage import SECOND, stream

NOW = datetime(2026, 9, 20, 12, tzinfo=timezone.utc)


def catalog(accounts: str, price: str = "0.5", plans: Sequence[str] = ("basic", "pro")) -> Catalog:
    terms = "".join(
        f"""
  {plan}:
    charges:
      - {{flat: "10.00", name: Base fee}}
      - {{meter: api.requests, included: 3, unit_price: "{price}"}}"""
        for plan in plans
    )
    return parse_catalog(
        f"""currency: EUR
meters:
  api.requests: {{unit: "{{request}}"}}
plans:{terms}
accounts:
{accounts}"""
    )


ACME = "  acme: {plan: basic, since: 2026-06-15, anchor_day: 15, time_zone: Asia/Kolkata}"


async def apply(store: Store, wanted: Catalog, now: datetime = NOW) -> records.Applied:
    async with store.transaction() as connection:
        return await records.apply(connection, "default", wanted, now)


def local(zone: str, *parts: int) -> datetime:
    return datetime(*parts, tzinfo=ZoneInfo(zone))  # type: ignore[arg-type]


def at(when: datetime, value: int, account: str = "acme", microseconds: int = 0) -> Point:
    end = round(when.timestamp()) * SECOND + microseconds * 1000
    return Point(stream(account), end - 5 * SECOND, end, Decimal(value))


async def by_period(store: Store) -> list[tuple[str, datetime, datetime, Decimal]]:
    async with store.reading() as connection:
        return await (
            await connection.execute(
                "SELECT account, period_start, period_end, quantity FROM usage_by_period ORDER BY 1, 2"
            )
        ).fetchall()


@pytest.mark.parametrize("refreshed", [True, False])
async def test_periods_of_zones_with_half_hours_and_clock_changes(store: Store, refreshed: bool) -> None:
    zones = ["Asia/Kolkata", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"]
    lines = [f"  a{i}: {{plan: basic, since: 2025-09-30, anchor_day: 31, time_zone: {z}}}" for i, z in enumerate(zones)]
    await apply(store, catalog("\n".join(lines)))
    points = []
    for i, zone in enumerate(zones):
        for month in range(9, 13):
            midnight = local(zone, 2025, month, 30 if month in (9, 11) else 31)
            for seconds in (-3601, -1800, -1, 0, 1, 1799, 1800, 3600, 86400):
                points.append(at(midnight.astimezone(timezone.utc) + timedelta(seconds=seconds), 1 + month, f"a{i}"))
    await store.write(Batch(points=points))
    while refreshed and await store.refresh():
        pass
    found = await by_period(store)
    assert len(found) == len(zones) * 4
    for account, start, end, quantity in found:
        low, high = (round(t.timestamp()) * SECOND for t in (start, end))
        brute = sum(p.value for p in points if p.stream.series.account == account and low <= p.time_ns < high)
        assert quantity == brute
        midnight = start.astimezone(ZoneInfo(zones[int(account[1:])]))
        assert (midnight.hour, midnight.minute) == (0, 0)


async def test_a_period_is_half_open_to_the_microsecond(store: Store) -> None:
    await apply(store, catalog(ACME))
    start = local("Asia/Kolkata", 2026, 7, 15)
    end = local("Asia/Kolkata", 2026, 8, 15)
    await store.write(
        Batch(points=[at(start, 1, microseconds=-1), at(start, 2), at(end, 4, microseconds=-1), at(end, 8)])
    )
    assert [(s, q) for _, s, _, q in await by_period(store)] == [
        (local("Asia/Kolkata", 2026, 6, 15), 1),
        (start, 6),
        (end, 8),
    ]


async def test_an_invoice_from_stored_usage(store: Store) -> None:
    await apply(store, catalog(ACME))
    inside = local("Asia/Kolkata", 2026, 8, 20)
    await store.write(Batch(points=[at(inside, 7), at(inside + timedelta(days=5), 2), at(inside, 50, "globex")]))
    async with store.reading() as connection:
        invoice = await records.invoice(connection, "default", "acme", inside)
    assert invoice.total == Decimal("13.00"), "10.00 and (9 - 3 included) at 0.5"
    assert invoice.period.start == local("Asia/Kolkata", 2026, 8, 15)


async def test_applying_the_same_again_changes_nothing(store: Store) -> None:
    first = await apply(store, catalog(ACME))
    again = await apply(store, catalog(ACME))
    assert (first.new_versions, first.changed_accounts) == (("basic v1", "pro v1"), ("acme",))
    assert (again.new_versions, again.changed_accounts, again.unchanged_accounts) == ((), (), 1)
    assert again.unchanged_plans == ("basic", "pro")


async def test_a_new_price_holds_for_periods_that_end_after_it_was_applied(store: Store) -> None:
    await apply(store, catalog(ACME, "0.5"), NOW)
    august, september = local("Asia/Kolkata", 2026, 8, 16), local("Asia/Kolkata", 2026, 9, 16)
    await store.write(Batch(points=[at(august, 13), at(september, 13)]))

    async def totals() -> list[Decimal]:
        async with store.reading() as connection:
            return [(await records.invoice(connection, "default", "acme", when)).total for when in (august, september)]

    assert await totals() == [Decimal("15.00")] * 2
    applied = await apply(store, catalog(ACME, "0.7"), NOW + timedelta(hours=1))
    assert applied.new_versions == ("basic v2", "pro v2")
    assert await totals() == [Decimal("15.00"), Decimal("17.00")]
    back = await apply(store, catalog(ACME, "0.5"), NOW + timedelta(hours=2))
    assert back.new_versions == ("basic v3", "pro v3")
    assert await totals() == [Decimal("15.00")] * 2


async def test_a_closed_period_cannot_be_rewritten(store: Store) -> None:
    await apply(store, catalog(ACME))
    for change in (("basic", "pro"), ("anchor_day: 15", "anchor_day: 14"), ("Asia/Kolkata", "UTC")):
        with pytest.raises(records.ClosedPeriodError, match="is closed and would change"):
            await apply(store, catalog(ACME.replace(*change)))
    async with store.reading() as connection:
        [kept] = (await records.subscriptions(connection, "default"))["acme"]
    assert (kept.plan, kept.anchor_day, kept.time_zone) == ("basic", 15, "Asia/Kolkata")


async def test_an_earlier_beginning_adds_a_period_and_moves_none(store: Store) -> None:
    await apply(store, catalog(ACME))
    await apply(store, catalog(ACME.replace("06-15", "05-15")))
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT count(*), min(period_start) FROM billing_period")).fetchone()
    assert row == (7, local("Asia/Kolkata", 2026, 5, 15))


async def test_a_change_of_plan_by_a_second_subscription(store: Store) -> None:
    await apply(store, catalog(ACME))
    both = """  acme:
    - {plan: basic, since: 2026-06-15, until: 2026-10-01, anchor_day: 15, time_zone: Asia/Kolkata}
    - {plan: pro, since: 2026-10-01, anchor_day: 1, time_zone: Asia/Kolkata}"""
    assert (await apply(store, catalog(both))).changed_accounts == ("acme",)
    async with store.reading() as connection:
        rows = await (
            await connection.execute("SELECT period_start, period_end, plan FROM billing_period ORDER BY period_start")
        ).fetchall()
        late = await records.invoice(connection, "default", "acme", local("Asia/Kolkata", 2026, 10, 5))
    assert all(before[1] == after[0] for before, after in pairwise(rows)), "no gap, no overlap"
    assert [row[2] for row in rows] == ["basic"] * 4 + ["pro"] * 2
    assert late.plan == "pro"


async def test_periods_are_extended_as_time_goes_on(store: Store) -> None:
    await apply(store, catalog(ACME))
    later = NOW + timedelta(days=200)
    async with store.transaction() as connection:
        assert await records.extend_periods(connection, "default", later) == 6, "December to May"
        assert await records.extend_periods(connection, "default", later) == 0


async def test_an_account_without_a_period_is_told_so(store: Store) -> None:
    await apply(store, catalog(ACME))
    async with store.reading() as connection:
        with pytest.raises(BillingError, match="no subscription"):
            await records.invoice(connection, "default", "nobody", NOW)
        with pytest.raises(BillingError, match="subscribed since 2026-06-15"):
            await records.invoice(connection, "default", "acme", local("UTC", 2020, 1, 1))


async def test_accounts_that_the_file_does_not_name_are_left_alone(store: Store) -> None:
    await apply(store, catalog(ACME))
    applied = await apply(store, catalog(ACME.replace("acme", "globex")))
    assert applied.only_in_database == ("acme",)
    async with store.reading() as connection:
        assert set(await records.subscriptions(connection, "default")) == {"acme", "globex"}


@pytest.mark.parametrize("edge", ["period_start", "period_end"])
async def test_a_period_row_that_differs_from_the_calendar_is_no_empty_invoice(
    store: Store, dsn: str, edge: str
) -> None:
    """Another machine's time zone data: neither "no usage" nor the same usage in two periods."""
    await apply(store, catalog(ACME))
    inside = local("Asia/Kolkata", 2026, 8, 20)
    await store.write(Batch(points=[at(inside, 7)]))
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(
            f"UPDATE billing_period SET {edge} = {edge} + interval '1 hour'"
            " WHERE period_start <= %s AND period_end > %s",
            [inside, inside],
        )
    async with store.transaction() as connection:
        await records.extend_periods(connection, "default", NOW)
    async with store.reading() as connection:
        with pytest.raises(BillingError, match="was written down as"):
            await records.invoice(connection, "default", "acme", inside)
    assert len(await by_period(store)) == 1


async def test_an_open_period_follows_new_time_zone_data(store: Store, dsn: str) -> None:
    await apply(store, catalog(ACME))
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(
            "UPDATE billing_period SET period_end = period_end + interval '1 hour' WHERE period_end > %s", [NOW]
        )
    async with store.transaction() as connection:
        await records.extend_periods(connection, "default", NOW)
    async with store.reading() as connection:
        assert (await records.invoice(connection, "default", "acme", NOW)).total == Decimal("10.00")


async def test_an_invoice_that_would_be_too_small_is_refused(store: Store, dsn: str) -> None:
    """Whose period begins inside an hour of UTC, once the points of that hour are gone; others are as before."""
    await apply(store, catalog("  acme: {plan: basic, since: 2026-01-01, time_zone: Asia/Kolkata}"))
    when = local("Asia/Kolkata", 2026, 2, 10)
    async with store.reading() as connection:
        await records.invoice(connection, "default", "acme", when)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("UPDATE tallymark.usage_kept SET points_from = '2026-02-15'")
    async with store.reading() as connection:
        with pytest.raises(BillingError, match="its invoice would be too small"):
            await records.invoice(connection, "default", "acme", when)
        await records.invoice(connection, "default", "acme", local("Asia/Kolkata", 2026, 3, 10))
