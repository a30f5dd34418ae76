"""Points are dropped piece by piece, and nobody waits while a piece is compared: told by what commits, and in which
order, not by a clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from typing import cast

import psycopg
import pytest

from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.reconciliation import reconcile
from tallymark_collector.aggregates.retention import Dropped, drop_old
from tallymark_collector.aggregates.schedule import keep_retained
from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import Attributes, Batch, Evidence
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tests.conformance.test_timescale import DAY, STREAMS, ZERO, execute, fill, totals
from tests.support.control import closed, on_spans, told
from tests.support.usage import BASE, SECOND, point

NOW = ZERO + timedelta(days=40)
KEEP = Retention(points=timedelta(days=10))
SPANS = Retention(evidence=timedelta(days=10))
SPAN = ("GET /", "shop", None, Attributes())

# What the test sees of a drop: each time that it says from when points are kept, and each piece that it has compared.
SEEN = """
CREATE TABLE seen (number serial, what text);
GRANT ALL ON seen, seen_number_seq TO public;
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO tallymark.seen (what) SELECT CASE TG_TABLE_NAME WHEN 'usage_edge' THEN 'compared'
        ELSE (SELECT points_from::text FROM tallymark.usage_kept) END;
    RETURN NULL;
END $$;
CREATE TRIGGER seen AFTER UPDATE OF points_from ON usage_kept FOR EACH STATEMENT EXECUTE FUNCTION see();
CREATE TRIGGER seen AFTER INSERT ON usage_edge FOR EACH STATEMENT EXECUTE FUNCTION see();
"""

ENDS = "SELECT range_end::text FROM timescaledb_information.chunks WHERE hypertable_name = 'usage_point' ORDER BY 1"
WAITING = (
    "SELECT DISTINCT xact_start FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


async def waiting(dsn: str, other: datetime | None = None) -> datetime:
    """Since when the transaction runs that waits for a lock, once there is one, and not that other one."""
    for _ in range(3000):
        found = await asyncio.to_thread(execute, dsn, WAITING)
        if found and found[0][0] != other:
            return cast(datetime, found[0][0])
        await asyncio.sleep(0.02)
    raise AssertionError("nobody waits")


@asynccontextmanager
async def locked(dsn: str, statement: str) -> AsyncIterator[None]:
    """Somebody's open transaction with that lock."""
    async with await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark,public") as other:
        await other.execute(statement)  # type: ignore[arg-type]
        yield


COMPARING = "LOCK TABLE usage_edge IN ACCESS EXCLUSIVE MODE"
"""Whoever compares a piece waits, and nobody else."""
READING = "SELECT count(*) FROM usage_point"


@pytest.mark.engines("timescale")
async def test_writers_go_on_while_a_piece_is_compared(store: Store, dsn: str) -> None:
    await fill(store)
    execute(dsn, SEEN)
    ends = [row[0] for row in execute(dsn, ENDS)]
    before = await totals(store)
    async with locked(dsn, COMPARING):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, NOW))
        await waiting(dsn)
        result = await asyncio.wait_for(
            store.write(Batch(points=[point(STREAMS[0], 39 * DAY + 99, 39 * DAY + 100, 1)])), 60
        )
        assert (result.inserted, dropping.done()) == (1, False)
    kept = (await dropping).points_before
    seen = [row[0] for row in execute(dsn, "SELECT what FROM seen ORDER BY number")]
    gone = ends[: len(seen) // 2]
    assert len(gone) > 2
    assert seen == [step for end in gone for step in ("compared", end)], "the oldest first, each by itself"
    assert execute(dsn, f"SELECT '{gone[-1]}'::timestamptz") == [(kept,)]
    while await store.refresh():
        pass
    hourly, daily, _ = await totals(store)
    assert hourly == daily == (before[0][0] + 1, before[0][1] + 1)  # type: ignore[operator]


@pytest.mark.engines("timescale")
async def test_what_comes_into_a_piece_while_it_is_compared_keeps_it(store: Store, dsn: str) -> None:
    await fill(store)
    before = await totals(store)
    async with locked(dsn, COMPARING):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, NOW))
        await waiting(dsn)
        late = Batch(points=[point(STREAMS[0], 99, 100, 1)])
        assert (await asyncio.wait_for(store.write(late), 60)).inserted == 1
        assert await store.refresh() == 0, "its mark stays as long as the piece is compared"
    assert await dropping == Dropped()
    while await store.refresh():
        pass
    await audit_changed(store, NOW)
    assert (await drop_old(store, KEEP, NOW)).points_before is not None
    hourly, daily, _ = await totals(store)
    assert hourly == daily == (before[0][0] + 1, before[0][1] + 1)  # type: ignore[operator]


@pytest.mark.engines("timescale")
async def test_a_reader_is_waited_for_with_what_was_compared(store: Store, dsn: str) -> None:
    await fill(store)
    execute(dsn, SEEN)
    async with locked(dsn, READING):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, NOW, [0.1] * 200))
        await waiting(dsn, await waiting(dsn))
        result = await store.write(Batch(points=[point(STREAMS[0], 39 * DAY + 99, 39 * DAY + 100, 1)]))
        assert (result.inserted, dropping.done()) == (1, False), "writers go on between two tries"
    assert (await dropping).points_before is not None
    seen = [row[0] for row in execute(dsn, "SELECT what FROM seen ORDER BY number")]
    assert seen[::2] == ["compared"] * (len(seen) // 2)
    assert len({*seen[1::2]}) == len(seen) // 2, "each piece was compared once"


@pytest.mark.engines("timescale")
async def test_a_reader_that_stays_ends_it_with_what_was_dropped_before(store: Store, dsn: str) -> None:
    await fill(store)
    execute(dsn, SEEN)
    async with locked(dsn, READING):
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await drop_old(store, KEEP, NOW, [])
    assert execute(dsn, "SELECT points_from = '-infinity' FROM usage_kept") == [(True,)]
    [[first, *_]] = [[row[0] for row in execute(dsn, ENDS)]]
    # Nobody holds the first piece; the second is held once the first has gone.
    execute(
        dsn,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.points_from > '{first}' THEN RAISE lock_not_available; END IF; RETURN NEW; END $$;"
        " CREATE TRIGGER fail BEFORE UPDATE ON usage_kept FOR EACH ROW EXECUTE FUNCTION fail()",
    )
    dropped = await drop_old(store, KEEP, NOW, [])
    assert execute(dsn, f"SELECT '{first}'::timestamptz") == [(dropped.points_before,)]
    assert dropped.cut_short is not None
    assert execute(dsn, "SELECT points_from FROM usage_kept") == [(dropped.points_before,)]
    hourly, daily, _ = await totals(store)
    assert hourly == daily


@pytest.mark.engines("timescale")
async def test_a_day_that_lies_across_two_pieces_is_compared(store: Store, dsn: str) -> None:
    """As somebody may have set them: pieces of a day and a half."""
    execute(dsn, "SELECT public.set_chunk_time_interval('tallymark.usage_point', interval '36 hours')")
    await fill(store)
    before = await totals(store)
    [[across]] = execute(
        dsn,
        "SELECT min(date_trunc('day', range_end)) FROM timescaledb_information.chunks"
        " WHERE hypertable_name = 'usage_point' AND range_end <> date_trunc('day', range_end)",
    )
    execute(dsn, f"UPDATE usage_day SET points = points + 1 WHERE bucket = '{across}' AND account = 'acme'")
    dropped = await drop_old(store, KEEP, NOW)
    assert dropped.differing == 1
    [[kept]] = execute(dsn, "SELECT points_from FROM usage_kept")
    assert cast(datetime, across) < cast(datetime, kept) < cast(datetime, across) + timedelta(days=1)
    while await store.refresh():
        pass
    await audit_changed(store, NOW)
    further = (await drop_old(store, KEEP, NOW)).points_before
    assert further is not None
    assert further > cast(datetime, across) + timedelta(days=1)
    assert (await totals(store))[:2] == before[:2]


class Away(Store):
    """A database that never lets anybody."""

    @asynccontextmanager
    async def session(self) -> AsyncIterator[object]:  # type: ignore[override]
        raise StoreUnavailable("a reader stays")
        yield


async def test_who_is_not_let_waits_longer_each_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    loop = asyncio.create_task(keep_retained(Away(""), KEEP, 0.04, 0.01))
    for _ in range(3000):
        if len(caplog.messages) > 4:
            break
        await asyncio.sleep(0.02)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    tries = [message.split(" is in ")[1].split(" s:")[0] for message in caplog.messages]
    assert tries[:5] == ["0.01", "0.02", "0.04", "0.04", "0.04"]


def spans_and_counts(days: range) -> Batch:
    """A span a day, and what its producer says of it."""
    spans = [
        Evidence("default", "acme", "api.requests", day.to_bytes(16, "big"), b"s" * 8, end, end, Decimal(1), *SPAN)
        for day in days
        for end in [BASE + (DAY * day - 5) * SECOND]
    ]
    return Batch(counts=[on_spans(DAY * day, 1) for day in days], evidence=spans)


@pytest.mark.engines("timescale")
async def test_what_producers_say_of_themselves_goes_with_what_it_is_about(store: Store, dsn: str) -> None:
    """The totals with the points, the counts of what is on spans with the spans."""
    await fill(store)
    days = range(1, 40)
    controls = [told(DAY * day, 10 * day, meter=meter) for day in days for meter in ("api.requests", "jobs")]
    await store.write(Batch(controls=controls, closings=[closed(DAY * 2), closed(DAY * 3)]))
    await store.write(spans_and_counts(days))
    dropped = await drop_old(store, KEEP, NOW)
    kept = dropped.points_before
    assert kept is not None
    after = sum(ZERO + timedelta(days=day) >= kept for day in days)
    assert 0 < after < len(days)
    rows = "SELECT (SELECT count(*) FROM usage_control), (SELECT count(*) FROM usage_closed),"
    rows += " (SELECT count(*) FROM usage_evidence_count)"
    assert execute(dsn, rows) == [(2 * (after + 1), 1, len(days))]

    async with store.reading() as connection:
        before = await reconcile(connection, start=NOW - timedelta(days=9))
    assert (await drop_old(store, SPANS, NOW)).evidence > 0
    oldest = "SELECT count(*), min(time) >= (SELECT evidence_from FROM usage_kept) FROM usage_evidence_count"
    assert execute(dsn, oldest) == [(after, True)]
    async with store.reading() as connection:
        assert await reconcile(connection, start=NOW - timedelta(days=9)) == before
        assert [(one.missing, one.more) for one in await reconcile(connection)] == [(0, 0)]


@pytest.mark.engines("timescale")
async def test_points_are_dropped_while_counts_of_dropped_spans_are_deleted(store: Store, dsn: str) -> None:
    """Which may take minutes; another collector's keeper would stop all writers to wait for it."""
    await fill(store)
    await store.write(spans_and_counts(range(1, 40)))
    async with locked(dsn, "SELECT FROM usage_evidence_count FOR UPDATE"):
        dropping = asyncio.ensure_future(drop_old(store, SPANS, NOW))
        await waiting(dsn)
        dropped = await drop_old(store, KEEP, NOW, [])
        assert (dropped.points_before is not None, dropped.cut_short, dropping.done()) == (True, None, False)
        old = "SELECT count(*) FROM usage_evidence WHERE time < (SELECT evidence_from FROM usage_kept)"
        assert execute(dsn, old) == [(0,)]
        assert execute(dsn, "SELECT evidence_from > '-infinity' FROM usage_kept") == [(True,)]
    assert (await dropping).evidence > 0
    oldest = "SELECT min(time) >= (SELECT evidence_from FROM usage_kept) FROM usage_evidence_count"
    assert execute(dsn, oldest) == [(True,)]


@pytest.mark.engines("timescale")
async def test_points_are_dropped_while_somebody_reads_spans(store: Store, dsn: str) -> None:
    await fill(store)
    await store.write(spans_and_counts(range(1, 40)))
    async with locked(dsn, "SELECT count(*) FROM usage_evidence"):
        dropping = asyncio.ensure_future(drop_old(store, SPANS, NOW))
        await waiting(dsn)
        execute(dsn, "SELECT FROM usage_kept FOR UPDATE NOWAIT")
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await dropping
    assert execute(dsn, "SELECT evidence_from = '-infinity' FROM usage_kept") == [(True,)]
    assert (await drop_old(store, SPANS, NOW)).evidence > 0
