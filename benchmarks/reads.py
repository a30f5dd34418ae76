"""What people ask, of the views and of the raw points: latencies and their ratio.

TALLYMARK_BENCH_POINTS says how many points (a million); TALLYMARK_BENCH_DSN names a server to make a database in (the
embedded one). Points are written by the server itself: this is about reading.
"""

from __future__ import annotations

import asyncio
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
ACCOUNTS: Final = 100
ROUTES: Final = 5
ROUNDS: Final = 7
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

_PERIODS: Final = f"""
INSERT INTO billing_period
SELECT timestamptz '2026-02-01', '2026-03-01', 'account-' || a, 'default', '2026-01-01', 1, 'p'
FROM generate_series(1, {ACCOUNTS}) a"""

_FEBRUARY: Final = "time >= '2026-02-01' AND time < '2026-03-01'"
_RAW: Final = "usage_point p JOIN usage_series s ON s.account = p.account AND s.series = p.series"

QUESTIONS: Final = {
    "an account's period total": (
        "SELECT sum(quantity) FROM usage_by_period WHERE account = 'account-7' AND period_start = '2026-02-01'",
        f"SELECT sum(quantity) FROM {_RAW} WHERE p.account = 'account-7' AND {_FEBRUARY}",
    ),
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
        asyncio.run(_fill(dsn))
        with psycopg.connect(
            dsn, autocommit=True, options="-c search_path=tallymark,public -c timezone=utc"
        ) as connection:
            connection.execute("ANALYZE")
            row = connection.execute("SELECT count(*) FROM usage_point").fetchone()
            assert row is not None
            table = Table(title=f"{row[0]:,} points of {ACCOUNTS} accounts, {ROUTES} routes, {DAYS} days")
            for column in ("question", "views, ms", "raw, ms", "raw over views"):
                table.add_column(column, justify="left" if column == "question" else "right")
            for question, (view, raw) in QUESTIONS.items():
                assert connection.execute(view).fetchall() == connection.execute(raw).fetchall(), "a fast wrong answer"
                fast, slow = (_milliseconds(connection, query) for query in (view, raw))
                table.add_row(question, f"{fast:,.1f}", f"{slow:,.1f}", f"{slow / fast:,.0f}")
    yield table


def _milliseconds(connection: psycopg.Connection, query: str) -> float:
    """Median of some runs."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        connection.execute(query).fetchall()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


async def _fill(dsn: str) -> None:
    store = Store(dsn)
    await store.open()
    await store.migrate()
    rounds = POINTS // (ACCOUNTS * ROUTES)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public -c timezone=utc") as connection:
        connection.execute(_SERIES)
        connection.execute(_PERIODS)
        for first in range(0, rounds, 400):
            connection.execute(_WRITE, {"first": first, "last": min(first + 400, rounds) - 1, "rounds": rounds})
        connection.execute(_MARK)
        connection.execute("ANALYZE")
    while await store.refresh():
        pass
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
