"""Days are kept over the hours as hours over the points: never stale, whoever commits between, migrates, or is old."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import Batch
from tallymark_collector.store import Store, days, hours, roles
from tallymark_collector.store.database import Connection, Database
from tallymark_collector.store.engines.capabilities import called, capabilities, sql, state
from tallymark_collector.store.migrations import available, migrate
from tests.support.usage import BASE, SECOND, point, stream

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
DAY = 86_400
STREAMS = [stream(account, route=route) for account in ("acme", "globex") for route in ("/a", "/b")]
[OURS] = [step.version for step in available() if step.name.endswith("_days")]
BEFORE = [step for step in available() if step.version < OURS]

OLD_REFRESH = """
WITH gone AS (DELETE FROM usage_dirty WHERE account = 'acme' RETURNING bucket)
SELECT DISTINCT bucket FROM gone ORDER BY 1"""
"""How a collector from before the days begins to make hours again: it knows of no day."""


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public -c timezone=utc") as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


async def refreshed(store: Store) -> None:
    while await store.refresh():
        pass


async def kept_by_the_collector(store: Store) -> None:
    async with store.session() as connection:
        if (await state(connection)).continuous_aggregates:
            pytest.skip("the database keeps the days")


async def check(store: Store, expected: int | Decimal) -> None:
    """Every view says so, and the audit finds nothing."""
    async with store.reading() as connection:
        for relation in ("usage_hourly", "usage_daily", "usage_point"):
            row = await (await connection.execute(f"SELECT sum(quantity) FROM {relation}")).fetchone()
            assert row == (expected,), relation
        assert (await with_days(connection, await audit(connection))).clean


class Paused:
    """A connection that lets somebody else work after its n-th statement."""

    def __init__(self, connection: Connection, after: int, meanwhile: Callable[[], Awaitable[None]]) -> None:
        self._connection = connection
        self._left = after
        self._meanwhile = meanwhile

    def transaction(self) -> object:
        return self._connection.transaction()

    async def execute(self, *arguments: object) -> object:
        result = await self._connection.execute(*arguments)  # type: ignore[arg-type]
        self._left -= 1
        if self._left == 0:
            await self._meanwhile()
        return result


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("after", range(1, 7))
async def test_hours_that_commit_between_the_statements_of_a_day_are_not_lost(
    store: Store, after: int, refresh: bool
) -> None:
    """The trap: a day's mark that is deleted although its hours were not in the snapshot that was summed."""
    await kept_by_the_collector(store)
    await store.write(Batch(points=[point(STREAMS[0], 0, 10, 10)]))
    async with store.transaction() as connection:
        assert await hours.refresh(connection) == 1
    written = 0

    async def meanwhile() -> None:
        nonlocal written
        written += 1
        await store.write(Batch(points=[point(STREAMS[0], 10, 20, 5)]))
        if refresh:
            async with store.transaction() as other:
                assert await hours.refresh(other) == 1

    async with store.transaction() as connection:
        await days.refresh(Paused(connection, after, meanwhile))  # type: ignore[arg-type]
    assert written == 1, "there are fewer statements than this test pauses after"
    await check(store, 15)
    await store.refresh()
    await check(store, 15)


async def test_two_that_make_the_same_day_take_turns(store: Store, dsn: str) -> None:
    """The second begins while the first has summed and not committed: it must not leave the first's sum behind."""
    await kept_by_the_collector(store)
    await store.write(Batch(points=[point(STREAMS[0], 0, 10, 10)]))
    async with store.transaction() as connection:
        await hours.refresh(connection)
    async with store.transaction() as first:
        assert await days.refresh(first) == 1
        await store.write(Batch(points=[point(STREAMS[0], 10, 20, 5)]))
        async with store.transaction() as connection:
            await hours.refresh(connection)

        async def again() -> int:
            async with store.transaction() as second:
                return await days.refresh(second)

        waiting = asyncio.create_task(again())
        for _ in range(1000):
            if execute(dsn, "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
                break
            await asyncio.sleep(0.02)
        else:
            raise AssertionError("nobody waits")
    assert await waiting == 1
    await check(store, 15)
    assert execute(dsn, "SELECT quantity, points FROM usage_day") == [(15, 2)]


async def test_a_day_of_which_hours_wait_is_read_from_its_hours(store: Store, dsn: str) -> None:
    await kept_by_the_collector(store)
    await store.write(Batch(points=[point(STREAMS[0], 3600 * h, 3600 * h + 10, 1) for h in range(5)]))
    assert await store.refresh(2) == 2
    assert execute(dsn, "SELECT sum(quantity) FROM usage_day") == [(2,)], "made with what was there, so not to be shown"
    assert execute(dsn, "SELECT count(*) FROM usage_day_dirty") == [(0,)], "a day that never rests gathers no marks"
    await check(store, 5)
    await refreshed(store)
    assert execute(dsn, "SELECT sum(quantity), sum(points) FROM usage_day") == [(5, 5)]
    assert execute(dsn, "SELECT count(*) FROM usage_day_marked") == [(0,)]
    await check(store, 5)


async def test_a_collector_of_before_cannot_leave_a_day_stale(store: Store, dsn: str) -> None:
    """It deletes an hour's marks and makes the hour again, as a role that was granted nothing about days."""
    await kept_by_the_collector(store)
    await store.write(Batch(points=[point(STREAMS[0], 0, 10, 10)]))
    await refreshed(store)
    await store.write(Batch(points=[point(STREAMS[0], 10, 20, 5)]))
    role = f"tallymark_test_old_{os.getpid()}"
    execute(dsn, f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA tallymark TO {role};"
                 f" GRANT SELECT, INSERT, DELETE ON usage_dirty, usage_hour TO {role};"
                 f" GRANT SELECT ON usage_point TO {role}")  # fmt: skip
    try:
        old = psycopg.connect(make_conninfo(dsn, user=role), options="-c search_path=tallymark")
        with old as connection:
            [(bucket,)] = connection.execute(OLD_REFRESH).fetchall()
            connection.execute("DELETE FROM usage_hour WHERE bucket = %s", [bucket])
            connection.execute(
                "INSERT INTO usage_hour SELECT %s, series, account, tenant, sum(quantity), count(*) FROM usage_point"
                " GROUP BY series, account, tenant",
                [bucket],
            )
    finally:
        execute(dsn, f"DROP OWNED BY {role}; DROP ROLE {role}")
    await check(store, 15)
    await refreshed(store)
    assert execute(dsn, "SELECT quantity FROM usage_day") == [(15,)]


async def test_emptied_hours_leave_no_days(store: Store, dsn: str) -> None:
    await store.write(Batch(points=[point(of, DAY * d, DAY * d + 5, 1) for of in STREAMS for d in range(3)]))
    await refreshed(store)
    execute(dsn, "TRUNCATE usage_point, usage_hour, usage_dirty")
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT count(*) FROM usage_daily")).fetchone()
    assert row == (0,)


@asynccontextmanager
async def at_the_version_before(dsn: str) -> AsyncIterator[Store]:
    database = Database(dsn)
    await database.open()
    async with database.connection() as connection:
        await migrate(connection, BEFORE)
    await database.close()
    store = Store(dsn)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.engines("embedded", "postgres")
async def test_a_database_of_before_gets_its_days_while_collectors_write(unmigrated: str) -> None:
    async with at_the_version_before(unmigrated) as store:
        for day in range(12):
            await store.write(Batch(points=[point(of, DAY * day + 5, DAY * day + 9, 3) for of in STREAMS]))
        async with store.transaction() as connection:
            await hours.refresh(connection, 18)  # of 24: marks wait
        stop, rounds = asyncio.Event(), 0

        async def writing() -> None:
            nonlocal rounds
            while not stop.is_set() or rounds < 3:
                start = DAY * (rounds % 14) + 100 + rounds
                rounds += 1
                await store.write(Batch(points=[point(of, start, start + 1, 3) for of in STREAMS]))

        async def reading() -> None:
            while not stop.is_set():
                with suppress(StoreUnavailable):
                    async with store.reading() as connection:
                        sums = []
                        for relation in ("usage_hourly", "usage_daily", "usage_point"):
                            sums += await (await connection.execute(f"SELECT sum(quantity) FROM {relation}")).fetchall()
                        assert len(set(sums)) == 1

        async def refreshing() -> None:
            """As before: hours alone."""
            while not stop.is_set():
                async with store.transaction() as connection:
                    await connection.execute(
                        "SELECT pg_advisory_xact_lock_shared(hashtextextended('tallymark.refreshing', 0))"
                    )
                    await hours.refresh(connection, 5)

        async def migrating() -> list[str]:
            try:
                return await store.migrate()
            finally:
                stop.set()

        results = await asyncio.gather(migrating(), writing(), writing(), refreshing(), reading(), reading())
        assert results[0][0].endswith("_days")
        await check(store, (12 + rounds) * 4 * 3)
        await refreshed(store)
        await check(store, (12 + rounds) * 4 * 3)
        assert execute(unmigrated, "SELECT sum(quantity) FROM usage_day") == [((12 + rounds) * 4 * 3,)]
        assert not (await audit_changed(store, ZERO + timedelta(days=20))).differences


@pytest.mark.engines("embedded", "postgres")
async def test_days_are_there_from_the_migration_on(unmigrated: str) -> None:
    """Not only right: read from days, without a refresh."""
    async with at_the_version_before(unmigrated) as store:
        await store.write(Batch(points=[point(of, DAY * d, DAY * d + 9, 3) for of in STREAMS for d in range(5)]))
        async with store.transaction() as connection:
            while await hours.refresh(connection):
                pass
        await store.write(Batch(points=[point(STREAMS[0], 50, 60, 1)]))
        await store.migrate()
        await check(store, 61)
        assert execute(unmigrated, "SELECT sum(quantity) FROM usage_day") == [(60,)]
        assert execute(unmigrated, "SELECT count(*) FROM usage_day_marked") == [(1,)]


@pytest.mark.engines("timescale")
async def test_the_views_are_the_same_over_continuous_aggregates(store: Store, dsn: str, server: str) -> None:
    """Two files have them; one must not learn something that the other does not."""
    async with store.session() as connection:
        if not (await state(connection)).continuous_aggregates:
            pytest.skip("this edition has the plain views")
    query = "SELECT pg_get_viewdef('tallymark.{}'::regclass)"
    steps = {step.name[5:]: step.sql for step in available()}
    for view, step in (("usage_day_current", "days"), ("usage_daily", "days"), ("usage_by_period", "edges")):
        found = execute(dsn, query.format(view))
        create = f"CREATE OR REPLACE VIEW {view} AS"
        text = steps[step]
        start = text.index(create)
        execute(dsn, "SET search_path = tallymark, public; " + text[start : text.index(";", start)])
        assert execute(dsn, query.format(view)) == found


async def test_the_writer_may_keep_days(store: Store, dsn: str) -> None:
    role = f"tallymark_test_days_{os.getpid()}"
    execute(dsn, f"CREATE ROLE {role} LOGIN")
    try:
        await kept_by_the_collector(store)
        async with store.transaction() as connection:
            await roles.grant(connection, writer=role)
        writer = Store(make_conninfo(dsn, user=role))
        await writer.open()
        await writer.write(Batch(points=[point(STREAMS[0], 0, 10, 10)]))
        await refreshed(writer)
        assert execute(dsn, "SELECT quantity FROM usage_day") == [(10,)]
        assert await audit_changed(writer, ZERO + timedelta(days=2)) == (1, [])
        assert execute(dsn, "SELECT count(*) FROM usage_day_unaudited") == [(0,)]
        await writer.close()
    finally:
        execute(dsn, f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.engines("timescale")
async def test_hours_and_days_of_dropped_points_move_along(unmigrated: str) -> None:
    """They exist in the collector's tables alone."""
    store = Store(unmigrated)
    await store.open()
    await store.migrate()
    await store.write(Batch(points=[point(of, DAY * d, DAY * d + 9, 3) for of in STREAMS for d in range(10)]))
    await refreshed(store)
    while (await audit_changed(store, ZERO + timedelta(days=30))).hours:
        pass
    kept = (ZERO + timedelta(days=5)).replace(hour=0)
    execute(unmigrated, f"DELETE FROM usage_point WHERE time < '{kept}'; UPDATE usage_kept SET points_from = '{kept}'")
    before = execute(unmigrated, "SELECT sum(quantity), sum(points), count(*) FROM usage_daily")
    execute(unmigrated, "CREATE EXTENSION timescaledb")
    await store.migrate()
    for relation in ("usage_daily", "usage_hourly"):
        assert execute(unmigrated, f"SELECT sum(quantity), sum(points), count(*) FROM {relation}") == before == [
            (120, 40, 40)
        ]  # fmt: skip
    await refreshed(store)
    assert execute(unmigrated, "SELECT sum(quantity) FROM usage_day") == [(120,)]
    async with store.reading() as connection:
        assert (await with_days(connection, await audit(connection))).clean
    await store.close()


@pytest.mark.engines("timescale")
async def test_a_move_of_before_that_was_interrupted_is_finished(unmigrated: str) -> None:
    """The aggregate of days stands there under the name that the collector's table has now."""
    async with at_the_version_before(unmigrated) as store:
        await store.write(Batch(points=[point(of, DAY * d, DAY * d + 9, 3) for of in STREAMS for d in range(10)]))
        async with store.transaction() as connection:
            await hours.refresh(connection, 30)
        execute(unmigrated, "CREATE EXTENSION timescaledb")
        async with store.session() as connection:
            if not (await capabilities(connection)).continuous_aggregates:
                pytest.skip("this edition has no aggregates")
            hypertables = sql("timescale_points").replace("usage_point_moving", "usage_point")
            hypertables = hypertables.replace("ALTER TABLE usage_point RENAME TO usage_point;", "")
            hypertables += sql("timescale_evidence")
            await connection.execute(await called(connection, hypertables))
            aggregates = sql("timescale_aggregates").replace("usage_day_native", "usage_day")
            await connection.execute(await called(connection, aggregates))
        await store.migrate()
        await check(store, 120)
        await refreshed(store)
        await check(store, 120)
        assert execute(unmigrated, "SELECT sum(quantity) FROM usage_day") == [(120,)]
