"""Everything that happens to points and hours, in random order and beside each other: every view equals raw after each
step.

Raw is a plain list here, summed by plain loops: what was written, each identity once, and what cumulative totals grew
by. Writes are late, repeated, and hit the ends of hours, days, months, periods and the changes of clocks. Between them
hours are refreshed (also by hand, as somebody else would), audited and broken, points are laid out as columns and
dropped, alone and all at once. Beside them levels are told, and asked for by what plans bill them by.
TALLYMARK_TEST_SEEDS=n runs n of them.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import psycopg
import pytest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.aggregates.retention import drop_old
from tallymark_collector.billing.aggregated import aggregated
from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import Batch, Point, Temporality, WriteResult
from tallymark_collector.query.usage import usage
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines.capabilities import State, state
from tests.conformance.test_levels import DECLARED, Clock, Sample, levels, rounded
from tests.conformance.test_levels import METERS as LEVEL_METERS
from tests.conftest import STEPS
from tests.support.usage import HOUR, SECOND, stream

SEEDS = range(int(os.environ.get("TALLYMARK_TEST_SEEDS", "3")))
STEPS_EACH = 30

DELTA = [
    stream(account, meter, route=route)
    for account in ("acme", "globex", "initech")
    for meter in ("m", "n")
    for route in "ab"
]
CUMULATIVE = [stream(account, "m", "counter", Temporality.CUMULATIVE) for account in ("acme", "globex")]

FIRST = datetime(2026, 9, 21, tzinfo=timezone.utc)
LAST = datetime(2026, 11, 12, tzinfo=timezone.utc)
EDGES = [
    datetime(2026, 9, 24, tzinfo=timezone.utc),  # a piece of a hypertable begins
    datetime(2026, 10, 1, tzinfo=timezone.utc),  # a month, and another piece
    datetime(2026, 10, 14, 18, 30, tzinfo=timezone.utc),  # midnight in Kolkata
    datetime(2026, 10, 25, 1, tzinfo=timezone.utc),  # clocks go back in Zurich
    datetime(2026, 10, 31, 23, tzinfo=timezone.utc),  # midnight there
    datetime(2026, 11, 1, 6, tzinfo=timezone.utc),  # clocks go back in New York
    datetime(2026, 11, 5, 12, tzinfo=timezone.utc),
    datetime(2026, 10, 1, 3, 30, tzinfo=timezone.utc),  # inside a period that is inside an hour
]
PERIODS = [
    ("acme", "2026-09-14T18:30+00:00", "2026-10-14T18:30+00:00"),  # Kolkata
    ("acme", "2026-10-14T18:30+00:00", "2026-11-14T18:30+00:00"),
    ("globex", "2026-09-30T22:00+00:00", "2026-10-31T23:00+00:00"),  # Zurich, with the hour that comes twice
    ("globex", "2026-10-31T23:00+00:00", "2026-11-30T23:00+00:00"),
    ("globex", "2026-11-30T23:00+00:00", "2026-12-01T04:00+00:00"),
    (
        "initech",
        "2026-09-23T23:30+00:00",
        "2026-09-24T00:15+00:00",
    ),  # nothing but pieces of hours, on both sides of a day
    ("initech", "2026-10-01T03:15+00:00", "2026-10-01T03:45+00:00"),  # inside an hour
    ("initech", "2026-10-24T22:00+00:00", "2026-10-25T23:00+00:00"),  # 25 hours: a day of Zurich
    ("initech", "2026-10-25T02:00+00:00", "2026-10-25T05:00+00:00"),  # whole hours of a day
]
NOW = LAST + timedelta(days=2)
SEATS = {meter: DECLARED[meter] for meter in ("max.sum", "latest.latest", "integral.sum", "average.latest")}
"""What acme's levels are billed by; each of them is told under all four."""
ZONES = ["UTC", "America/New_York", "Europe/Zurich", "Asia/Kolkata"]
"""What sessions of others may be set to: views must not care."""

Key = tuple[str, str, datetime]
ZERO = Decimal(0)


def nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * SECOND


def moment(ns: int) -> datetime:
    return datetime.fromtimestamp(ns // SECOND, timezone.utc)


def bucket(ns: int, width: timedelta) -> datetime:
    return moment(ns // (int(width.total_seconds()) * SECOND) * int(width.total_seconds()) * SECOND)


class World:
    """A store, and beside it what was written, as plain values."""

    def __init__(self, store: Store, dsn: str, rng: random.Random, can: State) -> None:
        self.store, self.dsn, self.rng, self.can = store, dsn, rng, can
        self.points: dict[tuple[object, ...], Point] = {}
        self.samples: dict[tuple[object, int], dict[int, Point]] = defaultdict(dict)
        self.sent: list[list[Point]] = []
        self.kept = datetime(1970, 1, 1, tzinfo=timezone.utc)
        self.levels_kept = self.kept
        self.coming: dict[tuple[object, int], Sample] = {}
        self.told: dict[tuple[object, ...], Sample] = {}
        self.storming = False
        self.answers: list[Decimal] = []
        self.gone: dict[str, dict[Key, Decimal]] = {"hour": {}, "day": {}}
        self.periods: list[tuple[str, datetime, datetime, set[datetime]]] = []
        self.summed: dict[str, set[tuple[datetime, datetime]]] = defaultdict(set)

    # What raw says ------------------------------------------------------------------------------------------------

    def usage(self) -> list[tuple[Point, Decimal]]:
        """Each point with what it adds; of totals, what they grew by since the one before in their epoch."""
        found = [(p, p.value) for p in self.points.values()]
        for totals in self.samples.values():
            before = Decimal(0)
            for _, p in sorted(totals.items()):
                found.append((p, p.value - before))
                before = p.value
        return found

    def expected(self, width: timedelta, name: str) -> dict[Key, Decimal]:
        """Sums by bucket, without those that are zero: corrections of late totals may leave such rows or none."""
        sums: dict[Key, Decimal] = defaultdict(Decimal)
        for p, value in self.usage():
            at = bucket(p.time_ns, width)
            if at >= self.kept:
                sums[p.stream.series.account, p.stream.series.meter, at] += value
        return {**self.gone[name], **{key: value for key, value in sums.items() if value}}

    def total_of(self, meter: str) -> Decimal:
        return sum(
            (sums for (_, name, _), sums in self.expected(timedelta(days=1), "day").items() if name == meter), ZERO
        )

    def expected_periods(self) -> dict[tuple[str, datetime, str], Decimal | None]:
        """By account, start and meter. Of a period that came after the points of its edge had gone, what had used
        something in that hour is None."""
        sums: dict[tuple[str, datetime, str], Decimal] = defaultdict(Decimal)
        unknown: set[tuple[str, datetime, str]] = set()
        for p, value in self.usage():
            for account, start, end, lost in self.periods:
                if p.stream.series.account != account:
                    continue
                key = account, start, p.stream.series.meter
                sums[key] += value if nanoseconds(start) <= p.time_ns < nanoseconds(end) else 0
                if bucket(p.time_ns, timedelta(hours=1)) in lost:
                    unknown.add(key)
        return {key: None if key in unknown else value for key, value in sums.items() if value or key in unknown}

    def period(self, account: str, start: datetime, end: datetime) -> None:
        """A billing period from here on."""
        first, last = -(-nanoseconds(start) // HOUR) * HOUR, nanoseconds(end) // HOUR * HOUR
        pieces = {(start, min(moment(first), end)), (max(moment(first), moment(last)), end)}
        lost = {piece for piece in pieces if piece[0] < min(piece[1], self.kept)} - self.summed[account]
        self.summed[account] |= pieces - lost
        hours = {starts.replace(minute=0) for starts, _ in lost}
        number = len(self.periods)
        self.periods.append((account, start, end, hours))
        self.execute(
            "INSERT INTO billing_period VALUES (%s, %s, %s, 'default', '2026-09-01', %s, 'p')",
            *(start, end, account, number),
        )

    async def late_period(self) -> None:
        """One that is written down after its time: as terms that were forgotten are."""
        start = self.rng.choice(EDGES) + timedelta(minutes=self.rng.choice([-30, 0, 20, 45]))
        end = start + self.rng.choice([timedelta(minutes=30), timedelta(hours=3), timedelta(days=9, minutes=15)])
        account = self.rng.choice(["acme", "globex", "initech"])
        if all((account, start) != known[:2] for known in self.periods):
            self.period(account, start, end)

    async def check_ranges(self, connection: Connection) -> None:
        """Ranges that begin and end anywhere, of all accounts or one."""
        for _ in range(3):
            start = max(moment(self.time()), self.kept)
            end = start + timedelta(seconds=self.rng.choice([900, 5000, 3600, 86_400, 100_000, 3_000_000]))
            account = self.rng.choice([None, "acme", "initech"])
            by = self.rng.choice([["account"], ["day"], ["hour", "account"]])
            found = await usage(connection, tenant="default", by=by, start=start, end=end, account=account)
            assert found.total() == sum(
                (
                    value
                    for p, value in self.usage()
                    if nanoseconds(start) <= p.time_ns < nanoseconds(end) and account in (None, p.stream.series.account)
                ),
                ZERO,
            ), (start, end, account, by)

    async def check_levels(self, connection: Connection) -> None:
        """Ranges that begin and end anywhere: what a clock says that stops wherever anything changes, or a refusal."""
        row = await (await connection.execute("SELECT count(*) FROM usage_levels")).fetchone()
        last: dict[tuple[str, str], Sample] = {}
        for sample in sorted(s for s in self.told.values() if s.time < self.levels_kept):
            last[sample.region, sample.producer] = sample
        kept = [s for s in self.told.values() if s.time >= self.levels_kept]
        assert row == (len(SEATS) * (len(kept) + len(last)),)
        clocks = {across: Clock(self.told.values(), across) for across in ("sum", "latest")}
        for _ in range(2):
            start = moment(self.time()) - timedelta(days=self.rng.choice([0, 0, 7, 14]))
            end = start + timedelta(seconds=self.rng.choice([1, 900, 1800, 5000, 86_400, 3_000_000]))
            found = await aggregated(connection, "default", "acme", start, end, SEATS)
            quantities = {across: clock.quantities(start, end) for across, clock in clocks.items()}
            expected: dict[str, Decimal | None] = {}
            if start < self.levels_kept and last:
                expected = dict.fromkeys(SEATS)
                assert all("levels before" in str(each.problem) for each in found)
            else:
                for meter in SEATS:
                    kind, across = LEVEL_METERS[meter]
                    if quantities[across]:
                        expected[meter] = rounded(quantities[across][kind])
            assert {each.meter: each.quantity for each in found} == expected, (start, end)

    # Steps --------------------------------------------------------------------------------------------------------

    def batch(self) -> list[Point]:
        found: dict[tuple[object, ...], Point] = {}
        for _ in range(self.rng.randint(1, 15)):
            end = self.time()
            if self.rng.random() < 0.2:
                for p in self.level(end):
                    found[p.stream.id, p.time_ns] = p
                continue
            if self.rng.random() < 0.25:
                p = self.total(end)
            else:
                of = self.rng.choice(DELTA)
                p = Point(
                    of, end - self.rng.randint(1, 60) * SECOND, end, Decimal(self.rng.randint(1, 5000)).scaleb(-2)
                )
                p = self.points.get((of.id, p.start_ns, p.time_ns), p)
            found[p.stream.id, p.start_ns, p.time_ns] = p
        return list(found.values())

    def time(self) -> int:
        """On an edge, beside it, or anywhere that is kept."""
        while True:
            if self.rng.random() < 0.5:
                at = nanoseconds(self.rng.choice(EDGES)) + self.rng.choice([-3600, -1, 0, 0, 1, 3599, 3600]) * SECOND
            else:
                at = nanoseconds(FIRST) + self.rng.randrange(int((LAST - FIRST).total_seconds())) * SECOND
            if moment(at) >= max(self.kept, self.levels_kept) + timedelta(days=3):
                return at

    def total(self, end: int) -> Point:
        """A total of a counter that counts a thousandth of a second's number since its start, of which it has three."""
        of = self.rng.choice(CUMULATIVE)
        starts = [s for s in (nanoseconds(FIRST) - 9, nanoseconds(EDGES[2]) + 7, nanoseconds(EDGES[5])) if s < end]
        start = self.rng.choice(starts)
        return Point(of, start, end, Decimal((end - start) // (1000 * SECOND)))

    def level(self, at: int) -> list[Point]:
        """What one of three streams stood at, under each of the meters; at one time it stood at one level."""
        region, producer = self.rng.choice([("eu", "one"), ("eu", "two"), ("us", "one")])
        sample = Sample(moment(at), Decimal(self.rng.randint(-50, 500)), region, producer)
        known = [*self.coming.values(), *self.told.values()]
        sample = next((s for s in known if (s.time, *s[2:]) == (sample.time, *sample[2:])), sample)
        points = levels([sample], SEATS)
        self.coming.update({(p.stream.id, p.time_ns): sample for p in points})
        return points

    async def write(self, points: list[Point]) -> None:
        for p in points:
            if p.stream.temporality is Temporality.LEVEL:
                sample = self.coming[p.stream.id, p.time_ns]
                self.told[sample.time, sample.region, sample.producer] = sample
            elif p.stream.temporality is Temporality.CUMULATIVE:
                self.samples[p.stream.id, p.start_ns][p.time_ns] = p
            else:
                self.points[p.stream.id, p.start_ns, p.time_ns] = p
        self.sent.append(points)
        result = await self.until_written(points)
        assert not result.conflicts

    async def until_written(self, points: list[Point]) -> WriteResult:
        for _ in range(500):
            try:
                return await self.store.write(Batch(points=list(points)))
            except StoreUnavailable:
                await asyncio.sleep(0.02)
        raise AssertionError("the database stays away")

    async def again(self) -> None:
        if self.sent:
            kept = max(self.kept, self.levels_kept)
            points = [p for p in self.rng.choice(self.sent) if moment(p.time_ns) >= kept]
            inserted = (await self.until_written(points)).inserted
            assert inserted == 0 or self.storming, "beside its first try, it may be the second that comes first"

    async def too_old(self) -> None:
        """A replay, or a point of its own, of a time whose points or levels have been dropped."""
        if self.levels_kept > FIRST:
            end = nanoseconds(FIRST + (self.levels_kept - FIRST) * self.rng.random()) - SECOND
            [late, *_] = levels([Sample(moment(end), Decimal(1), "eu", "three")], SEATS)
            result = await self.until_written([late])
            assert (result.inserted, len(result.conflicts)) == (0, 1)
        if self.kept > FIRST:
            end = nanoseconds(FIRST + (self.kept - FIRST) * self.rng.random()) - SECOND
            late = Point(self.rng.choice(DELTA), end - SECOND, end, Decimal(1))
            result = await self.until_written([late])
            assert (result.inserted, len(result.conflicts)) == (0, 1)

    async def refresh(self) -> None:
        await self.store.refresh(self.rng.randint(1, 12))

    async def refreshed_by_hand(self) -> None:
        """Somebody's own call, not forced, of any window that is kept; TimescaleDB lets one of two that meet fail."""
        if self.can.continuous_aggregates:
            start = max(self.kept, FIRST) + timedelta(hours=self.rng.randint(0, 600))
            arguments = (
                self.rng.choice(["usage_hour", "usage_day"]),
                start,
                start + timedelta(hours=self.rng.randint(48, 300)),
            )
            with suppress(psycopg.errors.LockNotAvailable):
                await asyncio.to_thread(self.execute, "CALL refresh_continuous_aggregate(%s, %s, %s)", *arguments)

    async def audited(self) -> None:
        try:
            looked = await audit_changed(self.store, NOW, self.rng.choice([3, 5000]))
        except StoreUnavailable:
            return
        assert not looked.differences

    async def broken(self) -> None:
        """A cached sum that is wrong: found by the audit of everything, mended, and right at once."""
        rows = self.execute(
            "SELECT account, tenant, bucket FROM usage_hour WHERE bucket >= %s ORDER BY 1, 2, 3", self.kept
        )
        if rows:
            account, _, at = self.rng.choice(rows)
            self.execute(
                "UPDATE usage_hour SET quantity = quantity + 1 WHERE account = %s AND bucket = %s", account, at
            )
            async with self.store.reading() as connection:
                report = await with_days(connection, await audit(connection))
            found = {(d.bucket, d.account, d.tenant) for d in report.differences}
            await self.store.mark(found)

    async def broken_day(self) -> None:
        """The same of a day."""
        rows = self.execute(
            "SELECT account, tenant, bucket FROM usage_day WHERE bucket >= %s ORDER BY 1, 2, 3", self.kept
        )
        if rows:
            account, _, at = self.rng.choice(rows)
            self.execute("UPDATE usage_day SET points = points + 1 WHERE account = %s AND bucket = %s", account, at)
            async with self.store.reading() as connection:
                report = await with_days(connection, await audit(connection))
            await self.store.mark({(d.bucket, d.account, d.tenant) for d in report.differences})

    async def columns(self) -> None:
        if self.can.continuous_aggregates:
            with suppress(StoreUnavailable):  # a piece was busy: there is a next time
                await self.store.lay_out(FIRST + (LAST - FIRST) * self.rng.random())

    async def drop(self) -> None:
        if not self.can.hypertables:
            return
        keep = timedelta(days=self.rng.randint(14, 50))
        if NOW - keep < self.kept:
            return
        hours, days = self.expected(timedelta(hours=1), "hour"), self.expected(timedelta(days=1), "day")
        try:
            dropped = await drop_old(self.store, Retention(points=keep, billing_grace=timedelta(days=1)), NOW)
        except StoreUnavailable:
            return
        if dropped.levels_before is not None:
            self.levels_kept = dropped.levels_before
        if dropped.points_before is not None:
            self.kept = dropped.points_before
            self.gone["hour"] = {key: value for key, value in hours.items() if key[2] < self.kept}
            self.gone["day"] = {key: value for key, value in days.items() if key[2] < self.kept}

    async def reader(self) -> None:
        """Asks twice in one moment of the database, with a pause between."""
        async with self.store.reading() as connection:
            rows = []
            for relation in ("usage_hourly", "usage_daily", "usage_hourly"):
                rows += await (await connection.execute(f"SELECT sum(quantity) FROM {relation}")).fetchall()
                await asyncio.sleep(self.rng.random() / 50)
            kept = await (await connection.execute("SELECT points_from = '-infinity' FROM usage_kept")).fetchone()
            if kept == (True,):
                rows += await (await connection.execute("SELECT sum(quantity) FROM usage_point")).fetchall()
        assert len(set(rows)) == 1, "one moment, and two answers"

    async def asker(self) -> None:
        """Single statements of somebody who knows nothing of our locks. A piece of a table that comes into being while
        one is planned may be missing from it, with what is being written there; what was there before may not. (Of a
        meter without cumulative totals: a correction that is missing for a moment makes a sum too high.)"""
        for relation in ("usage_hourly", "usage_daily", "usage_hourly"):
            [[answer]] = await asyncio.to_thread(
                self.execute, f"SELECT coalesce(sum(quantity), 0) FROM {relation} WHERE meter = 'n'"
            )
            assert isinstance(answer, Decimal)
            self.answers.append(answer)

    async def beside_askers(self, *jobs: Awaitable[None]) -> None:
        low = self.total_of("n")
        self.answers.clear()
        await asyncio.gather(*jobs)
        high = self.total_of("n")
        assert all(low <= answer <= high for answer in self.answers), (low, self.answers, high)

    async def storm(self) -> None:
        writes = [self.write(self.batch()) for _ in range(self.rng.randint(1, 5))]
        beside: list[Callable[[], Awaitable[None]]] = [
            self.again, self.refresh, self.refresh, self.refreshed_by_hand, self.audited, self.columns, self.reader,
            self.reader, self.asker, self.asker,
        ]  # fmt: skip
        jobs = [*writes, *(work() for work in self.rng.sample(beside, self.rng.randint(3, len(beside))))]
        self.rng.shuffle(jobs)
        self.storming = True
        await self.beside_askers(*jobs)
        self.storming = False

    async def dropping_storm(self) -> None:
        """What is written is days younger than anything that is dropped meanwhile: as collectors see to."""
        recent = [p for p in self.batch() if moment(p.time_ns) > NOW - timedelta(days=12)]
        works = [self.drop, self.refresh, self.reader, self.asker, self.audited, self.columns]
        await self.beside_askers(self.write(recent), *(work() for work in works))

    def execute(self, statement: str, *arguments: object) -> list[tuple[object, ...]]:
        options = "-c search_path=tallymark,public -c timezone=utc -c deadlock_timeout=200ms"
        with psycopg.connect(self.dsn, autocommit=True, options=options) as connection:
            cursor = connection.execute(statement, arguments)
            return cursor.fetchall() if cursor.description else []

    # Comparison ---------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        async with self.store.reading() as connection:
            await connection.execute(f"SET LOCAL TimeZone = '{self.rng.choice(ZONES)}'")
            for view, width, name in (
                ("usage_hourly", timedelta(hours=1), "hour"),
                ("usage_daily", timedelta(days=1), "day"),
            ):
                rows = await (
                    await connection.execute(
                        f"SELECT account, meter, bucket, sum(quantity) FROM {view} GROUP BY 1, 2, 3"
                    )
                ).fetchall()
                found = {(*row[:2], row[2].astimezone(timezone.utc)): row[3] for row in rows if row[3]}
                assert found == self.expected(width, name), view
            rows = await (
                await connection.execute(
                    "SELECT account, period_start, meter, sum(quantity), count(*) FROM usage_by_period GROUP BY 1, 2, 3"
                )
            ).fetchall()
            assert all(row[4] == 1 for row in rows)
            periods = {(row[0], row[1].astimezone(timezone.utc), row[2]): row[3] for row in rows if row[3] != 0}
            assert periods == self.expected_periods()
            await connection.execute("SET LOCAL TimeZone = 'UTC'")
            await self.check_ranges(connection)
            await self.check_levels(connection)
            report = await with_days(connection, await audit(connection))
        assert (report.differences, report.drifts) == ([], [])


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_view_equals_raw_after_each_step(
    store: Store, dsn: str, seed: int, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(seed)
    async with store.session() as connection:
        world = World(store, dsn, rng, await state(connection))
    for account, start, end in PERIODS:
        world.period(account, datetime.fromisoformat(start), datetime.fromisoformat(end))
    steps: list[Callable[[], Awaitable[None]]] = [
        *[lambda: world.write(world.batch())] * 4, world.again, *[world.refresh] * 3, *[world.storm] * 6,
        world.refreshed_by_hand, world.audited, world.broken, world.broken_day, *[world.columns] * 2, world.drop,
        world.dropping_storm, world.too_old, world.late_period,
    ]  # fmt: skip
    done = request.config.stash[STEPS]
    engine = request.node.callspec.params["server"]
    for _ in range(STEPS_EACH):
        await rng.choice(steps)()
        await world.check()
        done[engine] = done.get(engine, 0) + 1
    while await store.refresh():
        pass
    await world.check()
    while (looked := await audit_changed(store, NOW)).hours:
        assert not looked.differences
