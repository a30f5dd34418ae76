"""Processes that know nothing of Tallymark: their telemetry becomes usage by a file of meters."""

from __future__ import annotations

import random
from collections import defaultdict
from decimal import Decimal
from typing import Final

from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint

from tests.delivery.contract.items import CUMULATIVE, DELTA, Item
from tests.delivery.contract.sources import Source
from tests.delivery.contract.tally import Tally
from tests.support.usage import key_values, number

FILE: Final = """\
meters:
  foreign.requests:
    unit: "{request}"
    sources:
      - metric: http.server.request.duration
        resource: {service.name: contract}
        quantity: count
        account: consumer.id
        dimensions: [http.route]
  foreign.seconds:
    unit: s
    sources:
      - {metric: http.server.request.duration, quantity: sum, account: consumer.id}
  foreign.egress:
    unit: kBy
    sources:
      - {metric: "*.bytes.sent", quantity: value, factor: 1/1000, account: consumer.id}
  foreign.connections:
    unit: "{connection}"
    aggregation: level
    sources:
      - {metric: "*.connections", quantity: value, account: consumer.id}
"""
"""Two meters of one histogram, of which one takes two routes together; a counter in another unit than it comes in; and
levels, of which the file drops what tells two streams apart."""


class Foreign(Source):
    """A histogram of durations and a counter of bytes, as deltas or as running totals, and a gauge of connections."""

    temporality = DELTA

    def __init__(self, name: str, rng: random.Random, accounts: list[str], at_ns: int, tally: Tally) -> None:
        super().__init__(name, rng, accounts, at_ns, tally)
        self.running: dict[tuple[str, str], tuple[int, ...]] = defaultdict(lambda: (0, 0))

    def used(self, start: int) -> list[Item]:
        """What is used from `start` to now."""
        since = start
        if self.temporality == CUMULATIVE:
            if self.restarts():
                self.began_ns = start
                self.running.clear()
            since = self.began_ns
        found = []
        for account in self.some_accounts():
            for route in self.rng.sample(["/a", "/b"], self.rng.randint(1, 2)):
                found.append(self._requests(since, account, route))
            found.append(self._bytes(since, account))
            found += [self._connections(account, listener) for listener in self.rng.sample(["80", "443"], 2)]
        return found

    def _requests(self, since: int, account: str, route: str) -> Item:
        requests, tenths = self.rng.randint(1, 20), self.rng.randint(1, 300)
        self.tally.use(account, "foreign.requests", requests)
        self.tally.use(account, "foreign.seconds", Decimal(tenths) / 10)
        requests, tenths = self._so_far((account, route), requests, tenths)
        point = HistogramDataPoint(
            start_time_unix_nano=since,
            time_unix_nano=self.at_ns,
            count=requests,
            sum=tenths / 10,
            bucket_counts=[requests],
            attributes=key_values({"consumer.id": account, "http.route": route}),
        )
        return Item(self.name, "http.server.request.duration", "s", (point,), self.temporality, "histogram")

    def _bytes(self, since: int, account: str) -> Item:
        sent = self.rng.randint(1, 10**6)
        self.tally.use(account, "foreign.egress", Decimal(sent) / 1000)
        sent, _ = self._so_far((account, "sent"), sent, 0)
        point = number(since, self.at_ns, sent, {"consumer.id": account})
        return Item(self.name, "gateway.bytes.sent", "By", (point,), self.temporality)

    def _connections(self, account: str, listener: str) -> Item:
        level = self.rng.randint(0, 500)
        self.tally.levels[account, "foreign.connections", self.at_ns // 1000, Decimal(level)] += 1
        point = number(0, self.at_ns, level, {"consumer.id": account, "listener": listener})
        return Item(self.name, "gateway.connections", "{connection}", (point,), 0, "gauge")

    def _so_far(self, key: tuple[str, str], *more: int) -> tuple[int, ...]:
        if self.temporality == CUMULATIVE:
            more = self.running[key] = tuple(a + b for a, b in zip(self.running[key], more, strict=True))
        return more


class ForeignTotals(Foreign):
    """The same as running totals."""

    temporality = CUMULATIVE
