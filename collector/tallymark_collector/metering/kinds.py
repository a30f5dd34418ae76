"""What each type of OpenTelemetry's metrics holds: which numbers can be read of it, and if those are amounts or levels.

A counter's, histogram's or summary's numbers add up. A gauge, and a sum that can fall (UpDownCounter), says what it
stands at. A meter is one or the other, so that no level is ever billed as an increase, and no increase as a level.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Final, NamedTuple

from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark_collector import wire
from tallymark_collector.metering.rules import Meter, MetricSource
from tallymark_collector.model import Reason, Refusal, Temporality
from tallymark_collector.processors import validation

_AMOUNTS: Final = {
    "sum": ("value",),
    "histogram": ("count", "sum"),
    "exponential_histogram": ("count", "sum"),
    "summary": ("count", "sum"),
}
_LEVELS: Final = {"gauge": ("value",), "updowncounter": ("value",)}
_TYPES: Final = {
    "sum": "a counter",
    "histogram": "a histogram",
    "exponential_histogram": "an exponential histogram",
    "summary": "a summary",
    "gauge": "a gauge",
    "updowncounter": "a sum that can fall (UpDownCounter)",
    "": "a metric without data",
}


class Header(NamedTuple):
    """A metric less its points."""

    name: str
    unit: str
    kind: str
    """As `wire.kind_of` has it."""
    temporality: int

    @property
    def is_level(self) -> bool:
        """True where a point says what its stream stands at."""
        return self.kind in _LEVELS

    @property
    def field(self) -> str:
        """Where the points are, as OTLP's Metric calls it."""
        return "sum" if self.kind == "updowncounter" else self.kind


def header_of(metric: Any) -> Header:
    """The header of a whole metric."""
    kind = wire.kind_of(metric)
    match kind:
        case "sum" | "updowncounter":
            temporality = metric.sum.aggregation_temporality
        case "histogram" | "exponential_histogram":
            temporality = getattr(metric, kind).aggregation_temporality
        case "summary":
            temporality = Temporality.CUMULATIVE
        case _:
            temporality = 0
    return Header(metric.name, metric.unit, kind, int(temporality))


def alone(metric: Any, header: Header, point: Any) -> Any:
    """The metric with this one point."""
    single = metrics_pb2.Metric(name=metric.name, unit=metric.unit, description=metric.description)
    data = getattr(single, header.field)
    if header.kind not in ("summary", "gauge"):
        data.aggregation_temporality = header.temporality
    if header.kind == "sum":
        data.is_monotonic = True
    data.data_points.append(point)
    return single


def fits(kind: str, meter: Meter, source: MetricSource) -> bool:
    """True if a metric of this type has what the source reads, and that is what the meter is made of."""
    return source.quantity in (_LEVELS if meter.has_levels else _AMOUNTS).get(kind, ())


def mismatch(kind: str, meter: Meter, source: MetricSource) -> str:
    """Why it has not."""
    what = f"it is {_TYPES[kind]}"
    if meter.has_levels:
        if kind == "sum":
            return f"{what}: what it has added up is no level; leave out `aggregation: level` to bill its increases"
        return f"{what}, which stands at no level: those come from gauges and UpDownCounters"
    if kind in _LEVELS and source.quantity == "value":
        return f"{what}: what it stands at is no amount; say `aggregation: level` in a meter of its own"
    return f"{what}, which has no {source.quantity} that can be billed"


def check_temporality(header: Header) -> Refusal | None:
    """What is wrong with what a metric says its values count since."""
    if header.kind == "gauge":
        return None
    if header.temporality not in (Temporality.DELTA, Temporality.CUMULATIVE):
        return Refusal(Reason.TEMPORALITY_MISSING, f"{header.temporality} is neither delta nor cumulative")
    if header.kind == "updowncounter" and header.temporality == Temporality.DELTA:
        return validation.CHANGES_OF_A_LEVEL
    return None


def read(point: Any, quantity: str) -> Decimal | Refusal:
    """One number of a point, as it was measured."""
    if quantity == "value":
        return validation.read_number(point)
    if quantity == "count":
        return Decimal(point.count)
    if not isinstance(point, metrics_pb2.SummaryDataPoint) and not point.HasField("sum"):
        return Refusal(Reason.VALUE_MISSING, "the histogram's point has no sum")
    if not math.isfinite(point.sum):
        return Refusal(Reason.VALUE_NOT_FINITE, f"the sum is {point.sum}")
    return wire.shortest_decimal(point.sum)
