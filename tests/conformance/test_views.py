"""Whatever is written, in whatever order, beside whoever refreshes: the views say what the points say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from decimal import Decimal

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tallymark_collector.aggregates.audit import Report, audit
from tallymark_collector.model import Batch, Point
from tallymark_collector.store import Store, hours
from tallymark_collector.store.database import Connection
from tallymark_collector.store.rows import EPOCH
from tests.support.usage import BASE, HOUR, point, stream, sums_by_hour

STREAMS = [
    stream(account, meter, producer, route=route)
    for account in ("acme", "globex", "initech")
    for meter in ("api.requests", "llm.tokens")
    for producer in ("one", "two")
    for route in ("/a", "/b")
]

# Ends of intervals: on hours, beside them, across midnight, and anywhere; arriving in any order.
ends = st.one_of(st.sampled_from([3600 * k + d for k in (1, 2, 24, 25) for d in (-1, 0, 1)]), st.integers(1, 26 * 3600))
amounts = st.one_of(st.integers(1, 1000).map(Decimal), st.decimals("0.001", 5, places=3))


@st.composite
def points(draw: st.DrawFn) -> Point:
    end = draw(ends)
    value = draw(amounts)
    start = end - draw(st.integers(1, 30))
    return point(draw(st.sampled_from(STREAMS)), start, end, value)


batches = st.lists(points(), min_size=1, max_size=12)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), batches),
        st.tuples(st.just("again"), st.integers(0, 50)),
        st.tuples(st.just("refresh"), st.integers(1, 5)),
        st.tuples(st.just("storm"), st.lists(batches, min_size=2, max_size=5)),
    ),
    min_size=1,
    max_size=8,
)


class World:
    """A store, and beside it the plain list of what was written."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.batches: list[list[Point]] = []
        self.values: dict[tuple[object, ...], Point] = {}

    def consistent(self, batch: list[Point]) -> list[Point]:
        """The batch with the values that its identities had before: contradictions have a test of their own."""
        return [self.values.setdefault((p.stream.id, p.start_ns, p.time_ns), p) for p in batch]

    async def write(self, batch: list[Point]) -> None:
        batch = self.consistent(batch)
        self.batches.append(batch)
        await self.store.write(Batch(points=batch))

    async def audit(self) -> Report:
        async with self.store.reading() as connection:
            return await audit(connection)

    async def step(self, kind: str, argument: object) -> None:
        match kind, argument:
            case "write", list() as batch:
                await self.write(batch)
            case "again", int() as number if self.batches:
                await self.write(self.batches[number % len(self.batches)])
            case "refresh", int() as limit:
                await self.store.refresh(limit)
            case "storm", list() as several:
                written = self.write
                jobs = [written(batch) for batch in several] + [written(several[0])]
                refreshes = [self.store.refresh(3) for _ in range(3)]
                audits = [self.audit() for _ in range(3)]
                results = await asyncio.gather(*jobs, *refreshes, *audits)
                for report in results[-3:]:
                    assert not report.differences, "a reader between saw a sum that is not the points' sum"

    async def check(self) -> None:
        expected = sums_by_hour(p for batch in self.batches for p in batch)
        async with self.store.reading() as connection:
            hourly = await (
                await connection.execute(
                    "SELECT account, meter, bucket, sum(quantity), sum(points) FROM usage_hourly GROUP BY 1, 2, 3"
                )
            ).fetchall()
            daily = await (
                await connection.execute(
                    "SELECT account, meter, bucket, sum(quantity) FROM usage_daily GROUP BY 1, 2, 3"
                )
            ).fetchall()
        zero = EPOCH + timedelta(hours=BASE // HOUR)
        found = {(a, m, (bucket - zero) // timedelta(hours=1)): quantity for a, m, bucket, quantity, _ in hourly}
        assert found == expected
        assert sum(row[4] for row in hourly) == len(self.values)
        by_day: dict[tuple[str, str, int], Decimal] = {}
        for (account, meter, hour), quantity in expected.items():
            day = (zero + timedelta(hours=hour) - EPOCH).days
            by_day[account, meter, day] = by_day.get((account, meter, day), Decimal(0)) + quantity
        assert {(a, m, (bucket - EPOCH).days): quantity for a, m, bucket, quantity in daily} == by_day


@settings(
    max_examples=60,
    deadline=None,
    # Not shrunk: an example takes part of a second, and shrinking hundreds of them would look like a hang.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plan=steps)
def test_views_equal_an_independent_sum_after_every_step(
    plan: list[tuple[str, object]],
    blocking_store: Store,
    event_loop_runner: asyncio.AbstractEventLoop,
    dsn: str,
) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE tallymark.usage_point, tallymark.usage_hour, tallymark.usage_dirty")
    world = World(blocking_store)

    async def run() -> None:
        for kind, argument in plan:
            await world.step(kind, argument)
            await world.check()
        while await world.store.refresh(4):
            pass
        await world.check()
        report = await world.audit()
        assert (report.differences, report.points) == ([], len(world.values))

    event_loop_runner.run_until_complete(run())


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


@pytest.mark.parametrize("after", range(1, 7))
async def test_points_that_commit_between_a_refreshers_statements_are_not_lost(store: Store, after: int) -> None:
    """The trap: a mark that is deleted although its points were not in the snapshot that was summed."""
    await store.write(Batch(points=[point(STREAMS[0], 0, 10, 10)]))
    written = 0

    async def meanwhile() -> None:
        nonlocal written
        written += 1
        await store.write(Batch(points=[point(STREAMS[0], 10, 20, 5)]))

    async with store.transaction() as connection:
        await hours.refresh(Paused(connection, after, meanwhile))  # type: ignore[arg-type]
    assert written == 1, "there are fewer statements than this test pauses after"
    for _ in range(2):
        async with store.reading() as connection:
            row = await (await connection.execute("SELECT sum(quantity) FROM usage_hourly")).fetchone()
            assert row == (15,)
            assert (await audit(connection)).clean
        await store.refresh()


async def test_late_points_show_in_the_next_query(store: Store) -> None:
    await store.write(Batch(points=[point(STREAMS[0], 7200, 7210, 3)]))
    while await store.refresh():
        pass
    await store.write(Batch(points=[point(STREAMS[0], 0, 10, 4)]))
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT sum(quantity), count(*) FROM usage_hourly")).fetchone()
    assert row == (7, 2)
