"""Cumulative streams through the database: any order, any epochs, bases that come late, two collectors at once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from fractions import Fraction

import psycopg
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.model import Batch, Point, Temporality
from tallymark_collector.store import Store
from tests.support.usage import point, stream

STREAMS = [stream(account, temporality=Temporality.CUMULATIVE) for account in ("acme", "globex")]


@st.composite
def epochs(draw: st.DrawFn) -> list[Point]:
    """What one producer sent between two restarts: growing totals, perhaps with a base, perhaps with no start."""
    of = draw(st.sampled_from(STREAMS))
    start = draw(st.sampled_from([None, 0, 20, 40, 3590]))
    value = draw(st.integers(0, 50))
    sent = []
    if start is not None and draw(st.booleans()):
        sent.append(point(of, start, start, value))
    time = start or 0
    for gap, growth in draw(
        st.lists(st.tuples(st.integers(1, 3) | st.just(10), st.integers(0, 9)), min_size=1, max_size=6)
    ):
        time, value = time + gap, value + growth
        sent.append(point(of, start or 0, time, value))
    return [p._replace(start_ns=0) for p in sent] if start is None else sent


@st.composite
def histories(draw: st.DrawFn) -> list[list[Point]]:
    """Batches of all epochs' points in any order, some of them twice. No two points contradict each other."""
    found: dict[tuple[object, int], dict[int, Point]] = {}
    for epoch in draw(st.lists(epochs(), min_size=1, max_size=4)):
        found.setdefault((epoch[0].stream.id, epoch[0].start_ns), {p.time_ns: p for p in epoch})
    sent = draw(st.permutations([p for epoch in found.values() for p in epoch.values()]))
    sent = [*sent, *draw(st.lists(st.sampled_from(sent), max_size=4))]
    cuts = sorted(draw(st.lists(st.integers(0, len(sent)), max_size=5)))
    return [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]


def counted(points: list[Point]) -> Fraction:
    """What the producers counted, by the definition: growth since the start, or since the first total."""
    by_epoch: dict[tuple[object, int], dict[int, Fraction]] = defaultdict(dict)
    for p in points:
        by_epoch[p.stream.id, p.start_ns][p.time_ns] = Fraction(p.value)
    total = Fraction(0)
    for (_, start), totals in by_epoch.items():
        first, last = min(totals), max(totals)
        total += totals[last] - (totals[first] if start in (0, first) else 0)
    return total


@settings(
    max_examples=80,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=histories(), at_once=st.booleans())
def test_what_was_counted_is_what_is_billed(
    history: list[list[Point]],
    at_once: bool,
    blocking_store: Store,
    event_loop_runner: asyncio.AbstractEventLoop,
    dsn: str,
) -> None:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("TRUNCATE usage_dirty, usage_hour, usage_point, usage_sample, usage_quarantine")

    async def check(arrived: list[Point]) -> None:
        async with blocking_store.reading() as connection:
            row = await (
                await connection.execute(
                    "SELECT coalesce(sum(quantity), 0), (SELECT count(*) FROM usage_quarantine) FROM usage_hourly"
                )
            ).fetchone()
            report = await audit(connection)
        assert row is not None
        assert (Fraction(row[0]), row[1]) == (counted(arrived), 0)
        assert (report.differences, report.drifts) == ([], [])

    async def run() -> None:
        other = Store(dsn)
        await other.open()
        try:
            if at_once:
                stores = [blocking_store, other]
                await asyncio.gather(
                    *(stores[i % 2].write(Batch(points=batch)) for i, batch in enumerate(history)),
                    blocking_store.refresh(),
                )
            arrived: list[Point] = []
            for batch in history:
                await other.write(Batch(points=batch))
                arrived += batch
                if not at_once:
                    await check(arrived)
                await blocking_store.refresh(1)
            await check(arrived)
        finally:
            await other.close()

    event_loop_runner.run_until_complete(run())


async def test_a_database_whose_transactions_are_repeatable_reads_by_default(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        name = psycopg.sql.Identifier(connection.info.dbname)
        connection.execute(
            psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'").format(name)
        )
    stores = [Store(dsn), Store(dsn)]
    for store in stores:
        await store.open()
    totals = [point(STREAMS[0], 0, 10 * i, 3 * i) for i in range(1, 61)]
    await asyncio.gather(*(stores[i % 2].write(Batch(points=[p])) for i, p in enumerate(totals[::-1] + totals)))
    async with stores[0].reading() as connection:
        row = await (await connection.execute("SELECT sum(quantity) FROM usage_hourly")).fetchone()
    assert row == (180,)
    for store in stores:
        await store.close()
