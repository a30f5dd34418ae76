"""Random files of meters, telemetry that names nobody, random decisions of several people about it, and clients that
send again, some of it decorated by a gateway: what was given to an account is billed to it once, and nothing else is.

What each point or span is of each meter is worked out here from what was sent, by other means than the collector's.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

import pytest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine import items
from tallymark_collector.quarantine.items import Filter, Item
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import NotSettled, Person, discard, release, releasing, reopen, together
from tallymark_collector.store import Store
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, sum_metric

UNITS = 9
STEPS = 40
PEOPLE = 3
OWNERS = ("acme", "globex")
NOW = BASE + 86_400 * SECOND
TIMES = 3
"""Totals of each cumulative stream."""


@dataclass(frozen=True)
class Meter:
    """A meter of the file, of one name of metric or span."""

    name: str
    source: str
    """histogram, total (a cumulative histogram), counter or span"""
    quantity: str
    factor: int

    def text(self) -> str:
        what = "span: span" if self.source == "span" else f"metric: {self.source}"
        more = ", spans_are_complete: true" if self.source == "span" else ""
        return (
            f"  {self.name}: {{unit: '1', sources: [{{{what}, quantity: {self.quantity}, factor: {self.factor},"
            f" account: consumer{more}}}]}}"
        )


@dataclass(frozen=True)
class Unit:
    """Something that is billed as a whole: a point, a span, or one total of a stream (its increase is billed)."""

    source: str
    position: int
    stream: int
    """Of a running total; all that are billed of one stream are one account's."""
    amounts: dict[str, Decimal]
    """By quantity. Of a running total, the total."""

    def bodies(self) -> Iterator[tuple[str, bytes]]:
        """As it is sent, and as a gateway decorates it."""
        for pod in (None, "pod-1"):
            resource: dict[str, object] = {"service.name": "kong", "service.instance.id": "one"}
            resource |= {} if pod is None else {"k8s.pod.name": pod}
            end = BASE + self.position * 60 * SECOND
            where: dict[str, object] = {"n": self.stream}
            if self.source == "span":
                start = end - int(self.amounts["duration"]) * SECOND
                one = span(self.position, where, name="span", start_time_unix_nano=start, end_time_unix_nano=end)
                yield "traces", spans_of(resource, [one]).SerializeToString()
                continue
            start = BASE - SECOND if self.source == "total" else end - SECOND
            if self.source == "counter":
                metric = sum_metric([number(start, end, int(self.amounts["value"]), where)], "counter", unit="1")
            else:
                point = histogram_point(start, end, int(self.amounts["count"]), float(self.amounts["sum"]), where)
                metric = histogram([point], self.source, unit="1", temporality=2 if self.source == "total" else 1)
            yield "metrics", metrics_of(resource, metric).SerializeToString()


QUANTITIES = {
    "histogram": ("count", "sum"),
    "total": ("count", "sum"),
    "counter": ("value",),
    "span": ("spans", "duration"),
}


def a_file(rng: random.Random) -> tuple[list[Meter], Rules]:
    """Each source feeds one to three meters, some of them by the same quantity."""
    found = [
        Meter(f"{source}.{n}", source, rng.choice(QUANTITIES[source]), rng.choice((1, 10, 1000)))
        for source in QUANTITIES
        for n in range(rng.randint(1, 3))
    ]
    return found, parse_rules("meters:\n" + "\n".join(meter.text() for meter in found))


def telemetry(rng: random.Random) -> list[Unit]:
    found: list[Unit] = []
    for n in range(UNITS):
        source = rng.choice(("histogram", "counter", "span", "total"))
        position = 10 * n + 1
        if source == "total":
            count = Decimal(0)
            for step in range(TIMES):
                count += rng.randint(0, 50)
                found.append(Unit(source, position + step, n, {"count": count, "sum": count * 2}))
        else:
            amount = Decimal(rng.randint(1, 50))
            amounts = dict.fromkeys(QUANTITIES[source], amount)
            found.append(Unit(source, position, n, amounts | ({"spans": Decimal(1)} if source == "span" else {})))
    return found


@pytest.mark.parametrize("seed", [int(os.environ.get("TALLYMARK_TEST_SEED", "1")), 2, 3])
async def test_what_nobody_is_named_for_is_billed_once_if_somebody_decides_so(
    store: Store, dsn: str, seed: int
) -> None:
    rng = random.Random(seed)
    meters, rules = a_file(rng)
    units = telemetry(rng)
    pipeline = Pipeline(store, now_ns=lambda: NOW, metering=Metering(rules))

    async def send(body: tuple[str, bytes]) -> None:
        outcome = await (pipeline.traces if body[0] == "traces" else pipeline.metrics)("default", body[1])
        assert outcome.rejected == 1, "it names nobody, whenever it comes"

    work: dict[tuple[int, str], list[Item]] = {}
    seen: set[str] = set()
    for place, unit in enumerate(units):
        for body in unit.bodies():
            await send(body)
        async with store.reading() as connection:
            entries = await items.open_items(connection, Filter("default"), 1000)
            new = [await items.find(connection, "default", entry.id) for entry in entries if entry.id not in seen]
        seen |= {item.id for item in new}
        of_unit = [meter for meter in meters if meter.source == unit.source]
        for meter in of_unit:
            work[place, meter.name] = [item for item in new if item.meter == meter.name]
            assert len(work[place, meter.name]) == 2, "one for each wrapping"
        assert len(new) == 2 * len(of_unit)

    other = Store(dsn)
    await other.open()
    done: dict[str, list[str]] = defaultdict(list)
    refusals: list[str] = []
    keys = list(work)

    async def person(number_: int, seed_: int) -> None:
        own = random.Random(seed_)
        who = Person(f"person {number_}", "so it is")
        through = (store, other)[number_ % 2]
        for _ in range(STEPS):
            item = own.choice(work[own.choice(keys)])
            try:
                match own.choice(("bill", "bill", "several", "without", "discard", "reopen", "reopen")):
                    case "bill":
                        account = own.choice(OWNERS)
                        settled = await release(through, item, Decision(account=account), who, NOW, rules)
                        if settled.done_now:
                            done[item.id].append(account)
                    case "several":
                        account = own.choice(OWNERS)
                        meant = [own.choice(work[key]) for key in own.sample(keys, min(4, len(keys)))]
                        deciding = releasing(Decision(account=account), who, NOW, rules)
                        async for settled_item, outcome in together(through, meant, deciding):
                            if isinstance(outcome, NotSettled):
                                refusals.append(str(outcome))
                            elif outcome.done_now:
                                done[settled_item.id].append(account)
                    case "without":
                        # Closed already, and by somebody else: that is told instead.
                        settled = await release(through, item, Decision(account="acme"), who, NOW)
                        assert not settled.done_now, "nothing is billed without the file"
                    case "discard":
                        await discard(through, item, who)
                    case "reopen":
                        await reopen(through, item, who)
            except NotSettled as error:
                refusals.append(str(error))

    async def client(seed_: int) -> None:
        own = random.Random(seed_)
        for _ in range(STEPS):
            await send(own.choice(list(own.choice(units).bodies())))

    async def refresher() -> None:
        for _ in range(STEPS // 4):
            await store.refresh()

    try:
        tasks = [person(n, rng.randrange(2**32)) for n in range(PEOPLE)]
        await asyncio.gather(*tasks, client(rng.randrange(2**32)), refresher())
    finally:
        await other.close()

    allowed = ("is open", "it is billed", "billed as something else before", "give that file, --meters")
    assert [why for why in refusals if not any(part in why for part in allowed)] == []
    expected: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    highest: dict[tuple[str, str, int], Decimal] = defaultdict(Decimal)
    by_name = {meter.name: meter for meter in meters}
    for (place, name), both in work.items():
        unit, meter = units[place], by_name[name]
        given = {account for item in both for account in done[item.id]}
        assert all(len(done[item.id]) <= 1 for item in both), f"seed {seed}: an item was settled twice"
        assert len(given) <= 1, f"seed {seed}: one unit of two accounts"
        for account in given:
            amount = unit.amounts[meter.quantity] * meter.factor
            if unit.source == "total":
                # Totals tell of each other: what is billed is the highest of those that were given to somebody.
                key = (account, meter.name, unit.stream)
                highest[key] = max(highest[key], amount)
            else:
                expected[account, meter.name] += amount
    for (account, name, _), amount in highest.items():
        expected[account, name] += amount
    async with store.reading() as connection:
        for query in (
            "SELECT account, meter, sum(quantity) FROM usage_hourly GROUP BY 1, 2",
            "SELECT p.account, s.meter, sum(p.quantity) FROM usage_point p JOIN usage_series s USING (account, series)"
            " GROUP BY 1, 2",
        ):
            rows = await (await connection.execute(query)).fetchall()
            assert {row[:2]: row[2] for row in rows if row[2]} == {k: v for k, v in expected.items() if v}, (
                f"seed {seed}"
            )
        closed = {item_id for item_id, accounts in done.items() if accounts}
        still_open = {entry.id for entry in await items.open_items(connection, Filter("default"), 1000)}
        assert not closed & still_open
        assert closed | still_open <= seen, f"seed {seed}: what came again is another item"
        assert (await audit(connection)).clean
    assert expected, f"seed {seed}: nobody billed anything"
