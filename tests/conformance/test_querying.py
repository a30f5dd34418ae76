"""Usage by any dimension and any range, against plain loops over the points."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark_collector.errors import UserError
from tallymark_collector.model import Batch
from tallymark_collector.query.usage import split, usage
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, point, stream

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
POINTS = [
    point(stream(account, meter, **{"http.route": route, "tallymark.plan": plan}), t - 10, t, value)
    for value, (account, plan) in enumerate([("acme", "pro"), ("globex", "basic")], start=1)
    for meter in ("api.requests", "llm.tokens")
    for route in ("/a", "/b")
    for t in (1, 1800, 3599, 3600, 3601, 7200, 9000, 100_000)
]


@pytest.mark.parametrize("refreshed", [True, False])
@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (0, 3600), (1800, 9000), (1, 2), (3600, 3600), (1800, 3599), (3599, 3601), (0, 100_001)],
)
async def test_any_range(store: Store, refreshed: bool, start: int | None, end: int | None) -> None:
    await store.write(Batch(points=POINTS))
    while refreshed and await store.refresh():
        pass
    low, high = (None if t is None else ZERO + timedelta(seconds=t) for t in (start, end))
    async with store.reading() as connection:
        found = await usage(connection, tenant="default", by=["account", "route"], start=low, end=high)
    expected: dict[tuple[str, ...], Decimal] = defaultdict(Decimal)
    for p in POINTS:
        t = (p.time_ns - BASE) // SECOND
        if (start is None or t >= start) and (end is None or t < end):
            series = p.stream.series
            expected[series.account, str(series.attributes.get("http.route")), series.meter] += p.value
    assert found.columns == ("account", "route", "meter", "unit", "quantity", "points")
    assert {(a, r, m): q for a, r, m, _, q, _ in found.rows} == expected


async def test_filters_hours_and_days(store: Store) -> None:
    await store.write(Batch(points=POINTS))
    async with store.reading() as connection:
        found = await usage(connection, tenant="default", by=["hour"], account="globex", meter="llm.tokens")
        days = await usage(connection, tenant="default", by=["day", "plan"])
        nobody = await usage(connection, tenant="another")
    assert [(row[0], row[3]) for row in found.rows] == [
        (ZERO + timedelta(hours=h), Decimal(q)) for h, q in [(0, 12), (1, 8), (2, 8), (27, 4)]
    ]
    assert {row[1] for row in days.rows} == {"pro", "basic"}
    assert days.total() == sum(p.value for p in POINTS)
    assert nobody.rows == []


async def test_refusals(store: Store) -> None:
    async with store.reading() as connection:
        with pytest.raises(UserError, match="cannot group by colour: choose from account, meter"):
            await usage(connection, tenant="default", by=["colour"])
        with pytest.raises(UserError, match="has no time zone"):
            await usage(connection, tenant="default", start=datetime(2026, 1, 1))  # noqa: DTZ001
        with pytest.raises(UserError, match="before it starts"):
            await usage(connection, tenant="default", start=ZERO, end=ZERO - timedelta(hours=1))


@given(st.integers(0, 20_000), st.integers(0, 20_000))
def test_a_split_range_covers_each_second_once(first: int, length: int) -> None:
    start, end = ZERO + timedelta(seconds=first), ZERO + timedelta(seconds=first + length)
    whole, edges = split(start, end)
    pieces = [span for span in (whole, *edges) if span[0] < span[1]]
    assert sum((b - a for a, b in pieces), timedelta()) == end - start
    assert all(start <= a and b <= end for a, b in pieces)
    assert all(t.minute == t.second == 0 for t in whole)
