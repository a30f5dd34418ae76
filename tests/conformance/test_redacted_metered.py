"""What a file of meters takes and sets aside is released for what it is, with a secret in it or without."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.sent import MARK
from tallymark_collector.quarantine.metered import origin
from tallymark_collector.quarantine.settling import NotSettled
from tallymark_collector.store import Store
from tests.conformance.test_quarantine_metered import NOW, bill, billed, limited, one, queue, send
from tests.support.usage import BASE, SECOND, key_values

AT_NOW = (NOW - BASE) // SECOND
AHEAD = AT_NOW + 7200
SECRET = {"http.request.header.cookie": "s3cr3t"}
SAID = pytest.mark.parametrize("attributes", [{"a": "b"}, {"a": "b", **SECRET}], ids=["plain", "secret"])


def rules(source: str = "quantity: count, account: a") -> Rules:
    return parse_rules(
        f'meters: {{requests: {{unit: "{{request}}", sources: [{{metric: h, {source}}}]}}}}'  # a histogram's
    )


NAMES_NOBODY = rules("quantity: count, account: consumer")
NAMES = rules()


@SAID
@pytest.mark.parametrize("first", [True, False])
async def test_an_attributed_total_counts_with_those_that_are_named_later(
    store: Store, attributes: dict[str, object], first: bool
) -> None:
    early, late = (one(0, at, count, 1.0, attributes, temporality=2) for at, count in ((1, 4), (2, 9)))
    await send(store, early, rules=NAMES_NOBODY)
    [item] = await queue(store)
    if first:
        await bill(store, item, NAMES_NOBODY, account="b")
        await send(store, late, rules=NAMES)
    else:
        await send(store, late, rules=NAMES)
        await bill(store, item, NAMES_NOBODY, account="b")
    assert await billed(store) == {("b", "requests"): 9}


@SAID
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("account", ["b", "c"])
async def test_an_attributed_increase_that_comes_again_once_the_file_names_somebody(
    store: Store, attributes: dict[str, object], first: bool, account: str
) -> None:
    increase = one(0, 1, 4, 1.0, attributes)
    await send(store, increase, rules=NAMES_NOBODY)
    [item] = await queue(store)
    if first:
        await bill(store, item, NAMES_NOBODY, account=account)
        await send(store, increase, rules=NAMES)
        assert await billed(store) == {(account, "requests"): 4}
    else:
        await send(store, increase, rules=NAMES)
        if account == "b":
            await bill(store, item, NAMES_NOBODY, account=account)
        else:
            with pytest.raises(NotSettled, match="the same increase came again and was billed to account 'b'"):
                await bill(store, item, NAMES_NOBODY, account=account)
        assert await billed(store) == {("b", "requests"): 4}


@SAID
async def test_a_total_whose_account_the_file_has_learnt(store: Store, attributes: dict[str, object]) -> None:
    early, late = (one(0, at, count, 1.0, attributes, temporality=2) for at, count in ((1, 4), (2, 9)))
    await send(store, early, rules=NAMES_NOBODY)
    [item] = await queue(store)
    await send(store, late, rules=NAMES)
    await bill(store, item, NAMES)
    assert await billed(store) == {("b", "requests"): 9}


async def test_two_counters_that_differ_in_the_secret_alone(store: Store) -> None:
    for key, value in (("k1", 4), ("k2", 9)):
        attributes = {"a": "b", "http.request.header.cookie": key}
        await send(store, one(0, 1, value, 1.0, attributes, temporality=2), rules=NAMES_NOBODY)
    for item in await queue(store):
        await bill(store, item, NAMES_NOBODY, account="b")
    assert await billed(store) == {("b", "requests"): 13}


@SAID
async def test_a_base_that_found_no_room(store: Store, attributes: dict[str, object]) -> None:
    """It bills nothing, and what comes after counts from it."""
    since = datetime.fromtimestamp(BASE // SECOND, timezone.utc).isoformat().replace("+00:00", "Z")
    file = rules(f'quantity: count, account: a, since: "{since}"')
    base, first, second = (
        one(-2000, at, count, 1.0, attributes, temporality=2) for at, count in ((-5, 100), (1, 104), (2, 109))
    )
    await send(store, base, first, rules=file, quotas=limited(store, 0))
    for item in await queue(store):
        await bill(store, item, file)
    await send(store, second, rules=file)
    assert await billed(store) == {("b", "requests"): 9}


@SAID
async def test_a_file_that_reads_another_number_by_now(store: Store, attributes: dict[str, object]) -> None:
    """What was counted as requests is no base for what is summed."""
    counts, sums = rules(), rules("quantity: sum, account: a, factor: 1")
    await send(store, one(0, 1, 4, 100.0, attributes, temporality=2), rules=counts)
    await send(store, one(0, AHEAD, 9, 900.0, attributes, temporality=2), rules=counts)
    [item] = await queue(store)
    await bill(store, item, sums, force=True)
    last = one(0, AHEAD + 1, 10, 1000.0, attributes, temporality=2)
    await send(store, last, rules=sums, now_ns=BASE + (AHEAD + 2) * SECOND)
    assert await billed(store) == {("b", "requests"): 4 + 1000}


@pytest.mark.parametrize("place", ["where", "resource"])
async def test_a_source_that_asks_for_what_was_redacted(store: Store, place: str) -> None:
    key = "http.request.header.x-api-key"
    file = parse_rules(f"""
meters:
  requests:
    unit: "{{request}}"
    sources:
      - {{metric: h, quantity: count, account: a, factor: 10, {place}: {{{key}: "gold*"}}}}
      - {{metric: h, quantity: count, account: a}}
""")
    if place == "where":
        sent = one(AHEAD - 1, AHEAD, 4, 1.0, {key: "gold1", "a": "b"})
    else:
        sent = one(AHEAD - 1, AHEAD, 4, 1.0, {"a": "b"})
        sent.resource_metrics[0].resource.attributes.extend(key_values({key: "gold1"}))
    await send(store, sent, rules=file)
    [item] = await queue(store)
    with pytest.raises(NotSettled, match=f"asks for {key}, which was redacted"):
        await bill(store, item, file, force=True)
    assert await billed(store) == {}


@pytest.mark.parametrize("redaction", [STANDARD, Redaction(on=False)], ids=["on", "off"])
async def test_a_mark_that_a_client_sent_is_not_believed(store: Store, redaction: Redaction) -> None:
    pipeline = Pipeline(store, now_ns=lambda: NOW, metering=Metering(NAMES, redaction=redaction), redaction=redaction)
    await pipeline.metrics("default", one(0, 1, 4, 1.0, {"a": "b"}, temporality=2).SerializeToString())
    async with store.reading() as connection:
        [(source, stream)] = await (await connection.execute("SELECT source, stream FROM usage_sample")).fetchall()
    forged = {"a": "b", "x": "y", MARK: f"{source.hex} {stream.hex} {source.hex}"}
    await pipeline.metrics("default", one(0, AHEAD, 50, 1.0, forged, temporality=2).SerializeToString())
    [item] = await queue(store)
    await bill(store, item, NAMES, force=True)
    assert await billed(store) == {("b", "requests"): 54}


async def test_a_forged_mark_takes_no_decision_of_others(store: Store) -> None:
    await send(store, one(0, 1, 4, 1.0, {"a": "b"}, temporality=2), rules=NAMES_NOBODY)
    [theirs] = await queue(store)
    forged = {"z": "z", MARK: origin(theirs).stream.hex}
    await send(store, one(0, 1, 7, 1.0, forged, temporality=2), rules=NAMES_NOBODY)
    [other] = [item for item in await queue(store) if item.id != theirs.id]
    await bill(store, other, NAMES_NOBODY, account="mallory")
    await bill(store, theirs, NAMES_NOBODY, account="acme")
    assert await billed(store) == {("mallory", "requests"): 7, ("acme", "requests"): 4}
