"""Requests that share a transaction come to what they would have come to one after the other."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import (
    Attributes,
    Batch,
    ControlTotal,
    Evidence,
    EvidenceCount,
    Point,
    Reason,
    Source,
    Stream,
    Temporality,
    WriteResult,
    fingerprint,
)
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store, writer
from tallymark_collector.store.committing import committing
from tests.conformance.test_failing import end_connections
from tests.support.control import on_spans, told
from tests.support.usage import BASE, SECOND, point, stream

_tenants = itertools.count(1)

TABLES = {
    "points": "SELECT account, time, start_time, part, quantity FROM usage_point WHERE tenant = %s",
    "streams": "SELECT account, temporality, resource::text FROM usage_stream WHERE tenant = %s",
    "series": "SELECT account, meter, unit FROM usage_series WHERE tenant = %s",
    "samples": "SELECT s.account, start_ns, time_ns, value"
    " FROM usage_sample s JOIN usage_stream USING (account, stream) WHERE tenant = %s",
    "levels": "SELECT account, time, part, value, source IS NULL, factor FROM usage_level WHERE tenant = %s",
    "evidence": "SELECT account, time, meter, quantity FROM usage_evidence WHERE tenant = %s",
    "controls": "SELECT meter, time, start_time, total FROM usage_control WHERE tenant = %s",
    "counts": "SELECT account, meter, time, quantity FROM usage_evidence_count WHERE tenant = %s",
    "quarantine": "SELECT account, meter, reason, detail, time, payload FROM usage_quarantine WHERE tenant = %s",
    "marks": "SELECT DISTINCT bucket, account FROM usage_dirty WHERE tenant = %s",
    "hours": "SELECT account, meter, bucket, quantity, points FROM usage_hourly WHERE tenant = %s",
}

# Few streams, times and quantities, so that repeats and contradictions are everywhere. A resource's decoration is no
# part of the identity: the first one stays.
_accounts = st.sampled_from(["a", "bb", "ccc"])
_times = st.integers(1, 4)
_quantities = st.sampled_from(["1", "1.0", "2", "0.000001"])
_deltas = st.tuples(st.just("delta"), _accounts, _times, _quantities, st.integers(0, 1))
_totals = st.tuples(st.just("total"), _accounts, _times, st.sampled_from(["1", "5", "10"]), st.integers(0, 1))
_levels = st.tuples(st.just("level"), _accounts, _times, _quantities, st.integers(0, 1))
_sourced = st.tuples(st.just("sourced"), _accounts, _times, st.sampled_from(["1", "2"]), st.integers(0, 1))
_spans = st.tuples(st.just("span"), _accounts, _times, _quantities, st.just(0))
_controls = st.tuples(st.just("control"), st.just(""), _times, _quantities, st.just(0))
_counts = st.tuples(st.just("count"), _accounts, _times, _quantities, st.just(0))
_items = st.one_of(_deltas, _deltas, _totals, _levels, _sourced, _spans, _controls, _counts)
_requests = st.lists(st.tuples(st.lists(_items, max_size=6), st.booleans()), min_size=1, max_size=7)


def batch(items: Sequence[tuple[str, str, int, str, int]], tenant: str) -> Batch:
    points: list[Point] = []
    evidence: list[Evidence] = []
    controls: list[ControlTotal] = []
    counts: list[EvidenceCount] = []
    for kind, account, at, quantity, decoration in items:
        match kind:
            case "delta":
                points.append(point(decorated(stream(account, tenant=tenant), decoration), at - 1, at, quantity))
            case "total":
                of = decorated(stream(account, "jobs", tenant=tenant, temporality=Temporality.CUMULATIVE), decoration)
                points.append(point(of, 0, at, quantity))
            case "level":
                of = decorated(stream(account, "seats", tenant=tenant, temporality=Temporality.LEVEL), decoration)
                points.append(point(of, 0, at, quantity))
            case "sourced":
                # Whoever is billed, they are one source's: the account and the factor are what a file says.
                factor = Decimal(10 if decoration else 1)
                of = stream(account, "stored", tenant=tenant, temporality=Temporality.LEVEL)
                of = replace(of, source=Source(fingerprint(tenant), factor))
                points.append(point(of, 0, at, Decimal(quantity) * factor))
            case "span":
                evidence.append(span(account, at, quantity, tenant))
            case "control":
                controls.append(told(at, quantity, tenant=tenant))
            case "count":
                one = on_spans(at, quantity, account)
                counts.append(one._replace(producer=replace(one.producer, tenant=tenant)))
    return Batch(points=points, evidence=evidence, controls=controls, counts=counts)


def decorated(of: Stream, decoration: int) -> Stream:
    return replace(of, resource=Attributes.of({"service.name": "shop", "decorated": decoration}))


def span(account: str, at: int, quantity: str, tenant: str) -> Evidence:
    times = (BASE + (at - 1) * SECOND, BASE + at * SECOND)
    ids = (b"t" * 16, bytes([at] * 8))
    return Evidence(tenant, account, "m", *ids, *times, Decimal(quantity), "GET", "shop", None, Attributes())


def said(result: WriteResult) -> object:
    """A result, whatever the order of its conflicts."""
    conflicts = Counter((c.account, c.meter, c.refusal, c.payload) for c in result.conflicts)
    return result.inserted, result.duplicates, result.evidence, conflicts


async def stored(store: Store, tenant: str) -> dict[str, Counter[object]]:
    async with store.reading() as connection:
        return {
            table: Counter(await (await connection.execute(statement, [tenant])).fetchall())
            for table, statement in TABLES.items()
        }


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests=_requests)
def test_any_grouping_is_as_good_as_one_by_one(
    blocking_store: Store,
    event_loop_runner: asyncio.AbstractEventLoop,
    requests: list[tuple[list[tuple[str, str, int, str, int]], bool]],
) -> None:
    """A request's flag says that a new group begins with it. Two tenants: neither way finds the other's rows."""

    async def compare() -> None:
        one_by_one, together = (f"tenant-{next(_tenants)}" for _ in range(2))
        expected = [said(await blocking_store.write(batch(items, one_by_one))) for items, _ in requests]
        groups: list[list[writer.Encoded]] = [[]]
        for items, begins in requests:
            if begins:
                groups.append([])
            groups[-1].append(writer.encode(batch(items, together)))
        found = [said(r) for group in groups if group for r in await blocking_store.write_together(group)]
        assert found == expected
        assert await stored(blocking_store, together) == await stored(blocking_store, one_by_one)

    event_loop_runner.run_until_complete(compare())


async def test_the_first_of_a_group_counts_and_the_others_are_told(store: Store) -> None:
    of = stream()
    batches = [Batch(points=[point(of, 0, 10, quantity)]) for quantity in (4, 4, 5)]
    first, duplicate, conflict = await store.write_together([writer.encode(one) for one in batches])
    assert (first.inserted, first.duplicates, list(first.conflicts)) == (1, 0, [])
    assert (duplicate.inserted, duplicate.duplicates, list(duplicate.conflicts)) == (0, 1, [])
    assert (conflict.inserted, conflict.duplicates) == (0, 0)
    assert [c.refusal.reason for c in conflict.conflicts] == [Reason.VALUE_CONFLICT]
    assert "4 was stored" in conflict.conflicts[0].refusal.detail


async def test_what_repeats_a_contradiction_is_held_against_what_is_stored(store: Store) -> None:
    of = stream()
    await store.write(Batch(points=[point(of, 0, 10, 4)]))
    for quantities in ((5, 4, 5), ("4.0", 4, 5)):
        batches = [Batch(points=[point(of, 0, 10, quantity)]) for quantity in quantities]
        results = await store.write_together([writer.encode(one) for one in batches])
        conflicts = [int(quantity == 5) for quantity in quantities]
        assert [(r.inserted, r.duplicates, len(r.conflicts)) for r in results] == [(0, 1 - n, n) for n in conflicts]
        assert results[2].conflicts[0].refusal.detail.startswith("4 was stored")


async def test_a_request_that_the_database_cannot_hold_leaves_its_group_whole(store: Store) -> None:
    async with committing(store, Limits()) as found:
        good = [found.write(Batch(points=[point(stream(f"account-{i}"), 0, 10, 1)])) for i in range(5)]
        bad = found.write(Batch(points=[point(stream("a\0b"), 0, 10, 1), point(stream("fine"), 0, 10, 1)]))
        results = await asyncio.gather(*good[:3], bad, *good[3:])
    assert [result.inserted for result in results] == [1] * 6
    assert [c.refusal.reason for c in results[3].conflicts] == [Reason.NOT_STORABLE]
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT count(*), sum(quantity) FROM usage_point")).fetchall()
    assert rows == [(6, 6)]


async def test_many_collectors_with_the_same_points_in_groups_do_not_stand_in_each_others_way(
    store: Store, dsn: str
) -> None:
    """Each sends the same requests in another order: every transaction meets points that another has not committed."""
    requests = [
        Batch(points=[point(stream(f"account-{i % 13}"), i, i + 1, 1) for i in range(n, n + 60)]) for n in range(40)
    ]
    others = [Store(dsn) for _ in range(2)]
    for other in others:
        await other.open()

    async def collector(one: Store, seed: int) -> list[WriteResult]:
        order = list(requests)
        random.Random(seed).shuffle(order)
        async with committing(one, Limits(group_points=200)) as found:
            return await asyncio.gather(*(found.write(request) for request in order))

    results = await asyncio.gather(*(collector(one, seed) for seed, one in enumerate([store, *others])))
    for other in others:
        await other.close()
    assert sum(r.inserted for some in results for r in some) == 99, "each point once: 40 requests begin one apart"
    assert sum(r.duplicates for some in results for r in some) == 3 * 40 * 60 - 99
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT count(*), sum(quantity) FROM usage_point")).fetchall()
    assert rows == [(99, 99)]


@pytest.mark.parametrize("seed", [1, 2])
async def test_backends_that_are_ended_in_the_middle_of_groups(store: Store, server: str, dsn: str, seed: int) -> None:
    """Every request is either committed or told to come back; what comes back makes the total exact."""
    rng = random.Random(seed)
    requests = [
        Batch(points=[point(stream(f"a{i}", producer=str(n)), n, n + 1, i) for i in range(60)]) for n in range(120)
    ]
    acknowledged = 0
    done = asyncio.Event()
    left = iter(requests)

    async with committing(store, Limits(group_points=400)) as found:

        async def client() -> None:
            nonlocal acknowledged
            for request in left:
                while True:
                    try:
                        result = await found.write(request)
                    except StoreUnavailable:
                        await asyncio.sleep(0.01)
                    else:
                        assert result.inserted + result.duplicates == 60
                        acknowledged += 1
                        break

        async def ending() -> int:
            ended = 0
            while not done.is_set():
                ended += await asyncio.to_thread(end_connections, server, dsn)
                await asyncio.sleep(rng.uniform(0.005, 0.1))
            return ended

        killer = asyncio.ensure_future(ending())
        await asyncio.gather(*(client() for _ in range(8)))
        done.set()
        assert await killer > 0
        assert found.progress.requests > found.progress.groups, "some shared a transaction"
    assert acknowledged == 120
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT count(*), sum(quantity) FROM usage_point")).fetchall()
    assert rows == [(120 * 60, 120 * sum(range(60)))]


async def test_levels_of_a_group_are_inserted_in_one_order(store: Store, dsn: str) -> None:
    """Two collectors that insert the same in two orders wait for each other until the server ends one of them."""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(
            """CREATE TABLE noted (number serial, kind text, account text, time timestamptz);
               CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN
                   IF TG_LEVEL = 'ROW' THEN
                       INSERT INTO tallymark.noted (kind, account, time) VALUES ('row', NEW.account, NEW.time);
                   ELSE
                       INSERT INTO tallymark.noted (kind) VALUES ('statement');
                   END IF;
                   RETURN NULL;
               END $$;
               CREATE TRIGGER note_row AFTER INSERT ON usage_level FOR EACH ROW EXECUTE FUNCTION note();
               CREATE TRIGGER note_statement AFTER INSERT ON usage_level FOR EACH STATEMENT EXECUTE FUNCTION note()"""
        )
    of = {name: stream(name, "seats", temporality=Temporality.LEVEL) for name in ("a", "b", "c")}
    sent = [(name, at) for name in "cab" for at in (30, 10, 20)]
    group = [Batch(points=[point(of[name], 0, at, 1), point(of[name], 0, at + 1, 1)]) for name, at in sent]
    results = await store.write_together([writer.encode(one) for one in group])
    assert [(r.inserted, r.duplicates) for r in results] == [(2, 0)] * len(group)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        rows = connection.execute("SELECT account, time FROM noted WHERE kind = 'row' ORDER BY number").fetchall()
        statements = connection.execute("SELECT count(*) FROM noted WHERE kind = 'statement'").fetchone()
    assert rows == sorted(rows)
    assert (len(rows), statements) == (2 * len(group), (1,))
