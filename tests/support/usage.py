"""Streams, points and OTLP requests for tests, and sums that are made by other means than the collector's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from decimal import Decimal

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark_collector.model import Attributes, Origin, Point, Series, Stream, Temporality, fingerprint

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
BASE = 1_790_000_000 * SECOND // HOUR * HOUR
"""A whole hour in September 2026."""


def stream(
    account: str = "acme",
    meter: str = "api.requests",
    producer: str = "one",
    temporality: Temporality = Temporality.DELTA,
    tenant: str = "default",
    **dimensions: str | int,
) -> Stream:
    """A stream of one producer."""
    attributes = Attributes.of(dimensions)
    series = Series(tenant, account, meter, "{request}", attributes)
    resource = Attributes.of({"service.name": "shop", "service.instance.id": producer})
    origin = Origin(b"", b"", meter, "{request}", int(temporality), True, ())
    return Stream(
        fingerprint(series.id.hex, producer, int(temporality)), series, temporality, resource, "tallymark", origin
    )


def point(of: Stream, start: int, end: int, value: int | str | Decimal) -> Point:
    """A point over (start, end], in seconds after BASE."""
    return Point(of, BASE + start * SECOND, BASE + end * SECOND, Decimal(value))


def key_values(attributes: Mapping[str, object]) -> list[KeyValue]:
    """Attributes as OTLP has them."""
    found = []
    for key, value in attributes.items():
        item = KeyValue(key=key)
        match value:
            case bool():
                item.value.bool_value = value
            case int():
                item.value.int_value = value
            case float():
                item.value.double_value = value
            case bytes():
                item.value.bytes_value = value
            case _:
                item.value.string_value = str(value)
        found.append(item)
    return found


def number(start_ns: int, time_ns: int, value: float, attributes: Mapping[str, object]) -> NumberDataPoint:
    """A data point, integer or double as the value is."""
    found = NumberDataPoint(start_time_unix_nano=start_ns, time_unix_nano=time_ns, attributes=key_values(attributes))
    if isinstance(value, int):
        found.as_int = value
    else:
        found.as_double = value
    return found


def sum_metric(
    points: Iterable[NumberDataPoint],
    name: str = "api.requests",
    unit: str = "{request}",
    temporality: int = 1,
    monotonic: bool = True,
) -> Metric:
    """A sum with these points."""
    metric = Metric(name=name, unit=unit)
    metric.sum.aggregation_temporality = temporality
    metric.sum.is_monotonic = monotonic
    metric.sum.data_points.extend(points)
    return metric


def request(
    *metrics: Metric, producer: str = "one", scope: str = "tallymark", **resource: str
) -> ExportMetricsServiceRequest:
    """A request of one producer."""
    whole = ExportMetricsServiceRequest()
    first = whole.resource_metrics.add()
    first.resource.attributes.extend(key_values({"service.name": "shop", "service.instance.id": producer, **resource}))
    inner = first.scope_metrics.add()
    inner.scope.name = scope
    inner.metrics.extend(metrics)
    return whole


def sums_by_hour(points: Iterable[Point]) -> dict[tuple[str, str, int], Decimal]:
    """(account, meter, hour number since BASE) to quantity, each identity counted once: what the views must say."""
    once = {(p.stream.id, p.start_ns, p.time_ns): p for p in points}
    found: dict[tuple[str, str, int], Decimal] = defaultdict(Decimal)
    for p in once.values():
        found[p.stream.series.account, p.stream.series.meter, (p.time_ns - BASE) // HOUR] += p.value
    return dict(found)
