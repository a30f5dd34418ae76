"""A database of each earlier version, with usage in it, brought to this one: nothing is lost, nothing counts twice, and
what runs on goes on from where it was.

What an earlier version had written is taken from a database of this one: the columns that there were then. What the
views must say is summed up here, from what was sent.
"""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal

import psycopg
import pytest
from psycopg import sql

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.pipeline import Outcome, Pipeline
from tallymark_collector.store import Store
from tallymark_collector.store.database import Database
from tallymark_collector.store.migrations import available, migrate
from tests.support.usage import BASE, HOUR, SECOND, number, request, sum_metric

ACCOUNTS = ("acme", "globex", "initech")
VERSIONS = [migration.version for migration in available()][1:-1]
"""From the second on: with the first there are no views to ask."""
TABLES = (
    *("usage_series", "usage_stream", "usage_sample", "usage_evidence", "usage_quarantine", "usage_point"),
    *("usage_hour", "usage_dirty"),
)


def deltas(hours: range, value: int) -> bytes:
    """A point of each account in each of these hours."""
    points = [
        number(BASE + hour * HOUR, BASE + hour * HOUR + 60 * SECOND, value + i, {"tallymark.account.id": account})
        for hour in hours
        for i, account in enumerate(ACCOUNTS)
    ]
    return request(sum_metric(points)).SerializeToString()


def totals(hour: int, value: int) -> bytes:
    """What each account's running total stands at, of a process that began with the first hour."""
    points = [
        number(BASE, BASE + hour * HOUR + 90 * SECOND, value * (i + 1), {"tallymark.account.id": account})
        for i, account in enumerate(ACCOUNTS)
    ]
    return request(sum_metric(points, "llm.tokens", "{token}", temporality=2), producer="total").SerializeToString()


BEFORE = [deltas(range(30), 1), totals(1, 10), totals(5, 25), deltas(range(30, 50), 7)]
AFTER = [totals(7, 40), totals(3, 20), deltas(range(2, 3), 0) + deltas(range(60, 61), 3)]
"""A total goes on; one comes late; one point contradicts what is stored, another is new."""

DAY = 24


def daily() -> dict[tuple[str, str, int], Decimal]:
    """Account, meter and day number to the quantity, of what is in `BEFORE` and `AFTER`."""
    found: dict[tuple[str, str, int], Decimal] = defaultdict(Decimal)
    offset = BASE // HOUR % DAY
    for i, account in enumerate(ACCOUNTS):
        for hour in range(50):
            found[account, "api.requests", (hour + offset) // DAY] += (1 if hour < 30 else 7) + i
        found[account, "api.requests", (60 + offset) // DAY] += 3 + i
        for hour, grown in ((1, 10), (3, 10), (5, 5), (7, 15)):
            found[account, "llm.tokens", (hour + offset) // DAY] += grown * (i + 1)
    return dict(found)


async def put(store: Store, bodies: list[bytes]) -> list[Outcome]:
    pipeline = Pipeline(store, now_ns=lambda: BASE + 61 * HOUR)
    return [await pipeline.metrics("default", body) for body in bodies]


async def copied(source: str, target: str, version: int) -> None:
    """What a collector of that version would have left in its database."""
    database = Database(target)
    await database.open()
    async with database.connection() as connection:
        await migrate(connection, [step for step in available() if step.version <= version])
    await database.close()
    with psycopg.connect(source) as old, psycopg.connect(target, options="-c search_path=tallymark") as new:
        for table in TABLES:
            found = old.execute(
                """SELECT attname FROM pg_attribute
                   WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''""",
                [f"tallymark.{table}"],
            ).fetchall()
            there = new.execute(
                """SELECT column_name FROM information_schema.columns
                   WHERE table_schema = 'tallymark' AND table_name = %s""",
                [table],
            ).fetchall()
            columns = sql.SQL(", ").join(sql.Identifier(name) for (name,) in found if (name,) in there)
            reads = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(columns, sql.Identifier("tallymark", table))
            writes = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), columns)
            with old.cursor().copy(reads) as out, new.cursor().copy(writes) as into:
                for data in out:
                    into.write(data)


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_earlier_version_with_usage_in_it(store: Store, dsn: str, unmigrated: str, version: int) -> None:
    await put(store, BEFORE[:3])
    while await store.refresh():
        pass
    await put(store, BEFORE[3:])  # these hours are marked, and not yet made
    await copied(dsn, unmigrated, version)

    upgraded = Store(unmigrated)
    await upgraded.open()
    assert [name for name in await upgraded.migrate() if name[:4].isdigit()] == [
        step.name for step in available() if step.version > version
    ]
    again = await put(upgraded, BEFORE)
    assert again == [Outcome()] * len(BEFORE), "what was there is known to be there"
    with psycopg.connect(unmigrated) as connection:
        assert connection.execute("SELECT count(*) FROM tallymark.usage_point").fetchone() == (156,)
    outcomes = await put(upgraded, AFTER)
    assert [outcome.rejected for outcome in outcomes] == [0, 0, len(ACCOUNTS)], "contradictions"
    for refreshed in (False, True):
        with psycopg.connect(unmigrated) as connection:
            rows = connection.execute(
                """SELECT account, meter, extract(epoch FROM bucket)::bigint / 86400 - %s, sum(quantity)
                   FROM tallymark.usage_daily GROUP BY 1, 2, 3""",
                [BASE // SECOND // 86400],
            ).fetchall()
        assert {(account, meter, int(day)): quantity for account, meter, day, quantity in rows} == daily(), refreshed
        while await upgraded.refresh():
            pass
    async with upgraded.reading() as connection:
        report = await audit(connection)
    assert report.clean
    await upgraded.close()
