"""What was said at any moment can be said again, whatever has come since."""

from __future__ import annotations

import asyncio
import random
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.model import Batch, Temporality
from tallymark_collector.query.by_aggregation import usage_as_billed
from tallymark_collector.query.usage import Usage, usage
from tallymark_collector.store import Store, locks
from tests.conformance.test_quarantine import bill, one, send, the_one
from tests.support.usage import BASE, SECOND, number, point, stream

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
NOW = timedelta(0)


async def asked(store: Store, **more: Any) -> Usage:
    async with store.reading() as connection:
        return await usage(connection, tenant="default", by=["account", "route", "day"], settled=NOW, **more)


async def moment(store: Store) -> datetime:
    """Later than everything that was committed, by the database's clock."""
    async with store.reading() as connection:
        [now] = await (await connection.execute("SELECT clock_timestamp()")).fetchone() or ()
    return now  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(3))
async def test_every_answer_of_the_past_is_given_again(store: Store, seed: int) -> None:
    """Late points, running totals that come between two others and correct what was counted, repeats, refreshes."""
    chance = random.Random(seed)
    totals = {time: chance.randrange(5) for time in range(0, 200_000, 700)}
    ranges = [(None, None), (ZERO + timedelta(seconds=1800), ZERO + timedelta(days=1, minutes=20))]
    remembered: list[tuple[datetime, list[list[Any]]]] = []
    for _ in range(12):
        points = []
        for _ in range(chance.randrange(1, 8)):
            end = chance.randrange(1, 200_000)
            which = stream(chance.choice("ab"), **{"http.route": chance.choice(["/x", "/y"])})
            points.append(point(which, end - 1, end, chance.randrange(1, 9)))
        running = stream("a", temporality=Temporality.CUMULATIVE, **{"http.route": "/total"})
        for time in chance.sample(sorted(totals), 3):
            points.append(point(running, 0, time, sum(n for at, n in totals.items() if at <= time)))
        chosen = {(one.stream.id, one.start_ns, one.time_ns): one for one in points if one.time_ns > one.start_ns}
        await store.write(Batch(points=list(chosen.values())))
        if chance.random() < 0.5:
            await store.refresh()
        answers = [(await asked(store, start=start, end=end)).rows for start, end in ranges]
        remembered.append((await moment(store), answers))
    assert len({str(answers) for _, answers in remembered}) == 12, "each step has changed something"
    for then, answers in remembered:
        assert [(await asked(store, start=start, end=end, as_of=then)).rows for start, end in ranges] == answers


async def test_what_nobody_can_know_is_refused(store: Store, dsn: str) -> None:
    await store.write(Batch(points=[point(stream(), 0, 1, 1)]))
    now = await moment(store)
    async with store.reading() as connection:
        with pytest.raises(UserError, match=r"may still change: .* under way for 60 s\. Ask as of 20"):
            await usage(connection, tenant="default", as_of=now)
        with pytest.raises(UserError, match="has no time zone"):
            await usage(connection, tenant="default", as_of=datetime(2026, 1, 1))  # noqa: DTZ001
        found = await usage(connection, tenant="default", as_of=now - timedelta(hours=1))
    assert found.rows == []
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        connection.execute("UPDATE usage_kept SET points_from = %s", [ZERO])
    with pytest.raises(UserError, match=r"have been dropped, .*: begin the range there, or later"):
        await asked(store, as_of=now)
    assert (await asked(store, as_of=now, start=ZERO)).total() == Decimal(1)


async def test_only_sums_are_known_of_the_past(store: Store) -> None:
    plans = """currency: EUR
meters:
  seats: {unit: "{request}", aggregation: unique, of: user.id}
plans:
  pro:
    charges:
      - {meter: seats, unit_price: '1'}
accounts:
  acme: {plan: pro, since: 2026-09-01}
"""
    now = await moment(store)
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(plans), now)
    await store.write(Batch(points=[point(stream(meter="seats", **{"user.id": "u"}), 0, 1, 1)]))
    await store.write(Batch(points=[point(stream(), 0, 1, 5)]))
    now = await moment(store)
    async with store.reading() as connection:
        found = await usage_as_billed(connection, tenant="default", as_of=now, settled=NOW)
        assert [row[:5] for row in found.usage.rows] == [("acme", "api.requests", "{request}", "sum", Decimal(5))]
        assert found.remarks == ("left out: seats: only sums can be asked for as of a moment of the past",)
        with pytest.raises(UserError, match=r"'seats' is billed by its .*: only sums"):
            await usage_as_billed(connection, tenant="default", as_of=now, settled=NOW, meter="seats")


async def test_a_release_that_waits_for_somebody_is_given_up_as_any_write(store: Store, dsn: str) -> None:
    """It would date its point by its beginning, however long ago that was by then."""
    await send(store, one(number(BASE - SECOND, BASE, 5, {"route": "/"})))
    item = await the_one(store)
    impatient = Store(dsn, patience=1.0)
    await impatient.open()
    try:
        async with await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark") as somebody:
            await locks.taken(somebody, f"{locks.QUARANTINE}.{item.id}")
            with pytest.raises(StoreUnavailable, match="did not answer within 1 s"):
                await asyncio.wait_for(bill(impatient, item, account="acme"), 60)
        assert (await asked(store)).rows == []
        assert (await bill(impatient, item, account="acme")).done_now
        assert (await asked(store)).total() == Decimal(5)
    finally:
        await impatient.close()
