"""The move into hypertables among readers and writers who stay, interrupt it, or come in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import Batch
from tallymark_collector.store import Store, migrations
from tallymark_collector.store.engines import moving, timescale
from tests.collector.cli.conftest import program
from tests.conformance.test_completeness import span
from tests.conformance.test_timescale import DAY, STREAMS, clean, execute, opened, totals, until_written
from tests.support.usage import point

SOON = 60
"""Seconds in which what must happen does."""


@pytest.fixture
async def plain(unmigrated: str) -> AsyncIterator[Store]:
    """A migrated database with usage, in which TimescaleDB has just been installed."""
    async with opened(unmigrated) as store:
        await store.migrate()
        points = [point(of, DAY * day, DAY * day + 7, 3) for of in STREAMS for day in range(20)]
        await store.write(Batch(points=points, evidence=[span(10, 1)]))
        execute(unmigrated, "CREATE EXTENSION timescaledb")
        yield store


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "LOCK_TIMEOUT", "300ms")
    monkeypatch.setattr(moving, "PAUSE", 0.1)


@contextmanager
def staying(dsn: str, relation: str) -> Iterator[int]:
    """A reader that has forgotten to end its transaction; gives its session's number."""
    with psycopg.connect(dsn, options="-c search_path=tallymark", application_name="forgotten") as reader:
        reader.execute(f"SELECT count(*) FROM {relation}")  # type: ignore[arg-type]
        yield reader.info.backend_pid
        reader.rollback()


async def waiting(dsn: str, relations: str, count: int = 1) -> None:
    query = (
        "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()"
        f" WHERE NOT granted AND relation::regclass::text ~ '{relations}'"
    )
    for _ in range(50 * SOON):
        if execute(dsn, query) >= [(count,)]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("nobody waits")


@pytest.mark.engines("timescale")
async def test_a_copy_that_waits_for_the_move_is_not_lost(
    plain: Store, unmigrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TimescaleDB decides before it waits whether a COPY goes into a hypertable: one that has waited while the table
    became a hypertable went where nobody reads, and was committed (2.29.2), or failed for good (2.19.3)."""
    monkeypatch.setattr(moving, "LOCK_TIMEOUT", f"{SOON}s")
    before = (await totals(plain))[-1]
    async with opened(unmigrated) as mover:
        with staying(unmigrated, "usage_point"):
            move = asyncio.ensure_future(mover.migrate())
            await waiting(unmigrated, "^usage_point$")
            writing = asyncio.ensure_future(until_written(plain, [point(STREAMS[0], 30, 40, 5)]))
            await waiting(unmigrated, "^usage_point$", 2)
        await move
    assert (await writing).inserted == 1
    assert set(await totals(plain)) == {(before[0] + 5, before[1] + 1)}  # type: ignore[operator]


@pytest.mark.engines("timescale")
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("relation", ["usage_daily", "usage_point", "usage_calls"])
async def test_a_reader_that_stays_is_named_and_writers_go_on(
    plain: Store, unmigrated: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, relation: str
) -> None:
    monkeypatch.setattr(moving, "ATTEMPTS", 3)
    before = (await totals(plain))[-1]
    stop = asyncio.Event()
    written = 0

    async def writing() -> None:
        nonlocal written
        while not stop.is_set():
            await until_written(plain, [point(STREAMS[0], 1000 + written, 1001 + written, 1)])
            written += 1

    writer = asyncio.create_task(writing())
    table = "usage_evidence" if relation == "usage_calls" else "usage_point"
    async with opened(unmigrated) as mover, plain.presence() as presence:
        with staying(unmigrated, relation) as pid:
            who = rf"session {pid} \(the user 'postgres', application 'forgotten', idle in transaction, in a"
            with pytest.raises(
                StoreUnavailable, match=rf"{table} while it is moved, and in 3 attempts .*{who}"
            ) as told:
                await mover.migrate()
            assert "nobody can write" not in str(told.value)
            assert f"attempt 3 of 3 is in 0.1 s: session {pid} " in caplog.text
            assert await presence.ask() is None
            assert (await plain.write(Batch(points=[point(STREAMS[0], 500, 501, 1)]))).inserted == 1
            assert timescale.HYPERTABLES in await mover.pending()
        assert (await mover.migrate())[0] == timescale.HYPERTABLES
        stop.set()
        await writer
        assert written > 0
        assert await mover.pending() == []
    expected = (before[0] + written + 1, before[1] + written + 1)  # type: ignore[operator]
    assert set(await totals(plain)) == {expected}
    assert execute(unmigrated, "SELECT count(*) FROM usage_calls") == [(1,)]
    assert await clean(plain)


@pytest.mark.engines("timescale")
@pytest.mark.usefixtures("hurried")
async def test_a_reader_of_the_table_that_came_in_between_is_outlasted(
    plain: Store, unmigrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the table itself, by the name that it has for the move, keeps it from getting its own back."""
    real, between, tries = moving._take, None, 0

    async def taking(*arguments: object) -> None:
        nonlocal between, tries
        tries += 1
        if tries == 1:
            between = psycopg.connect(unmigrated)
            between.execute("SELECT count(*) FROM tallymark.usage_point_moving")
        elif tries == 2:
            assert between is not None
            with pytest.raises(StoreUnavailable, match="`tallymark status` says which"):
                await plain.write(Batch(points=[point(STREAMS[0], 30, 40, 5)]))
            between.close()
        await real(*arguments)  # type: ignore[arg-type]

    before = (await totals(plain))[-1]
    monkeypatch.setattr(moving, "_take", taking)
    assert (await plain.migrate())[0] == timescale.HYPERTABLES
    assert tries == 3, "once in vain, once for the points, once for evidence"
    assert set(await totals(plain)) == {before}


@pytest.mark.engines("timescale")
async def test_readers_of_views_that_come_in_between_wait_and_keep_nobody(
    plain: Store, unmigrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "ATTEMPTS", 1)
    monkeypatch.setattr(moving, "LOCK_TIMEOUT", f"{SOON}s")
    real = moving._take
    readers: list[asyncio.Future[list[tuple[object, ...]]]] = []

    async def taking(connection: object, table: str) -> None:
        if table == moving.MOVING:
            readers.append(asyncio.ensure_future(totals_by_view()))
            await waiting(unmigrated, "^usage_(hour|day)_current$")
        await real(connection, table)  # type: ignore[arg-type]

    async def totals_by_view() -> list[tuple[object, ...]]:
        async with opened(unmigrated) as other, other.reading() as connection:
            return await (await connection.execute("SELECT sum(quantity), sum(points) FROM usage_daily")).fetchall()

    before = (await totals(plain))[-1]
    monkeypatch.setattr(moving, "_take", taking)
    assert (await plain.migrate())[0] == timescale.HYPERTABLES
    [reader] = readers
    assert await reader == [before]


@pytest.mark.engines("timescale")
async def test_a_move_that_a_person_interrupts_gives_the_name_back(
    plain: Store, unmigrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = asyncio.Event()

    async def hanging(*_: object) -> None:
        moved.set()
        await asyncio.Event().wait()

    before = (await totals(plain))[-1]
    monkeypatch.setattr(moving, "called", hanging)
    async with opened(unmigrated) as mover, plain.presence() as presence:
        move = asyncio.ensure_future(mover.migrate())
        await asyncio.wait_for(moved.wait(), SOON)
        assert await presence.ask() == "the points are being moved to TimescaleDB: no usage is taken until that is done"
        move.cancel()
        await asyncio.gather(move, return_exceptions=True)
        assert await presence.ask() is None
    assert set(await totals(plain)) == {before}
    assert (await plain.write(Batch(points=[point(STREAMS[0], 30, 40, 5)]))).inserted == 1


@pytest.mark.parametrize("version", [1, 11, len(migrations.available())])
async def test_a_move_that_was_killed_is_undone_before_an_upgrade(server: str, unmigrated: str, version: int) -> None:
    """The migrations after it name the table by its own name; so does whoever writes meanwhile."""
    async with opened(unmigrated) as store, store.presence() as presence:
        steps = migrations.available()
        async with store.session() as connection:
            await migrations.migrate(connection, steps[:version])
        execute(unmigrated, "ALTER TABLE usage_point RENAME TO usage_point_moving")
        told = await presence.ask()
        assert told is not None
        assert "was interrupted: no usage is taken until the owner of the tables runs `tallymark migrate`" in told
        with pytest.raises(StoreUnavailable):
            await store.write(Batch(points=[point(STREAMS[0], 0, 10, 5)]))
        pending = [moving.INTERRUPTED, *[step.name for step in steps[version:]]]
        assert await store.pending() == pending
        shown = await asyncio.to_thread(program, "status", "--endpoint", "127.0.0.1:1", "--database", unmigrated)
        assert shown.returncode == 0, shown.stderr
        assert told in shown.stdout
        assert f"pending: {', '.join(pending)}; run `tallymark migrate`" in shown.stdout
        assert await store.migrate() == pending
        assert await presence.ask() is None
        assert await store.migrate() == []
        assert (await store.write(Batch(points=[point(STREAMS[0], 0, 10, 5)]))).inserted == 1
        assert set(await totals(store)) == {(5, 1)}


@pytest.mark.usefixtures("hurried")
async def test_a_reader_of_an_interrupted_move_is_named(unmigrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "ATTEMPTS", 2)
    async with opened(unmigrated) as store:
        await store.migrate()
        execute(unmigrated, "ALTER TABLE usage_point RENAME TO usage_point_moving")
        with (
            staying(unmigrated, "usage_daily") as pid,
            pytest.raises(StoreUnavailable, match=rf"session {pid} .* nobody can write points until then"),
        ):
            await store.migrate()
        assert (await store.migrate())[0] == moving.INTERRUPTED


async def test_readiness_tells_a_move_from_one_that_was_interrupted(store: Store, dsn: str) -> None:
    execute(dsn, "ALTER TABLE usage_point RENAME TO usage_point_moving")
    async with store.presence() as presence, store.session() as connection:
        async with migrations.alone(connection):
            assert "are being moved to TimescaleDB" in str(await presence.ask())
        assert "was interrupted" in str(await presence.ask())
        execute(dsn, "ALTER TABLE usage_point_moving RENAME TO usage_point")
        assert await presence.ask() is None
