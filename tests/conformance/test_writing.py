"""What every engine owes a batch: all or nothing, once, and nothing lost."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from decimal import Decimal

import psycopg
import pytest

from tallymark_collector.model import Attributes, Batch, Evidence, Quarantined, Reason, Refusal, Temporality
from tallymark_collector.store import Store
from tests.support.usage import SECOND, point, stream


async def total(store: Store) -> Decimal:
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT coalesce(sum(quantity), 0) FROM usage_hourly")).fetchone()
    assert row is not None
    return Decimal(row[0])


async def quarantined(store: Store) -> list[tuple[str, str]]:
    async with store.reading() as connection:
        return await (await connection.execute("SELECT account, reason FROM usage_quarantine ORDER BY 1, 2")).fetchall()


async def test_the_same_batch_twice_counts_once(store: Store) -> None:
    batch = Batch(points=[point(stream(), 0, 10, 7), point(stream("globex"), 0, 10, 5)])
    first = await store.write(batch)
    again = await store.write(batch)
    assert (first.inserted, first.duplicates) == (2, 0)
    assert (again.inserted, again.duplicates) == (0, 2)
    assert await total(store) == 12


async def test_a_batch_half_known_adds_the_other_half(store: Store) -> None:
    of = stream()
    await store.write(Batch(points=[point(of, 0, 10, 1)]))
    result = await store.write(Batch(points=[point(of, 0, 10, 1), point(of, 10, 20, 2)]))
    assert (result.inserted, result.duplicates) == (1, 1)
    assert await total(store) == 3


async def test_a_point_repeated_inside_a_batch_counts_once(store: Store) -> None:
    result = await store.write(Batch(points=[point(stream(), 0, 10, 4)] * 3))
    assert (result.inserted, result.duplicates) == (1, 2)
    assert await total(store) == 4


@pytest.mark.parametrize("together", [True, False])
async def test_another_value_for_the_same_point_is_kept_aside(store: Store, together: bool) -> None:
    one, other = point(stream(), 0, 10, 4), point(stream(), 0, 10, 5)
    if together:
        result = await store.write(Batch(points=[one, other]))
    else:
        await store.write(Batch(points=[one]))
        result = await store.write(Batch(points=[other]))
    assert [conflict.refusal.reason for conflict in result.conflicts] == [Reason.VALUE_CONFLICT]
    assert await total(store) == 4
    assert await quarantined(store) == [("acme", "value_conflict")]
    await store.write(Batch(points=[other]))
    assert await quarantined(store) == [("acme", "value_conflict")], "the same refusal twice is one row"


async def test_new_streams_share_what_is_sent_of_their_resource_and_scope(store: Store) -> None:
    """Each row has its own all the same."""
    resources = [Attributes.of({"service.name": "shop", "said": f'"{i}" \\ ü\0'}) for i in range(3)]
    streams = [
        replace(stream(f"a{i % 3}", n=i), resource=resources[i % 3], scope_name=f"scope {i % 2}") for i in range(2500)
    ]
    result = await store.write(Batch(points=[point(of, 0, 10, 1) for of in streams]))
    assert result.inserted == 2500
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT stream, series, scope, resource FROM usage_stream")).fetchall()
        series = await (await connection.execute("SELECT series, attributes FROM usage_series")).fetchall()
    dimensions = dict(series)
    found = {identity: (dimensions[series], scope, resource) for identity, series, scope, resource in rows}
    assert found == {
        of.id: ({"n": i}, f"scope {i % 2}", {"service.name": "shop", "said": f'"{i % 3}" \\ ü\ufffd'})
        for i, of in enumerate(streams)
    }


async def test_points_a_nanosecond_apart_are_two(store: Store) -> None:
    of = stream()
    first = point(of, 0, 10, 4)
    await store.write(Batch(points=[first, first._replace(time_ns=first.time_ns + 1)]))
    await store.write(Batch(points=[first._replace(start_ns=first.start_ns + 1)]))
    assert await total(store) == 12


async def test_equal_decimals_with_other_scales_are_duplicates(store: Store) -> None:
    await store.write(Batch(points=[point(stream(), 0, 10, "1.50")]))
    result = await store.write(Batch(points=[point(stream(), 0, 10, "1.5")]))
    assert (result.inserted, result.duplicates, list(result.conflicts)) == (0, 1, [])


async def test_quantities_are_exact(store: Store) -> None:
    of = stream()
    await store.write(Batch(points=[point(of, i, i + 1, "0.1") for i in range(10)]))
    await store.write(Batch(points=[point(of, 50, 51, 2**63 - 1), point(of, 51, 52, "1E+30")]))
    assert await total(store) == 1 + (2**63 - 1) + 10**30


async def test_text_survives(store: Store) -> None:
    account = "a\\b\tc\nd\re'\"\N{SNOWMAN}\\N"
    await store.write(Batch(points=[point(stream(account, route="/\\x/{id}\t"), 0, 10, 1)]))
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT account, attributes->>'route' FROM usage_hourly")).fetchall()
    assert rows == [(account, "/\\x/{id}\t")]


async def test_tenants_with_the_same_account_name_stay_apart(store: Store) -> None:
    await store.write(Batch(points=[point(stream(tenant="one"), 0, 10, 3), point(stream(tenant="two"), 0, 10, 4)]))
    for refreshed in (False, True):
        if refreshed:
            assert await store.refresh() == 2
        async with store.reading() as connection:
            rows = await (
                await connection.execute("SELECT tenant, quantity FROM usage_hourly ORDER BY tenant")
            ).fetchall()
        assert rows == [("one", 3), ("two", 4)]


async def test_concurrent_writers_of_the_same_points_count_once(store: Store) -> None:
    points = [point(stream(f"account-{i % 7}"), i, i + 1, i) for i in range(200)]
    orders = [points, points[::-1], points[100:] + points[:100], points[::2] + points[1::2]]
    results = await asyncio.gather(*(store.write(Batch(points=list(order))) for order in orders * 2))
    assert sum(result.inserted for result in results) == 200
    assert sum(result.duplicates for result in results) == 200 * 7
    assert await total(store) == sum(range(200))


async def test_a_cumulative_stream_through_two_stores_at_once(store: Store, dsn: str) -> None:
    other = Store(dsn)
    await other.open()
    of = stream(temporality=Temporality.CUMULATIVE)
    totals = [point(of, 0, 10 * i, 3 * i) for i in range(1, 61)]
    jobs = [(other if i % 2 else store).write(Batch(points=[p])) for i, p in enumerate(totals[::-1] + totals)]
    await asyncio.gather(*jobs)
    await other.close()
    assert await total(store) == 180, "the last total is all that was ever counted"
    async with store.reading() as connection:
        row = await (await connection.execute("SELECT count(*) FROM usage_sample")).fetchone()
    assert row == (60,)


async def test_a_refusal_that_a_retry_words_otherwise_is_one_row(store: Store) -> None:
    for seconds in (3000, 2995, 2990):
        refusal = Refusal(Reason.TIME_AHEAD, f"it lies {seconds} s past the allowed skew")
        await store.write(Batch(quarantined=[Quarantined("default", "acme", "m", 1, refusal, "metrics", b"payload")]))
    assert await quarantined(store) == [("acme", "time_ahead")]


async def test_streams_are_registered_again_in_a_database_that_lost_them(store: Store, server: str, dsn: str) -> None:
    """A failover to a standby that lags, or a restored copy: known connections end, and so does what was known."""
    await store.write(Batch(points=[point(stream(), 0, 10, 5)]))
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("TRUNCATE usage_point, usage_dirty, usage_stream, usage_series")
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    await store.write(Batch(points=[point(stream(), 10, 20, 7)]))
    assert await total(store) == 7


async def test_text_that_only_looks_like_an_escape_survives(store: Store) -> None:
    of = stream()
    odd = replace(of, resource=Attributes.of({"service.name": "a\\u0000b", "other": "c\0d"}))
    await store.write(Batch(points=[point(odd, 0, 10, 5)]))
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT resource FROM usage_stream")).fetchall()
    assert rows == [({"service.name": "a\\u0000b", "other": "c\N{REPLACEMENT CHARACTER}d"},)]


async def test_what_the_database_cannot_hold_is_set_apart_from_the_rest(store: Store) -> None:
    """Validation lets none of these through; if it ever does, a client must not send the batch for ever."""
    points = [point(stream(f"account-{i}"), 0, 10, 1) for i in range(9)]
    points[3] = points[3]._replace(time_ns=2**62 + 2**61)  # the year 2188 is fine for PostgreSQL
    points[5] = point(stream("a\0b"), 0, 10, 1)
    evidence = [
        Evidence(
            "default",
            "acme",
            meter,
            b"t" * 16,
            b"s" * 8,
            10 * SECOND,
            20 * SECOND,
            Decimal(1),
            "",
            "",
            None,
            Attributes(),
        )
        for meter in ("fine", os.urandom(6000).hex())
    ]
    result = await store.write(Batch(points=points, evidence=evidence))
    assert (result.inserted, result.evidence) == (8, 1)
    assert [conflict.refusal.reason for conflict in result.conflicts] == [Reason.NOT_STORABLE] * 2
    again = await store.write(Batch(points=points, evidence=evidence))
    assert (again.inserted, again.duplicates, again.evidence) == (0, 8, 0)
    assert len(await quarantined(store)) == 2
