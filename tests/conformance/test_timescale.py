"""TimescaleDB: how a database gets there while collectors write, what it refuses, and what it drops."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.aggregates.retention import Dropped, check_possible, drop_old
from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.model import Batch, Point, Reason, Temporality, WriteResult
from tallymark_collector.query.usage import usage
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store, migrations
from tallymark_collector.store.engines import moving, timescale
from tallymark_collector.store.engines.capabilities import capabilities, state
from tests.support.usage import BASE, SECOND, point, stream

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
DAY = 86_400
STREAMS = [stream(account, route=route) for account in ("acme", "globex") for route in ("/a", "/b")]


@asynccontextmanager
async def opened(dsn: str, *, wants_timescale: bool = False) -> AsyncIterator[Store]:
    store = Store(dsn, wants_timescale=wants_timescale)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def empty(server: str) -> Iterator[str]:
    """A database with nothing in it, not even an extension."""
    name = sql.Identifier(f"tallymark_test_plain_{os.getpid()}")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
        yield make_conninfo(server, dbname=name.as_string().strip('"'))
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


async def is_native(store: Store) -> bool:
    async with store.session() as connection:
        return (await state(connection)).continuous_aggregates


async def clean(store: Store) -> bool:
    async with store.reading() as connection:
        return (await with_days(connection, await audit(connection))).clean


async def totals(store: Store) -> list[tuple[object, ...]]:
    """What each view says altogether, and the points themselves."""
    async with store.reading() as connection:
        rows = []
        for relation in ("usage_hourly", "usage_daily", "usage_point"):
            points = "count(*)" if relation == "usage_point" else "sum(points)"
            rows += await (await connection.execute(f"SELECT sum(quantity), {points} FROM {relation}")).fetchall()
        return rows


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public -c timezone=utc") as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@pytest.mark.engines("timescale")
@pytest.mark.parametrize("before", ["plain", "hypertables"])
async def test_a_database_moves_while_collectors_write(empty: str, before: str) -> None:
    """Extension newly installed, or used by the Apache edition until now; points there already, marks waiting, writers
    and refreshers at work all the while."""
    async with opened(empty) as plain, opened(empty) as other:
        await plain.migrate()
        assert not await is_native(plain)
        for day in range(20):
            await plain.write(Batch(points=[point(of, DAY * day, DAY * day + 7, 3) for of in STREAMS]))
        await plain.refresh(5)
        execute(empty, "CREATE EXTENSION timescaledb")
        if before == "hypertables":
            async with plain.session() as connection:
                await moving.cut_up(connection, plain.session)
        steps = await plain.pending()
        stop = asyncio.Event()
        written = 20

        async def writing(store: Store, first: int) -> None:
            nonlocal written
            number = first
            while not stop.is_set():
                batch = [point(of, DAY * (number % 25) + number, DAY * (number % 25) + number + 1, 3) for of in STREAMS]
                assert (await until_written(store, batch)).inserted + (
                    await until_written(store, batch)
                ).duplicates == 8
                written += 1
                number += 2

        async def refreshing(store: Store) -> None:
            while not stop.is_set():
                with suppress(StoreUnavailable):
                    await store.refresh()
                await asyncio.sleep(0)

        async def reading(store: Store) -> None:
            while not stop.is_set():
                with suppress(StoreUnavailable):
                    assert len(set(await totals(store))) == 1, "a view said something else than the points"

        async def migrating() -> list[str]:
            try:
                async with opened(empty) as mover:
                    return await mover.migrate()
            finally:
                stop.set()

        results = await asyncio.gather(
            migrating(), writing(plain, 100), writing(other, 101), refreshing(plain), refreshing(other), reading(other)
        )
        can = timescale.AGGREGATES in results[0]
        assert results[0] == steps == [timescale.HYPERTABLES, timescale.AGGREGATES][before == "hypertables" : 1 + can]
        assert await is_native(plain) is can
        expected = (Decimal(written * 4 * 3), written * 4)
        assert set(await totals(plain)) == {expected}
        while await other.refresh():
            pass
        assert set(await totals(plain)) == {expected}
        assert await clean(plain)
        async with opened(empty) as again:
            assert await again.pending() == []
            assert await again.migrate() == []


async def until_written(store: Store, points: list[Point]) -> WriteResult:
    """As a client does: again and again while the answer is that it should be sent again."""
    for _ in range(500):
        try:
            return await store.write(Batch(points=list(points)))
        except StoreUnavailable:
            await asyncio.sleep(0.02)
    raise AssertionError("the database stays away")


async def until_laid_out(store: Store) -> None:
    for _ in range(500):
        try:
            if not await store.lay_out(ZERO + timedelta(days=365)):
                return
        except StoreUnavailable:
            await asyncio.sleep(0.02)


@pytest.mark.engines("timescale")
async def test_a_move_that_was_killed_leaves_a_table_that_clients_wait_for(empty: str) -> None:
    async with opened(empty) as store:
        await store.migrate()
        await store.write(Batch(points=[point(STREAMS[0], 0, 10, 5)]))
        execute(empty, "CREATE EXTENSION timescaledb")
        execute(empty, "ALTER TABLE usage_point RENAME TO usage_point_moving")
        for work in (store.write(Batch(points=[point(STREAMS[0], 10, 20, 5)])), store.refresh()):
            with pytest.raises(StoreUnavailable):
                await work
        async with store.reading() as connection:
            row = await (await connection.execute("SELECT sum(quantity) FROM usage_daily")).fetchone()
        assert row == (5,), "views know the table, whatever its name"
        assert (await store.migrate())[:2] == [moving.INTERRUPTED, timescale.HYPERTABLES]
        assert (await store.write(Batch(points=[point(STREAMS[0], 10, 20, 5)]))).inserted == 1
        assert set(await totals(store)) == {(10, 2)}


@pytest.mark.engines("timescale")
async def test_a_reader_sees_one_moment_while_points_become_columns(store: Store, dsn: str) -> None:
    """TimescaleDB moves rows past older snapshots: without the reader's lock it missed points that were there before it
    began, or saw some that came after (2.29.2)."""
    if not await is_native(store):
        pytest.skip("this edition has no columns")
    for round_ in range(3):
        ends = [7 * round_ + 7 * 100 * s for s in range(40)]
        await store.write(Batch(points=[point(of, end, end + 1 + round_, 1) for of in STREAMS for end in ends]))
        expected = 160 * (round_ + 1)
        async with store.reading() as connection:
            laying_out = asyncio.create_task(until_laid_out(store))
            await asyncio.wait([laying_out], timeout=1)
            for relation in ("usage_point", "usage_hourly", "usage_daily", "usage_point"):
                row = await (await connection.execute(f"SELECT sum(quantity) FROM {relation}")).fetchone()
                assert row == (expected,)
        await laying_out
        while await store.refresh():
            pass
        assert set(await totals(store)) == {(expected, expected)}


@pytest.mark.engines("timescale")
async def test_an_interrupted_move_is_finished_by_the_next(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(empty) as store:
        await store.migrate()
        await store.write(Batch(points=[point(of, DAY * day, DAY * day + 7, 3) for of in STREAMS for day in range(20)]))
        execute(empty, "CREATE EXTENSION timescaledb")
        before = (await totals(store))[-1]
        real = timescale.refresh_window
        calls = 0

        async def failing(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("killed")
            await real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(timescale, "refresh_window", failing)
        async with store.session() as connection:
            native = (await capabilities(connection)).continuous_aggregates
        if not native:
            pytest.skip("this edition has one step, in one transaction")
        with pytest.raises(RuntimeError, match="killed"):
            await store.migrate()
        await store.write(Batch(points=[point(STREAMS[0], 30, 40, 5)]))
        while await store.refresh():
            pass
        assert not await is_native(store)
        assert set(await totals(store)) == {(before[0] + 5, before[1] + 1)}
        monkeypatch.undo()
        assert await store.migrate() == [timescale.AGGREGATES]
        assert set(await totals(store)) == {(before[0] + 5, before[1] + 1)}
        assert await clean(store)


@pytest.mark.engines("timescale")
async def test_views_have_the_same_columns_as_everywhere(store: Store, dsn: str, empty: str) -> None:
    query = """SELECT c.relname, a.attname::text, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a
               JOIN pg_class c ON c.oid = a.attrelid AND c.relkind = 'v' AND c.relname <> 'usage_hour'
                              AND c.relname <> 'usage_day'
               WHERE c.relnamespace = 'tallymark'::regnamespace AND a.attnum > 0 ORDER BY c.relname, a.attnum"""
    async with opened(empty) as plain:
        await plain.migrate()
    assert execute(dsn, query) == execute(empty, query)


@pytest.mark.engines("timescale")
async def test_a_migration_that_makes_a_view_again_does_not_undo_the_engine(store: Store, dsn: str) -> None:
    if not await is_native(store):
        pytest.skip("this edition has the plain views")
    steps = {step.name: step for step in migrations.available()}
    execute(dsn, "DELETE FROM migration WHERE name = '0018_quarantine_time'; DROP INDEX usage_quarantine_time")
    plain = steps["0002_aggregates"].sql
    daily = "CREATE OR REPLACE" + plain[plain.index(" VIEW usage_daily") : plain.index("-- PUBLIC. Single calls")]
    execute(dsn, daily)
    assert "usage_day" not in str(execute(dsn, "SELECT pg_get_viewdef('usage_daily'::regclass)"))
    assert await store.migrate() == ["0018_quarantine_time"]
    assert "usage_day" in str(execute(dsn, "SELECT pg_get_viewdef('usage_daily'::regclass)"))


@pytest.mark.engines("embedded", "postgres")
async def test_timescale_that_the_server_does_not_have_is_a_sentence(server: str, dsn: str) -> None:
    async with opened(dsn, wants_timescale=True) as store:
        for work in (store.migrate, store.prepare):
            with pytest.raises(UserError, match="this server has no TimescaleDB: install its package"):
                await work()
        assert await store.pending() == ["timescaledb"]


@pytest.mark.engines("embedded", "postgres")
async def test_what_only_timescale_does_is_a_sentence_elsewhere(store: Store) -> None:
    with pytest.raises(UserError, match=r"leave out --keep-points and --keep-evidence"):
        await check_possible(store, Retention(points=timedelta(days=30)))
    with pytest.raises(UserError, match=r"leave out --columnstore-after"):
        await store.check_columns()
    await check_possible(store, Retention())


@pytest.mark.engines("timescale")
async def test_who_may_not_is_told_who_may(server: str, empty: str) -> None:
    role = f"tallymark_test_guest_{os.getpid()}"
    execute(empty, f"CREATE ROLE {role} LOGIN")
    try:
        async with opened(empty) as owner:
            await owner.migrate()
        execute(
            empty,
            f"GRANT ALL ON SCHEMA tallymark TO {role}; GRANT ALL ON ALL TABLES IN SCHEMA tallymark TO {role};"
            f" GRANT CREATE ON DATABASE {psycopg.conninfo.conninfo_to_dict(empty)['dbname']} TO {role}",
        )
        execute(empty, "CREATE EXTENSION timescaledb")
        async with opened(make_conninfo(empty, user=role)) as guest:
            with pytest.raises(UserError, match=f"by the owner of the tables: run .* not as {role}"):
                await guest.migrate()
            with pytest.raises(
                UserError, match=f"lacks timescale_hypertables.* run `tallymark migrate --writer {role}`"
            ):
                await guest.prepare()
        async with opened(empty) as owner:
            pending = await owner.pending()
            assert pending[0] == timescale.HYPERTABLES
            assert await owner.prepare() == pending, "as the owner `serve` takes the engine's steps, too"
            assert await owner.prepare() == []
    finally:
        execute(empty, f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.engines("timescale")
async def test_an_extension_that_may_not_be_installed_is_a_sentence(server: str, empty: str) -> None:
    role = f"tallymark_test_guest_{os.getpid()}"
    execute(empty, f"CREATE ROLE {role} LOGIN")
    try:
        async with opened(make_conninfo(empty, user=role), wants_timescale=True) as guest:
            with pytest.raises(UserError, match="have an administrator run CREATE EXTENSION timescaledb"):
                await guest.migrate()
    finally:
        execute(empty, f"DROP ROLE {role}")


@pytest.mark.engines("timescale")
async def test_views_with_many_marks_in_sessions_that_are_not_ours(store: Store, dsn: str) -> None:
    """TimescaleDB's SkipScan failed on these (2.29.2)."""
    batch = [point(stream(f"account-{i}"), 3600 * h, 3600 * h + 1, 1) for i in range(150) for h in range(30)]
    for of in range(3):
        await store.write(Batch(points=[p._replace(time_ns=p.time_ns + of * 1000) for p in batch]))
    for statement in ("SELECT 1", "ANALYZE usage_dirty", "VACUUM ANALYZE usage_dirty"):
        execute(dsn, statement)
        for setting in ("on", "off"):
            with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
                connection.execute(f"SET enable_hashagg = {setting}; SET enable_seqscan = {setting}")
                for view in ("usage_hourly", "usage_daily"):
                    assert connection.execute(f"SELECT sum(points) FROM {view}").fetchone() == (13_500,)


async def fill(store: Store, days: int = 40) -> None:
    for of in STREAMS:
        ends = [DAY * day + 3600 * hour for day in range(days) for hour in (0, 5, 23)]
        await store.write(Batch(points=[point(of, end, end + 10, 2) for end in ends]))
    while await store.refresh():
        pass
    while (await audit_changed(store, ZERO + timedelta(days=days + 1))).hours:
        pass


@pytest.mark.engines("timescale")
async def test_dropped_points_leave_their_hours_and_days(store: Store, dsn: str) -> None:
    await fill(store)
    cumulative = stream("acme", producer="other", temporality=Temporality.CUMULATIVE)
    await store.write(Batch(points=[point(cumulative, 0, DAY * day + 60, 10 * day + 10) for day in range(40)]))
    while await store.refresh():
        pass
    now = ZERO + timedelta(days=40)
    await audit_changed(store, now)
    before = await totals(store)
    assert len(set(before)) == 1
    dropped = await drop_old(store, Retention(points=timedelta(days=15)), now)
    kept = dropped.points_before
    assert kept is not None
    assert now - timedelta(days=15 + 7) < kept <= now - timedelta(days=15)
    after = await totals(store)
    assert after[:2] == before[:2], "hours and days are as they were"
    assert after[2] != before[2], "points are gone"
    assert execute(dsn, "SELECT min(time) FROM usage_point")[0][0] >= kept  # type: ignore[operator]
    assert await clean(store), "what has been dropped is no difference and no drift"

    await store.write(Batch(points=[point(STREAMS[0], 39 * DAY + 99, 39 * DAY + 100, 1)]))
    late = point(STREAMS[0], 3600, 3700, 50)
    replay = point(STREAMS[0], 0, 10, 2)
    result = await store.write(Batch(points=[late, point(STREAMS[0], 39 * DAY + 200, 39 * DAY + 201, 1), replay]))
    assert (result.inserted, [c.refusal.reason for c in result.conflicts]) == (1, [Reason.NOT_STORABLE] * 2)
    assert "have been dropped" in result.conflicts[0].refusal.detail
    while await store.refresh():
        pass
    assert await clean(store)
    hourly, daily, _ = await totals(store)
    assert hourly == daily == (before[0][0] + 2, before[0][1] + 2)  # type: ignore[operator]

    async with store.reading() as connection:
        whole = await usage(connection, tenant="default", start=ZERO, end=ZERO + timedelta(hours=1))
        assert whole.total() == 4 * 2 + 10
        with pytest.raises(UserError, match="on a whole hour"):
            await usage(connection, tenant="default", start=ZERO + timedelta(minutes=1))
    assert await drop_old(store, Retention(points=timedelta(days=15)), now) == Dropped()


@pytest.mark.engines("timescale")
async def test_nothing_is_dropped_that_is_still_needed(store: Store, dsn: str) -> None:
    await fill(store)
    now = ZERO + timedelta(days=40)
    retention = Retention(points=timedelta(days=10), billing_grace=timedelta(days=5))

    execute(
        dsn,
        "INSERT INTO billing_period VALUES"
        f" ('{ZERO + timedelta(days=9)}', '{ZERO + timedelta(days=36)}', 'acme', 'default', '2026-01-01', 0, 'pro')",
    )
    kept = (await drop_old(store, retention, now)).points_before
    assert kept is not None
    assert kept <= ZERO + timedelta(days=9), "a period that ended four days ago is still billed"
    execute(dsn, "UPDATE billing_period SET period_end = period_end - interval '10 days'")

    await store.write(Batch(points=[point(STREAMS[0], 16 * DAY + 100, 16 * DAY + 101, 1)]))
    kept = (await drop_old(store, retention, now)).points_before
    assert kept is None or kept <= ZERO + timedelta(days=16), "an hour there is not refreshed yet"
    while await store.refresh():
        pass
    kept = (await drop_old(store, retention, now)).points_before
    assert kept is None or kept <= ZERO + timedelta(days=16), "an hour there is not audited yet"
    await audit_changed(store, now)

    execute(
        dsn, f"UPDATE usage_hour SET quantity = 7 WHERE account = 'globex' AND bucket = '{ZERO + timedelta(days=20)}'"
    )
    dropped = await drop_old(store, retention, now)
    assert dropped.differing == 1, "an hour that is wrong is mended first"
    [[kept]] = execute(dsn, "SELECT points_from FROM usage_kept")
    assert isinstance(kept, datetime)
    assert kept <= ZERO + timedelta(days=20)
    assert dropped.points_before in (None, kept), "what is older went before"
    while await store.refresh():
        pass
    await audit_changed(store, now)
    kept = (await drop_old(store, retention, now)).points_before
    assert kept is not None
    assert kept > ZERO + timedelta(days=20)
    assert await clean(store)


@pytest.mark.engines("timescale")
async def test_periods_that_end_inside_an_hour_say_the_same_when_its_points_are_gone(store: Store, dsn: str) -> None:
    """Or nothing, where they were written down too late for that: never less."""
    zone = ZERO.replace(hour=0)  # a whole number of days
    rows = [point(STREAMS[0], 600 * n, 600 * n + 60, 1) for n in range(6 * 24 * 40)]
    other = stream("acme", "jobs")
    await store.write(Batch(points=[*rows, point(other, 3600 * 40, 3600 * 40 + 1, 5)]))
    while await store.refresh():
        pass
    now = ZERO + timedelta(days=60)
    while (await audit_changed(store, now)).hours:
        pass
    edge = zone + timedelta(days=2, hours=18, minutes=30)

    def begin(account: str, start: datetime, end: datetime, number: int) -> None:
        execute(
            dsn, f"INSERT INTO billing_period VALUES ('{start}', '{end}', '{account}', 'default', '2026-01-01',"
            f" {number}, 'pro')"
        )  # fmt: skip

    async def periods() -> dict[tuple[object, ...], tuple[object, ...]]:
        async with store.reading() as connection:
            found = await connection.execute(
                "SELECT account, period_start, meter, quantity, points FROM usage_by_period"
            )
            return {row[:3]: row[3:] for row in await found.fetchall()}

    begin("acme", edge, edge + timedelta(days=7), 0)
    begin("globex", edge, edge + timedelta(days=7), 0)  # without usage
    before = await periods()
    assert before["acme", edge, "api.requests"] == (1008, 1008)
    assert (await drop_old(store, Retention(points=timedelta(days=15)), now)).points_before is not None
    assert await periods() == before

    # Inside one hour; of both ends the points are gone; and one that has its end from the one before.
    inside = edge + timedelta(days=1, minutes=5)
    begin("acme", inside, inside + timedelta(minutes=20), 1)
    begin("acme", edge - timedelta(days=1), edge - timedelta(hours=3, minutes=20), 2)
    begin("acme", edge + timedelta(days=1, minutes=30), edge + timedelta(days=7), 3)
    begin("globex", edge - timedelta(days=1), edge + timedelta(minutes=5), 1)
    found = await periods()
    assert {key: found.pop(key) for key in before} == before
    hours = 24 * 6 - 1
    assert found == {
        ("acme", inside, "api.requests"): (None, None),
        ("acme", edge - timedelta(days=1), "api.requests"): (None, None),
        # Nothing else of the meter was used in the hours at the ends, so all of it is known.
        ("acme", edge - timedelta(days=1), "jobs"): (5, 1),
        ("acme", edge + timedelta(days=1, minutes=30), "api.requests"): (6 * hours + 3, 6 * hours + 3),
    }


@pytest.mark.engines("timescale")
async def test_a_writer_on_its_way_and_a_drop_do_not_miss_each_other(store: Store, dsn: str) -> None:
    """Its points are in, its marks are not: either it commits before the drop looks, or it is refused."""
    await fill(store)
    now = ZERO + timedelta(days=40)
    old = point(STREAMS[0], 99, 100, 1)

    async def dropping(retention: Retention) -> None:
        # Of a writer and a drop that wait for each other one is ended, and tries again.
        with suppress(StoreUnavailable):
            await drop_old(store, retention, now)

    async def writing(batch: Batch, after: float) -> WriteResult:
        await asyncio.sleep(after)
        return await store.write(batch)

    for step in range(6):
        # Where several stay, because nothing is dropped beside their marks, they do not overlap.
        start = old.start_ns + step * 1000
        batch = Batch(points=[old._replace(start_ns=start, time_ns=start + 1000)])
        results = await asyncio.gather(
            writing(batch, 0.04 * step), dropping(Retention(points=timedelta(days=15 - step))), store.refresh()
        )
        assert results[0].inserted + len(results[0].conflicts) == 1
        while await store.refresh():
            pass
        await audit_changed(store, now)
        assert await clean(store)
        hourly, daily, _ = await totals(store)
        assert hourly == daily
    await drop_old(store, Retention(points=timedelta(days=9)), now)
    result = await store.write(Batch(points=[old._replace(start_ns=old.start_ns + 9000, time_ns=old.time_ns + 9000)]))
    assert (result.inserted, len(result.conflicts)) == (0, 1)


@pytest.mark.engines("timescale")
async def test_repeated_and_late_points_into_columns(store: Store, dsn: str) -> None:
    if not await is_native(store):
        pytest.skip("this edition has no columns")
    await store.check_columns()
    points = [point(of, DAY * day + s, DAY * day + s + 1, 1) for of in STREAMS for day in (0, 9) for s in range(500)]
    await store.write(Batch(points=list(points)))
    assert await store.lay_out(ZERO + timedelta(days=3)) == 1, "of two pieces"
    assert await store.lay_out(ZERO + timedelta(days=30)) == 1
    assert await store.lay_out(ZERO + timedelta(days=30)) == 0
    assert execute(dsn, "SELECT bool_and(is_compressed) FROM timescaledb_information.chunks"
                        " WHERE hypertable_name = 'usage_point'") == [(True,)]  # fmt: skip
    async with store.session() as connection:
        row = await (
            await connection.execute("SHOW timescaledb.max_tuples_decompressed_per_dml_transaction")
        ).fetchone()
    assert row == ("0",)
    again = await store.write(Batch(points=[*points, point(STREAMS[0], DAY + 5, DAY + 6, 9)]))
    assert (again.inserted, again.duplicates) == (1, len(points))
    different = await store.write(Batch(points=[points[0]._replace(value=Decimal(8))]))
    assert [c.refusal.reason for c in different.conflicts] == [Reason.VALUE_CONFLICT]
    while await store.refresh():
        pass
    assert set(await totals(store)) == {(Decimal(len(points) + 9), len(points) + 1)}
    assert await clean(store)
