"""Points as a gateway holds them between clients and a collector, and requests made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint, Metric, NumberDataPoint, ScopeMetrics

from tests.support.usage import key_values

DELTA: Final = 1
CUMULATIVE: Final = 2
SERVICE: Final = "contract"
LIBRARY: Final = "some.library"


class Item(NamedTuple):
    """Points that stay in one request: nearly always a single one."""

    producer: str
    """`service.instance.id`"""
    name: str
    unit: str
    points: tuple[NumberDataPoint | HistogramDataPoint, ...]
    temporality: int = DELTA
    kind: str = "sum"
    """Of a metric's data: `sum`, `gauge` or `histogram`."""
    monotonic: bool = True
    scope: str = LIBRARY


def request(items: Iterable[Item]) -> ExportMetricsServiceRequest:
    """The items as one request; those of one metric together, in the order in which they come."""
    whole = ExportMetricsServiceRequest()
    scopes: dict[tuple[str, str], ScopeMetrics] = {}
    metrics: dict[tuple[object, ...], Metric] = {}
    for item in items:
        scope = scopes.get((item.producer, item.scope))
        if scope is None:
            added = whole.resource_metrics.add()
            said = {"service.name": SERVICE, "service.instance.id": item.producer}
            added.resource.attributes.extend(key_values(said))
            scope = scopes[item.producer, item.scope] = added.scope_metrics.add()
            scope.scope.name = item.scope
        key = item._replace(points=())
        metric = metrics.get(key)
        if metric is None:
            metric = metrics[key] = scope.metrics.add(name=item.name, unit=item.unit)
            if item.kind != "gauge":
                getattr(metric, item.kind).aggregation_temporality = item.temporality
            if item.kind == "sum":
                metric.sum.is_monotonic = item.monotonic
        getattr(metric, item.kind).data_points.extend(item.points)
    return whole
