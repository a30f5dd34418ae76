"""Points that may be there already are looked up first; whatever was guessed of them, each counts once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from tallymark_collector.model import Batch, Point, Reason, WriteResult
from tallymark_collector.store import Store, writer
from tallymark_collector.store.database import Connection, configure
from tallymark_collector.store.dictionaries import Dictionaries
from tallymark_collector.store.latest import MAX_IN_VAIN
from tests.support.usage import point, stream


class Counting(psycopg.AsyncConnection[TupleRow]):
    """A connection that counts its transactions, of one message or several: one that did not fail is one."""

    tried = 0

    async def wait(self, *arguments: Any, **options: Any) -> Any:
        self.tried += self.info.transaction_status == TransactionStatus.IDLE
        return await super().wait(*arguments, **options)


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[Counting]:
    async with await Counting.connect(dsn, autocommit=True) as found:
        await configure(found)
        found.tried = 0
        yield found


async def write(connection: Connection, known: Dictionaries, *batches: list[Point]) -> list[tuple[int, int, int]]:
    """Writes them as one group; returns what was inserted, was a duplicate, was a conflict, of each."""
    results = await writer.write(connection, [writer.encode(Batch(points=points)) for points in batches], known)
    return [(one.inserted, one.duplicates, len(one.conflicts)) for one in results]


STREAMS = [stream(f"account-{i}") for i in range(5)]


def interval(at: int, quantity: int = 1) -> list[Point]:
    return [point(of, at, at + 10, quantity) for of in STREAMS]


async def stored(connection: Connection) -> tuple[int, int]:
    """Points and their sum."""
    rows = await (await connection.execute("SELECT count(*), sum(quantity)::int FROM usage_point")).fetchall()
    return rows[0][0], rows[0][1]


async def marked(connection: Connection) -> int:
    rows = await (await connection.execute("SELECT count(*) FROM usage_dirty")).fetchall()
    return int(rows[0][0])


async def test_what_was_sent_again_is_found_and_the_rest_copied_in_one_transaction(connection: Counting) -> None:
    known = Dictionaries()
    await write(connection, known, interval(10))
    marks = await marked(connection)
    connection.tried = 0
    assert await write(connection, known, interval(10)) == [(0, 5, 0)]
    assert connection.tried == 1
    assert await marked(connection) == marks, "nothing new, nothing to recompute"
    connection.tried = 0
    assert await write(connection, known, interval(10) + interval(20), interval(30)) == [(5, 5, 0), (5, 0, 0)]
    assert await write(connection, known, interval(0) + interval(30)) == [(5, 5, 0)], "the first of them are late"
    assert connection.tried == 2
    assert await stored(connection) == (20, 20)


async def test_another_quantity_for_what_is_there_is_a_conflict(connection: Counting) -> None:
    known = Dictionaries()
    await write(connection, known, interval(10))
    connection.tried = 0
    again = [writer.encode(Batch(points=interval(10, quantity))) for quantity in (1, 2)]
    same, other = await writer.write(connection, again, known)
    assert (same.inserted, same.duplicates, list(same.conflicts)) == (0, 5, [])
    assert (other.inserted, other.duplicates) == (0, 0)
    assert {c.refusal.reason for c in other.conflicts} == {Reason.VALUE_CONFLICT}
    assert other.conflicts[0].refusal.detail.startswith("1 was stored")
    assert connection.tried == 1
    assert await stored(connection) == (5, 5)


async def test_repeats_inside_a_group_are_told_without_a_failure(connection: Counting) -> None:
    """The retry of a request that still waits; new points, late points, and both."""
    known = Dictionaries()
    first = [interval(20), interval(20), interval(30) + interval(20), interval(20, quantity=2)]
    assert await write(connection, known, *first) == [(5, 0, 0), (0, 5, 0), (5, 5, 0), (0, 0, 5)]
    late = [interval(0), interval(40), interval(0), interval(40) + interval(20)]
    assert await write(connection, known, *late) == [(5, 0, 0), (5, 0, 0), (0, 5, 0), (0, 10, 0)]
    assert connection.tried == 2
    assert await stored(connection) == (20, 20)


async def test_repeats_under_two_descriptions_of_one_stream_count_once(connection: Counting) -> None:
    """A gateway may decorate a resource: another description, the same identity. No guess sees that."""
    known = Dictionaries()
    two = [point(stream("account-0"), 0, 10, 1), point(stream("account-0"), 0, 10, 1)]
    assert two[0].stream is not two[1].stream
    assert await write(connection, known, two[:1], two[1:]) == [(1, 0, 0), (0, 1, 0)]
    assert await stored(connection) == (1, 1)


async def test_times_that_differ_by_a_nanosecond_are_no_repeats(connection: Counting) -> None:
    """timestamptz cannot tell them apart, `part` does."""
    known = Dictionaries()
    one = point(stream(), 0, 10, 1)
    others = [one._replace(time_ns=one.time_ns - n) for n in range(1, 4)]
    await write(connection, known, [one])
    assert await write(connection, known, others) == [(3, 0, 0)]
    assert await write(connection, known, [*others, one]) == [(0, 4, 0)]
    assert await stored(connection) == (4, 4)


async def test_what_nobody_here_knows_of_is_found_by_the_unique_key(connection: Counting) -> None:
    """As after a start, or where another collector wrote them."""
    await write(connection, Dictionaries(), interval(10), interval(20))
    connection.tried = 0
    assert await write(connection, Dictionaries(), interval(0) + interval(10) + interval(30)) == [(10, 5, 0)]
    assert connection.tried == 2, "the second one looked all of them up"
    assert await stored(connection) == (20, 20)


async def test_backfill_is_not_looked_up_for_ever_and_repeats_in_it_count_once(connection: Counting) -> None:
    known = Dictionaries()
    await write(connection, known, interval(1000))
    for n in range(MAX_IN_VAIN):
        assert known.latest.guess(interval(n * 10)).late
        assert await write(connection, known, interval(n * 10)) == [(5, 0, 0)]
    assert not known.latest.guess(interval(500)).late
    connection.tried = 0
    assert await write(connection, known, interval(500), interval(0)) == [(5, 0, 0), (0, 5, 0)]
    assert connection.tried == 2
    assert known.latest.guess(interval(500)).late, "one was there: they are looked up again"
    assert await write(connection, known, interval(500) + interval(510)) == [(5, 5, 0)]
    assert connection.tried == 3
    assert await stored(connection) == ((1 + MAX_IN_VAIN + 2) * 5, (1 + MAX_IN_VAIN + 2) * 5)


async def test_a_transaction_that_fails_leaves_no_trace_in_what_is_guessed(connection: Counting) -> None:
    known = Dictionaries()
    await write(connection, known, interval(10))

    async def fail(_: Connection) -> None:
        raise RuntimeError("the power is off")

    with pytest.raises(RuntimeError):
        await writer.write(connection, [writer.encode(Batch(points=interval(50)))], known, fail)
    assert not known.latest.guess(interval(50)).late
    assert not known.latest.guess(interval(20)).late
    assert list(known.latest.guess(interval(10)).late) == [0, 1, 2, 3, 4]
    assert await write(connection, known, interval(50)) == [(5, 0, 0)]
    assert list(known.latest.guess(interval(20)).late) == [0, 1, 2, 3, 4]


async def test_others_that_insert_between_a_look_and_copy(store: Store, dsn: str) -> None:
    """Each holds the same point as ours, not committed, so that no look finds it and COPY waits for it; the first is
    let go when ours waits, then the next, until no more looks are taken and the database itself tells new from old."""
    held = [point(stream(f"account-{i}"), 0, 10, 1) for i in range(4)]
    ours = [*held, point(stream("account-4"), 0, 10, 1)]
    known = Dictionaries()
    async with AsyncExitStack() as stack:
        mine = await stack.enter_async_context(await Counting.connect(dsn, autocommit=True))
        await configure(mine)
        # Registered before: whoever adds a stream waits for others that add it.
        await write(mine, known, [one._replace(time_ns=one.time_ns - 1) for one in ours])
        go = [await stack.enter_async_context(holding(store, one)) for one in held]
        mine.tried = 0
        writing = asyncio.ensure_future(write(mine, known, ours))
        for number, let_go in enumerate(go, 1):
            await waits(store, mine.info.backend_pid)
            assert mine.tried == number
            await let_go()
        assert await writing == [(1, 4, 0)]
        assert mine.tried == 4
        assert await stored(mine) == (10, 10)


@asynccontextmanager
async def holding(store: Store, one: Point) -> AsyncIterator[Any]:
    """Another writer that has inserted the point; what is given has it commit."""
    inserted, release = asyncio.Event(), asyncio.Event()

    async def hold(_: Connection) -> None:
        inserted.set()
        await release.wait()

    writing: asyncio.Task[WriteResult] = asyncio.ensure_future(store.write(Batch(points=[one]), hold))
    await inserted.wait()

    async def let_go() -> None:
        release.set()
        assert (await writing).inserted == 1

    try:
        yield let_go
    finally:
        release.set()
        await asyncio.wait([writing])


async def waits(store: Store, pid: int) -> None:
    """Returns when that session waits for another one's transaction."""
    while True:  # pytest has a time-out
        async with store.session() as session:
            found = await session.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", [pid])
            if await found.fetchone() == (True,):
                return
        await asyncio.sleep(0.01)
