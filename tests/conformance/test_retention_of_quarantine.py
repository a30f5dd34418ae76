"""What the quarantine has open and could still be billed keeps the points of its time, and nothing else in it does."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone

import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from psycopg.errors import QueryCanceled

from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.retention import Dropped, drop_old
from tallymark_collector.aggregates.stopping import Stopping
from tallymark_collector.aggregates.unsettled import (
    NEVER,
    PAGE_BYTES,
    held_by_quarantine,
    oldest_unsettled,
    opened_since,
    with_unsettled,
)
from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.model import Batch, Reason
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine.settling import NotSettled, Person, discard, reopen
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tests.conformance.test_plans_of_queries import nodes
from tests.conformance.test_quarantine import ACME, ANNE, DAY, NOW, bill, one, queue, send, span, the_one
from tests.conformance.test_quarantine_levels import sent
from tests.conformance.test_retention_in_pieces import COMPARING, WAITING, locked, waiting
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import BASE, SECOND, key_values, number, point, request, stream, sum_metric

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
LATER = ZERO + timedelta(days=40)
KEEP = Retention(points=timedelta(days=15))
NOBODY = {"route": "/"}


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        cursor = connection.execute(statement)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


async def settle_down(store: Store) -> None:
    while await store.refresh():
        pass
    while (await audit_changed(store, LATER)).hours:
        pass


async def drop(store: Store, retention: Retention = KEEP) -> Dropped:
    await settle_down(store)
    return await drop_old(store, retention, LATER)


async def used(store: Store) -> None:
    await store.write(Batch(points=[point(stream(), 86_400 * day, 86_400 * day + 5, 3) for day in range(40)]))


@pytest.mark.engines("timescale")
async def test_usage_of_nobody_is_still_attributed_when_its_points_would_be_old(store: Store) -> None:
    await used(store)
    end = BASE + 9 * DAY
    await send(store, one(number(end - SECOND, end, 500, NOBODY)), now_ns=end)
    item = await the_one(store)
    kept = (await drop(store)).points_before
    assert kept is not None
    assert kept <= ZERO + timedelta(days=9), "what is older goes"
    told = str(await held_by_quarantine(store, KEEP, LATER))
    assert f"the oldest is {item.id[:12]} (account_missing, meter 'api.requests', tenant 'default')" in told
    assert "--drop-unsettled" in told
    assert await held_by_quarantine(store, Retention(points=timedelta(days=35)), LATER) is None, "it is not old yet"
    assert await held_by_quarantine(store, Retention(), LATER) is None

    assert (await bill(store, item, account="acme", now_ns=BASE + 40 * DAY)).action.inserted == 1
    assert await held_by_quarantine(store, KEEP, LATER) is None
    kept = (await drop(store)).points_before
    assert kept is not None
    assert kept > ZERO + timedelta(days=9)
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT sum(quantity) FROM usage_daily")).fetchone()
    assert row == (40 * 3 + 500,)


@pytest.mark.engines("timescale")
async def test_who_does_not_want_to_wait_for_the_quarantine_does_not(store: Store) -> None:
    await used(store)
    await send(store, one(number(BASE, BASE + SECOND, 500, NOBODY)))
    assert (await drop(store)).points_before is None
    loose = Retention(points=KEEP.points, keep_unsettled=False)
    assert await held_by_quarantine(store, loose, LATER) is None
    kept = (await drop(store, loose)).points_before
    assert kept is not None
    with pytest.raises(NotSettled, match="have been dropped"):
        await bill(store, await the_one(store), account="acme", now_ns=BASE + 40 * DAY)
    # It can never be billed now, and holds nothing more.
    assert await held_by_quarantine(store, KEEP, LATER) is None


@pytest.mark.engines("timescale")
async def test_what_is_set_aside_during_a_run_keeps_the_pieces_of_its_time(store: Store, dsn: str) -> None:
    await used(store)
    await settle_down(store)
    end = BASE + 16 * DAY
    async with locked(dsn, COMPARING):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, LATER))
        await waiting(dsn)
        await send(store, one(number(end - SECOND, end, 500, NOBODY)), now_ns=end)
    kept = (await dropping).points_before
    assert kept is not None, "what is older goes"
    assert kept <= ZERO + timedelta(days=16)
    assert (await bill(store, await the_one(store), account="acme", now_ns=BASE + 40 * DAY)).action.inserted == 1


@pytest.mark.engines("timescale")
@pytest.mark.parametrize("again", [False, True])
async def test_what_is_opened_while_a_piece_is_compared_keeps_it(store: Store, dsn: str, again: bool) -> None:
    """Set aside then, or discarded before and opened again."""
    await used(store)
    await settle_down(store)
    nobodys = one(number(BASE, BASE + SECOND, 500, NOBODY))
    if again:
        await send(store, nobodys)
        item = await the_one(store)
        await discard(store, item, Person("anne", "a test"))
    async with locked(dsn, COMPARING):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, LATER))
        await waiting(dsn)
        if again:
            await reopen(store, item, ANNE)
        else:
            await send(store, nobodys)
    assert await dropping == Dropped()
    assert (await bill(store, await the_one(store), account="acme", now_ns=BASE + 40 * DAY)).action.inserted == 1
    assert (await drop(store)).points_before is not None, "once it is settled they go"


@pytest.mark.engines("timescale")
@pytest.mark.parametrize("name", ["a contradiction of totals", "old usage"])
async def test_what_holds_nothing_may_come_while_a_piece_is_compared(store: Store, dsn: str, name: str) -> None:
    """It can never be billed, or its time is another."""
    await used(store)
    await settle_down(store)
    first, *others = ITEMS["a contradiction of totals"][0]
    await send(store, first)
    await settle_down(store)
    async with locked(dsn, COMPARING):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, LATER))
        await waiting(dsn)
        if name == "old usage":
            late = BASE + 35 * DAY
            others = [one(number(late - SECOND, late, 500, NOBODY))]
        await send(store, *others, now_ns=BASE + 40 * DAY)
    assert (await dropping).points_before is not None
    assert len(await queue(store)) == 1


@pytest.mark.engines("timescale")
async def test_many_that_can_never_be_billed_may_come_while_a_piece_is_compared(
    store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are looked into, and one that can be billed behind them is found."""
    monkeypatch.setattr("tallymark_collector.aggregates.unsettled.PAGE", 2)
    await used(store)
    await settle_down(store)
    never = [one(number(BASE + offset + SECOND, BASE + offset, 5, ACME), temporality=2) for offset in range(4)]
    async with locked(dsn, COMPARING):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, LATER))
        await waiting(dsn)
        await send(store, *never)
    kept = (await dropping).points_before
    assert kept is not None
    assert len(await queue(store)) == 4
    end = int(kept.timestamp()) * SECOND + DAY
    async with store.session() as connection:
        bounds = await with_unsettled(connection, {"keep_unsettled": True}, LATER)
        assert not await opened_since(connection.execute, bounds, LATER)
        never = [one(number(end + offset + SECOND, end + offset, 5, ACME), temporality=2) for offset in range(4)]
        await send(store, *never, one(number(end, end + SECOND, 5, NOBODY)), now_ns=end + SECOND)
        assert await opened_since(connection.execute, bounds, LATER)
        assert not await opened_since(connection.execute, bounds, kept + timedelta(days=1))


SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(120);
    RETURN NULL;
END $$;
CREATE TRIGGER slow AFTER UPDATE ON usage_kept FOR EACH STATEMENT EXECUTE FUNCTION slow();
"""


@pytest.mark.engines("timescale")
@pytest.mark.parametrize("what", ["points", "levels"])
async def test_whatever_takes_long_while_writers_are_stopped_is_given_up(store: Store, dsn: str, what: str) -> None:
    if what == "points":
        await used(store)
    else:
        await send(store, sent("gauge", number(0, BASE, 2, ACME), number(0, BASE + SECOND, 3, ACME)))
    await settle_down(store)
    execute(dsn, SLOW)
    with pytest.raises(StoreUnavailable, match="statement timeout"):
        await drop_old(store, KEEP, LATER, [])
    execute(dsn, "DROP TRIGGER slow ON usage_kept")
    dropped = await drop_old(store, KEEP, LATER)
    assert (dropped.points_before if what == "points" else dropped.levels_before) is not None


async def test_statements_that_are_short_each_and_long_together_are_given_up(store: Store) -> None:
    async with store.session() as connection:

        async def many() -> None:
            async with connection.transaction():
                stopping = Stopping(connection, seconds=0.5)
                for _ in range(1000):
                    await stopping.execute("SELECT pg_sleep(0.01)")

        with pytest.raises(QueryCanceled):
            await many()
        async with connection.transaction():
            assert await (await Stopping(connection).execute("SELECT %s::int", [1])).fetchone() == (1,)
        assert await (await connection.execute("SHOW statement_timeout")).fetchone() == ("0",)


@pytest.mark.engines("timescale")
async def test_a_level_that_is_set_aside_while_levels_are_about_to_go_keeps_them(store: Store, dsn: str) -> None:
    await send(store, sent("gauge", number(0, BASE, 2, ACME), number(0, BASE + SECOND, 3, ACME)))
    async with locked(dsn, "LOCK TABLE billing_period IN ACCESS EXCLUSIVE MODE"):
        dropping = asyncio.ensure_future(drop_old(store, KEEP, LATER))
        await waiting(dsn)
        await send(store, sent("gauge", number(0, BASE, 5, NOBODY), number(0, BASE, 2, ACME)))
    assert await dropping == Dropped()
    assert (await bill(store, await the_one(store), account="globex")).action.inserted == 1
    assert (await drop(store)).levels_before is not None


@pytest.mark.engines("timescale")
async def test_a_loose_run_does_not_wait_for_what_comes_meanwhile(store: Store, dsn: str) -> None:
    await used(store)
    await settle_down(store)
    async with locked(dsn, COMPARING):
        loose = Retention(points=KEEP.points, keep_unsettled=False)
        dropping = asyncio.ensure_future(drop_old(store, loose, LATER))
        await waiting(dsn)
        await send(store, one(number(BASE, BASE + SECOND, 500, NOBODY)))
    assert (await dropping).points_before is not None


HELD = """
CREATE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(4711);
    RETURN NULL;
END $$;
CREATE TRIGGER held AFTER INSERT ON usage_quarantine FOR EACH STATEMENT EXECUTE FUNCTION held();
"""


@pytest.mark.engines("timescale")
async def test_what_is_about_to_be_set_aside_is_waited_for(store: Store, dsn: str) -> None:
    """A request that holds nothing else is being written when the piece is about to go."""
    await used(store)
    await settle_down(store)
    execute(dsn, HELD)
    async with locked(dsn, "SELECT pg_advisory_xact_lock(4711)"):
        sending = asyncio.ensure_future(send(store, one(number(BASE, BASE + SECOND, 500, NOBODY))))
        await waiting(dsn)
        dropping = asyncio.ensure_future(drop_old(store, KEEP, LATER, [0.1] * 600))
        for _ in range(3000):
            if dropping.done() or len(await asyncio.to_thread(execute, dsn, WAITING)) == 2:
                break
            await asyncio.sleep(0.02)
        assert not dropping.done()
    await sending
    assert await dropping == Dropped()
    assert (await bill(store, await the_one(store), account="acme", now_ns=BASE + 40 * DAY)).action.inserted == 1


async def holds(store: Store) -> bool:
    async with store.session() as connection:
        return await oldest_unsettled(connection, LATER) is not None


TOTAL = sum_metric([number(BASE, BASE + SECOND, 1, {})], "tallymark.control.total", "1", 2)
OTHER = {"service.name": "kong", "service.instance.id": "one"}
HUGE = one(number(BASE, BASE + SECOND, 5, ACME))
HUGE.resource_metrics[0].resource.attributes.extend(key_values({f"label.{n}": "x" for n in range(300)}))


def two(*values: int, temporality: int) -> list[ExportMetricsServiceRequest]:
    return [one(number(BASE, BASE + SECOND, value, ACME), temporality=temporality) for value in values]


ITEMS: Mapping[str, tuple[list[ExportMetricsServiceRequest], str, bool]] = {
    "usage of nobody": ([one(number(BASE, BASE + SECOND, 5, NOBODY))], "account_missing", True),
    "a running total of nobody": (
        [one(number(BASE, BASE + SECOND, 5, NOBODY), temporality=2)],
        "account_missing",
        True,
    ),
    "old usage": ([one(number(BASE - 400 * DAY, BASE - 400 * DAY + 1, 5, ACME))], "time_too_old", True),
    "a contradiction": (two(5, 6, temporality=1), "value_conflict", True),
    "a contradiction of totals": (two(5, 6, temporality=2), "value_conflict", False),
    "an increase that starts after it ends": (
        [one(number(BASE + SECOND, BASE, 5, ACME))],
        "time_reversed",
        True,
    ),
    "a total that does": ([one(number(BASE + SECOND, BASE, 5, ACME), temporality=2)], "time_reversed", False),
    "a negative value": ([one(number(BASE, BASE + SECOND, -5, ACME))], "value_negative", False),
    "no time": ([one(number(BASE, 0, 5, ACME))], "time_missing", False),
    "a histogram": (
        [metrics_of(OTHER, histogram([histogram_point(BASE, BASE + SECOND, 5, None, ACME)]), scope="tallymark")],
        "type_unsupported",
        False,
    ),
    "usage beside a resource that is too large": ([HUGE], "resource_too_large", False),
    "a control total": ([request(TOTAL, scope="tallymark.control")], "control_invalid", False),
}


@pytest.mark.parametrize("name", ITEMS)
async def test_what_holds_is_what_can_still_be_billed(store: Store, dsn: str, name: str) -> None:
    messages, reason, expected = ITEMS[name]
    await send(store, *messages)
    assert [entry.reason for entry in await queue(store)] == [reason]
    assert await holds(store) is expected
    if expected:
        item = await the_one(store)
        await discard(store, item, Person("anne", "a test"))
        assert not await holds(store)
        await reopen(store, item, ANNE)
        assert await holds(store)
        execute(dsn, "UPDATE usage_kept SET points_from = '2026-12-01'")
        assert not await holds(store), "its time has been dropped already"


async def test_evidence_bills_nothing_and_holds_nothing(store: Store) -> None:
    evidence = span({"tallymark.meter.api.requests": 1})
    await Pipeline(store, now_ns=lambda: NOW).traces("default", evidence.SerializeToString())
    assert [(entry.reason, entry.signal) for entry in await queue(store)] == [("account_missing", "traces")]
    assert not await holds(store)


RULES = parse_rules("meters: {calls: {unit: '1', sources: [{metric: h, quantity: count, account: consumer}]}}")


async def test_usage_by_a_file_of_meters_holds_whatever_it_is_made_of(store: Store) -> None:
    metric = histogram([histogram_point(BASE, BASE + SECOND, 5, None, {})], "h", "s", 2)
    collector = Pipeline(store, now_ns=lambda: NOW, metering=Metering(RULES))
    await collector.metrics("default", metrics_of(OTHER, metric).SerializeToString())
    assert [entry.reason for entry in await queue(store)] == ["account_missing"]
    assert await holds(store)


async def test_a_level_is_held_as_long_as_levels_of_its_time_are_there(store: Store, dsn: str) -> None:
    await send(store, sent("gauge", number(0, BASE, 5, NOBODY), number(0, BASE, 2, ACME)))
    assert await holds(store)
    execute(dsn, "UPDATE usage_kept SET points_from = '2026-12-01'")
    assert await holds(store), "its points are gone, its levels are not"
    execute(dsn, "UPDATE usage_kept SET points_from = '-infinity', levels_from = '2026-12-01'")
    assert not await holds(store)


async def test_many_that_can_never_be_billed_do_not_hide_one_that_can(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tallymark_collector.aggregates.unsettled.PAGE", 2)
    pairs = [one(number(BASE, BASE + offset // 2 * SECOND, 5 + offset, ACME), temporality=2) for offset in range(2, 12)]
    await send(store, *pairs)
    assert not await holds(store)
    await send(store, one(number(BASE, BASE + 100 * SECOND, 5, NOBODY)))
    async with store.session() as connection:
        found = await oldest_unsettled(connection, LATER)
    assert found is not None
    assert found.time == ZERO + timedelta(seconds=100)
    assert len(await queue(store)) > 4


NEVER_SQL = """
INSERT INTO usage_quarantine (account, digest, tenant, meter, reason, detail, signal, time, payload)
SELECT 'acme', decode(md5(n::text), 'hex'), 'default', 'api.requests', 'time_reversed', '', 'metrics',
       '2026-09-21T14:00Z'::timestamptz + n * interval '1 second', %s
FROM generate_series(1, %s) n"""


async def test_large_payloads_are_not_in_memory_together(store: Store, dsn: str) -> None:
    large = one(number(BASE + SECOND, BASE, 5, {**ACME, "label": "x" * (PAGE_BYTES // 3)}), temporality=2)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(NEVER_SQL, [large.SerializeToString(), 40])
    async with store.session() as connection:
        bounds = await with_unsettled(connection, {"keep_unsettled": True}, LATER)
        tracemalloc.start()
        assert await oldest_unsettled(connection, LATER) is None
        assert not await opened_since(connection.execute, bounds, LATER)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * PAGE_BYTES, "all of them take more than three times as much"


@pytest.mark.parametrize("settled", [True, False])
async def test_what_came_before_is_not_read_while_writers_are_stopped(store: Store, dsn: str, settled: bool) -> None:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(NEVER_SQL, [one(number(BASE, BASE, 5, NOBODY)).SerializeToString(), 5000])
        connection.execute("UPDATE usage_quarantine SET reason = 'account_missing', recorded_at = '2026-09-22'")
        if settled:
            connection.execute(
                "INSERT INTO quarantine_action (account, digest, number, action, tenant, acted_by, because)"
                " SELECT account, digest, 1, 'discarded', tenant, 'anne', 'a test' FROM usage_quarantine"
            )
        connection.execute("VACUUM ANALYZE usage_quarantine")
        connection.execute("VACUUM ANALYZE quarantine_action")
    async with store.session() as asking:
        bounds = await with_unsettled(asking, {"keep_unsettled": True}, LATER)
        assert (bounds["unsettled"] is None) == settled
        explained: list[float] = []

        async def explain(statement: str, given: Mapping[str, object]) -> object:
            row = await (
                await asking.execute(f"EXPLAIN (ANALYZE, TIMING off, FORMAT json) {statement}", given)
            ).fetchone()
            assert row is not None
            [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
            for node in nodes(document["Plan"]):
                if node.get("Relation Name") in ("usage_quarantine", "quarantine_action"):
                    removed = node.get("Rows Removed by Filter", 0)
                    explained.append((node["Actual Rows"] + removed) * node["Actual Loops"])
            return await asking.execute(statement, given)

        assert not await opened_since(explain, bounds, LATER)
    assert explained
    assert sum(explained) < 100


def test_a_reason_that_only_a_newer_version_knows_may_be_money() -> None:
    assert "from_the_future" not in NEVER
    assert {Reason.VALUE_NEGATIVE.value, Reason.TYPE_UNSUPPORTED.value, Reason.RESOURCE_TOO_LARGE.value} <= {*NEVER}
    assert not {Reason.ACCOUNT_MISSING.value, Reason.TIME_TOO_OLD.value, Reason.NOT_STORABLE.value} & {*NEVER}
