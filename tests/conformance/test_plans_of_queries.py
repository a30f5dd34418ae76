"""What the hot queries read. Of clean hours never the points; of an account never the others' hours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tallymark_collector.model import Batch
from tallymark_collector.store import Store
from tests.support.usage import point, stream

DAY = 86_400
PERIOD = "INSERT INTO billing_period VALUES ('2026-09-01', '2026-12-01', 'a1', 'default', '2026-01-01', 0, 'p')"
QUERIES = {
    "an account's period": "SELECT sum(quantity) FROM usage_by_period WHERE account = 'a1'",
    "top accounts": "SELECT account, sum(quantity) FROM usage_daily GROUP BY 1 ORDER BY 2 DESC LIMIT 3",
    "a meter by route": "SELECT route, plan, sum(quantity) FROM usage_daily WHERE meter = 'api.requests' GROUP BY 1, 2",
    "an account's hours": "SELECT bucket, quantity FROM usage_hourly WHERE account = 'a1' AND bucket >= '2026-09-22'",
}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


@pytest.mark.parametrize("query", QUERIES)
async def test_clean_hours_are_not_read_from_points(store: Store, dsn: str, query: str) -> None:
    names = [stream(f"a{i}", route=route) for i in range(40) for route in ("/a", "/b")]
    # Many in an hour: where an account has few points, reading all of them costs no more than looking for some.
    starts = [DAY * day + 3600 * hour + 9 * n for day in range(20) for hour in (1, 9) for n in range(10)]
    await store.write(Batch(points=[point(of, start, start + 9, 1) for of in names for start in starts]))
    while await store.refresh():
        pass
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public") as connection:
        connection.execute(PERIOD)
        connection.execute("VACUUM ANALYZE")
        chunks = connection.execute(
            "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid"
            " WHERE inhparent = 'usage_point'::regclass"
        ).fetchall()
        raw = {"usage_point", *(name for (name,) in chunks)}
        row = connection.execute("EXPLAIN (ANALYZE, TIMING off, FORMAT json) " + QUERIES[query]).fetchone()
    assert row is not None
    [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
    scans = [node for node in nodes(document["Plan"]) if "Relation Name" in node]
    read = {node["Relation Name"]: node["Actual Rows"] * node["Actual Loops"] for node in scans}
    assert sum(count for name, count in read.items() if name in raw) == 0
    if "account = 'a1'" in QUERIES[query]:
        hours = [node for node in scans if node["Relation Name"] not in raw and node["Actual Rows"] >= 10]
        assert hours, "the account's hours are somewhere"
        assert all("Rows Removed by Filter" not in node or node["Rows Removed by Filter"] < 40 for node in hours), (
            "they are found by an index, not by looking at everybody's"
        )
