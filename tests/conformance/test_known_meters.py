"""What becomes of usage that names nobody depends on the tenant's meters, and not on who gets it in which batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import datetime, timezone

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.known_meters import KnownMeters
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store
from tests.conformance.test_quarantine import ACCOUNT, BASE, NOW, SECOND, billed, queue
from tests.support.collector import running
from tests.support.usage import number, request, sum_metric

METER = ("u.route", "{request}")
OVERFLOW = {"otel.metric.overflow": True}
PLANS = """
currency: EUR
meters: {u.route: {unit: "{request}"}}
plans: {basic: {charges: [{meter: u.route, unit_price: 1}]}}
"""


def sent(points: Sequence[NumberDataPoint]) -> bytes:
    return request(sum_metric(points, *METER), scope="shop").SerializeToString()


def collector(store: Store) -> Pipeline:
    """One that has just started."""
    return Pipeline(store, now_ns=lambda: NOW, known=KnownMeters(store))


async def charge(store: Store, plans: str = PLANS) -> None:
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(plans), datetime.now(timezone.utc))


async def test_what_a_plan_charges_for_is_a_meter_before_anybody_has_used_it(store: Store) -> None:
    await charge(store)
    nobodys = sent([number(BASE, BASE + SECOND, 7, {})])
    assert (await collector(store).metrics("default", nobodys)).rejected == 1
    assert (await collector(store).metrics("globex", nobodys)).rejected == 0
    assert [item.reason for item in await queue(store)] == ["account_missing"]


async def test_what_somebody_sends_makes_nobody_elses_telemetry_usage(store: Store) -> None:
    """A metric of some other software, of which one service names an account."""
    nobodys = sent([number(BASE, BASE + SECOND, n, {"n": n}) for n in range(50)])
    await collector(store).metrics("default", sent([number(BASE, BASE + SECOND, 1, {ACCOUNT: "acme"})]))
    assert (await collector(store).metrics("default", nobodys)).rejected == 0
    assert await queue(store) == []


async def test_what_plans_charged_for_once_is_forgotten(store: Store) -> None:
    await charge(store)
    await charge(store, PLANS.replace("u.route", "u.other"))
    for meter, rejected in (("u.route", 0), ("u.other", 1)):
        body = request(sum_metric([number(BASE, BASE + SECOND, 7, {})], meter), scope="shop").SerializeToString()
        assert (await collector(store).metrics("default", body)).rejected == rejected


async def test_serve_keeps_the_overflow_that_a_gateway_cut_off(store: Store, dsn: str) -> None:
    await charge(store)
    with running(dsn) as process:
        process.send(sent([number(BASE, BASE + SECOND, 700, OVERFLOW)]))
    assert [(item.reason, item.meter) for item in await queue(store)] == [("attribute_overflow", METER[0])]


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_gets_which_slice_all_usage_is_billed_or_kept(store: Store, dsn: str, seed: int) -> None:
    """Two collectors, random slices, each sent once or twice and all at once."""
    rng = random.Random(seed)
    await charge(store)
    attributes = [{ACCOUNT: "acme"}, {ACCOUNT: "globex"}, {}, OVERFLOW]
    points = [number(BASE, BASE + SECOND + n, n + 1, attributes[n % 4]) for n in range(80)]
    rng.shuffle(points)
    slices = []
    while points:
        size = rng.randint(1, 8)
        slices.append(sent(points[:size]))
        del points[:size]
    slices += rng.sample(slices, len(slices) // 2)
    other = Store(dsn)
    await other.open()
    try:
        several = (collector(store), collector(other))
        await asyncio.gather(*(rng.choice(several).metrics("default", one) for one in slices))
    finally:
        await other.close()
    expected = [sum(n + 1 for n in range(80) if n % 4 == place) for place in range(2)]
    assert await billed(store) == {("acme", METER[0]): expected[0], ("globex", METER[0]): expected[1]}
    reasons = [item.reason for item in await queue(store)]
    assert sorted(reasons) == ["account_missing"] * 20 + ["attribute_overflow"] * 20
