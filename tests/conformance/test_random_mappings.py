"""A file of meters that changes while what it bills goes on counting: each unit that was counted is billed once, to
whom the file named when it came.

Producers count, restart and report running totals; totals come late, twice and through two collectors; and the file is
changed at random: whom a consumer's usage is billed to, by which factor and dimensions, since when, and whether at all.
The oracle knows nothing of increases and corrections. It keeps what each collector's file said when a total became the
latest of its stream: that is who pays for the time up to it. At the end it walks along each stream's totals once.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal

import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.quarantine import contradictions, items
from tallymark_collector.quarantine.items import Filter
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import NotSettled, Person, release
from tallymark_collector.store import Store
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import BASE, SECOND, number, sum_metric

SEEDS = range(int(os.environ.get("TALLYMARK_TEST_SEEDS", "3")))
STEPS = 60
NOW = BASE + 3 * 3600 * SECOND
ACCOUNTS = ("acme", "globex", "initech")
CONSUMERS = ("one", "two")
METERS = ("requests", "more.requests", "bytes")
"""The first two take the same streams."""


@dataclass(frozen=True)
class Rule:
    """What a file says of one meter."""

    to: tuple[str, ...]
    """The account of each consumer."""
    factor: int = 1
    dimensions: tuple[str, ...] = ()
    since: int | None = None
    """In seconds after BASE."""

    def text(self, meter: str) -> str:
        metric = "metric: sent, quantity: value" if meter == "bytes" else "metric: calls, quantity: count"
        unit = "By" if meter == "bytes" else "'{request}'"
        mapped = ", ".join(f"{consumer}: {to}" for consumer, to in zip(CONSUMERS, self.to, strict=True))
        since = "" if self.since is None else f", since: '{_instant(self.since)}'"
        return (
            f"  {meter}: {{unit: {unit}, sources: [{{{metric}, account: {{attribute: consumer, map: {{{mapped}}}}},"
            f" factor: {self.factor}, dimensions: [{', '.join(self.dimensions)}]{since}}}]}}"
        )


def _instant(second: int) -> str:
    minutes, seconds = divmod((BASE // SECOND % 86_400) + second, 60)
    hours, minutes = divmod(minutes, 60)
    return f"2026-09-21T{hours:02}:{minutes:02}:{seconds:02}Z"


def test_the_clock_of_this_test() -> None:
    source = parse_rules("meters:\n" + Rule(("a", "b"), since=77).text("requests")).meters["requests"].sources[0]
    assert source.since == BASE + 77 * SECOND


@dataclass(frozen=True)
class Total:
    """What a producer reports of one consumer: how much it has counted since it started."""

    kind: str
    """calls or sent"""
    producer: str
    consumer: str
    start: int
    """In seconds after BASE, as `at`."""
    at: int
    value: int

    @property
    def stream(self) -> tuple[str, str, str]:
        return self.kind, self.producer, self.consumer

    def message(self) -> ExportMetricsServiceRequest:
        attributes = {"consumer": self.consumer, "route": f"/{self.consumer}"}
        start = 0 if self.start == UNKNOWN else BASE + self.start * SECOND
        end = BASE + self.at * SECOND
        if self.kind == "calls":
            metric = histogram([histogram_point(start, end, self.value, None, attributes)], "calls", "s", 2)
        else:
            metric = sum_metric([number(start, end, self.value, attributes)], "sent", "By", temporality=2)
        resource = {"service.name": "kong", "service.instance.id": self.producer}
        return metrics_of(resource, metric)


UNKNOWN = -1_000_000
"""A start that is never said."""


def request(totals: Iterable[Total]) -> bytes:
    whole = ExportMetricsServiceRequest()
    for total in totals:
        whole.MergeFrom(total.message())
    return whole.SerializeToString()


@dataclass
class Producer:
    """Counts for each consumer; may have begun long before anybody bills it."""

    rng: random.Random
    kind: str
    name: str
    start: int
    counted: dict[str, int] = field(default_factory=dict)

    def report(self, at: int) -> list[Total]:
        found = []
        for consumer in CONSUMERS:
            self.counted[consumer] = self.counted.get(consumer, 0) + self.rng.choice((0, 1, 2, 5, 40))
            found.append(Total(self.kind, self.name, consumer, self.start, at, self.counted[consumer]))
        return found

    def restart(self, at: int) -> None:
        self.counted.clear()
        if self.start != UNKNOWN:
            self.start = at


@dataclass
class Oracle:
    """Who pays for the time up to which total, and what that comes to."""

    known: dict[tuple[object, ...], dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    """By meter, stream and start: totals by their times."""
    marks: dict[tuple[object, ...], dict[int, tuple[Rule, str]]] = field(default_factory=lambda: defaultdict(dict))
    """The same: of those that were the latest when they came, what the file said."""

    def came(self, total: Total, rules: dict[str, Rule]) -> None:
        for meter, rule in rules.items():
            if (meter == "bytes") is not (total.kind == "sent"):
                continue
            key = (meter, total.stream, total.start)
            if total.at > max(self.known[key], default=-(10**9)):
                account = rule.to[CONSUMERS.index(total.consumer)]
                self.marks[key][total.at] = (rule, account)
            self.known[key][total.at] = total.value

    def billed(self) -> dict[tuple[str, str], Decimal]:
        found: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
        for key, totals in self.known.items():
            meter, _, start = key
            before: int | None = None
            for at in sorted(totals):
                rule, account = self._payer(key, at)
                grown = self._grown(key, before, at, rule, start)
                found[account, str(meter)] += grown * rule.factor
                before = at
        return {who: amount for who, amount in found.items() if amount}

    def _payer(self, key: tuple[object, ...], at: int) -> tuple[Rule, str]:
        return self.marks[key][min(mark for mark in self.marks[key] if mark >= at)]

    def _grown(self, key: tuple[object, ...], before: int | None, at: int, rule: Rule, start: object) -> int:
        totals = self.known[key]
        since = -(10**9) if rule.since is None else rule.since
        if at <= since:
            return 0
        if before is None:
            assert isinstance(start, int)
            return 0 if start == UNKNOWN or start < since else totals[at]
        if before <= since and self._payer(key, before)[0].since != rule.since:
            return 0  # it was kept by another rule: how long before `since` nobody knows
        if start == UNKNOWN and totals[at] < totals[before]:
            return totals[at]
        return totals[at] - totals[before]


class World:
    """Two collectors with files of their own, and what is on its way to them."""

    def __init__(self, rng: random.Random, stores: list[Store]) -> None:
        self.rng, self.stores = rng, stores
        self.at = 0
        self.oracle = Oracle()
        self.sent: list[Total] = []
        self.delayed: list[Total] = []
        self.producers = [
            Producer(rng, kind, name, start)
            for kind in ("calls", "sent")
            for name, start in (("old", -40 * 3600), ("young", 0), ("silent", UNKNOWN))
        ]
        # The others come later: what has run for long by then.
        rule = {meter: Rule(("acme", "globex")) for meter in rng.sample(METERS, 2)}
        self.files: list[dict[str, Rule]] = [{}, {}]
        self.collectors: list[Pipeline] = []
        for place in range(2):
            self.collectors.append(Pipeline(stores[place], now_ns=lambda: NOW))
            self.use(place, rule)

    def use(self, place: int, rules: dict[str, Rule]) -> None:
        self.files[place] = rules
        text = "meters:\n" + "\n".join(rule.text(meter) for meter, rule in rules.items())
        metering = Metering(parse_rules(text)) if rules else None
        self.collectors[place] = Pipeline(self.stores[place], now_ns=lambda: NOW, metering=metering)

    def reported(self) -> Iterator[Total]:
        self.at += self.rng.randint(1, 30)
        for producer in self.producers:
            if self.rng.random() < 0.1:
                producer.restart(self.at)
                self.at += 1
            for total in producer.report(self.at):
                if self.rng.random() < 0.2:
                    self.delayed.append(total)
                else:
                    yield total

    async def report(self) -> None:
        await self.deliver([*self.reported()])

    async def late(self) -> None:
        self.rng.shuffle(self.delayed)
        found, self.delayed = self.delayed[:6], self.delayed[6:]
        await self.deliver(found)

    async def again(self) -> None:
        await self.deliver(self.rng.sample(self.sent, min(len(self.sent), 8)))

    async def deliver(self, totals: list[Total]) -> None:
        """Each of them through one of the collectors."""
        first = {total for total in totals if self.rng.random() < 0.5}
        order = self.rng.sample((0, 1), 2)
        for place, found in zip(order, (first, {*totals} - first), strict=True):
            # A request's totals are taken in the order of their times, in whichever they stand in it.
            ordered = sorted(found, key=lambda total: total.at)
            outcome = await self.collectors[place].metrics("default", request(ordered[::-1]))
            assert (outcome.rejected, outcome.message) == (0, "")
            self.sent += ordered
            for total in ordered:
                self.oracle.came(total, self.files[place])

    async def change(self) -> None:
        """One collector gets another file, the other one perhaps later."""
        rules = dict(self.files[self.rng.randrange(2)])
        meter = self.rng.choice(METERS)
        if meter not in rules:
            fresh = Rule((self.rng.choice(ACCOUNTS), self.rng.choice(ACCOUNTS)))
            since = self.rng.choice([None, self.at, self.at + 40])
            rules[meter] = Rule(fresh.to, since=since)
        else:
            old = rules[meter]
            match self.rng.choice(("to", "to", "to", "factor", "dimensions", "since", "removed")):
                case "to":
                    rules[meter] = Rule(
                        (self.rng.choice(ACCOUNTS), self.rng.choice(ACCOUNTS)), old.factor, old.dimensions, old.since
                    )
                case "factor":
                    rules[meter] = Rule(old.to, self.rng.choice((1, 10, 1000)), old.dimensions, old.since)
                case "dimensions":
                    rules[meter] = Rule(old.to, old.factor, self.rng.choice(((), ("route",))), old.since)
                case "since":
                    since = self.rng.choice([None, self.at - 20, self.at, self.at + 40])
                    rules[meter] = Rule(old.to, old.factor, old.dimensions, since)
                case _:
                    del rules[meter]
        for place in self.rng.choice(([0], [1], [0, 1], [0, 1])):
            self.use(place, rules)

    async def check(self) -> None:
        async with self.stores[0].reading() as connection:
            rows = await (
                await connection.execute("SELECT account, meter, sum(quantity) FROM usage_hourly GROUP BY 1, 2")
            ).fetchall()
            aside = await (await connection.execute("SELECT reason, detail FROM usage_quarantine")).fetchall()
            report = await audit(connection)
            of_one = await audit(connection, account=self.rng.choice(ACCOUNTS))
        assert aside == []
        assert {(account, meter): quantity for account, meter, quantity in rows if quantity} == self.oracle.billed()
        assert (report.differences, report.drifts, of_one.drifts) == ([], [], [])


@pytest.fixture
async def stores(store: Store, dsn: str) -> AsyncIterator[list[Store]]:
    other = Store(dsn)
    await other.open()
    yield [store, other]
    await other.close()


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_was_counted_is_billed_to_whom_the_file_named(stores: list[Store], seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, stores)
    steps = [world.report, world.report, world.report, world.late, world.again, world.change, world.change]
    for number_ in range(STEPS):
        await rng.choice(steps)()
        if number_ % 10 == 9:
            await stores[0].refresh()
            await world.check()
    while world.delayed:
        await world.late()
    await world.again()
    await world.check()
    assert len(world.oracle.billed()) > 3


@pytest.mark.parametrize("seed", range(2))
async def test_collectors_with_different_files_at_once_bill_nothing_twice(stores: list[Store], seed: int) -> None:
    """Whichever of them takes a total bills it to whom its own file names: together it is what was counted."""
    rng = random.Random(seed)
    world = World(rng, stores)
    for place, account in enumerate(("acme", "globex")):
        world.use(place, {meter: Rule((account, account)) for meter in METERS})
    waves = [[*world.reported()] for _ in range(8)]
    sent = [(n % 2, request(wave)) for wave in waves for n in range(rng.randint(2, 4))]
    await asyncio.gather(
        *(world.collectors[place].metrics("default", body) for place, body in sent), stores[0].refresh()
    )
    await world.collectors[0].metrics("default", request([*world.delayed, *(t for wave in waves for t in wave)]))
    for wave in [*waves, world.delayed]:
        for total in wave:
            world.oracle.came(total, world.files[0])
    counted: dict[str, Decimal] = defaultdict(Decimal)
    for (_, meter), amount in world.oracle.billed().items():
        counted[meter] += amount
    async with stores[1].reading() as connection:
        rows = await (await connection.execute("SELECT meter, sum(quantity) FROM usage_hourly GROUP BY 1")).fetchall()
        report = await audit(connection)
        aside = await (await connection.execute("SELECT reason, detail FROM usage_quarantine")).fetchall()
    assert (dict(rows), aside) == (dict(counted), [])
    assert (report.differences, report.drifts) == ([], [])


@pytest.mark.parametrize("since", [None, 0])
async def test_totals_that_an_earlier_version_kept_count_on(store: Store, dsn: str, since: int | None) -> None:
    """It kept them by account, and by `since` where they began before that; without the source."""
    rule = Rule(("acme", "globex"), since=since)
    metering = Metering(parse_rules("meters:\n" + rule.text("requests")))
    collector = Pipeline(store, now_ns=lambda: NOW, metering=metering)
    reported = [Total("calls", "old", "one", -600, at, value) for at, value in ((10, 100), (20, 130), (30, 150))]
    for total in reported[:2]:
        await collector.metrics("default", request([total]))
    [point] = decode_metrics("default", request(reported[:1]), StreamCache(), TimeLimits(), NOW, metering).points
    assert point.stream.source is not None
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("UPDATE usage_sample SET source = NULL, series = NULL, factor = NULL, since_ns = NULL")
        connection.execute("DELETE FROM usage_source")
        if since is not None:
            connection.execute("UPDATE usage_sample SET stream = %s, start_ns = 0", [point.stream.source.earlier])
            connection.execute("UPDATE usage_point SET stream = %s", [point.stream.source.earlier])
            connection.execute("UPDATE usage_stream SET stream = %s", [point.stream.source.earlier])
    other = Pipeline(store, now_ns=lambda: NOW, metering=metering)
    await other.metrics("default", request([reported[2], reported[1], reported[2]]))
    late = Total("calls", "old", "one", -600, 15, 120)
    await other.metrics("default", request([late]))
    async with store.reading() as connection_:
        rows = await (
            await connection_.execute("SELECT account, sum(quantity) FROM usage_hourly GROUP BY 1")
        ).fetchall()
        report = await audit(connection_)
    assert rows == [("acme", 150 if since is None else 50)]
    assert (report.differences, report.drifts) == ([], [])


async def test_a_total_of_nobody_that_a_later_one_has_billed_is_not_billed_to_somebody_else(store: Store) -> None:
    """The file has learned the customer's name meanwhile: what had been counted by then is in the next total."""
    reported = [Total("calls", "young", "one", 0, at, value) for at, value in ((10, 100), (20, 130))]
    nobody = Metering(parse_rules("meters:\n" + Rule(("acme", "globex")).text("requests").replace("one: ", "three: ")))
    rules = parse_rules("meters:\n" + Rule(("acme", "globex")).text("requests"))
    await Pipeline(store, now_ns=lambda: NOW, metering=nobody).metrics("default", request(reported[:1]))
    async with store.reading() as connection:
        [entry] = await items.open_items(connection, Filter("default"), 10)
        item = await items.find(connection, "default", entry.id)
    await Pipeline(store, now_ns=lambda: NOW, metering=Metering(rules)).metrics("default", request(reported[1:]))
    anne = Person("anne")
    with pytest.raises(NotSettled, match="holds this one's usage and was billed to account 'acme'"):
        await release(store, item, Decision(account="initech"), anne, NOW, nobody.rules)
    async with store.reading() as connection:
        assert len(await contradictions.stored(connection, item, rules)) == 1
    assert (await release(store, item, Decision(), anne, NOW, rules)).action.action == "released"
    async with store.reading() as connection:
        rows = await (await connection.execute("SELECT account, sum(quantity) FROM usage_hourly GROUP BY 1")).fetchall()
        assert (await audit(connection)).clean
    assert rows == [("acme", 130)]
