"""Telemetry of other people's software for tests: histograms, summaries, spans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint, Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.usage import BASE, SECOND, key_values

NAME = "http.server.request.duration"


def histogram_point(
    start_ns: int, time_ns: int, count: int, total: float | None, attributes: Mapping[str, object]
) -> HistogramDataPoint:
    """A point; without a sum where `total` is None."""
    point = HistogramDataPoint(
        start_time_unix_nano=start_ns,
        time_unix_nano=time_ns,
        count=count,
        attributes=key_values(attributes),
        bucket_counts=[count, 0],
        explicit_bounds=[0.5],
    )
    if total is not None:
        point.sum = total
    return point


def histogram(points: Iterable[HistogramDataPoint], name: str = NAME, unit: str = "s", temporality: int = 1) -> Metric:
    """A histogram with these points."""
    metric = Metric(name=name, unit=unit)
    metric.histogram.aggregation_temporality = temporality  # type: ignore[assignment]
    metric.histogram.data_points.extend(points)
    return metric


def metrics_of(resource: Mapping[str, object], *metrics: Metric, scope: str = "gateway") -> ExportMetricsServiceRequest:
    """A request of one resource and scope."""
    request = ExportMetricsServiceRequest()
    outer = request.resource_metrics.add()
    outer.resource.attributes.extend(key_values(resource))
    inner = outer.scope_metrics.add(metrics=metrics)
    inner.scope.name = scope
    return request


def span(number: int, attributes: Mapping[str, object], **fields: object) -> Span:
    """The span of this number: its identifiers are made of it."""
    given = {
        "trace_id": (number + 1).to_bytes(16, "big"),
        "span_id": (number + 1).to_bytes(8, "big"),
        "name": "ingress",
        "kind": 2,
        "start_time_unix_nano": BASE,
        "end_time_unix_nano": BASE + SECOND,
        **fields,
    }
    return Span(**given, attributes=key_values(attributes))  # type: ignore[arg-type]


def spans_of(resource: Mapping[str, object], spans: Iterable[Span], scope: str = "envoy") -> ExportTraceServiceRequest:
    """A request of one resource and scope."""
    request = ExportTraceServiceRequest()
    outer = request.resource_spans.add()
    outer.resource.attributes.extend(key_values(resource))
    inner = outer.scope_spans.add(spans=spans)
    inner.scope.name = scope
    return request
