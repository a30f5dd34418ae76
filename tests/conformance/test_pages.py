"""Usage page by page: together the pages are the whole, whatever the names, the order of the database or the size."""

from __future__ import annotations

import random
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.errors import UserError
from tallymark_collector.model import Batch, Point
from tallymark_collector.query.by_aggregation import usage_as_billed
from tallymark_collector.query.pages import Page
from tallymark_collector.query.usage import usage
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, point, stream

NAMES = [
    "a",
    "A",
    "ä",
    "b",
    "B",
    "a b",
    "ab",
    "a-b",
    "Z",
    "",
    "=",
    "=a",
    "~",
    "é",
    "e",
    "日本",
    "z" * 300,
    "'",
    '"',
    "\\",
]
"""Names which databases order differently, or take for equal but for their case or accents."""
ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
PLANS = """
currency: EUR
meters:
  api.requests: {unit: "{request}"}
  seats: {unit: "{request}", aggregation: unique, of: user.id}
plans: {pro: {charges: [{meter: seats, unit_price: '1'}]}}
accounts: {acme: {plan: pro, since: 2026-09-01}}
"""


def some(seed: int) -> list[Point]:
    draw = random.Random(seed)
    points = []
    for n in range(150):
        dimensions: dict[str, str | int] = {}
        if draw.random() < 0.7:
            dimensions["http.route"] = draw.choice(NAMES)
        if draw.random() < 0.7:
            dimensions["http.response.status_code"] = draw.choice([0, 9, 20, 200, 404])
        of = stream(draw.choice([name for name in NAMES if name]), draw.choice(["m", "M", "n"]), **dimensions)
        time = draw.randrange(400_000)
        points.append(point(of, time, time + 1 + n, draw.randrange(1, 1000)))
    return points


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "by", [("account", "meter"), ("route",), ("status", "route"), ("day", "account"), ("hour",), ("meter",), ("plan",)]
)
async def test_pages_are_the_whole(store: Store, by: tuple[str, ...], seed: int) -> None:
    points = some(seed)
    await store.write(Batch(points=points))
    expected: dict[tuple[object, ...], Decimal] = defaultdict(Decimal)
    for p in points:
        time = ZERO + timedelta(seconds=(p.time_ns - BASE) // SECOND)
        series = p.stream.series
        of = {
            "account": series.account,
            "meter": series.meter,
            "unit": "{request}",
            "plan": None,
            "route": series.attributes.get("http.route"),
            "status": series.attributes.get("http.response.status_code"),
            "hour": time.replace(minute=0, second=0),
            "day": time.replace(hour=0, minute=0, second=0),
        }
        expected[tuple(of[name] for name in dict.fromkeys((*by, "meter", "unit")))] += p.value
    async with store.reading() as connection:
        for size in (1, 7, 1000) if len(expected) < 60 else (7, 1000):
            found: list[tuple[object, ...]] = []
            after = None
            for _ in range(len(expected) + 1):
                page = await usage(connection, tenant="default", by=by, page=Page(size, after))
                assert len(page.rows) <= size
                found += page.rows
                after = page.last
                if after is None:
                    break
            assert len(found) == len(expected)
            assert {row[:-2]: row[-2] for row in found} == expected


async def test_long_names_make_shorter_pages(store: Store) -> None:
    """A client takes so many bytes, and the collector keeps no more than a page of them."""
    names = [f"{n:02}{letter * 3000}" for n, letter in enumerate("aé日" * 4)]
    await store.write(Batch(points=[point(stream(**{"http.route": name}), 0, 1, 1) for name in names]))
    found: list[object] = []
    after, sizes = None, []
    async with store.reading() as connection:
        while True:
            page = await usage(connection, tenant="default", by=["route"], page=Page(10, after, bytes=20_000))
            sizes.append(sum(len(str(row[0]).encode()) for row in page.rows))
            found += [row[0] for row in page.rows]
            after = page.last
            if after is None:
                break
        [one] = (await usage(connection, tenant="default", by=["route"], page=Page(10, bytes=1))).rows
    assert found == names
    assert one[0] == names[0]
    assert max(sizes) <= 20_000 < sizes[0] + sizes[1]


async def test_what_is_written_between_pages_moves_nobody_else(store: Store) -> None:
    def of(*accounts: str) -> Batch:
        return Batch(points=[point(stream(name), 0, 10, 1) for name in accounts])

    await store.write(of("b", "d", "f"))

    async def page(after: tuple[str | None, ...] | None) -> tuple[list[str], tuple[str | None, ...] | None]:
        async with store.reading() as connection:
            found = await usage(connection, tenant="default", page=Page(2, after))
        return [str(row[0]) for row in found.rows], found.last

    names, after = await page(None)
    assert names == ["b", "d"]
    await store.write(of("a", "c", "e"))
    assert await page(after) == (["e", "f"], None)


async def test_what_is_no_sum_comes_once_and_of_one_account(store: Store) -> None:
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(PLANS), datetime.now(timezone.utc))
    users = [point(stream(meter="seats", **{"user.id": user}), n, n + 1, 1) for n, user in enumerate("aab")]
    await store.write(Batch(points=[*users, point(stream(), 0, 1, 5), point(stream(meter="zeta"), 0, 1, 6)]))
    async with store.reading() as connection:
        first = await usage_as_billed(connection, tenant="default", account="acme", page=Page(1))
        second = await usage_as_billed(connection, tenant="default", account="acme", page=Page(1, first.usage.last))
        third = await usage_as_billed(connection, tenant="default", account="acme", page=Page(1, second.usage.last))
        assert third.usage.last is None
        rows = [row[1:5] for page in (first, second, third) for row in page.usage.rows]
        assert rows == [
            ("api.requests", "{request}", "sum", Decimal(5)),
            ("seats", "{user.id}", "unique user.id", Decimal(2)),
            ("zeta", "{request}", "sum", Decimal(6)),
        ]
        of_all = await usage_as_billed(connection, tenant="default", page=Page(10))
        assert [row[1] for row in of_all.usage.rows] == ["api.requests", "zeta"]
        assert of_all.remarks == (
            "left out: seats: quantities that are no sums can only be asked for of one account, page by page",
        )
        with pytest.raises(UserError, match=r"'seats' is billed by its unique user\.id: .* of one account"):
            await usage_as_billed(connection, tenant="default", meter="seats", page=Page(10))
