"""What producers say against what is here: each way in which they can differ must be told, with the amount and time."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from tallymark_collector.aggregates.completeness import Completeness, Proof, Status, prove
from tallymark_collector.aggregates.reconciliation import EvidenceBalance, reconcile
from tallymark_collector.aggregates.totals import drop_totals
from tallymark_collector.model import Attributes, Batch, Evidence, Reason, Temporality
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine import items, reading, settling
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.store import Store
from tallymark_collector.store.rows import EPOCH
from tests.support.control import closed, on_spans, told
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric

NOW = timedelta(0)


def at(seconds: float) -> datetime:
    return EPOCH + timedelta(microseconds=(BASE + int(seconds * SECOND)) // 1000)


async def proof(store: Store, tolerance: timedelta = NOW, **bounds: Any) -> Proof:
    async with store.reading() as connection:
        return await prove(connection, tolerance=tolerance, **bounds)


async def the_one(store: Store, tolerance: timedelta = NOW, **bounds: Any) -> Completeness:
    [one] = (await proof(store, tolerance, **bounds)).producers
    return one


async def balance(store: Store, tolerance: timedelta = NOW, **bounds: Any) -> list[EvidenceBalance]:
    async with store.reading() as connection:
        return await reconcile(connection, tolerance=tolerance, **bounds)


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(statement)  # type: ignore[arg-type]


def age(dsn: str, table: str, by: str) -> None:
    """What is there arrived earlier than it did."""
    execute(dsn, f"UPDATE {table} SET recorded_at = recorded_at - interval '{by}'")


def intervals(*quantities: int, skip: Sequence[int] = ()) -> Batch:
    """Ten seconds each; the points of those in `skip` got lost, their control totals too."""
    points, controls, total = [], [], 0
    for n, quantity in enumerate(quantities):
        total += quantity
        if n not in skip:
            points.append(point(stream(), 10 * n, 10 * n + 10, quantity))
            controls.append(told(10 * n + 10, total))
    return Batch(points=points, controls=controls)


async def test_an_ended_producer_is_complete(store: Store) -> None:
    await store.write(intervals(5, 7, 1))
    one = await the_one(store)
    assert (one.status, one.closed) == (Status.OPEN, False), "it may be dead, with usage in its journal"
    await store.write(Batch(closings=[closed(30)]))
    one = await the_one(store)
    assert (one.status, one.counted, one.control, one.as_of) == (Status.COMPLETE, 13, 13, at(30))
    assert (one.service, one.producer, one.meter, one.unit) == ("shop", "one", "api.requests", "{request}")
    assert one.closed
    assert (await proof(store)).clean


async def test_a_living_producer_is_complete_while_it_is_heard_of(store: Store, dsn: str) -> None:
    await store.write(intervals(5, 7))
    assert (await the_one(store, timedelta(minutes=1))).status is Status.COMPLETE
    age(dsn, "usage_control", "2 minutes")
    assert (await the_one(store, timedelta(minutes=1))).status is Status.OPEN
    assert (await the_one(store, timedelta(minutes=3))).status is Status.COMPLETE


@pytest.mark.parametrize(
    ("lost", "missing", "since", "until"), [([0], 5, 0, 20), ([1], 7, 10, 30), ([1, 2], 8, 10, 40), ([2], 1, 20, 40)]
)
async def test_what_got_lost_is_named_with_its_time(
    store: Store, lost: list[int], missing: int, since: int, until: int
) -> None:
    await store.write(intervals(5, 7, 1, 9, skip=lost))
    one = await the_one(store)
    assert (one.status, one.difference) == (Status.MISSING, missing)
    assert (one.since, one.until) == (at(since), at(until))
    assert (one.control - one.counted, one.in_quarantine) == (missing, 0)
    assert not (await proof(store)).clean
    await store.write(intervals(5, 7, 1, 9))  # sent again from where it was
    await store.write(Batch(closings=[closed(40)]))
    assert (await the_one(store)).status is Status.COMPLETE


async def test_what_got_lost_last_is_told_by_the_closing_note(store: Store) -> None:
    await store.write(intervals(5, 7, skip=[1]))
    assert (await the_one(store)).difference == 0
    await store.write(Batch(controls=[told(20, 12)], closings=[closed(20)]))
    one = await the_one(store)
    assert (one.status, one.difference, one.since, one.until) == (Status.MISSING, 7, at(10), at(20))


async def test_a_loss_is_no_loss_before_the_tolerance_is_over(store: Store, dsn: str) -> None:
    await store.write(intervals(5, 7, 1, skip=[1]))
    assert (await the_one(store, timedelta(minutes=5))).status is Status.OPEN, "it may be on its way"
    age(dsn, "usage_control", "6 minutes")
    assert (await the_one(store, timedelta(minutes=5))).status is Status.MISSING


async def test_usage_that_was_counted_twice_under_two_identities_is_too_much(store: Store) -> None:
    await store.write(intervals(5, 7))
    await store.write(Batch(points=[point(stream("acme", colour="red"), 0, 10, 3)], closings=[closed(20)]))
    one = await the_one(store)
    assert (one.status, one.difference, one.since, one.until) == (Status.TOO_MANY, 3, at(0), at(10))
    assert not (await proof(store)).clean


async def test_points_that_no_total_covers_are_not_yet_closed(store: Store, dsn: str) -> None:
    await store.write(intervals(5, 7))
    await store.write(Batch(points=[point(stream(), 20, 30, 4)]))
    one = await the_one(store)
    assert (one.status, one.uncovered) == (Status.OPEN, 4)
    assert (await the_one(store, timedelta(minutes=1))).status is Status.COMPLETE, "its total may be on its way"


async def test_a_meter_without_any_total_of_a_producer_that_sends_them_is_not_yet_closed(store: Store) -> None:
    await store.write(intervals(5))
    await store.write(Batch(points=[point(stream(meter="tokens"), 0, 10, 4)], closings=[closed(10)]))
    found = (await proof(store)).producers
    assert [(one.meter, one.status, one.as_of, one.uncovered) for one in found] == [
        ("api.requests", Status.COMPLETE, at(10), 0),
        ("tokens", Status.OPEN, None, 4),
    ]


async def test_closed_and_then_more_is_open_again(store: Store) -> None:
    await store.write(intervals(5))
    await store.write(Batch(closings=[closed(10)]))
    await store.write(intervals(5, 7))
    assert (await the_one(store)).status is Status.OPEN
    await store.write(Batch(closings=[closed(20)]))
    assert (await the_one(store)).status is Status.COMPLETE


async def test_producers_meters_accounts_and_tenants_are_kept_apart(store: Store) -> None:
    points = [
        point(stream("acme"), 0, 10, 1),
        point(stream("globex", colour="red"), 0, 10, 2),
        point(stream("acme", meter="tokens"), 0, 10, 4),
        point(stream("acme", producer="two"), 0, 10, 8),
        point(stream("acme", tenant="other"), 0, 10, 16),
        point(stream("acme", temporality=Temporality.CUMULATIVE), 0, 10, 32),
    ]
    controls = [
        told(10, 3),
        told(10, 5, meter="tokens"),
        told(10, 8, of="two"),
        told(10, 17, tenant="other"),
    ]
    await store.write(Batch(points=points, controls=controls))
    found = {(o.tenant, o.producer, o.meter): (o.counted, o.difference) for o in (await proof(store)).producers}
    assert found == {
        ("default", "one", "api.requests"): (3, 0),
        ("default", "one", "tokens"): (4, 1),
        ("default", "two", "api.requests"): (8, 0),
        ("other", "one", "api.requests"): (16, 1),
    }


async def test_a_producer_of_an_earlier_version_is_only_counted(store: Store) -> None:
    await store.write(Batch(points=[point(stream(), 0, 10, 1), point(stream(producer="two"), 0, 10, 1)]))
    await store.write(Batch(controls=[told(10, 1)]))
    found = await proof(store)
    assert ([one.producer for one in found.producers], found.unproved) == (["one"], 1)


async def test_runs_that_cover_the_same_time_count_together(store: Store) -> None:
    """A clock that was set back, or a second process under the same name."""
    points = [
        point(stream(), 0, 10, 5),
        point(stream(), 3, 4, 7),
        point(stream(), 4, 12, 1),
        point(stream(), 10, 20, 2),
    ]
    controls = [told(10, 5), told(4, 7, start=3), told(12, 8, start=3), told(20, 7)]
    await store.write(Batch(points=points, controls=controls, closings=[closed(20), closed(12, start=3)]))
    one = await the_one(store)
    assert (one.status, one.counted, one.control) == (Status.COMPLETE, 15, 15)


async def test_one_run_of_two_that_did_not_end_leaves_the_producer_open(store: Store) -> None:
    await store.write(intervals(5))
    await store.write(Batch(points=[point(stream(), 20, 30, 2)], controls=[told(30, 2, start=20)]))
    await store.write(Batch(closings=[closed(30, start=20)]))
    assert (await the_one(store)).status is Status.OPEN
    await store.write(Batch(closings=[closed(10)]))
    assert (await the_one(store)).status is Status.COMPLETE


async def test_a_range_begins_behind_the_last_total_before_it(store: Store) -> None:
    await store.write(intervals(5, 7, 1, 9, skip=[1]))  # the first minute lacks 7
    late = [point(stream(), 3600 + 10 * n, 3610 + 10 * n, 2) for n in range(3)]
    controls = [told(3610, 24), told(3620, 26), told(3630, 28)]
    await store.write(Batch(points=late, controls=controls, closings=[closed(3630)]))
    assert (await the_one(store)).difference == 7
    one = await the_one(store, start=at(3600))
    assert (one.status, one.counted, one.control) == (Status.COMPLETE, 6, 6)
    first = await the_one(store, end=at(3600))
    assert (first.status, first.difference, first.counted, first.control) == (Status.MISSING, 7, 15, 22)
    early = await the_one(store, start=at(5), end=at(15))
    assert (early.status, early.counted, early.control) == (Status.COMPLETE, 5, 5)


async def test_totals_with_nanoseconds_and_points_in_parts(store: Store) -> None:
    """A sum that one value cannot carry: points a nanosecond apart, of which the last ends with the total."""
    of = stream()
    end = BASE + 10 * SECOND + 777
    parts = [point(of, 0, 0, v)._replace(start_ns=s, time_ns=e) for v, s, e in (
        (2**63 - 1, BASE, end - 1),
        (4, end - 1, end),
    )]  # fmt: skip
    control = told(10, str(2**63 + 3))._replace(time_ns=end)
    after = told(10, str(2**63 + 4))._replace(time_ns=end + 400)
    more = point(of, 0, 0, 1)._replace(start_ns=end, time_ns=end + 400)
    await store.write(Batch(points=[*parts, more], controls=[control, after]))
    await store.write(Batch(closings=[closed(0)._replace(time_ns=end + 400)]))
    one = await the_one(store)
    assert (one.status, one.counted) == (Status.COMPLETE, 2**63 + 4)


async def test_the_same_again_changes_nothing_and_another_total_is_a_conflict(store: Store) -> None:
    whole = intervals(5, 7)
    batch = Batch(whole.points, controls=whole.controls, closings=[closed(20)], counts=[on_spans(10, 2)])
    first = await store.write(batch)
    again = await store.write(batch)
    assert (first.conflicts, again.conflicts, again.inserted) == ([], [], 0)
    result = await store.write(Batch(controls=[told(20, 13)], counts=[on_spans(10, 3)]))
    reasons = [(kept.refusal.reason, kept.meter) for kept in result.conflicts]
    assert [reason for reason, _ in reasons] == [Reason.VALUE_CONFLICT] * 2
    assert "12 was stored before" in result.conflicts[0].refusal.detail
    assert (await the_one(store)).status is Status.COMPLETE, "what was there stays"
    together = await store.write(Batch(controls=[told(30, 13), told(30, 14)]))
    assert len(together.conflicts) == 1
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT count(*) FROM usage_quarantine")).fetchone()
    assert row == (3,)


async def test_all_of_a_request_or_nothing(store: Store, dsn: str) -> None:
    """The totals are in the transaction of the points that they tell of."""
    execute(dsn, "ALTER TABLE usage_control ADD CHECK (total < 10)")
    with pytest.raises(psycopg.errors.CheckViolation):
        await store.write(intervals(5, 7))
    async with store.reading() as connection:
        assert await (await connection.execute("SELECT count(*) FROM usage_point")).fetchone() == (0,)


async def test_what_the_database_cannot_hold_goes_to_quarantine_alone(store: Store, dsn: str) -> None:
    execute(dsn, "ALTER TABLE usage_control ALTER total TYPE numeric(3)")
    execute(dsn, "ALTER TABLE usage_evidence_count ALTER quantity TYPE numeric(3)")
    batch = Batch(
        points=[point(stream(), 0, 10, 5)],
        controls=[told(10, 5), told(10, 1000, meter="wide"), told(10, 7, meter="other")],
        closings=[closed(10)],
        counts=[on_spans(10, 1), on_spans(10, 1000, meter="wide")],
    )
    result = await store.write(batch)
    assert result.inserted == 1
    assert [kept.refusal.reason for kept in result.conflicts] == [Reason.NOT_STORABLE] * 2
    assert {one.meter: one.control for one in (await proof(store)).producers} == {"api.requests": 5, "other": 7}
    assert [one.counted for one in await balance(store)] == [1]


async def test_any_order_and_several_writers_come_to_the_same(store: Store, dsn: str) -> None:
    rng = random.Random(7)
    batches, want = [], defaultdict(int)
    for which in range(4):
        total = 0
        for n in range(12):
            quantity = rng.randrange(1, 50)
            total += quantity
            want[f"p{which}"] += quantity
            batches.append(
                Batch(
                    points=[point(stream(f"a{n % 3}", producer=f"p{which}"), 10 * n, 10 * n + 10, quantity)],
                    controls=[told(10 * n + 10, total, of=f"p{which}")],
                    closings=[closed(120, of=f"p{which}")] if n == 11 else [],
                    counts=[on_spans(10 * n + 10, 1, f"a{n % 3}", of=f"p{which}")],
                )
            )
    twice = batches * 2
    rng.shuffle(twice)
    other = Store(dsn)
    await other.open()
    for n, batch in enumerate(twice):
        result = await (store, other)[n % 2].write(batch)
        assert result.conflicts == []
    await other.close()
    found = (await proof(store)).producers
    assert {one.producer: (one.status, one.counted) for one in found} == {
        name: (Status.COMPLETE, total) for name, total in want.items()
    }
    assert {one.account: one.counted for one in await balance(store)} == {f"a{n}": 16 for n in range(3)}


async def test_a_random_loss_is_told_to_the_unit(store: Store) -> None:
    rng = random.Random(11)
    for which in range(12):
        quantities = [rng.randrange(1, 100) for _ in range(10)]
        lost = sorted(rng.sample(range(10), rng.randrange(4)))
        batch = intervals(*quantities, skip=lost)
        name = f"p{which}"
        points = [point(stream(producer=name), 10 * n, 10 * n + 10, q) for n, q in enumerate(quantities)]
        controls = [c._replace(producer=told(1, 1, of=name).producer) for c in batch.controls]
        last = told(100, sum(quantities), of=name)
        await store.write(
            Batch(
                points=[p for n, p in enumerate(points) if n not in lost],
                controls=[*(c for c in controls if c.time_ns != last.time_ns), last],
                closings=[closed(100, of=name)],
            )
        )
        [one] = [one for one in (await proof(store)).producers if one.producer == name]
        assert one.difference == sum(quantities[n] for n in lost)
        if lost:
            assert (one.status, one.since) == (Status.MISSING, at(10 * lost[0]))


async def test_what_lies_in_quarantine_explains_what_is_missing(store: Store) -> None:
    pipeline = Pipeline(store, now_ns=lambda: BASE + 100 * SECOND)
    nobody: dict[str, object] = {}
    usage = [
        number(BASE, BASE + 10 * SECOND, 5, {"tallymark.account.id": "acme"}),
        number(BASE, BASE + 10 * SECOND, 2, nobody),
        number(BASE, BASE + 10 * SECOND, 0.5, {"model": "large"}),
    ]
    sent = request(sum_metric(usage))
    names = {"tallymark.control.meter": "api.requests", "tallymark.control.unit": "{request}"}
    scope = sent.resource_metrics[0].scope_metrics.add()
    scope.scope.name = "tallymark.control"
    total = number(BASE, BASE + 10 * SECOND, 8.5, names)  # one of 1 was lost besides
    scope.metrics.append(sum_metric([total], "tallymark.control.total", "1", temporality=2))
    for _ in range(2):
        outcome = await pipeline.metrics("default", sent.SerializeToString())
        assert outcome.rejected == 2
    one = await the_one(store)
    assert (one.status, one.difference, one.in_quarantine) == (Status.MISSING, Decimal("3.5"), Decimal("2.5"))

    # What somebody decided is not to be billed is told apart; what was attributed is no longer missing.
    async with store.reading() as connection:
        entries = await items.open_items(connection, items.Filter("default"), 10)
        by_size = {
            reading.read(found.signal, found.payload).facts["value"]: found
            for found in [await items.find(connection, "default", entry.id) for entry in entries]
        }
    assert (await settling.discard(store, by_size["0.5"], settling.Person("anne", "a test"))).done_now
    one = await the_one(store)
    assert (one.difference, one.in_quarantine, one.discarded) == (Decimal("3.5"), 2, Decimal("0.5"))
    now_ns = BASE + 100 * SECOND
    await settling.release(store, by_size["2"], Decision(account="acme"), settling.Person("anne"), now_ns)
    one = await the_one(store)
    assert (one.difference, one.in_quarantine, one.discarded) == (Decimal("1.5"), 0, Decimal("0.5"))
    assert (await settling.reopen(store, by_size["0.5"], settling.Person("anne"))).done_now
    one = await the_one(store)
    assert (one.difference, one.in_quarantine, one.discarded) == (Decimal("1.5"), Decimal("0.5"), 0)


def span(end: float, quantity: int | str, account: str = "acme", n: int = 1) -> Evidence:
    times = (BASE + int((end - 1) * SECOND), BASE + int(end * SECOND))
    trace, own = n.to_bytes(16, "big"), n.to_bytes(8, "big")
    more = ("GET /", "shop", None, Attributes())
    return Evidence("default", account, "api.requests", trace, own, *times, Decimal(quantity), *more)


async def test_spans_are_compared_by_account_and_meter(store: Store) -> None:
    await store.write(Batch(counts=[on_spans(10, 3), on_spans(20, "2.5"), on_spans(10, 4, "globex")]))
    await store.write(Batch(evidence=[span(5, 3), span(15, "2.5", n=2), span(6, 3, "globex", 3), span(7, 9, "x", 4)]))
    found = {one.account: (one.counted, one.shown, one.missing, one.more) for one in await balance(store)}
    assert found == {"acme": (Decimal("5.5"), Decimal("5.5"), 0, 0), "globex": (4, 3, 1, 0)}
    assert [one.account for one in await balance(store, account="globex")] == ["globex"]
    await store.write(Batch(evidence=[span(8, 3, "globex", 5)]))
    assert [(one.missing, one.more) for one in await balance(store, account="globex")] == [(0, 2)]


async def test_spans_may_come_later_and_reach_over_the_edges_of_a_range(store: Store) -> None:
    await store.write(Batch(counts=[on_spans(3600, 3), on_spans(3610, 4)]))
    await store.write(Batch(evidence=[span(3605, 3), span(3650, 4, n=2)]))  # the call of 3 was still running at 3600
    tolerance = timedelta(minutes=1)
    assert [(one.missing, one.more) for one in await balance(store, tolerance, end=at(3601))] == [(0, 0)]
    assert [(one.missing, one.more) for one in await balance(store, tolerance, start=at(3601))] == [(0, 0)]
    assert [one.missing for one in await balance(store, NOW, end=at(3601))] == [3]


async def test_counts_of_just_now_are_not_missing_yet(store: Store) -> None:
    import time

    now = time.time_ns()
    count = on_spans(10, 3)._replace(start_ns=now - 10 * SECOND, time_ns=now - SECOND)
    await store.write(Batch(counts=[count]))
    assert [one.missing for one in await balance(store, timedelta(minutes=1))] == [0]
    assert [one.missing for one in await balance(store, NOW)] == [3]


async def test_evidence_counts_and_totals_are_never_billed(store: Store) -> None:
    await store.write(Batch(controls=[told(10, 5)], closings=[closed(10)], counts=[on_spans(10, 3)]))
    async with store.reading() as connection:
        for relation in ("usage_hourly", "usage_daily", "usage_point", "usage_calls", "usage_by_period"):
            row = await (await connection.execute(f"SELECT count(*) FROM {relation}")).fetchone()  # type: ignore[arg-type]
            assert row == (0,), relation


def drop_points(dsn: str, before: datetime) -> None:
    """What dropping old points leaves behind, on an engine that need not be able to."""
    execute(dsn, f"DELETE FROM usage_point WHERE time < '{before}'; UPDATE usage_kept SET points_from = '{before}'")


async def test_points_that_were_dropped_for_their_age_are_not_missing(store: Store, dsn: str) -> None:
    await store.write(intervals(5, 7, 1, 9, 2))
    await store.write(Batch(closings=[closed(50)]))
    drop_points(dsn, at(25))
    for bounds in ({}, {"start": at(0)}, {"start": at(22)}, {"start": at(25)}, {"start": at(30)}):
        one = await the_one(store, **bounds)
        assert (one.status, one.counted, one.control, one.difference) == (Status.COMPLETE, 11, 11, 0), bounds
    one = await the_one(store, start=at(31))
    assert (one.status, one.counted) == (Status.COMPLETE, 11)
    drop_points(dsn, at(55))
    assert (await proof(store)).producers == []


async def test_what_got_lost_after_the_dropped_points_is_told(store: Store, dsn: str) -> None:
    await store.write(intervals(5, 7, 1, 9, 2, skip=[3]))
    await store.write(Batch(closings=[closed(50)]))
    drop_points(dsn, at(25))
    one = await the_one(store)
    assert (one.status, one.difference, one.since, one.until) == (Status.MISSING, 9, at(30), at(50))


async def test_a_run_that_began_after_the_dropped_points_is_judged_from_its_beginning(store: Store, dsn: str) -> None:
    early = intervals(5, 7)
    second = [told(40, 3, start=30), told(50, 8, start=30), told(40, 6, start=30, of="new")]
    points = [*early.points, point(stream(), 40, 50, 5), point(stream(producer="new"), 30, 40, 2)]
    await store.write(Batch(points=points, controls=[*early.controls, *second]))
    drop_points(dsn, at(5))
    found = {one.producer: one for one in (await proof(store)).producers}
    assert (found["one"].status, found["one"].counted, found["one"].difference) == (Status.MISSING, 12, 3)
    drop_points(dsn, at(25))
    found = {one.producer: one for one in (await proof(store)).producers}
    assert (found["new"].status, found["new"].difference) == (Status.MISSING, 4), "nothing of it can have been dropped"
    assert (found["one"].control, found["one"].difference) == (5, 0), "its first total after them is where it begins"


@pytest.mark.parametrize("seed", range(8))
async def test_without_old_control_totals_the_same_is_said_of_what_is_kept(store: Store, dsn: str, seed: int) -> None:
    """Of producers with several runs and meters that lost points and totals, whose words came in any order."""
    rng = random.Random(seed)
    points, controls, closings = [], [], []
    for of in "abc":
        for start in rng.sample(range(0, 400, 10), rng.randint(1, 4)):
            end = rng.randrange(start + 10, start + 300, 10)
            totals = dict.fromkeys(rng.sample(["api.requests", "jobs"], rng.randint(1, 2)), 0)
            for time, meter in itertools.product(range(start + 10, end + 1, 10), totals):
                quantity = rng.randint(0, 9)
                totals[meter] += quantity
                if quantity and rng.random() < 0.95:
                    points.append(point(stream(meter=meter, producer=of, run=start), time - 10, time, quantity))
                if rng.random() < 0.8:
                    controls.append(told(time, totals[meter], start, meter, of))
            if rng.random() < 0.6:
                closings += [closed(time, start, of) for time in {end, rng.randrange(start + 10, end + 1, 10)}]
    rng.shuffle(controls)
    await store.write(Batch(points=points, controls=controls, closings=closings))
    execute(dsn, f"SELECT setseed({seed / 10}); UPDATE usage_control SET recorded_at = recorded_at"
                 " - (ARRAY['0', '3 h', '9 h', '27 h']::interval[])[1 + floor(random() * 4)::int]")  # fmt: skip

    async def said() -> list[Proof]:
        return [
            await proof(store, timedelta(hours=hours), start=start, end=end)
            for hours in (1, 6, 15)
            for start in (None, *map(at, (0, *range(cut - 25, cut + 200, 45))))
            for end in (None, at(cut + 150))
        ]

    for cut in sorted(rng.sample(range(20, 500, 10), 3)):
        drop_points(dsn, at(cut))
        before = await said()
        for _ in range(2):
            async with store.session() as connection:
                await drop_totals(connection, at(cut))
            assert await said() == before
        with psycopg.connect(dsn) as connection:
            left = connection.execute(
                """SELECT count(*) FROM tallymark.usage_control WHERE time < %s
                   GROUP BY producer, meter, start_time ORDER BY 1 DESC""",
                [at(cut)],
            ).fetchall()
            ends = connection.execute(
                "SELECT count(*) FROM tallymark.usage_closed WHERE time < %s GROUP BY producer, start_time", [at(cut)]
            ).fetchall()
        assert {count for (count,) in left} <= {1, 2}
        assert {count for (count,) in ends} <= {1}


async def test_spans_that_were_dropped_for_their_age_are_not_missing(store: Store, dsn: str) -> None:
    counts = [on_spans(3600, 3), on_spans(3700, 2), on_spans(7200, 4)]
    await store.write(Batch(counts=counts, evidence=[span(3595, 3), span(3695, 2, n=2), span(7195, 3, n=3)]))
    execute(dsn, f"DELETE FROM usage_evidence WHERE time < '{at(3610)}'")
    assert [one.missing for one in await balance(store)] == [3 + 1]
    execute(dsn, f"UPDATE usage_kept SET evidence_from = '{at(3610)}'")
    for tolerance in (NOW, timedelta(minutes=1)):
        assert [(one.missing, one.more) for one in await balance(store, tolerance)] == [(1, 0)]
