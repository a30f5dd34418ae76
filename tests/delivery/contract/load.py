"""Usage that is told apart to the unit: every point has its own identity, and the totals are known beforehand.

A gateway stands in for clients: points wait in it until a request that holds them was acknowledged. Whatever was not
goes into other requests, in another order and other company; some of what was acknowledged goes out again.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tests.support.usage import SECOND, key_values, number

ACCOUNTS: Final = 4
METERS: Final = {"whole": (1, 1000), "tenths": (1, 99)}
"""Meter to the smallest and the largest count of its units: integers, and doubles of tenths."""
CUMULATIVE: Final = 2
DELTA: Final = 1


class Item(NamedTuple):
    """One point of one stream, as a gateway holds it."""

    producer: str
    meter: str
    temporality: int
    point: NumberDataPoint


@dataclass
class Source:
    """One process with any OpenTelemetry client. Its streams are its own: one writer each."""

    name: str
    temporality: int
    rng: random.Random
    accounts: list[str]
    at_ns: int
    began_ns: int = 0
    running: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    recorded: dict[tuple[str, str], Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    """(account, meter) to what was used: the tally that what is stored is compared with."""

    def __post_init__(self) -> None:
        self.began_ns = self.at_ns

    def step(self) -> list[Item]:
        """What is used in one interval."""
        start, self.at_ns = self.at_ns, self.at_ns + self.rng.randint(1, 3 * SECOND)
        if self.temporality == CUMULATIVE and self.rng.random() < 0.15:
            self.began_ns = start  # the process was restarted: its totals begin anew
            self.running.clear()
        found = []
        for meter, (least, most) in METERS.items():
            for account in self.rng.sample(self.accounts, self.rng.randint(1, len(self.accounts))):
                units = self.rng.randint(least, most)
                self.recorded[account, meter] += Decimal(units) / (1 if meter == "whole" else 10)
                if self.temporality == CUMULATIVE:
                    self.running[account, meter] += units
                    units = self.running[account, meter]
                value = units if meter == "whole" else units / 10
                since = self.began_ns if self.temporality == CUMULATIVE else start
                attributes = {"tallymark.account.id": account, "http.route": f"/r{self.rng.randrange(3)}"}
                if self.temporality == CUMULATIVE:
                    attributes["http.route"] = "/r"  # one stream has one running total
                found.append(Item(self.name, meter, self.temporality, number(since, self.at_ns, value, attributes)))
        return found


class Gateway:
    """Holds points until they are acknowledged."""

    def __init__(self, seed: int, name: str) -> None:
        self.rng = random.Random(seed)
        self.name = name
        began = time.time_ns() // SECOND * SECOND - 6 * 3600 * SECOND
        accounts = [f"{name}-{i}" for i in range(ACCOUNTS)]
        self.sources = [
            Source(f"{name}-{i}", temporality, random.Random(self.rng.random()), accounts, began)
            for i, temporality in enumerate((DELTA, DELTA, CUMULATIVE, CUMULATIVE))
        ]
        self.waiting: list[Item] = []
        self.sent: list[Item] = []
        self.spans: dict[str, int] = defaultdict(int)
        """Account to the calls that spans show."""
        self.calls = 0

    def use(self) -> None:
        """Some sources go on by an interval."""
        for source in self.rng.sample(self.sources, self.rng.randint(1, len(self.sources))):
            self.waiting += source.step()

    def batch(self, whole: bool = False) -> list[Item]:
        """What the next request holds: of what waits, out of order, and of what was acknowledged before."""
        self.rng.shuffle(self.waiting)
        held = list(self.waiting if whole else self.waiting[: self.rng.randint(1, len(self.waiting) or 1)])
        if self.sent and self.rng.random() < 0.3:
            held += self.rng.sample(self.sent, min(len(self.sent), self.rng.randint(1, 20)))
        self.rng.shuffle(held)
        return held

    def acknowledged(self, held: list[Item]) -> None:
        """A request that held these was."""
        arrived = {id(item) for item in held}
        self.sent += [item for item in self.waiting if id(item) in arrived]
        del self.sent[:-500]
        self.waiting = [item for item in self.waiting if id(item) not in arrived]

    def calls_behind(self) -> ExportTraceServiceRequest:
        """Spans of single calls, each with an identity of its own."""
        whole = ExportTraceServiceRequest()
        spans = whole.resource_spans.add().scope_spans.add().spans
        for _ in range(self.rng.randint(1, 5)):
            account = f"{self.name}-{self.rng.randrange(ACCOUNTS)}"
            self.calls += 1
            self.spans[account] += 1
            at = self.sources[0].at_ns
            spans.add(
                trace_id=self.rng.randbytes(16),
                span_id=self.rng.randbytes(8),
                name="call",
                start_time_unix_nano=at,
                end_time_unix_nano=at + 1000,
                attributes=key_values({"tallymark.account.id": account, "tallymark.meter.whole": 1}),
            )
        return whole

    def recorded(self) -> dict[tuple[str, str], Decimal]:
        """(account, meter) to what was used."""
        found: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
        for source in self.sources:
            for key, quantity in source.recorded.items():
                found[key] += quantity
        return dict(found)


def request(items: list[Item]) -> ExportMetricsServiceRequest:
    """The items as one request; those of one producer's meter under one metric, in the order in which they come."""
    whole = ExportMetricsServiceRequest()
    resources: dict[str, object] = {}
    metrics: dict[tuple[str, str, int], Metric] = {}
    for item in items:
        if item.producer not in resources:
            added = whole.resource_metrics.add()
            added.resource.attributes.extend(
                key_values({"service.name": "contract", "service.instance.id": item.producer})
            )
            scope = added.scope_metrics.add()
            scope.scope.name = "some.library"
            resources[item.producer] = scope
        key = item[:3]
        if key not in metrics:
            metric = resources[item.producer].metrics.add(  # type: ignore[attr-defined]
                name=item.meter, unit="{unit}"
            )
            metric.sum.aggregation_temporality = item.temporality
            metric.sum.is_monotonic = True
            metrics[key] = metric
        metrics[key].sum.data_points.append(item.point)
    return whole
