"""What people ask, of the views and of the raw points: latencies, their ratio, and how many pages the views read.

TALLYMARK_BENCH_POINTS says how many points (a million); TALLYMARK_BENCH_DSN names a server to make a database in (the
embedded one). The points are of 15 accounts with 5 routes over 90 days, so there are 162,000 series-hours: 10 million
are 62 points in each, what one process sends that exports every minute; 100 million are ten such processes, or two that
export every 12 s; a million is one point in 10 minutes. So what grows with the number is raw alone, and the views
should not notice. All have been refreshed but the last hour, which a running service keeps writing to.

Each statement is planned each time, as a dashboard's is. Points are written by the server itself: this is about
reading.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import make_conninfo
from rich.table import Table

from tallymark_collector.store import Store
from tallymark_collector.store.engines import connect_string

POINTS: Final = int(os.environ.get("TALLYMARK_BENCH_POINTS", "1000000"))
DAYS: Final = 90
ACCOUNTS: Final = 15
ROUTES: Final = 5
ROUNDS: Final = 9
RAW_ROUNDS: Final = 3
STEP: Final = 5000
"""Points of each series that one transaction writes."""
NAME: Final = "tallymark_bench_reads"

_SERIES: Final = f"""
INSERT INTO usage_series (account, series, tenant, meter, unit, plan, route, attributes)
SELECT 'account-' || a, md5(a || '/' || r)::uuid, 'default', 'api.requests', '{{request}}', 'plan-' || a % 3,
       '/r/' || r, '{{}}'
FROM generate_series(1, {ACCOUNTS}) a, generate_series(1, {ROUTES}) r"""

_WRITE: Final = f"""
INSERT INTO usage_point (time, start_time, stream, series, part, account, tenant, quantity)
SELECT t, t - interval '10 s', md5('stream' || a || '/' || r)::uuid, md5(a || '/' || r)::uuid, 0, 'account-' || a,
       'default', 1 + mod(i + a, 7)
FROM generate_series(%(first)s::bigint, %(last)s::bigint) i,
     generate_series(1, {ACCOUNTS}) a, generate_series(1, {ROUTES}) r,
     LATERAL (SELECT timestamptz '2026-01-01' + i * interval '{DAYS} days' / %(rounds)s + a * interval '1 ms' AS t) x"""

_MARK: Final = """
INSERT INTO usage_dirty (bucket, account, tenant)
SELECT DISTINCT date_trunc('hour', time, 'UTC'), account, tenant FROM usage_point"""

_MARK_LAST: Final = f"""
INSERT INTO usage_dirty (bucket, account, tenant)
SELECT timestamptz '2026-03-31 23:00Z', 'account-' || a, 'default' FROM generate_series(1, {ACCOUNTS}) a"""

_PERIODS: Final = f"""
INSERT INTO billing_period
SELECT starts, ends, 'account-' || a, 'default', '2026-01-01', number, 'p'
FROM generate_series(1, {ACCOUNTS}) a,
     (VALUES (timestamptz '2026-01-31 18:30Z', timestamptz '2026-02-28 18:30Z', 1),
             (timestamptz '2026-02-28 18:30Z', timestamptz '2026-03-31 18:30Z', 2),
             (timestamptz '2026-02-01', timestamptz '2026-03-01', 3),
             (timestamptz '2026-03-01', timestamptz '2026-04-01', 4)) p (starts, ends, number)"""

_FEBRUARY: Final = "time >= '2026-02-01' AND time < '2026-03-01'"
_RAW: Final = "usage_point p JOIN usage_series s ON s.account = p.account AND s.series = p.series"


def _period(start: str, end: str) -> tuple[str, str]:
    return (
        f"SELECT sum(quantity) FROM usage_by_period WHERE account = 'account-7' AND period_start = '{start}'",
        f"SELECT sum(quantity) FROM {_RAW} WHERE p.account = 'account-7' AND time >= '{start}' AND time < '{end}'",
    )


QUESTIONS: Final = {
    "an account's period total": _period("2026-02-01", "2026-03-01"),
    "the same in Kolkata (half hours at its ends)": _period("2026-01-31 18:30Z", "2026-02-28 18:30Z"),
    "the running period's, its last hour written to": _period("2026-03-01", "2026-04-01"),
    "the top accounts of a month": (
        "SELECT account, sum(quantity) FROM usage_daily WHERE bucket >= '2026-02-01' AND bucket < '2026-03-01'"
        " GROUP BY account ORDER BY 2 DESC, 1 LIMIT 10",
        f"SELECT p.account, sum(quantity) FROM {_RAW} WHERE {_FEBRUARY} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 10",
    ),
    f"a meter by route and plan, {DAYS} days": (
        "SELECT route, plan, sum(quantity) FROM usage_daily WHERE meter = 'api.requests' GROUP BY 1, 2 ORDER BY 1, 2",
        f"SELECT route, plan, sum(quantity) FROM {_RAW} WHERE s.meter = 'api.requests' GROUP BY 1, 2 ORDER BY 1, 2",
    ),
}


def tables() -> Iterator[Table]:
    """One table of latencies and ratios."""
    with _database() as dsn:
        began = time.perf_counter()
        asyncio.run(_fill(dsn))
        filled = time.perf_counter() - began
        with psycopg.connect(
            dsn, autocommit=True, prepare_threshold=None, options="-c search_path=tallymark,public -c timezone=utc"
        ) as connection:
            row = connection.execute("SELECT count(*) FROM usage_point").fetchone()
            assert row is not None
            hours = ACCOUNTS * ROUTES * DAYS * 24
            table = Table(
                title=f"{row[0]:,} points of {ACCOUNTS} accounts, {ROUTES} routes, {DAYS} days: {row[0] / hours:,.0f}"
                f" an hour and series; written and refreshed in {filled:,.0f} s"
            )
            for column in ("question", "views, ms", "pages", "raw, ms", "raw over views"):
                table.add_column(column, justify="left" if column == "question" else "right")
            for question, (view, raw) in QUESTIONS.items():
                assert connection.execute(view).fetchall() == connection.execute(raw).fetchall(), "a fast wrong answer"
                fast, slow = _milliseconds(connection, view, ROUNDS), _milliseconds(connection, raw, RAW_ROUNDS)
                pages = f"{_pages(connection, view):,}"
                table.add_row(question, f"{fast:,.1f}", pages, f"{slow:,.1f}", f"{slow / fast:,.0f}")
    yield table


def _milliseconds(connection: psycopg.Connection, query: str, rounds: int) -> float:
    """Median of some runs."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        connection.execute(query).fetchall()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


def _pages(connection: psycopg.Connection, query: str) -> int:
    """Pages that the query touches, wherever they are."""
    row = connection.execute("EXPLAIN (ANALYZE, BUFFERS, FORMAT json) " + query).fetchone()
    assert row is not None
    [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
    return int(document["Plan"]["Shared Hit Blocks"] + document["Plan"]["Shared Read Blocks"])


async def _fill(dsn: str) -> None:
    store = Store(dsn)
    await store.open()
    await store.migrate()
    rounds = POINTS // (ACCOUNTS * ROUTES)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public -c timezone=utc") as connection:
        connection.execute(_SERIES)
        connection.execute(_PERIODS)
        for first in range(0, rounds, STEP):
            connection.execute(_WRITE, {"first": first, "last": min(first + STEP, rounds) - 1, "rounds": rounds})
        connection.execute(_MARK)
        connection.execute("ANALYZE")
        while await store.refresh():
            pass
        connection.execute("VACUUM ANALYZE")
        connection.execute(_MARK_LAST)
    await store.close()


@contextmanager
def _database() -> Iterator[str]:
    server = os.environ.get("TALLYMARK_BENCH_DSN")
    if server is None:
        with (
            tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder,
            connect_string(f"embedded:{Path(folder) / 'pg'}") as dsn,
        ):
            yield dsn
        return
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {NAME}")
        dsn = make_conninfo(server, dbname=NAME)
        try:
            with psycopg.connect(dsn, autocommit=True) as inside:
                inside.execute("DO $$BEGIN CREATE EXTENSION timescaledb; EXCEPTION WHEN OTHERS THEN NULL; END$$")
            yield dsn
        finally:
            connection.execute(f"DROP DATABASE {NAME} WITH (FORCE)")
