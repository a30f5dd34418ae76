"""The same increase is one account's, whatever files of meters collectors have, and whoever gets it when."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal

import psycopg
import pytest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.metering.rules import Rules
from tallymark_collector.pipeline import Outcome, Pipeline
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import NotSettled, release
from tallymark_collector.store import Store, locks, source_streams
from tallymark_collector.store.database import Connection
from tests.conformance.test_plans_of_queries import nodes
from tests.conformance.test_quarantine import ANNE, NOW, billed, queue, the_one
from tests.support.telemetry import metrics_of
from tests.support.usage import BASE, SECOND, number, sum_metric

KONG = {"service.name": "kong", "service.instance.id": "one"}


def file(account: str, factor: str = "1") -> Rules:
    """Who is billed for the key k: everybody else is called by the key."""
    return parse_rules(
        f"""
        meters:
          calls:
            unit: "1"
            sources:
              - metric: c
                quantity: value
                factor: {factor}
                account: {{attribute: key, map: {{k: {account}, other: other}}}}
        """
    )


def sent(*points: tuple[int, int], key: str | None = "k", resource: dict[str, str] = KONG) -> bytes:
    """Increases of a second each: (second, value)."""
    attributes = {} if key is None else {"key": key}
    several = [number(BASE + n * SECOND, BASE + (n + 1) * SECOND, value, attributes) for n, value in points]
    return metrics_of(resource, sum_metric(several, "c", "1")).SerializeToString()


def collector(store: Store, rules: Rules) -> Pipeline:
    return Pipeline(store, now_ns=lambda: NOW, metering=Metering(rules))


async def send(pipeline: Pipeline, *bodies: bytes) -> list[Outcome]:
    return [await pipeline.metrics("default", body) for body in bodies]


async def is_right(store: Store) -> bool:
    async with store.reading() as connection:
        return (await audit(connection)).clean


@asynccontextmanager
async def another(dsn: str) -> AsyncIterator[Store]:
    store = Store(dsn)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def test_what_comes_again_under_another_file_stays_whose_it_was(store: Store, dsn: str) -> None:
    one, two = sent((0, 5)), sent((1, 7))
    async with another(dsn) as second:
        old, new = collector(store, file("paul")), collector(second, file("anne"))
        await send(old, one)
        await send(new, one, two)
        assert await billed(store) == {("paul", "calls"): 5, ("anne", "calls"): 7}
        # Each knows by now what the other has billed, and so does one that has just started.
        await send(old, one, two)
        await send(new, one, two)
        async with another(dsn) as third:
            await send(collector(third, file("eve")), one, two, sent((2, 1)))
        await send(old, sent((2, 1)), sent((3, 2)))
    assert await billed(store) == {("paul", "calls"): 7, ("anne", "calls"): 7, ("eve", "calls"): 1}
    assert (old.totals.duplicates, new.totals.duplicates, await queue(store)) == (3, 3, [])
    assert await is_right(store)


async def test_another_amount_of_the_same_increase_is_kept_and_not_billed(store: Store) -> None:
    await send(collector(store, file("paul")), sent((0, 5)))
    [answer] = await send(collector(store, file("anne", "2")), sent((0, 5)))
    assert answer.rejected == 1
    assert (
        "5 was stored before for the same stream and interval and billed to account 'paul', 10 came" in answer.message
    )
    assert await billed(store) == {("paul", "calls"): 5}
    assert [item.reason for item in await queue(store)] == ["value_conflict"]


async def test_resources_that_name_their_accounts_are_two_senders(store: Store) -> None:
    """Of one process, at the same times, with the same amounts: both are usage."""
    rules = parse_rules(
        'meters: {calls: {unit: "1", sources: [{metric: c, quantity: value, account: {resource: customer}}]}}'
    )
    pipeline = collector(store, rules)
    bodies = [sent((0, 5), (1, 6), resource={**KONG, "customer": name}) for name in ("paul", "anne")]
    await send(pipeline, *bodies, *bodies)
    assert await billed(store) == {("paul", "calls"): 11, ("anne", "calls"): 11}


def of_key(account: str) -> Rules:
    return parse_rules(
        f'meters: {{calls: {{unit: "1", sources: [{{metric: c, quantity: value, account: {account}}}]}}}}'
    )


async def attribute(store: Store, account: str) -> None:
    await release(store, await the_one(store), Decision(account=account), ANNE, NOW, of_key("key"))


async def test_what_was_attributed_to_somebody_is_not_billed_to_whom_the_file_names_later(store: Store) -> None:
    nobodys = sent((0, 5), key=None)
    await send(collector(store, of_key("key")), nobodys)
    await attribute(store, "paul")
    later = collector(store, of_key("[key, {resource: service.name}]"))
    await send(later, nobodys, sent((1, 3), key=None))
    assert await billed(store) == {("paul", "calls"): 5, ("kong", "calls"): 3}
    assert later.totals.duplicates == 1


async def test_what_the_file_has_billed_meanwhile_is_not_attributed_to_another(store: Store) -> None:
    nobodys = sent((0, 5), key=None)
    await send(collector(store, of_key("key")), nobodys)
    await send(collector(store, of_key("[key, {resource: service.name}]")), nobodys)
    with pytest.raises(NotSettled, match="the same increase came again and was billed to account 'kong'"):
        await attribute(store, "paul")
    await attribute(store, "kong")
    assert await billed(store) == {("kong", "calls"): 5}


async def test_a_release_with_an_identity_of_its_own_is_apart_from_the_source(store: Store) -> None:
    """As usage beside what was billed: somebody has said so."""
    await send(collector(store, file("paul")), sent((0, 5)))
    await send(collector(store, file("anne", "2")), sent((0, 5)))
    await release(store, await the_one(store), Decision(additional=True), ANNE, NOW, file("anne", "2"))
    assert await billed(store) == {("paul", "calls"): 5, ("anne", "calls"): 10}


@pytest.mark.parametrize("writers", [2, 5])
async def test_two_files_at_the_very_first_moment(store: Store, dsn: str, writers: int) -> None:
    """Nobody knows the source, and all bill it at once to somebody else."""
    for n in range(15):
        async with another(dsn) as second:
            stores = [store, second]
            pipelines = [collector(stores[place % 2], file(f"account{place}")) for place in range(writers)]
            body = sent((0, n + 1), key="k", resource={**KONG, "service.instance.id": f"i{n}"})
            await asyncio.gather(*(pipeline.metrics("default", body) for pipeline in pipelines))
    assert sum((await billed(store)).values()) == sum(range(1, 16))
    assert await queue(store) == []


async def test_an_increase_that_is_not_committed_yet_is_waited_for(store: Store, dsn: str) -> None:
    """One collector, who knows of a single account, is in the middle of its transaction when another one bills the same
    increase to a second."""
    old = collector(store, file("paul"))
    await send(old, sent((0, 1)))
    beside, go_on = asyncio.Event(), asyncio.Event()

    async def waiting(_: Connection) -> None:
        beside.set()
        await go_on.wait()

    class Holding:
        async def write(self, batch: object) -> object:
            return await store.write(batch, waiting)  # type: ignore[arg-type]

    holding = Pipeline(Holding(), now_ns=lambda: NOW, metering=Metering(file("paul")))  # type: ignore[arg-type]
    async with another(dsn) as second:
        first = asyncio.ensure_future(holding.metrics("default", sent((1, 7))))
        await asyncio.wait_for(beside.wait(), 60)
        then = asyncio.ensure_future(collector(second, file("anne")).metrics("default", sent((1, 7), (2, 9))))
        try:
            await _wait_for_a_lock(dsn)
            assert not then.done()
        finally:
            go_on.set()
        await asyncio.wait_for(asyncio.gather(first, then), 60)
    assert await billed(store) == {("paul", "calls"): 8, ("anne", "calls"): 9}


async def _wait_for_a_lock(dsn: str) -> None:
    query = """SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
               WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        for _ in range(6000):
            row = await (await connection.execute(query)).fetchone()
            if row is not None and row[0]:
                return
            await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


async def test_a_source_of_one_account_costs_one_question_for_a_transaction(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many points; of a stream that this process has registered nothing else is asked."""
    pipeline = collector(store, file("paul"))
    await send(pipeline, sent((0, 1)), sent((1, 1), key="other"))
    taken: list[object] = []

    async def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this is for sources with several streams, or new ones")

    shared = locks.shared

    async def count(connection: Connection, name: str) -> None:
        if name == locks.SOURCES:
            taken.append(name)
        await shared(connection, name)

    monkeypatch.setattr(source_streams, "elsewhere", refuse)
    monkeypatch.setattr(source_streams, "_register", refuse)
    monkeypatch.setattr(locks, "shared", count)
    await send(pipeline, sent(*((n, 1) for n in range(2, 500))))
    assert taken == [locks.SOURCES]


@pytest.mark.parametrize("seed", range(6))
async def test_random_files_and_retries_at_once(store: Store, dsn: str, seed: int) -> None:
    """Collectors that start anew with other files while clients send the same bytes to any of them: each increase is
    one account's."""
    rng = random.Random(seed)
    names = ["paul", "anne", "eve"]
    bodies = [
        sent((n, 2**n), key=key, resource={**KONG, "service.instance.id": instance})
        for key in ("k", "other")
        for instance in ("one", "two")
        for n in range(10)
    ]
    async with another(dsn) as second, another(dsn) as third:
        stores: Sequence[Store] = (store, second, third)
        for _ in range(4):
            pipelines = [collector(each, file(rng.choice(names))) for each in stores]
            several = [(rng.choice(pipelines), rng.choice(bodies)) for _ in range(60)]
            await asyncio.gather(*(pipeline.metrics("default", body) for pipeline, body in several))
            if rng.random() < 0.3:
                rng.choice(stores)._dictionaries.forget()
        await asyncio.gather(*(collector(store, file("paul")).metrics("default", body) for body in bodies))
    found = await billed(store)
    assert found.pop(("other", "calls")) == 2 * (2**10 - 1)
    assert sum(found.values(), Decimal(0)) == 2 * (2**10 - 1)
    async with store.reading() as connection:
        query = "SELECT time, quantity, count(*) FROM usage_point WHERE account <> 'other' GROUP BY 1, 2"
        rows = await (await connection.execute(query)).fetchall()
    assert sorted(count for _, _, count in rows) == [2] * 10, "one of each instance"
    assert await queue(store) == []
    assert await is_right(store)


async def test_increases_are_found_by_their_source(store: Store, dsn: str) -> None:
    """However many sources and points there are, the ones of other accounts at that very time are read; and of what has
    become several since, only that."""
    del store
    fill = """
        INSERT INTO usage_source_stream (source, account, stream, tenant, later)
        SELECT md5('s' || s)::uuid, 'a' || (s + n) % 50, md5('s' || s || n)::uuid, 'default',
               CASE WHEN n > 1 THEN 2 * s + n END
        FROM generate_series(1, 300) s, generate_series(1, 3) n;
        INSERT INTO usage_point (time, start_time, stream, series, part, account, tenant, quantity)
        SELECT to_timestamp(1790000000 + t), to_timestamp(1790000000), md5('s' || s || n)::uuid, md5('r')::uuid, 0,
               'a' || (s + n) % 50, 'default', 1
        FROM generate_series(1, 300) s, generate_series(1, 3) n, generate_series(1, 40) t"""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public") as connection:
        connection.execute(fill)
        row = connection.execute(
            "SELECT array_agg(DISTINCT md5('s' || s)::uuid) FROM generate_series(1, 20) s"
        ).fetchone()
        assert row is not None
        arguments = {
            "sources": row[0],
            "streams": row[0],  # none of theirs: all three are others
            "times": ["2026-09-21 14:13:50+00"] * 20,
            "starts": ["2026-09-21 14:13:20+00"] * 20,
            "parts": [0] * 20,
            "first": "2026-09-21 14:13:50+00",
            "last": "2026-09-21 14:13:50+00",
        }
        for statement in ("SELECT", "ANALYZE"):
            connection.execute(statement)
            found = connection.execute(source_streams._ELSEWHERE_SQL, arguments).fetchall()
            assert len(found) == 20
            points = _read(connection, source_streams._ELSEWHERE_SQL, arguments, ("usage_point", "_hyper"))
            assert points <= 60
        assert _read(connection, source_streams._NEWS_SQL, [601], ("usage_source_stream",)) <= 4


def _read(connection: psycopg.Connection, query: str, arguments: object, tables: tuple[str, ...]) -> float:
    """The rows that were looked at in these tables."""
    row = connection.execute(f"EXPLAIN (ANALYZE, TIMING off, FORMAT json) {query}", arguments).fetchone()  # type: ignore[arg-type, call-overload]
    assert row is not None
    [document] = row[0] if isinstance(row[0], list) else json.loads(row[0])
    # What appends a hypertable's chunks has its name, and their rows once more.
    leaves = [node for node in nodes(document["Plan"]) if not node.get("Plans")]
    scans = [node for node in leaves if node.get("Relation Name", "").startswith(tables)]
    return sum((n["Actual Rows"] + n.get("Rows Removed by Filter", 0)) * n["Actual Loops"] for n in scans)


async def test_what_is_remembered_is_bounded(store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_streams, "MAX_REMEMBERED", 3)
    async with another(dsn) as second:
        for n in range(8):
            body = sent((0, 1), resource={**KONG, "service.instance.id": f"i{n}"})
            await send(collector(store, file("paul")), body)
            await send(collector(second, file("anne")), body)
            known = second._dictionaries.sources
            assert len(known.streams) + len(known.several) <= 5
    assert await billed(store) == {("paul", "calls"): 8}
