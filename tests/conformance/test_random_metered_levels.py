"""A file of meters that changes while gauges and UpDownCounters go on: what each stands at is one account's at a time,
the one that the file named.

Pods report levels that rise and fall, of several consumers, late, twice and through two collectors; the file is changed
at random: whom a consumer is billed to or whether to anybody, by which factor and dimensions, since when, whether at
all; and somebody settles what nobody was named for. The oracle puts each level in its place when it comes, and walks by
a clock that stops at every second at which anything changes.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.billing.aggregated import aggregated
from tallymark_collector.billing.plans import Aggregation
from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine import items
from tallymark_collector.quarantine.items import Filter
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import NotSettled, Person, release
from tallymark_collector.store import Store
from tests.support.telemetry import metrics_of
from tests.support.usage import BASE, SECOND, number, sum_metric

SEEDS = range(int(os.environ.get("TALLYMARK_TEST_SEEDS", "3")))
STEPS = 50
STALE = 45
NOW = BASE + 3 * 3600 * SECOND
ACCOUNTS = ("acme", "globex", "initech")
CONSUMERS = ("one", "two")
METERS = {"seats": "seats", "more.seats": "seats", "stored": "stored"}
"""Each with its metric: `seats` is a gauge that two of them take, `stored` an UpDownCounter."""
PODS = ("p1", "p2")
EPOCH = datetime.fromtimestamp(BASE // SECOND, timezone.utc)


@dataclass(frozen=True)
class Rule:
    """What a file says of one meter."""

    to: tuple[str | None, ...]
    """The account of each consumer; None where the file names none."""
    factor: str = "1"
    dimensions: tuple[str, ...] = ()
    since: int | None = None
    """In seconds after BASE."""

    def text(self, meter: str) -> str:
        known = (f"{consumer}: {to}" for consumer, to in zip(CONSUMERS, self.to, strict=True) if to is not None)
        mapped = ", ".join([*known, "nobody: nobody"])
        since = "" if self.since is None else f", since: '{EPOCH + timedelta(seconds=self.since):%Y-%m-%dT%H:%M:%SZ}'"
        return (
            f"  {meter}: {{unit: '1', aggregation: level, sources: [{{metric: {METERS[meter]}, quantity: value,"
            f" account: {{attribute: consumer, map: {{{mapped}}}}}, factor: {self.factor},"
            f" dimensions: [{', '.join(self.dimensions)}]{since}}}]}}"
        )


class Level(NamedTuple):
    """What one pod reports of one consumer."""

    metric: str
    pod: str
    consumer: str
    at: int
    """In seconds after BASE."""
    value: int
    ended: bool = False
    """It says that it has ended, instead."""

    def message(self) -> ExportMetricsServiceRequest:
        # The process is not told by the resource, as of some gateways: its points are told apart by an attribute.
        attributes = {"consumer": self.consumer, "pod": self.pod, "region": "eu"}
        point = number(0, BASE + self.at * SECOND, self.value, attributes)
        if self.ended:
            point.ClearField("as_int")
            point.flags = 1
        if self.metric == "seats":
            metric = Metric(name="seats", unit="1")
            metric.gauge.data_points.append(point)
        else:
            metric = sum_metric([point], "stored", "1", temporality=2, monotonic=False)
        return metrics_of({"service.name": "portal", "service.instance.id": "gateway"}, metric)


def request(levels: Iterable[Level]) -> bytes:
    whole = ExportMetricsServiceRequest()
    for level in levels:
        whole.MergeFrom(level.message())
    return whole.SerializeToString()


def read(payload: bytes) -> tuple[str, str, str, int]:
    """Of which level an item's payload is."""
    [metric] = ExportMetricsServiceRequest.FromString(payload).resource_metrics[0].scope_metrics[0].metrics
    [point] = (metric.gauge if metric.HasField("gauge") else metric.sum).data_points
    said = {item.key: item.value.string_value for item in point.attributes}
    return metric.name, said["pod"], said["consumer"], (point.time_unix_nano - BASE) // SECOND


class Stands(NamedTuple):
    value: Fraction
    account: str
    factor: Fraction
    dimensions: tuple[str, ...]
    ended: bool = False


@dataclass
class Oracle:
    """By meter and source: what it stood at from when on, and for whom."""

    known: dict[tuple[str, str, str], dict[int, Stands]] = field(default_factory=lambda: defaultdict(dict))
    ends: dict[tuple[str, str], set[int]] = field(default_factory=lambda: defaultdict(set))
    """By meter and account: when levels of its went to somebody else."""

    def came(self, level: Level, rules: dict[str, Rule]) -> None:
        for meter, rule in rules.items():
            account = rule.to[CONSUMERS.index(level.consumer)]
            if METERS[meter] == level.metric and account is not None and (rule.since is None or level.at > rule.since):
                self.take(meter, level, rule, account, decided=False)

    def take(self, meter: str, level: Level, rule: Rule, account: str, *, decided: bool) -> None:
        told = self.known[meter, level.pod, level.consumer]
        if level.at in told and (level.ended or not told[level.at].ended):
            return
        earlier = [at for at in told if at < level.at]
        later = [at for at in told if at > level.at]
        factor, dimensions = Fraction(rule.factor), rule.dimensions
        if (later or (earlier and level.ended)) and not decided:
            _, account, factor, dimensions, _ = told[max(earlier) if earlier else min(later)]
        told[level.at] = Stands(level.value * factor * (not level.ended), account, factor, dimensions, level.ended)
        if level.ended:
            self.ends[meter, account].add(level.at)
            return
        around = sorted([*earlier, level.at, *later])
        place = around.index(level.at)
        for at, following in pairwise(around[max(place - 1, 0) : place + 2]):
            if not told[at].ended and told[at][1:4:2] != told[following][1:4:2]:
                self.ends[meter, told[at].account].add(following)

    def stands(self, meter: str, account: str, now: int) -> Fraction:
        total = Fraction(0)
        for (of, *_), told in self.known.items():
            last = max((at for at in told if at <= now), default=None)
            if of == meter and last is not None and now < last + STALE and told[last].account == account:
                total += told[last].value
        return total

    def quantities(self, meter: str, account: str, start: int, end: int) -> dict[str, Fraction] | None:
        """By aggregation; None where nothing of the account's is or holds there."""
        own = {at for (of, *_), told in self.known.items() if of == meter for at in told if told[at].account == account}
        told_then = {at for at in own | self.ends[meter, account] if start - STALE < at < end}
        if not told_then:
            return None
        levels = [self.stands(meter, account, now) for now in range(start, end)]
        seconds = sum(levels, Fraction(0))
        return {
            "integral": seconds / 3600,
            "average": seconds / (end - start),
            "max": max(levels),
            "latest": levels[max(start, *told_then) - start],
        }


def rounded(quantity: Fraction) -> Decimal:
    """To 18 decimals, half away from zero."""
    whole = int(abs(quantity) * 10**18 + Fraction(1, 2))
    return Decimal(whole if quantity >= 0 else -whole).scaleb(-18)


class World:
    """Two collectors with files of their own, and what is on its way to them."""

    def __init__(self, rng: random.Random, stores: list[Store]) -> None:
        self.rng, self.stores = rng, stores
        self.at = 0
        self.oracle = Oracle()
        self.sent: list[Level] = []
        self.delayed: list[Level] = []
        self.files: list[dict[str, Rule]] = [{}, {}]
        self.parsed: list[Rules | None] = [None, None]
        self.collectors: list[Pipeline] = [Pipeline(store, now_ns=lambda: NOW) for store in stores]
        self.settled = 0
        for place in range(2):
            self.use(place, {meter: Rule(("acme", None)) for meter in ("seats", "stored")})

    def use(self, place: int, rules: dict[str, Rule]) -> None:
        self.files[place] = rules
        text = "meters:\n" + "\n".join(rule.text(meter) for meter, rule in rules.items())
        self.parsed[place] = parse_rules(text) if rules else None
        metering = Metering(self.parsed[place]) if rules else None  # type: ignore[arg-type]
        self.collectors[place] = Pipeline(self.stores[place], now_ns=lambda: NOW, metering=metering)

    def reported(self) -> Iterator[Level]:
        self.at += self.rng.randint(1, 30)
        for metric in ("seats", "stored"):
            for pod in PODS:
                for consumer in CONSUMERS:
                    if self.rng.random() < 0.1:
                        continue
                    level = Level(metric, pod, consumer, self.at, self.rng.choice((0, 1, 2, 5, 40)))
                    ended = level._replace(value=0, ended=True)
                    for one in self.rng.choices(([level], [ended], [level, ended]), (8, 1, 1))[0]:
                        if self.rng.random() < 0.2:
                            self.delayed.append(one)
                        else:
                            yield one

    async def report(self) -> None:
        await self.deliver([*self.reported()])

    async def late(self) -> None:
        self.rng.shuffle(self.delayed)
        found, self.delayed = self.delayed[:6], self.delayed[6:]
        await self.deliver(found)

    async def again(self) -> None:
        await self.deliver(self.rng.sample(self.sent, min(len(self.sent), 8)))

    async def deliver(self, levels: list[Level]) -> None:
        """Each of them through one of the collectors."""
        first = {level for level in levels if self.rng.random() < 0.5}
        order = self.rng.sample((0, 1), 2)
        for place, found in zip(order, (first, {*levels} - first), strict=True):
            # A request's levels are taken in the order of their times, in whichever they stand in it.
            ordered = sorted(found, key=lambda level: level.at)
            outcome = await self.collectors[place].metrics("default", request(ordered[::-1]))
            assert "account_missing" in outcome.message or not outcome.rejected, outcome.message
            self.sent += ordered
            for level in ordered:
                self.oracle.came(level, self.files[place])

    async def change(self) -> None:
        """One collector gets another file, the other one perhaps later."""
        rules = dict(self.files[self.rng.randrange(2)])
        meter = self.rng.choice([*METERS])
        to = tuple(self.rng.choice((*ACCOUNTS, None)) for _ in CONSUMERS)
        old = rules.get(meter)
        if old is None:
            rules[meter] = Rule(to, since=self.rng.choice([None, self.at, self.at + 40]))
        else:
            match self.rng.choice(("to", "to", "to", "factor", "dimensions", "since", "removed")):
                case "to":
                    rules[meter] = Rule(to, old.factor, old.dimensions, old.since)
                case "factor":
                    rules[meter] = Rule(old.to, self.rng.choice(("1", "10", "1/1000")), old.dimensions, old.since)
                case "dimensions":
                    dimensions = self.rng.choice(((), ("pod",), ("region",)))
                    rules[meter] = Rule(old.to, old.factor, dimensions, old.since)
                case "since":
                    since = self.rng.choice([None, self.at - 20, self.at, self.at + 40])
                    rules[meter] = Rule(old.to, old.factor, old.dimensions, since)
                case _:
                    del rules[meter]
        for place in self.rng.choice(([0], [1], [0, 1], [0, 1])):
            self.use(place, rules)

    async def settle(self) -> None:
        """Somebody decides about what nobody was named for, with the file of one of the collectors."""
        async with self.stores[0].reading() as connection:
            entries = await items.open_items(connection, Filter("default"), 1000)
            if not entries:
                return
            item = await items.find(connection, "default", self.rng.choice(entries).id)
        place = self.rng.randrange(2)
        sent = read(item.payload)
        [level] = {level for level in self.sent if level[:4] == sent and not level.ended}
        rule = self.files[place].get(item.meter)
        named = None if rule is None else rule.to[CONSUMERS.index(level.consumer)]
        account = self.rng.choice((*ACCOUNTS, None))
        there = self.oracle.known[item.meter, level.pod, level.consumer].get(level.at)
        if there is not None and there.ended:
            there = None  # a level of that very time counts instead
        decision = Decision(account=account)
        whom = named or account
        try:
            settled = await release(self.stores[place], item, decision, Person("anne"), NOW, self.parsed[place])
        except NotSettled:
            before = rule is not None and rule.since is not None and level.at <= rule.since
            elsewhere = there is not None and there.account != whom
            assert rule is None or (named and account) or whom is None or before or elsewhere
            return
        assert rule is not None
        assert whom is not None
        assert settled.action.billed_to == whom
        assert (settled.action.inserted, settled.action.duplicates) == ((1, 0) if there is None else (0, 1))
        self.settled += there is None
        self.oracle.take(item.meter, level, rule, whom, decided=True)

    async def check(self) -> None:
        start, end = self.rng.choice([(0, self.at + 60), (self.at // 2, self.at + 1), (self.at // 3, self.at // 2 + 1)])
        bounds = (EPOCH + timedelta(seconds=start), EPOCH + timedelta(seconds=end))
        async with self.stores[0].reading() as connection:
            expected = {
                (account, meter): quantities
                for account in ACCOUNTS
                for meter in METERS
                if (quantities := self.oracle.quantities(meter, account, start, end)) is not None
            }
            for kind in ("integral", "average", "max", "latest"):
                how = {meter: Aggregation(aggregation=kind, stale_after=STALE) for meter in METERS}  # type: ignore[arg-type]
                found = {
                    (each.account, each.meter): each.quantity
                    for each in await aggregated(connection, "default", None, *bounds, how)
                }
                assert found == {whose: rounded(quantities[kind]) for whose, quantities in expected.items()}, kind
            [[summed]] = await (await connection.execute("SELECT count(*) FROM usage_point")).fetchall()
            aside = await (await connection.execute("SELECT DISTINCT reason FROM usage_quarantine")).fetchall()
        assert summed == 0, "levels are in no sum"
        assert aside in ([], [("account_missing",)])


@pytest.fixture
async def stores(store: Store, dsn: str) -> AsyncIterator[list[Store]]:
    other = Store(dsn)
    await other.open()
    yield [store, other]
    await other.close()


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_a_source_stands_at_is_one_accounts_at_a_time(stores: list[Store], seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, stores)
    steps = [world.report] * 4 + [world.late, world.again, world.settle, world.settle, world.change, world.change]
    for number_ in range(STEPS):
        await rng.choice(steps)()
        if number_ % 10 == 9:
            await world.check()
    while world.delayed:
        await world.late()
    await world.again()
    for _ in range(20):
        await world.settle()
    await world.check()
    assert world.settled
    assert sum(map(len, world.oracle.ends.values())) > 3


@pytest.mark.parametrize("seed", range(2))
async def test_collectors_with_different_files_at_once(stores: list[Store], seed: int) -> None:
    """Whichever of them takes a level bills it to whom its own file names: together it is what the pods stood at."""
    rng = random.Random(seed)
    world = World(rng, stores)
    for place, account in enumerate(("acme", "globex")):
        world.use(place, {meter: Rule((account, account)) for meter in METERS})
    waves = [[*world.reported()] for _ in range(8)]
    sent = [(n % 2, request(wave)) for wave in waves for n in range(rng.randint(2, 4))]
    await asyncio.gather(*(world.collectors[place].metrics("default", body) for place, body in sent))
    last = [*world.delayed, *(level for wave in waves for level in wave)]
    outcome = await world.collectors[0].metrics("default", request(last))
    assert outcome.message == ""
    for level in last:
        world.oracle.came(level, {meter: Rule(("both", "both")) for meter in METERS})
    how = {meter: Aggregation(aggregation="integral", stale_after=STALE) for meter in METERS}
    bounds = (EPOCH, EPOCH + timedelta(seconds=world.at + 60))
    found: dict[str, Decimal] = defaultdict(Decimal)
    async with stores[1].reading() as connection:
        for each in await aggregated(connection, "default", None, *bounds, how):
            assert each.quantity is not None
            found[each.meter] += each.quantity
    for meter in METERS:
        expected = world.oracle.quantities(meter, "both", 0, world.at + 60)
        assert expected is not None
        assert abs(found[meter] - rounded(expected["integral"])) <= Decimal("1e-17"), meter
