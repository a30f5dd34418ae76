"""Random decisions about random items by several people at once, while services send the same again and hours are
refreshed: each item is billed exactly once, or never, as the last decision about it says. Every point comes in two
wrappings, as two items: it is billed once even if both are.

Quantities are different powers of two, so an account's sum says which items are in it, and how often.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal

import pytest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine import items, reading
from tallymark_collector.quarantine.items import Filter, Item
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import (
    NotSettled,
    Person,
    discard,
    discarding,
    release,
    releasing,
    reopen,
    together,
)
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection
from tests.support.usage import BASE, SECOND, number, request, sum_metric

ITEMS = 24
STEPS = 40
PEOPLE = 3
DAY = 86_400 * SECOND
NOW = BASE + DAY
ACCOUNT = "tallymark.account.id"
OWNERS = ("acme", "globex")


@dataclass(frozen=True)
class Sent:
    """A request whose point is refused, and how to have it billed."""

    bodies: tuple[bytes, bytes]
    """As the service sends it, and decorated by a gateway."""
    quantity: int
    owner: str | None
    """The account that it names."""
    decision: Decision


def sent(rng: random.Random, position: int) -> tuple[Sent, bytes | None]:
    """One of a random kind, and a request that has to be there before."""
    quantity = 2**position
    end = BASE + position * 60 * SECOND
    owner = rng.choice(OWNERS)
    named: dict[str, object] = {ACCOUNT: owner, "n": rng.randint(1, 3)}
    kind = rng.choice(("old", "nobody", "conflict", "reversed", "invalid", "overflow"))
    before = None
    decision, account = Decision(), owner
    start = end - SECOND
    match kind:
        case "old":
            start, end = start - 500 * DAY, end - 500 * DAY
        case "nobody":
            named.pop(ACCOUNT)
            account = ""
        case "conflict":
            before = one(start, end, 2 ** (ITEMS + position), named)
            decision = Decision(additional=True)
        case "reversed":
            start = end + SECOND
        case "invalid":
            named["note"] = "\0"
            decision = Decision(drop=("note",))
        case "overflow":
            named = {"otel.metric.overflow": True}
            account = ""
    bodies = (one(start, end, quantity, named), one(start, end, quantity, named, **{"k8s.pod.name": "shop-1"}))
    return Sent(bodies, quantity, account or None, decision), before


def one(start: int, end: int, quantity: int, attributes: dict[str, object], **resource: str) -> bytes:
    return request(sum_metric([number(start, end, quantity, attributes)]), **resource).SerializeToString()


@pytest.mark.parametrize("seed", [int(os.environ.get("TALLYMARK_TEST_SEED", "1")), 2, 3])
async def test_each_item_is_billed_once_or_never(store: Store, dsn: str, seed: int) -> None:
    rng = random.Random(seed)
    pipeline = Pipeline(store, now_ns=lambda: NOW)
    work: list[Sent] = []
    stored_before = Decimal(0)
    for position in range(ITEMS):
        found, before = sent(rng, position)
        if before is not None:
            await pipeline.metrics("default", before)
            stored_before += 2 ** (ITEMS + position)
        for body in found.bodies:
            await pipeline.metrics("default", body)
        work.append(found)
    async with store.reading() as connection:
        queue = await items.open_items(connection, Filter("default"), 1000)
        by_quantity: dict[int, list[Item]] = defaultdict(list)
        for entry in queue:
            item = await items.find(connection, "default", entry.id)
            by_quantity[int(reading.read(item.signal, item.payload).facts["value"])].append(item)
    assert {quantity: len(both) for quantity, both in by_quantity.items()} == {2**n: 2 for n in range(ITEMS)}

    other = Store(dsn)
    await other.open()
    billed_by_us: dict[str, list[str]] = defaultdict(list)
    refusals: list[str] = []

    async def person(number_: int, seed_: int) -> None:
        own = random.Random(seed_)
        through = (store, other)[number_ % 2]
        who = Person(f"person {number_}", "so it is")
        for _ in range(STEPS):
            chosen = own.choice(work)
            item = own.choice(by_quantity[chosen.quantity])
            try:
                match own.choice(("bill", "bill", "several", "discard", "discard several", "reopen", "reopen")):
                    case "several":
                        account = own.choice(OWNERS)
                        alike = [one for one in work if (one.owner, one.decision) == (chosen.owner, chosen.decision)]
                        some = own.sample(alike, min(own.randint(1, 4), len(alike)))
                        decision = chosen.decision if chosen.owner else Decision(account=account)
                        meant = [
                            one for each in some for one in own.sample(by_quantity[each.quantity], own.randint(1, 2))
                        ]
                        async for done, outcome in together(through, meant, releasing(decision, who, NOW)):
                            if isinstance(outcome, NotSettled):
                                refusals.append(str(outcome))
                            elif outcome.done_now:
                                billed_by_us[done.id].append(chosen.owner or account)
                    case "discard several":
                        meant = [one for both in own.sample(list(by_quantity.values()), 3) for one in both]
                        async for _, outcome in together(through, meant, discarding(who)):
                            assert not isinstance(outcome, NotSettled)
                    case "bill":
                        account = own.choice(OWNERS)
                        decision = chosen.decision if chosen.owner else Decision(account=account)
                        settled = await release(through, item, decision, who, NOW)
                        if settled.done_now:
                            billed_by_us[item.id].append(chosen.owner or account)
                    case "discard":
                        await discard(through, item, who)
                    case "reopen":
                        await reopen(through, item, who)
            except NotSettled as error:
                refusals.append(str(error))

    async def service(seed_: int) -> None:
        own = random.Random(seed_)
        for _ in range(STEPS):
            outcome = await pipeline.metrics("default", own.choice(own.choice(work).bodies))
            assert outcome.rejected == 1, "it is refused whenever it comes"

    async def refresher() -> None:
        for _ in range(STEPS):
            await store.refresh()

    try:
        tasks = [person(n, rng.randrange(2**32)) for n in range(PEOPLE)]
        await asyncio.gather(*tasks, service(rng.randrange(2**32)), refresher())
    finally:
        await other.close()

    allowed = ("is open", "it is billed", "the same point was billed as something else before")
    assert [why for why in refusals if not any(part in why for part in allowed)] == []
    expected: dict[str, Decimal] = defaultdict(Decimal)
    async with store.reading() as connection:
        for quantity, both in by_quantity.items():
            accounts = set()
            for item in both:
                last = await items.last_action(connection, item)
                was_billed = last is not None and last.action in ("released", "attributed")
                assert len(billed_by_us[item.id]) == int(was_billed), f"seed {seed}: {quantity}"
                accounts.update(billed_by_us[item.id])
            assert len(accounts) <= 1, f"seed {seed}: {quantity} of two accounts"
            for account in accounts:
                expected[account] += quantity
        still_open = {entry.id for entry in await items.open_items(connection, Filter("default"), 1000)}
        assert still_open <= {item.id for both in by_quantity.values() for item in both}
        assert await _sums(connection) == {account: total for account, total in expected.items() if total}
        rows = await (await connection.execute("SELECT sum(quantity) FROM usage_hourly")).fetchone()
        assert rows is not None
        assert (rows[0] or 0) == sum(expected.values()) + stored_before
        assert (await audit(connection)).clean
    assert any(billed_by_us.values()), f"seed {seed}: nobody billed anything"


async def _sums(connection: Connection) -> dict[str, Decimal]:
    """By account what is billed of the items: the lower powers of two; what was there before has the higher ones."""
    rows = await (
        await connection.execute("SELECT account, sum(quantity) %% %s FROM usage_point GROUP BY account", [2**ITEMS])
    ).fetchall()
    return {account: total for account, total in rows if total}
