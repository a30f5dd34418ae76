"""A stream of levels that says that it has ended stands at nothing from then on: against a clock, second by second."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.access.quotas import Quotas
from tallymark_collector.access.records import Tenant
from tallymark_collector.billing.aggregated import aggregated
from tallymark_collector.billing.plans import Aggregation
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.model import Stream
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, key_values, number, sum_metric

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
NOW = BASE + 7200 * SECOND
ACCOUNT = "tallymark.account.id"


class Said(NamedTuple):
    pod: str
    at: int
    """In seconds after BASE."""
    value: int | None
    """None: it has ended."""

    def message(self, kind: str = "gauge") -> ExportMetricsServiceRequest:
        point = number(0, BASE + self.at * SECOND, self.value or 0, {ACCOUNT: "acme"})
        if self.value is None:
            point.ClearField("as_int")
            point.flags = 1
        metric = Metric(name="stor", unit="GBy")
        if kind == "gauge":
            metric.gauge.data_points.append(point)
        else:
            metric = sum_metric([point], "stor", "GBy", temporality=2, monotonic=False)
        whole = ExportMetricsServiceRequest()
        inner = whole.resource_metrics.add()
        inner.resource.attributes.extend(key_values({"service.name": "shop", "service.instance.id": self.pod}))
        inner.scope_metrics.add(metrics=[metric]).scope.name = "otel"
        return whole


async def tell(collector: Pipeline, *said: Said, kind: str = "gauge") -> None:
    whole = ExportMetricsServiceRequest()
    for one in said:
        whole.MergeFrom(one.message(kind))
    outcome = await collector.metrics("default", whole.SerializeToString())
    assert outcome.message == ""


async def billed(
    store: Store, kind: str, start: int, end: int, *, across: str = "sum", stale: int = 3600
) -> Decimal | None:
    how = Aggregation(aggregation=kind, across=across, stale_after=stale)  # type: ignore[arg-type]
    bounds = (ZERO + timedelta(seconds=start), ZERO + timedelta(seconds=end))
    async with store.reading() as connection:
        found = await aggregated(connection, "default", "acme", *bounds, {"stor": how})
    return found[0].quantity if found else None


def collecting(store: Store) -> Pipeline:
    return Pipeline(store, now_ns=lambda: NOW)


@pytest.mark.parametrize("kind", ["gauge", "updowncounter"])
async def test_a_level_holds_until_its_stream_ends(store: Store, kind: str) -> None:
    collector = collecting(store)
    for _ in range(2):
        await tell(collector, Said("one", 0, 5), kind=kind)
        await tell(collector, Said("one", 60, None), kind=kind)
    assert await billed(store, "integral", 0, 3600) == Decimal("0.083333333333333333")
    assert await billed(store, "max", 0, 3600) == 5
    assert await billed(store, "max", 60, 3600) == 0
    assert await billed(store, "latest", 0, 3600) == 0
    await tell(collector, Said("one", 120, 7), kind=kind)
    assert await billed(store, "latest", 0, 3600) == 7
    # Late ones, of before the end and after it.
    await tell(collector, Said("one", 30, 11), Said("one", 90, 0), kind=kind)
    assert await billed(store, "integral", 0, 120) == Decimal("0.133333333333333333")
    async with store.reading() as connection:
        [[aside]] = await (await connection.execute("SELECT count(*) FROM usage_quarantine")).fetchall()
    assert aside == 0


async def test_a_level_of_the_very_time_of_an_end_counts_instead(store: Store) -> None:
    collector = collecting(store)
    for one in (Said("one", 0, 5), Said("one", 0, None), Said("two", 0, None), Said("two", 0, 7)):
        await tell(collector, one)
    assert await billed(store, "integral", 0, 3600) == 12


async def test_an_end_of_what_is_no_level_says_nothing(store: Store, dsn: str) -> None:
    whole = Said("one", 60, None).message("updowncounter")
    whole.resource_metrics[0].scope_metrics[0].metrics[0].sum.is_monotonic = True
    collector = collecting(store)
    assert (await collector.metrics("default", whole.SerializeToString())).message == ""
    # Nor does one at a time that nobody can believe.
    for at in (-500 * 86_400, 10 * 86_400):
        await tell(collector, Said("one", at, None))
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        for table in ("usage_point", "usage_sample", "usage_level", "usage_quarantine"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table  # type: ignore[arg-type]


async def test_an_end_of_a_time_whose_levels_were_dropped_is_nothing(store: Store, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("UPDATE usage_kept SET levels_from = %s", [ZERO + timedelta(seconds=100)])
        collector = collecting(store)
        await tell(collector, Said("one", 60, None), Said("two", 120, 5))
        await tell(collector, Said("one", 60, None))
        assert connection.execute("SELECT count(*) FROM usage_quarantine").fetchone() == (0,)
    assert await billed(store, "latest", 100, 3600) == 5


class Directory:
    """Of tenants without limits of their own."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def tenant(self, name: str) -> Tenant:
        return Tenant(name, None, None)

    async def unseen(self, streams: Sequence[Stream]) -> list[Stream]:
        return await self._store.unseen(streams)


async def test_an_end_is_no_usage_that_a_limit_would_set_aside(store: Store) -> None:
    limited = Quotas(Directory(store), Limits(new_streams_per_hour=1))  # type: ignore[arg-type]
    collector = Pipeline(store, now_ns=lambda: NOW, quotas=limited)
    await tell(collector, Said("one", 0, 5))
    await tell(collector, Said("two", 0, None))
    async with store.reading() as connection:
        [[aside]] = await (await connection.execute("SELECT count(*) FROM usage_quarantine")).fetchall()
    assert aside == 0


async def test_a_deploy_hands_over_and_the_old_one_ends(store: Store) -> None:
    """Both tell of the same seats: while the new one lives, the end of the old one is not theirs."""
    collector = collecting(store)
    await tell(collector, Said("a", 0, 10), Said("b", 50, 10), Said("a", 60, 10), Said("a", 70, None))
    for kind, quantity in (("latest", 10), ("max", 10), ("integral", 20)):
        assert await billed(store, kind, 0, 7200, across="latest", stale=7200) == quantity, kind
    await tell(collector, Said("b", 100, None))
    assert await billed(store, "latest", 0, 7200, across="latest", stale=7200) == 0
    assert await billed(store, "integral", 0, 7200, across="latest", stale=7200) == Decimal("0.277777777777777778")


async def test_what_nobody_tells_any_more_ends_with_the_last_that_lives(store: Store) -> None:
    """One process dies without a word, its successor ends in order: from when the dead one is stale nobody holds it."""
    collector = collecting(store)
    await tell(collector, Said("b", 0, 10), Said("a", 3000, 10), Said("a", 3100, None))
    assert await billed(store, "integral", 0, 7200, across="latest", stale=3600) == 10
    assert await billed(store, "latest", 0, 3500, across="latest", stale=3600) == 10
    assert await billed(store, "latest", 0, 7200, across="latest", stale=3600) == 0
    await tell(collector, Said("c", 3500, 4))
    assert await billed(store, "latest", 0, 7000, across="latest", stale=3600) == 4


def stands(said: Sequence[Said], now: int, stale: int, across: str) -> int:
    """What the pods stand at by what they have said."""
    once: dict[tuple[str, int], int | None] = {}
    for pod, at, value in said:
        if once.get((pod, at)) is None:
            once[pod, at] = value

    def last(pod: str, at: int) -> tuple[int, int | None] | None:
        return max(((then, once[who, then]) for who, then in once if who == pod and then <= at), default=None)

    def lives(pod: str, at: int) -> bool:
        told = last(pod, at)
        return told is not None and told[1] is not None and at < told[0] + stale

    pods = {pod for pod, _ in once}
    if across == "sum":
        return sum((last(pod, now) or (0, 0))[1] or 0 for pod in pods if lives(pod, now))
    at, level = max(
        ((at, value) for (_, at), value in once.items() if value is not None and at <= now), default=(-stale, 0)
    )
    ended = any(value is None and at < then <= now for (_, then), value in once.items())
    if ended and not any(lives(pod, now) for pod in pods):
        return 0
    return level if now < at + stale else 0


@pytest.mark.parametrize("seed", range(6))
async def test_levels_that_end_equal_those_of_a_clock(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    stale = rng.choice((20, 45))
    # Of one pod and time there is one value: another would be a contradiction.
    values = {(pod, at): rng.randint(1, 9) for pod in "abc" for at in range(0, 200, 5)}
    chosen = rng.sample(sorted(values), 40)
    said = [Said(pod, at, None if rng.random() < rng.choice((0.3, 0.6)) else values[pod, at]) for pod, at in chosen]
    said += [one._replace(value=None) for one in rng.sample(said, 5)]
    collector = collecting(store)
    rng.shuffle(said)
    for first in range(0, len(said), 7):
        await tell(collector, *said[first : first + 7])
        await tell(collector, *rng.sample(said[: first + 7], 3))
    for start, end in ((0, 260), (60, 130), (101, 150)):
        for across in ("sum", "latest"):
            levels = [stands(said, now, stale, across) for now in range(start, end)]
            found = await billed(store, "integral", start, end, across=across, stale=stale)
            assert found is not None
            assert abs(Fraction(found) - Fraction(sum(levels), 3600)) < Fraction(1, 10**17), (across, start, end)
            assert await billed(store, "max", start, end, across=across, stale=stale) == max(levels)


RULES = """
meters:
  stor:
    unit: GBy
    aggregation: level
    sources: [{metric: disk, quantity: value, account: {attribute: org, map: {o1: ACCOUNT}}}]
"""


async def test_what_a_file_takes_ends_for_whom_it_was_billed_to(store: Store) -> None:
    """Whatever the file says by then."""

    async def take(account: str, at: int, value: int | None) -> None:
        whole = Said("one", at, value).message()
        metric = whole.resource_metrics[0].scope_metrics[0].metrics[0]
        metric.name = "disk"
        del metric.gauge.data_points[0].attributes[:]
        metric.gauge.data_points[0].attributes.extend(key_values({"org": "o1"}))
        metering = Metering(parse_rules(RULES.replace("ACCOUNT", account)))
        collector = Pipeline(store, now_ns=lambda: NOW, metering=metering)
        assert (await collector.metrics("default", whole.SerializeToString())).message == ""

    await take("acme", 0, 5)
    for _ in range(2):
        await take("globex", 60, None)
    assert await billed(store, "integral", 0, 3600) == Decimal("0.083333333333333333")
    # It comes late, of a time that was acme's, and ends when its source has.
    await take("globex", 30, 11)
    assert await billed(store, "integral", 0, 3600) == Decimal("0.133333333333333333")
    await take("globex", 90, 7)
    assert await billed(store, "latest", 0, 3600) == 0
