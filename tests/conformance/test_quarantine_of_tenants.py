"""Usage that a file of several tenants' meters takes, in quarantine: settled as its own tenant's."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tallymark_collector.metering import parse_rules
from tallymark_collector.quarantine.settling import NotSettled
from tallymark_collector.store import Store
from tests.conformance.test_quarantine_metered import bill, billed, egress, queue, send


async def test_a_file_that_is_another_tenants_releases_nothing(store: Store) -> None:
    """What one tenant's customers are called is no name of another's."""
    source = "metric: egress, quantity: value, factor: 1/1000, account: {attribute: key, map: {k1: acme}}"
    of_one, of_two = (
        parse_rules(f"meters: {{egress: {{unit: MBy, sources: [{{tenants: [{tenant}], {source}}}]}}}}")
        for tenant in ("one", "two")
    )
    await send(store, egress(7, {"key": "k1"}), tenant="one")
    [item] = await queue(store, "one")
    for decided in ({}, {"account": "acme"}):
        with pytest.raises(NotSettled, match="it is tenant one's, the source takes two's"):
            await bill(store, item, of_two, **decided)
    with pytest.raises(NotSettled, match="it names account 'acme' itself"):
        await bill(store, item, of_one, account="globex")
    assert await billed(store) == {}
    await bill(store, item, of_one)
    assert await billed(store) == {("acme", "egress"): Decimal("0.007")}
    await send(store, egress(7, {"key": "k1"}), tenant="one", rules=of_one)
    await send(store, egress(7, {"key": "k1"}), tenant="two", rules=of_one)
    assert await billed(store) == {("acme", "egress"): Decimal("0.007")}


async def test_what_another_tenants_source_asks_for_may_be_redacted(store: Store) -> None:
    asks = "where: {api_key: {present: true, is: k}}"
    sources = f"{{tenants: [two], metric: egress, quantity: value, account: a, {asks}}}"
    sources += ", {metric: egress, quantity: value, account: consumer}"
    rules = parse_rules(f"meters: {{egress: {{unit: kBy, sources: [{sources}]}}}}")
    await send(store, egress(7, {"api_key": "k"}), tenant="one", rules=rules)
    [item] = await queue(store, "one")
    assert item.metered
    await bill(store, item, rules, account="acme")
    assert await billed(store) == {("acme", "egress"): 7}
