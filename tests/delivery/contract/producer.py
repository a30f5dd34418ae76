"""Processes of the SDK's kind: beside their usage they say what it comes to, what was on spans, and when they ended."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from decimal import Decimal
from typing import Final

from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint

from tallymark import conventions
from tests.delivery.contract.items import CUMULATIVE, DELTA, Item
from tests.delivery.contract.sources import UNIT, Counters
from tests.delivery.contract.tally import Tally
from tests.support.usage import number

CALLED: Final = "whole"
"""The meter that spans carry."""


class Producer(Counters):
    """Deltas, and control totals of each run of the process. One that ends says so, also before it is started again."""

    def __init__(self, name: str, rng: random.Random, accounts: list[str], at_ns: int, tally: Tally) -> None:
        super().__init__(name, rng, accounts, at_ns, tally)
        self.so_far: dict[str, Decimal] = defaultdict(Decimal)
        """Meter to what this run has recorded."""
        self.on_spans: Counter[str] = Counter()
        """Account to the calls on spans that no count tells of yet."""

    def used(self, start: int) -> list[Item]:
        """Usage from `start` to now, and what is said of it."""
        found = []
        if self.so_far and self.restarts():
            found.append(self._closed(start))
            self.began_ns = start
            self.so_far.clear()
        for item in super().used(start):
            [point] = item.points
            assert isinstance(point, NumberDataPoint)
            value = Decimal(point.as_int) if point.HasField("as_int") else Decimal(repr(point.as_double))
            self.so_far[item.name] += value
            self.tally.told[self.name, item.name] += value
            found.append(item._replace(scope=conventions.SCOPE_NAME))
        found += [self._total(meter, total) for meter, total in self.so_far.items()]
        found += [self._shown(start, account, calls) for account, calls in self.on_spans.items()]
        self.on_spans.clear()
        return found

    def end(self) -> list[Item]:
        """The last interval, and that it was."""
        return [*self.step(), self._closed(self.at_ns)]

    def _total(self, meter: str, total: Decimal) -> Item:
        """Of two parts, at times and wherever it is no integer: they stay in one request."""
        names = {conventions.CONTROL_METER: meter, conventions.CONTROL_UNIT: UNIT}
        whole, rest = int(total), total % 1
        if not rest and self.rng.random() < 0.5:
            points = [number(self.began_ns, self.at_ns, whole, names)]
        else:
            parts = (whole, float(rest) if rest else 0)
            points = [
                number(
                    self.began_ns,
                    self.at_ns,
                    part,
                    {**names, conventions.CONTROL_PART: place, conventions.CONTROL_PARTS: 2},
                )
                for place, part in enumerate(parts)
            ]
        return self._said(conventions.CONTROL_TOTAL, CUMULATIVE, *points)

    def _shown(self, start: int, account: str, calls: int) -> Item:
        names = {
            conventions.CONTROL_METER: CALLED,
            conventions.CONTROL_UNIT: UNIT,
            conventions.CONTROL_ACCOUNT: account,
        }
        return self._said(conventions.CONTROL_EVIDENCE, DELTA, number(start, self.at_ns, calls, names))

    def _closed(self, at_ns: int) -> Item:
        return self._said(conventions.CONTROL_CLOSED, CUMULATIVE, number(self.began_ns, at_ns, 1, {}))

    def _said(self, name: str, temporality: int, *points: NumberDataPoint) -> Item:
        return Item(self.name, name, "1", points, temporality, scope=conventions.CONTROL_SCOPE)
