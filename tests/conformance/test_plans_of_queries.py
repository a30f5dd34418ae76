"""What the hot queries read. Of clean hours never the points; of whole days never the hours; of an account never the
others'; and no more when there are more points in an hour."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tallymark_collector.model import Batch
from tallymark_collector.store import Store, levels
from tallymark_collector.store.sources import _KNOWN_SQL
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


async def test_totals_are_found_by_their_source(store: Store, dsn: str) -> None:
    """However many there are of it and of others, three are read: the neighbours, and the one that comes again."""
    del store
    fill = """INSERT INTO usage_sample (account, stream, start_ns, time_ns, value, source, series, factor, since_ns)
              SELECT 'a' || s % 7, md5('s' || s)::uuid, 5, n, n, md5('s' || s)::uuid, md5('r')::uuid, 1, 0
              FROM generate_series(1, 60) s, generate_series(1, 200) n"""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public") as connection:
        connection.execute(fill)
        keys = connection.execute("SELECT array_agg(DISTINCT source) FROM usage_sample").fetchone()
        assert keys is not None
        columns = [keys[0], [5] * 60, [100] * 60, [100] * 60]
        for statement in ("SELECT", "ANALYZE usage_sample"):
            connection.execute(statement)
            row = connection.execute(f"EXPLAIN (ANALYZE, TIMING off, FORMAT json) {_KNOWN_SQL}", columns).fetchone()
            assert row is not None
            [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
            scans = [node for node in nodes(document["Plan"]) if node.get("Relation Name") == "usage_sample"]
            assert {node.get("Index Name") for node in scans} == {"usage_sample_source"}
            assert sum(node["Actual Rows"] * node["Actual Loops"] for node in scans) == 3 * 60


async def test_levels_are_found_by_their_source(store: Store, dsn: str) -> None:
    """The same of levels, whoever they are billed to."""
    del store
    fill = """INSERT INTO usage_level (account, time, stream, part, series, tenant, value, source, factor)
              SELECT 'a' || s % 7, to_timestamp(n), md5('s' || s)::uuid, 0, md5('r')::uuid, 'default', n,
                     CASE WHEN s <= 60 THEN md5('s' || s)::uuid END, 1
              FROM generate_series(1, 90) s, generate_series(1, 200) n"""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public") as connection:
        connection.execute(fill)
        keys = connection.execute(
            "SELECT array_agg(DISTINCT source) FROM usage_level WHERE source IS NOT NULL"
        ).fetchone()
        assert keys is not None
        columns = [keys[0], *([["1970-01-01T00:01:40Z"] * 60, [0] * 60] * 2)]
        for statement in ("SELECT", "ANALYZE usage_level"):
            connection.execute(statement)
            explain = f"EXPLAIN (ANALYZE, TIMING off, FORMAT json) {levels._KNOWN_SQL}"
            row = connection.execute(explain, columns).fetchone()
            assert row is not None
            [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
            scans = [node for node in nodes(document["Plan"]) if node.get("Index Name")]
            assert {node["Index Name"] for node in scans} == {"usage_level_source"}
            # The one at that time and both neighbours; and one more, by which the later one is known to be alone.
            assert sum(node["Actual Rows"] * node["Actual Loops"] for node in scans) <= 4 * 60
            read = [node for node in nodes(document["Plan"]) if node.get("Relation Name") == "usage_level"]
            assert sum(node["Actual Rows"] * node["Actual Loops"] for node in read) <= 4 * 60


MIDNIGHT = 36_000
"""Seconds from BASE to 0:00 UTC."""
ACCOUNTS, ROUTES, DAYS = 30, ("/a", "/b"), 6
PERIODS = {
    "whole days": ("2026-09-22T00:00Z", "2026-09-27T00:00Z"),
    "half hours": ("2026-09-22T18:30Z", "2026-09-26T18:30Z"),  # midnights of Kolkata
}
_FAMILIES = """
SELECT c.relname, f.name
FROM (SELECT name, to_regclass(coalesce(behind, name)) AS oid
      FROM unnest(ARRAY['usage_point', 'usage_hour', 'usage_day']) AS asked (name) LEFT JOIN ({}) b USING (name)) f
JOIN pg_class c ON c.oid = f.oid OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = f.oid)"""
_NATIVE = """
SELECT view_name AS name, materialization_hypertable_schema || '.' || materialization_hypertable_name AS behind
FROM timescaledb_information.continuous_aggregates"""
_PLAIN = "SELECT NULL::text AS name, NULL::text AS behind"


def reads(connection: psycopg.Connection, period: str) -> tuple[dict[str, int], int]:
    """Rows that an account's period takes from points, hours, days and other relations, and all pages of it."""
    native = connection.execute("SELECT relkind = 'v' FROM pg_class WHERE oid = 'usage_hour'::regclass").fetchone()
    families = dict(connection.execute(_FAMILIES.format(_NATIVE if native == (True,) else _PLAIN)).fetchall())
    row = connection.execute(
        "EXPLAIN (ANALYZE, BUFFERS, TIMING off, FORMAT json) SELECT sum(quantity) FROM usage_by_period"
        f" WHERE account = 'a1' AND period_start = '{PERIODS[period][0]}'"
    ).fetchone()
    assert row is not None
    [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
    counts = dict.fromkeys(("usage_point", "usage_hour", "usage_day", "others"), 0)
    for node in nodes(document["Plan"]):
        # TimescaleDB's ChunkAppend names the relation, too; what it reads is below it.
        if "Relation Name" in node and node["Node Type"] != "Custom Scan":
            removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
            seen = (node["Actual Rows"] + removed) * node["Actual Loops"]
            counts[families.get(node["Relation Name"], "others")] += round(seen)
    return counts, document["Plan"]["Shared Hit Blocks"] + document["Plan"]["Shared Read Blocks"]


async def test_a_period_reads_no_more_when_its_hours_have_more_points(store: Store, dsn: str) -> None:
    names = [stream(f"a{i}", route=route) for i in range(ACCOUNTS) for route in ROUTES]
    seen = {}
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public") as connection:
        for number, (start, end) in enumerate(PERIODS.values()):
            connection.execute(
                "INSERT INTO billing_period VALUES (%s, %s, 'a1', 'default', '2026-01-01', %s, 'p')",
                [start, end, number],
            )
        # Many others, or looking at everybody's would be the shorter way.
        others = [stream(f"other-{i}") for i in range(700)]
        for day in range(DAYS):
            end = MIDNIGHT + day * DAY + 7200
            await store.write(Batch(points=[point(of, end, end + 9, 1) for of in others]))
        for each in (4, 16):
            step = 3600 // each
            ends = [MIDNIGHT + 3600 * h + step * n + 1 for h in range(24 * DAYS) for n in range(each)]
            for day in range(DAYS):
                part = ends[24 * each * day : 24 * each * (day + 1)]
                # A producer's name for each size: all of its points are new ones.
                of_size = [stream(n.series.account, producer=f"p{each}", route=r) for n in names[::2] for r in ROUTES]
                await store.write(Batch(points=[point(of, end - 1, end, 1) for of in of_size for end in part]))
            while await store.refresh():
                pass
            connection.execute("VACUUM ANALYZE")
            seen[each] = {period: reads(connection, period) for period in PERIODS}
        series, edge = len(ROUTES), 4 + 16
        for each, found in seen.items():
            rows, pages = found["whole days"]
            assert (rows["usage_point"], rows["usage_hour"], rows["usage_day"]) == (0, 0, 5 * series), each
            assert pages <= 100, each
            rows, pages = found["half hours"]
            points = series * (each if each == 4 else edge)  # of half an hour at either end
            # 5 hours after the first edge, 18 before the last.
            assert (rows["usage_point"], rows["usage_hour"], rows["usage_day"]) == (points, 23 * series, 3 * series)
            assert pages <= 200 + points, each
        assert seen[4]["whole days"][0] == seen[16]["whole days"][0]

        # One late point: its day is read from hours, its hour from points, and nothing else is.
        await store.write(Batch(points=[point(names[2], MIDNIGHT + 2 * DAY + 900, MIDNIGHT + 2 * DAY + 950, 1)]))
        connection.execute("ANALYZE usage_dirty")
        rows, _ = reads(connection, "whole days")
        assert rows["usage_point"] == series * edge + 1
        assert rows["usage_hour"] <= 24 * series
        assert rows["usage_day"] <= 5 * series
