"""What people ask, of the views and of the raw points: latencies, their ratio, and how many pages the views read.

TALLYMARK_BENCH_POINTS says how many points (a million); TALLYMARK_BENCH_DSN names a server to make a database in (the
embedded one), which TALLYMARK_BENCH_KEEP=1 leaves there, and asks again the next time: 100 million points take most of
an hour to write.

The points are of 15 accounts with 5 routes over 90 days, so there are 162,000 series-hours: 10 million are 62 points in
each, what one process sends that exports every minute; 100 million are ten such processes, or two that export every
12 s; a million is one point in 10 minutes. So what grows with the number is raw alone, and the views should not notice.
All have been refreshed but the last hour, which a running service keeps writing to.

Each statement is asked twice over: planned anew each time, as an ad-hoc query is, and prepared, as drivers do after
some calls (psycopg: five). Points are written by the server itself: this is about
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
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final, NamedTuple

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
STEP: Final = 5000
"""Points of each series that one transaction writes."""
NAME: Final = "tallymark_bench_reads"
KEEP: Final = os.environ.get("TALLYMARK_BENCH_KEEP") == "1"

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

_RAW: Final = "usage_point p JOIN usage_series s ON s.account = p.account AND s.series = p.series"


class Question(NamedTuple):
    """The same asked of a view and of the raw points."""

    view: str
    raw: str
    given: tuple[object, ...] = ()
    """What both are given."""


def _period(start: datetime, end: datetime) -> Question:
    return Question(
        "SELECT sum(quantity) FROM usage_by_period WHERE account = %s AND period_start = %s AND period_end = %s",
        f"SELECT sum(quantity) FROM {_RAW} WHERE p.account = %s AND time >= %s AND time < %s",
        ("account-7", start, end),
    )


_KOLKATA: Final = timezone(timedelta(hours=5, minutes=30))
_FEBRUARY, _MARCH, _APRIL = (datetime(2026, month, 1, tzinfo=timezone.utc) for month in (2, 3, 4))

QUESTIONS: Final = {
    "an account's period total": _period(_FEBRUARY, _MARCH),
    "the same in Kolkata (half hours at its ends)": _period(
        _FEBRUARY.replace(tzinfo=_KOLKATA), _MARCH.replace(tzinfo=_KOLKATA)
    ),
    "the running period's, its last hour written to": _period(_MARCH, _APRIL),
    "the top accounts of a month": Question(
        "SELECT account, sum(quantity) FROM usage_daily WHERE bucket >= %s AND bucket < %s"
        " GROUP BY account ORDER BY 2 DESC, 1 LIMIT 10",
        f"SELECT p.account, sum(quantity) FROM {_RAW} WHERE time >= %s AND time < %s"
        " GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 10",
        (_FEBRUARY, _MARCH),
    ),
    f"a meter by route and plan, {DAYS} days": Question(
        "SELECT route, plan, sum(quantity) FROM usage_daily WHERE meter = %s GROUP BY 1, 2 ORDER BY 1, 2",
        f"SELECT route, plan, sum(quantity) FROM {_RAW} WHERE s.meter = %s GROUP BY 1, 2 ORDER BY 1, 2",
        ("api.requests",),
    ),
}


def tables() -> Iterator[Table]:
    """One table of latencies and ratios."""
    with _database() as (dsn, is_new):
        began = time.perf_counter()
        asyncio.run(_make(dsn, is_new=is_new))
        made = f"written and refreshed in {time.perf_counter() - began:,.0f} s" if is_new else "written before"
        with _connected(dsn, prepares=False) as connection, _connected(dsn, prepares=True) as prepared:
            row = connection.execute("SELECT count(*) FROM usage_point").fetchone()
            assert row is not None
            hours = ACCOUNTS * ROUTES * DAYS * 24
            table = Table(
                title=f"{row[0]:,} points of {ACCOUNTS} accounts, {ROUTES} routes, {DAYS} days: {row[0] / hours:,.0f}"
                f" an hour and series; {made}"
            )
            for column in ("question", "views, ms", "prepared, ms", "pages", "raw, ms", "over views", "over prepared"):
                table.add_column(column, justify="left" if column == "question" else "right")
            for name, question in QUESTIONS.items():
                answer = connection.execute(question.raw, question.given).fetchall()
                assert connection.execute(question.view, question.given).fetchall() == answer, "a fast wrong answer"
                planned, slow = (_milliseconds(connection, q, question.given) for q in (question.view, question.raw))
                _milliseconds(prepared, question.view, question.given)  # until the server keeps one plan for all
                fast = _milliseconds(prepared, question.view, question.given)
                table.add_row(
                    name,
                    *(f"{planned:,.1f}", f"{fast:,.1f}", f"{_pages(connection, question):,}", f"{slow:,.1f}"),
                    *(f"{slow / each:,.0f}" for each in (planned, fast)),
                )
    yield table


def _connected(dsn: str, *, prepares: bool) -> psycopg.Connection:
    return psycopg.connect(
        dsn,
        autocommit=True,
        prepare_threshold=0 if prepares else None,
        options="-c search_path=tallymark,public -c timezone=utc",
    )


def _milliseconds(connection: psycopg.Connection, query: str, given: tuple[object, ...]) -> float:
    """Median of some runs."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        connection.execute(query, given).fetchall()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


def _pages(connection: psycopg.Connection, question: Question) -> int:
    """Pages that the view's query touches, wherever they are."""
    query = "EXPLAIN (ANALYZE, BUFFERS, FORMAT json) " + question.view
    row = connection.execute(query, question.given).fetchone()
    assert row is not None
    [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
    return int(document["Plan"]["Shared Hit Blocks"] + document["Plan"]["Shared Read Blocks"])


async def _make(dsn: str, *, is_new: bool) -> None:
    store = Store(dsn)
    await store.open()
    await store.migrate()
    if is_new:
        await _fill(dsn, store)
    await store.close()


async def _fill(dsn: str, store: Store) -> None:
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


@contextmanager
def _database() -> Iterator[tuple[str, bool]]:
    """A database, and whether there is nothing in it."""
    server = os.environ.get("TALLYMARK_BENCH_DSN")
    if server is None:
        with (
            tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder,
            connect_string(f"embedded:{Path(folder) / 'pg'}") as dsn,
        ):
            yield dsn, True
        return
    name = f"{NAME}_{POINTS}" if KEEP else NAME
    with psycopg.connect(server, autocommit=True) as connection:
        if KEEP and connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is not None:
            yield make_conninfo(server, dbname=name), False
            return
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name}")
        dsn = make_conninfo(server, dbname=name)
        whole = False
        try:
            with psycopg.connect(dsn, autocommit=True) as inside:
                inside.execute("DO $$BEGIN CREATE EXTENSION timescaledb; EXCEPTION WHEN OTHERS THEN NULL; END$$")
            yield dsn, True
            whole = True
        finally:
            if not (KEEP and whole):
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
