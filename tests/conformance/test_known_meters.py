"""What becomes of usage that names nobody depends on the tenant's meters, and not on who gets it in which batch."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from datetime import datetime, timezone

import psycopg
import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.known_meters import KnownMeters
from tallymark_collector.model import Batch
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store
from tallymark_collector.store.meters import _METERS_SQL
from tests.conformance.test_plans_of_queries import nodes
from tests.conformance.test_quarantine import ACCOUNT, BASE, NOW, SECOND, billed, queue
from tests.support.collector import running
from tests.support.usage import number, point, request, stream, sum_metric

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


async def test_another_collector_knows_what_one_has_written(store: Store) -> None:
    overflow = sent([number(BASE, BASE + SECOND, 700, OVERFLOW)])
    assert (await collector(store).metrics("default", overflow)).rejected == 0
    await collector(store).metrics("default", sent([number(BASE, BASE + SECOND, 1, {ACCOUNT: "acme"})]))
    for _ in range(2):
        assert (await collector(store).metrics("default", overflow)).rejected == 1
        assert (await collector(store).metrics("globex", overflow)).rejected == 0
    assert [(item.reason, item.meter) for item in await queue(store)] == [("attribute_overflow", METER[0])]
    assert await billed(store) == {("acme", METER[0]): 1}


async def test_what_a_plan_charges_for_is_a_meter_before_anybody_has_used_it(store: Store) -> None:
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(PLANS), datetime.now(timezone.utc))
    nobodys = sent([number(BASE, BASE + SECOND, 7, {})])
    assert (await collector(store).metrics("default", nobodys)).rejected == 1
    assert (await collector(store).metrics("globex", nobodys)).rejected == 0
    assert [item.reason for item in await queue(store)] == ["account_missing"]


def test_serve_keeps_the_overflow_that_a_gateway_cut_off(dsn: str) -> None:
    """As a process, and another one after it, which has it from the database."""
    for n in range(2):
        with running(dsn) as process:
            if n == 0:
                process.send(sent([number(BASE, BASE + SECOND, 1, {ACCOUNT: "acme"})]))
            process.send(sent([number(BASE, BASE + SECOND + n, 700, OVERFLOW)]))
    with psycopg.connect(dsn) as connection:
        found = connection.execute("SELECT reason, count(*) FROM tallymark.usage_quarantine GROUP BY 1").fetchall()
    assert found == [("attribute_overflow", 2)]


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_gets_which_slice_all_usage_is_billed_or_kept(store: Store, dsn: str, seed: int) -> None:
    """Two collectors, random slices, each sent once or twice and all at once."""
    rng = random.Random(seed)
    await collector(store).metrics("default", sent([number(BASE, BASE + SECOND, 1, {ACCOUNT: "acme"})]))
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


async def test_meters_are_found_by_their_names_however_many_series_they_have(store: Store, dsn: str) -> None:
    names = [stream(f"a{n}", meter=f"m{n % 3}", route=f"/{n}") for n in range(600)]
    others = [stream(f"a{n}", meter="other", route=f"/{n}", tenant="globex") for n in range(300)]
    await store.write(Batch(points=[point(of, 0, 1, 1) for of in names + others]))
    meters = [(f"m{n}", "{request}") for n in range(3)]
    assert sorted(await store.meters("default", 10)) == meters
    assert len(await store.meters("default", 2)) == 2
    assert await store.meters("nobody", 10) == []
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public") as connection:
        for statement in ("SELECT", "VACUUM ANALYZE usage_series"):
            connection.execute(statement)
            arguments = {"tenant": "default", "limit": 10}
            explain = f"EXPLAIN (ANALYZE, TIMING off, FORMAT json) {_METERS_SQL}"
            row = connection.execute(explain, arguments).fetchone()
            assert row is not None
            [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
            scans = [node for node in nodes(document["Plan"]) if node.get("Relation Name") == "usage_series"]
            assert sum(node["Actual Rows"] * node["Actual Loops"] for node in scans) <= 6
            assert all(not node.get("Rows Removed by Filter") for node in scans)
