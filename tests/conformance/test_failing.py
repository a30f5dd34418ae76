"""A database that fails says so in a way that a retry mends: StoreUnavailable, and nothing kept by half."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import Batch, Point, Temporality, WriteResult
from tallymark_collector.store import Store
from tests.support.usage import point, stream


@contextmanager
def beside(server: str) -> Iterator[psycopg.Connection]:
    """A connection to another database of the same server."""
    with psycopg.connect(server, autocommit=True) as connection:
        yield connection


def end_connections(server: str, dsn: str) -> int:
    with beside(server) as connection:
        name = conninfo_to_dict(dsn)["dbname"]
        return connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s", [name]
        ).fetchall()[0][0]


async def total(store: Store) -> Decimal:
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT coalesce(sum(quantity), 0) FROM usage_hourly")).fetchone()
    assert row is not None
    return Decimal(row[0])


async def write_until_it_is_in(store: Store, batch: list[Point]) -> WriteResult:
    while True:
        try:
            return await store.write(Batch(points=list(batch)))
        except StoreUnavailable:
            await asyncio.sleep(0.01)


async def test_connections_that_the_server_ends_at_any_moment(store: Store, server: str, dsn: str) -> None:
    batches = [[point(stream(f"a{i}", producer=str(b)), b, b + 1, i) for i in range(300)] for b in range(30)]
    done = asyncio.Event()

    async def writing() -> None:
        for batch in batches:
            await write_until_it_is_in(store, batch)
        done.set()

    rng = random.Random(7)
    ended = 0

    async def ending() -> None:
        nonlocal ended
        while not done.is_set():
            ended += await asyncio.to_thread(end_connections, server, dsn)
            await asyncio.sleep(rng.uniform(0.01, 0.3))

    await asyncio.gather(writing(), ending())
    assert ended > 0
    assert await total(store) == 30 * sum(range(300))


async def test_a_read_only_database_refuses_and_recovers(store: Store, server: str, dsn: str) -> None:
    batch = [point(stream(), 0, 10, 7)]
    name = psycopg.sql.Identifier(conninfo_to_dict(dsn)["dbname"])
    statement = psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
    for state in ("on", "off"):
        with beside(server) as connection:
            connection.execute(statement.format(name, psycopg.sql.SQL(state)))
        end_connections(server, dsn)
        if state == "on":
            with pytest.raises(StoreUnavailable, match="read-only"):
                await store.write(Batch(points=batch))
    await write_until_it_is_in(store, batch)
    assert await total(store) == 7


async def test_a_batch_that_fails_late_leaves_nothing(store: Store, dsn: str) -> None:
    """The last table that a batch touches is broken: what came before it must be gone, and the next try complete."""
    bad = point(stream(), 0, 10, 5)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        await store.write(Batch(points=[bad]))
        connection.execute("ALTER TABLE usage_quarantine RENAME TO elsewhere")
        new = point(stream("globex"), 0, 10, 3)
        with pytest.raises(psycopg.errors.UndefinedTable):
            await store.write(Batch(points=[new, bad._replace(value=Decimal(6))]))
        assert await total(store) == 5
        assert connection.execute("SELECT count(*) FROM usage_stream WHERE account = 'globex'").fetchone() == (0,)
        connection.execute("ALTER TABLE elsewhere RENAME TO usage_quarantine")
        result = await store.write(Batch(points=[new, bad._replace(value=Decimal(6))]))
    assert (result.inserted, len(result.conflicts)) == (1, 1)
    assert await total(store) == 8


async def test_a_deadlock_is_tried_again_at_once(store: Store, dsn: str) -> None:
    """Somebody else's session takes the lock that the writer needs next, and waits for the one that it has."""
    of = stream(temporality=Temporality.CUMULATIVE)
    await store.write(Batch(points=[point(of, 0, 10, 1)]))
    async with await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark") as other:
        await other.execute("SET deadlock_timeout = '10s'")
        await other.execute("LOCK TABLE usage_point IN SHARE MODE")
        writing = asyncio.ensure_future(store.write(Batch(points=[point(of, 0, 20, 3)])))
        waits = "SELECT count(*) FROM pg_locks WHERE relation = 'usage_point'::regclass AND NOT granted"
        while await (await other.execute(waits)).fetchone() != (1,):  # noqa: ASYNC110 - the server's event
            await asyncio.sleep(0.01)
        # The writer holds the stream's row and waits for usage_point; its own deadlock_timeout is the shorter one.
        await other.execute("SELECT FROM usage_stream FOR UPDATE")
        await other.commit()
        result = await writing
    assert result.inserted == 1
    assert await total(store) == 3


async def test_a_write_without_an_answer_is_given_up(dsn: str) -> None:
    """And its session is ended at the server: a silent network's would hold its locks for good."""
    patient, impatient = Store(dsn), Store(dsn, patience=0.5)
    for one in (patient, impatient):
        await one.open()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    try:
        batch = Batch(points=[point(stream(), 0, 10, 7)])
        async with await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark") as other:
            await other.execute("LOCK TABLE usage_point IN SHARE MODE")
            with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
                await asyncio.wait_for(impatient.write(batch), 60)
            while await (await other.execute(waiting)).fetchone() != (0,):  # noqa: ASYNC110 - the server's event
                await asyncio.sleep(0.01)
        # Again and again: on a slow machine this write, too, may take longer than its patience.
        result = await asyncio.wait_for(write_until_it_is_in(impatient, batch.points), 60)
        assert result.inserted + result.duplicates == 1
        assert (await patient.write(batch)).duplicates == 1
        assert await total(patient) == 7
    finally:
        for one in (patient, impatient):
            await one.close()


@pytest.mark.parametrize("last", ["COPY usage_evidence FROM STDIN", "SELECT 1"])
async def test_a_session_whose_collector_is_gone_is_ended_by_those_who_wait_for_it(last: str, dsn: str) -> None:
    """A collector that was killed behind a connection that carries nothing any more leaves its session in the middle of
    a COPY, with its locks: no time-out of the server's reaches that."""
    store = Store(dsn, patience=0.5)
    await store.open()
    gone = await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark", application_name="tallymark")
    try:
        await gone.execute("LOCK TABLE usage_point IN SHARE MODE")
        gone.pgconn.exec_(last.encode())
        batch = Batch(points=[point(stream(), 0, 10, 7)])
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
            await store.write(batch)
        await asyncio.wait_for(write_until_it_is_in(store, batch.points), 60)
        assert await total(store) == 7
    finally:
        await gone.close()
        await store.close()


async def test_a_session_that_is_not_a_collectors_is_left_alone(dsn: str) -> None:
    """Whatever it holds: somebody sits before it."""
    store = Store(dsn, patience=0.5)
    await store.open()
    try:
        batch = Batch(points=[point(stream(), 0, 10, 7)])
        async with await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark") as somebody:
            await somebody.execute("LOCK TABLE usage_point IN SHARE MODE")
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await store.write(batch)
            assert (await (await somebody.execute("SELECT 1")).fetchone()) == (1,)
        await write_until_it_is_in(store, batch.points)
        assert await total(store) == 7
    finally:
        await store.close()
