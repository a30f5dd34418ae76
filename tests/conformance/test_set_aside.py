"""What is kept in quarantine of one request is bounded, whole, and harms no other request."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from tallymark_collector.errors import StoreUnavailable, TooLarge
from tallymark_collector.model import Batch, Quarantined, Reason, Refusal
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processors import described, set_aside
from tallymark_collector.quarantine import reading
from tallymark_collector.quarantine.settling import NotSettled, discard
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store, quarantined
from tallymark_collector.store.committing import committing
from tests.conformance.test_quarantine import ACME, ANNE, BASE, NOW, SECOND, bill, billed, queue, send, the_one
from tests.support.usage import key_values, number, point, request, stream, sum_metric


async def test_usage_beside_a_large_resource_is_one_item_that_people_can_look_at_and_close(store: Store) -> None:
    points = [number(BASE + i, BASE + SECOND + i, 1, ACME) for i in range(300)]
    message = request(sum_metric(points), sum_metric(points[:5], "tokens"))
    more = {"label": "x" * (described.MAX_STORED + 1), "db.password": "hunter2-hunter2"}
    message.resource_metrics[0].resource.attributes.extend(key_values(more))
    for _ in range(2):
        answer = await Pipeline(store, now_ns=lambda: NOW).metrics("default", message.SerializeToString())
        assert (answer.rejected, "its resource has 32,8" in answer.message) == (305, True)
    found = await the_one(store)
    assert b"hunter2" not in found.payload
    assert reading.read(found.signal, found.payload).facts["points"] == "305, of which this is one"
    with pytest.raises(NotSettled, match="cannot be released: have it sent again with a smaller resource"):
        await bill(store, found)
    assert (await discard(store, found, ANNE)).done_now
    assert (await queue(store), await billed(store)) == ([], {})


async def test_contradictions_that_are_too_large_together_fail_their_request_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [point(stream("acme", route=f"/{i}"), 0, 1, 1) for i in range(50)]
    await store.write(Batch(points=many))
    monkeypatch.setattr(set_aside, "MAX_BYTES", 2000)
    other = [one._replace(value=one.value + 1) for one in many]
    async with committing(store, Limits()) as together:
        batches = [[many[0]], other, [point(stream("b"), 0, 1, 5)], other[:2]]
        answers = await asyncio.gather(*(together.write(Batch(points=one)) for one in batches), return_exceptions=True)
    assert isinstance(answers[1], TooLarge)
    told = [(one.inserted, one.duplicates, len(one.conflicts)) for one in answers if not isinstance(one, BaseException)]
    assert told == [(0, 1, 0), (1, 0, 0), (0, 0, 2)]
    assert len(await queue(store)) == 1, "both contradictions have one payload here"
    assert await billed(store) == {("acme", "api.requests"): 50, ("b", "api.requests"): 5}


async def test_spans_are_one_transaction_with_what_is_refused_of_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too much of it: nothing of the request is kept."""
    monkeypatch.setattr(set_aside, "MAX_BYTES", 1000)
    refused = [number(BASE, BASE + SECOND, -1, {**ACME, "n": i}) for i in range(100)]
    with pytest.raises(TooLarge, match="send fewer at once"):
        await send(store, request(sum_metric([number(BASE, BASE + SECOND, 7, ACME), *refused])))
    assert (await queue(store), await billed(store)) == ([], {})


async def test_what_was_set_aside_before_there_was_a_limit_can_still_be_billed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = request(sum_metric([number(BASE, BASE + SECOND, 7, {})]))
    message.resource_metrics[0].resource.attributes.extend(key_values({"label": "x" * (described.MAX_STORED + 1)}))
    with monkeypatch.context() as before:
        before.setattr(described, "MAX_STORED", 10 * described.MAX_STORED)
        await send(store, message)
    found = await the_one(store)
    assert found.reason == "account_missing"
    await bill(store, found, account="acme")
    assert await billed(store) == {("acme", "api.requests"): 7}


async def test_more_items_than_a_transaction_should_hold_are_refused_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small they are: a request that takes longer than the database is waited for is sent for ever."""
    monkeypatch.setattr(set_aside, "MAX_ITEMS", 20)
    refused = [number(BASE, BASE + SECOND, -1, {**ACME, "n": i}) for i in range(21)]
    with pytest.raises(TooLarge, match=r"more than 20 points or spans of this request .* send fewer at once"):
        await send(store, request(sum_metric([number(BASE, BASE + SECOND, 7, ACME), *refused])))
    assert (await queue(store), await billed(store)) == ([], {})
    await send(store, request(sum_metric([number(BASE, BASE + SECOND, 7, ACME), *refused[:20]])))
    assert (len(await queue(store)), await billed(store)) == (20, {("acme", "api.requests"): 7})


async def test_many_items_have_transactions_of_their_own(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are written others have their turn; and where one of these fails, the same request makes it whole."""
    monkeypatch.setattr(set_aside, "AT_ONCE", 8)
    refused = [number(BASE, BASE + SECOND, -1, {**ACME, "n": i}) for i in range(20)]
    message = request(sum_metric([number(BASE, BASE + SECOND, 7, ACME), *refused]))
    write, sizes = Store.write, list[int]()

    async def failing(self: Store, batch: Batch, *more: Any) -> Any:
        sizes.append(len(batch.quarantined))
        if len(sizes) == 2:
            raise StoreUnavailable("away")
        return await write(self, batch, *more)

    monkeypatch.setattr(Store, "write", failing)
    with pytest.raises(StoreUnavailable):
        await send(store, message)
    assert (len(await queue(store)), await billed(store)) == (8, {})
    for _ in range(2):
        outcome = await Pipeline(store, now_ns=lambda: NOW).metrics("default", message.SerializeToString())
        assert outcome.rejected == 20
        assert (len(await queue(store)), await billed(store)) == (20, {("acme", "api.requests"): 7})
    assert sizes == [8, 8, *[8, 8, 4] * 2]


async def test_contradictions_that_are_too_many_together_fail_their_request(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_aside, "MAX_ITEMS", 20)
    many = [point(stream("acme", route=f"/{i}"), 0, 1, 1) for i in range(21)]
    await store.write(Batch(points=many))
    with pytest.raises(TooLarge, match="send fewer at once"):
        await store.write(Batch(points=[one._replace(value=one.value + 1) for one in many]))
    assert await queue(store) == []


COUNTED = """
CREATE TABLE statements (number serial);
CREATE FUNCTION counted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO tallymark.statements DEFAULT VALUES;
    RETURN NULL;
END $$;
CREATE TRIGGER counted AFTER INSERT ON usage_quarantine FOR EACH STATEMENT EXECUTE FUNCTION counted();
"""


def refused(number: int, payload: bytes) -> Quarantined:
    refusal = Refusal(Reason.ACCOUNT_MISSING, f"there is none\x00 in {number}")
    return Quarantined("default", "", "api\x00.requests", number % 7 and BASE + number, refusal, "metrics", payload)


async def test_many_items_are_few_statements(store: Store, dsn: str) -> None:
    piece = quarantined.PIECE
    items = [refused(number, f"{number}".encode()) for number in range(3 * piece)]
    items += [refused(number, b"x" * (quarantined.PIECE_BYTES // 2) + f"{number}".encode()) for number in range(4)]
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute(COUNTED)
        for _ in range(2):
            assert (await store.write(Batch(quarantined=[*items, items[7]]))).conflicts == []
        [statements] = connection.execute("SELECT count(*) FROM statements").fetchall()
        kept = connection.execute(
            "SELECT meter, detail, digest, payload, metered, (extract(epoch FROM time) * 1000000)::bigint"
            " FROM usage_quarantine"
        ).fetchall()
    assert statements[0] <= 2 * 12
    assert {row[2]: row for row in kept} == {
        item.digest(): (
            "api\N{REPLACEMENT CHARACTER}.requests",
            item.refusal.detail.replace("\0", "\N{REPLACEMENT CHARACTER}"),
            item.digest(),
            item.payload,
            False,
            item.time_ns // 1000 if item.time_ns else None,
        )
        for item in items
    }


async def test_others_have_their_turn_while_items_are_told_from_each_other(store: Store) -> None:
    turns = 0
    told: list[int] = []

    class Watched(Quarantined):
        def digest(self) -> bytes:
            told.append(turns)
            return super().digest()

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    piece = quarantined.PIECE
    beside = asyncio.create_task(others())
    try:
        items = [Watched(*refused(number, f"{number}".encode())) for number in range(3 * piece)]
        items += [Watched(*refused(number, b"x" * quarantined.PIECE_BYTES + b"%d" % number)) for number in range(3)]
        await store.write(Batch(quarantined=items))
    finally:
        beside.cancel()
    rests = [place for place, (before, after) in enumerate(pairwise(told), 1) if after > before]
    assert max(after - before for before, after in pairwise([0, *rests])) <= piece
    assert set(range(3 * piece + 1, 3 * piece + 3)) <= set(rests), "each of the large ones"
