"""Levels in quarantine: what is released is what a gauge or an UpDownCounter stood at, once, whatever comes again."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark_collector.access.quotas import Quotas
from tallymark_collector.access.records import InDatabase
from tallymark_collector.model import Reason
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine import contradictions, items
from tallymark_collector.quarantine.items import Filter, Item
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.reading import read
from tallymark_collector.quarantine.rules import Kind, rule
from tallymark_collector.quarantine.settling import NotSettled, Person, Settled, discard, release, reopen
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, number, request, sum_metric

ACME: dict[str, object] = {"tallymark.account.id": "acme"}
NOW = BASE + 3000 * SECOND
DAY = 86_400 * SECOND
ANNE = Person("anne", "on the phone")
KINDS = ("gauge", "updowncounter")


def metric_of(kind: str, *points: NumberDataPoint) -> Metric:
    if kind == "updowncounter":
        return sum_metric(points, "seats", temporality=2, monotonic=False)
    metric = Metric(name="seats", unit="{request}")
    metric.gauge.data_points.extend(points)
    return metric


def sent(kind: str, *points: NumberDataPoint, **resource: str) -> ExportMetricsServiceRequest:
    return request(metric_of(kind, *points), scope="billing", **resource)


async def send(store: Store, *messages: ExportMetricsServiceRequest, now_ns: int = NOW, **more: object) -> int:
    """How many points were refused."""
    pipeline = Pipeline(store, now_ns=lambda: now_ns, **more)  # type: ignore[arg-type]
    return sum([(await pipeline.metrics("default", message.SerializeToString())).rejected for message in messages])


async def queue(store: Store) -> list[Item]:
    async with store.reading() as connection:
        entries = await items.open_items(connection, Filter("default"), 1000)
        return [await items.find(connection, "default", entry.id) for entry in entries]


async def bill(store: Store, item: Item, **decided: object) -> Settled:
    return await release(store, item, Decision(**decided), ANNE, NOW)  # type: ignore[arg-type]


async def levels(store: Store) -> list[tuple[str, Decimal]]:
    async with store.reading() as connection:
        rows = await (
            await connection.execute("SELECT account, value FROM usage_levels ORDER BY time, value")
        ).fetchall()
        summed = await (await connection.execute("SELECT count(*) FROM usage_point")).fetchone()
    assert summed == (0,), "levels are in no sum"
    return [(account, value) for account, value in rows]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_beyond_the_limit_is_released_as_it_is(store: Store, kind: str) -> None:
    limited = Quotas(InDatabase(store), Limits(new_streams_per_hour=1))
    message = sent(kind, *(number(0, BASE + n * SECOND, n + 0.5, {**ACME, "n": n}) for n in range(3)))
    assert await send(store, message, quotas=limited) == 2
    found = await queue(store)
    assert [item.reason for item in found] == ["streams_limited"] * 2
    for item in found:
        settled = await bill(store, item)
        assert (settled.action.action, settled.action.inserted, settled.action.changed) == ("released", 1, {})
        assert settled.action.billed_to == "acme"
        again = await bill(store, item)
        assert not again.done_now
    assert await levels(store) == [("acme", Decimal("0.5")), ("acme", Decimal("1.5")), ("acme", Decimal("2.5"))]
    # Its streams are known from then on: sent again, all of it is there.
    assert await send(store, message, quotas=limited) == 0
    assert await queue(store) == []
    assert len(await levels(store)) == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_a_level_of_nobody_is_attributed_once_whatever_its_wrapping(store: Store, kind: str) -> None:
    # That any of its points names an account makes the metric usage; the other one is nobody's.
    points = [number(BASE, BASE + SECOND, 7, {"region": "eu"}), number(BASE, BASE + SECOND, 2, ACME)]
    decorated = sent(kind, *points, **{"k8s.pod.name": "shop-2"})
    await send(store, sent(kind, *points), decorated)
    one, two = await queue(store)
    assert {one.reason, two.reason} == {"account_missing"}
    with pytest.raises(NotSettled, match="needs a decision: --account"):
        await bill(store, one)
    with pytest.raises(NotSettled, match="only an increase can be additional"):
        await bill(store, one, account="acme", additional=True)
    settled = await bill(store, one, account="acme")
    assert (settled.action.action, settled.action.billed_to, settled.action.inserted) == ("attributed", "acme", 1)
    with pytest.raises(NotSettled, match="billed as something else before, to account 'acme'"):
        await bill(store, two, account="globex")
    assert (await bill(store, two, account="acme")).action.duplicates == 1
    assert await levels(store) == [("acme", 2), ("acme", 7)]
    named = sent(kind, number(BASE, BASE + 2 * SECOND, 3, {**ACME, "bad": "\0"}))
    await send(store, named)
    [item] = await queue(store)
    with pytest.raises(NotSettled, match="names account 'acme' itself"):
        await bill(store, item, account="globex")
    settled = await bill(store, item, drop=("bad",))
    assert list(settled.action.changed) == ["bad"]
    assert await levels(store) == [("acme", 2), ("acme", 7), ("acme", 3)]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_old_level_and_one_ahead_are_released_as_they_are(store: Store, kind: str) -> None:
    old = sent(kind, number(0, BASE - 500 * DAY, 4, ACME))
    ahead = sent(kind, number(0, NOW + DAY, 6, ACME))
    await send(store, old, ahead)
    by_reason = {item.reason: item for item in await queue(store)}
    assert set(by_reason) == {"time_too_old", "time_ahead"}
    assert (await bill(store, by_reason["time_too_old"])).action.inserted == 1
    with pytest.raises(NotSettled, match="time_ahead: it lies"):
        await bill(store, by_reason["time_ahead"])
    assert (await bill(store, by_reason["time_ahead"], force=True)).action.inserted == 1
    assert await send(store, ahead, now_ns=NOW + DAY) == 0
    assert await levels(store) == [("acme", 4), ("acme", 6)]


@pytest.mark.parametrize("kind", KINDS)
async def test_two_levels_of_one_time_are_never_both_taken(store: Store, kind: str) -> None:
    await send(store, sent(kind, number(0, BASE, 4, ACME)), sent(kind, number(0, BASE, 5, ACME)))
    [item] = await queue(store)
    assert item.reason == "value_conflict"
    assert rule(item.reason).refusal(Kind.LEVEL) is not None
    with pytest.raises(NotSettled, match="two are two answers to one question"):
        await bill(store, item, additional=True)
    async with store.reading() as connection:
        [there] = await contradictions.stored(connection, item)
    assert (there.what, there.quantity) == ("the same stream and time", 4)
    # What was set aside for another reason meets what is there by now.
    ahead = sent(kind, number(0, NOW + DAY, 6, ACME))
    await send(store, ahead)
    [later] = [one for one in await queue(store) if one.reason == "time_ahead"]
    await send(store, sent(kind, number(0, NOW + DAY, 7, ACME)), now_ns=NOW + DAY)
    with pytest.raises(NotSettled, match="the level at this time was 7 before and is 6 now; discard it"):
        await bill(store, later, force=True)
    assert await levels(store) == [("acme", 4), ("acme", 7)]


async def test_a_level_whose_start_lies_after_its_end_stands_at_its_end(store: Store) -> None:
    await send(store, sent("updowncounter", number(BASE + SECOND, BASE, 4, ACME)))
    [item] = await queue(store)
    assert item.reason == "time_reversed"
    assert (await bill(store, item)).action.inserted == 1
    assert await levels(store) == [("acme", 4)]


async def test_changes_of_a_level_are_still_no_level(store: Store) -> None:
    changes = sum_metric([number(BASE, BASE + SECOND, 4, ACME)], "seats", temporality=1, monotonic=False)
    await send(store, request(changes, scope="billing"))
    [item] = await queue(store)
    assert item.reason == Reason.TYPE_UNSUPPORTED.value
    with pytest.raises(NotSettled, match="cannot be released"):
        await bill(store, item)
    await discard(store, item, ANNE)
    assert await queue(store) == []


@pytest.mark.parametrize("seed", range(3))
async def test_random_decisions_about_levels_are_each_taken_once(store: Store, seed: int) -> None:
    """Values are different powers of two, so the set of stored values says which items were taken."""
    rng = random.Random(seed)
    work: dict[int, ExportMetricsServiceRequest] = {}
    for n in range(12):
        attributes: dict[str, object] = {**ACME, "n": n % 3}
        match rng.choice(("old", "bad", "nobody")):
            case "old":
                time_ns = BASE - 500 * DAY + n * SECOND
            case "bad":
                time_ns = BASE + n * SECOND
                attributes["note"] = "\0"
            case _:
                time_ns = BASE + n * SECOND
                attributes = {"n": n % 3, "otel.metric.overflow": True, "x": "tallymark.account.id"}
        work[2**n] = sent(rng.choice(KINDS), number(0, time_ns, 2**n, attributes))
    assert await send(store, *work.values()) == len(work)
    known = {int(read(item.signal, item.payload).facts["value"]): item for item in await queue(store)}
    assert set(known) == set(work)
    taken: dict[int, str] = {}
    for _ in range(60):
        value = rng.choice(list(work))
        item = known[value]
        decided = {
            "time_too_old": {},
            "attributes_invalid": {"drop": ("note",)},
            "attribute_overflow": {"account": rng.choice(["acme", "globex"])},
        }[item.reason]
        try:
            match rng.choice(("bill", "bill", "discard", "reopen", "again")):
                case "bill":
                    settled = await bill(store, item, **decided)
                    if settled.done_now:
                        assert settled.action.inserted == 1
                        taken[value] = str(settled.action.billed_to)
                case "discard":
                    await discard(store, item, ANNE)
                case "reopen":
                    await reopen(store, item, ANNE)
                case "again":
                    assert await send(store, work[value]) == 1
        except NotSettled:
            continue
        assert sorted((value, account) for account, value in await levels(store)) == sorted(taken.items())
    assert taken
