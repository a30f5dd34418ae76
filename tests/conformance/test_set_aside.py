"""What is kept in quarantine of one request is bounded, whole, and harms no other request."""

from __future__ import annotations

import asyncio

import pytest

from tallymark_collector.errors import TooLarge
from tallymark_collector.model import Batch
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processors import described, set_aside
from tallymark_collector.quarantine import reading
from tallymark_collector.quarantine.settling import NotSettled, discard
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store
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
