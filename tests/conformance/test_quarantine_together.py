"""Many items are settled in few transactions, and come to what they would have come to one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psycopg
import pytest

from tallymark_collector.quarantine import settling
from tallymark_collector.quarantine.items import Filter, Item, open_ids
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import Deciding, NotSettled, Settled, discarding, releasing, together
from tallymark_collector.store import Store, locks
from tests.conformance.test_quarantine import ACCOUNT, ACME, ANNE, BORIS, NOW, billed, item, queue, send, trail
from tests.conformance.test_retention_in_pieces import WAITING
from tests.conformance.test_timescale import execute
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOBODY = {"route": "/"}


async def everything(store: Store) -> list[Item]:
    async with store.reading() as connection:
        ids = await open_ids(connection, Filter("default"))
    return [await item(store, each) for each in ids]


async def settle(store: Store, found: Sequence[Item], deciding: Deciding) -> list[str]:
    """What became of each, in a word."""
    told = []
    seen = []
    async for one, outcome in together(store, found, deciding):
        seen.append(one)
        if isinstance(outcome, Settled):
            assert outcome.item == one
            told.append(outcome.action.action if outcome.done_now else "before")
        else:
            assert str(outcome).startswith(one.id)
            told.append("refused")
    assert seen == list(found)
    return told


async def test_many_are_few_transactions(store: Store, dsn: str) -> None:
    many = settling.GROUP * 2 + 10
    points = [number(BASE + n * SECOND, BASE + (n + 1) * SECOND, n + 1, NOBODY) for n in range(many)]
    await send(store, request(sum_metric(points)))
    found = await everything(store)
    told = await settle(store, found, releasing(Decision(account="acme"), ANNE, NOW))
    assert told == ["attributed"] * many
    assert await billed(store) == {("acme", "api.requests"): many * (many + 1) // 2}
    assert await settle(store, found, discarding(ANNE)) == ["before"] * many
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "SELECT count(DISTINCT xmin::text), count(*), sum(inserted) FROM tallymark.quarantine_action"
        ).fetchall()
    assert rows == [(3, many, many)]


async def test_what_cannot_be_done_is_told_and_the_rest_is_done(store: Store) -> None:
    """Refused before anything is written, and by what is stored."""
    stored = [number(BASE + n * SECOND, BASE + (n + 1) * SECOND, 1, ACME) for n in range(2)]
    other = [number(BASE + n * SECOND, BASE + (n + 1) * SECOND, 2, ACME) for n in range(2)]
    nobodys = [number(BASE + n * SECOND, BASE + (n + 1) * SECOND, 100, NOBODY) for n in range(9)]
    await send(store, request(sum_metric(stored)), request(sum_metric([*other, *nobodys])))
    await send(store, request(sum_metric([number(BASE + SECOND, BASE, 1000, ACME)])))
    found = await everything(store)
    reasons = [one.reason for one in found]
    assert sorted(reasons) == ["account_missing"] * 9 + ["time_reversed"] + ["value_conflict"] * 2
    told = await settle(store, found, releasing(Decision(), ANNE, NOW))
    expected = {"account_missing": "refused", "value_conflict": "refused", "time_reversed": "released"}
    assert told == [expected[reason] for reason in reasons]
    told = await settle(store, found, releasing(Decision(account="acme"), ANNE, NOW))
    expected = {"account_missing": "attributed", "value_conflict": "refused", "time_reversed": "refused"}
    assert told == [expected[reason] for reason in reasons]
    assert await billed(store) == {("acme", "api.requests"): 2 + 1000 + 900}


async def test_one_that_the_database_refuses_is_found_by_halves(store: Store, dsn: str) -> None:
    nobodys = [number(BASE + n * SECOND, BASE + (n + 1) * SECOND, 2**n, NOBODY) for n in range(13)]
    await send(store, request(sum_metric(nobodys)))
    found = await everything(store)
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        # What a psycopg.DataError is to the writer.
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF NEW.quantity = 64 THEN RAISE numeric_value_out_of_range; END IF; RETURN NEW; END $$;"
            " CREATE TRIGGER refuse BEFORE INSERT ON usage_point FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        told = await settle(store, found, releasing(Decision(account="acme"), ANNE, NOW))
        connection.execute("DROP TRIGGER refuse ON usage_point")
    assert told == ["attributed"] * 6 + ["refused"] + ["attributed"] * 6
    assert await billed(store) == {("acme", "api.requests"): 2**13 - 1 - 64}
    assert len(await queue(store)) == 1


async def test_totals_of_one_stream_become_its_increases(store: Store) -> None:
    totals = [number(BASE, BASE + (n + 1) * SECOND, 10 * (n + 1), NOBODY) for n in range(7)]
    await send(store, request(sum_metric(totals, temporality=2)))
    found = await everything(store)
    assert await settle(store, found[::-1], releasing(Decision(account="acme"), ANNE, NOW)) == ["attributed"] * 7
    assert await billed(store) == {("acme", "api.requests"): 70}
    # Sent again, and once more of the account that it went to: nothing of it is new.
    await send(store, request(sum_metric(totals, temporality=2)))
    assert (await queue(store), await billed(store)) == ([], {("acme", "api.requests"): 70})


@pytest.mark.parametrize("groups", [1, 3])
async def test_two_people_who_mean_the_same_in_opposite_orders(
    store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    monkeypatch.setattr(settling, "GROUP", 12 // groups)
    await send(
        store, request(sum_metric([number(BASE + n * SECOND, BASE + (n + 1) * SECOND, 1, NOBODY) for n in range(12)]))
    )
    found = await everything(store)
    other = Store(dsn)
    await other.open()
    try:
        async with await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark") as somebody:
            await locks.taken(somebody, f"{locks.QUARANTINE}.{found[5].id}")
            tasks = [
                asyncio.create_task(settle(through, meant, releasing(Decision(account=account), who, NOW)))
                for through, meant, account, who in (
                    (store, found, "acme", ANNE),
                    (other, found[::-1], "globex", BORIS),
                )
            ]
            for _ in range(1500):
                if len(await asyncio.to_thread(execute, dsn, WAITING)) == 2:
                    break
                await asyncio.sleep(0.01)
        told = await asyncio.gather(*tasks)
    finally:
        await other.close()
    both = zip(told[0], told[1][::-1], strict=True)
    assert all({*pair} == {"attributed", "before"} for pair in both)
    assert sum((await billed(store)).values()) == 12
    assert len(await trail(store)) == 12


async def test_a_large_item_is_settled_by_itself(store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "GROUP_BYTES", 1000)
    large = {"route": "x" * 2000, "n": 1}
    points = [number(BASE + n * SECOND, BASE + (n + 1) * SECOND, 1, large if n == 2 else NOBODY) for n in range(5)]
    await send(store, request(sum_metric(points)))
    assert await settle(store, await everything(store), discarding(ANNE)) == ["discarded"] * 5
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "SELECT count(*) FROM tallymark.quarantine_action GROUP BY xmin::text ORDER BY min(number), min(acted_at)"
        ).fetchall()
    assert [count for (count,) in rows] == [2, 1, 2]


async def test_nothing_is_discarded_without_a_reason(store: Store) -> None:
    await send(store, request(sum_metric([number(BASE, BASE + SECOND, 1, {ACCOUNT: ""})])))
    [found] = await everything(store)
    [(_, outcome)] = [one async for one in together(store, [found], discarding(BORIS))]
    assert isinstance(outcome, NotSettled)
    assert "say why" in str(outcome)
