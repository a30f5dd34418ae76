"""Requests added up again, point by point, without knowing what made them: what merging does with its parcels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA, Metric, NumberDataPoint

from tallymark import quantities
from tallymark.batches import MAX_BATCH_BYTES, MAX_BATCH_POINTS, Request, points_over
from tallymark.quantities import Exact

_FRAMING_BYTES = 64  # tags and lengths around a metric and what it stands in


class CannotMergeError(ValueError):
    """Requests of a form that this version does not merge; the message says which."""


@dataclass(slots=True)
class _Total:
    """The exact sum of one stream; `latest` instead where it is a running total of the producer's."""

    like: NumberDataPoint
    amount: Exact = 0
    latest: NumberDataPoint | None = None


class Sums:
    """Adds up the points of requests, stream by stream."""

    def __init__(self) -> None:
        self.begin_ns = 2**64
        self.end_ns = 0
        # Each level's message without what lies below it, as bytes, to the next level.
        self._resources: dict[bytes, dict[bytes, dict[bytes, dict[bytes, _Total]]]] = {}

    def take(self, body: bytes) -> None:
        """Adds a request. Of each run of a cumulative stream the last point stays, which says more than those
        before it. Raises CannotMergeError for anything but monotonic sums."""
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            scopes = list(resource.scope_metrics)
            resource_own = type(resource)(resource=resource.resource, schema_url=resource.schema_url)
            scopes_of = self._resources.setdefault(resource_own.SerializeToString(deterministic=True), {})
            for scope in scopes:
                scope_own = type(scope)(scope=scope.scope, schema_url=scope.schema_url)
                metrics = scopes_of.setdefault(scope_own.SerializeToString(deterministic=True), {})
                for metric in scope.metrics:
                    if metric.WhichOneof("data") != "sum" or not metric.sum.is_monotonic:
                        raise CannotMergeError(f"metric {metric.name!r} is no monotonic sum")
                    points = list(metric.sum.data_points)
                    delta = metric.sum.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA
                    del metric.sum.data_points[:]
                    totals = metrics.setdefault(metric.SerializeToString(deterministic=True), {})
                    for point in points:
                        self._add(totals, point, delta)

    def requests(self) -> Iterator[Request]:
        """What has been taken, over the whole interval, in requests within the limits of any other."""
        message, points, size, amounts = ExportMetricsServiceRequest(), 0, 0, dict[str, Exact]()
        for resource, scopes in self._resources.items():
            for scope, metrics in scopes.items():
                for metric, totals in metrics.items():
                    frame = len(resource) + len(scope) + len(metric) + _FRAMING_BYTES
                    into = None
                    for total in totals.values():
                        for point, value in self._points(total):
                            more = point.ByteSize() + 8
                            if points and (points >= MAX_BATCH_POINTS or size + more + frame > MAX_BATCH_BYTES):
                                yield Request(message.SerializeToString(deterministic=True), points, amounts)
                                message, points, size, amounts = ExportMetricsServiceRequest(), 0, 0, {}
                                into = None
                            if into is None:
                                into = _place(message, resource, scope, metric)
                                size += frame
                            into.sum.data_points.append(point)
                            points += 1
                            size += more
                            if value is not None:
                                amounts[into.name] = quantities.add(amounts.get(into.name, 0), value)
        if points:
            yield Request(message.SerializeToString(deterministic=True), points, amounts)

    def _points(self, total: _Total) -> Iterator[tuple[NumberDataPoint, Exact | None]]:
        if total.latest is not None:
            yield total.latest, None
            return
        values = quantities.wire_parts(total.amount)
        for point, value in points_over(self.begin_ns, self.end_ns, values, total.like):
            yield point, quantities.shortest(value)

    def _add(self, totals: dict[bytes, _Total], point: NumberDataPoint, delta: bool) -> None:
        begin_ns, end_ns = point.start_time_unix_nano, point.time_unix_nano
        value = point.as_int if point.WhichOneof("value") == "as_int" else quantities.shortest(point.as_double)
        latest = None if delta else NumberDataPoint()
        if latest is not None:
            latest.CopyFrom(point)
        for field in ("start_time_unix_nano", "time_unix_nano", "as_int", "as_double"):
            if (
                delta or field != "start_time_unix_nano"
            ):  # another beginning is another run, with a last point of its own
                point.ClearField(field)
        key = point.SerializeToString(deterministic=True)
        total = totals.get(key)
        if total is None:
            total = totals[key] = _Total(point)
        if latest is None:
            self.begin_ns, self.end_ns = min(self.begin_ns, begin_ns), max(self.end_ns, end_ns)
            total.amount = quantities.add(total.amount, value)
        elif total.latest is None or total.latest.time_unix_nano <= end_ns:
            total.latest = latest


def _place(message: ExportMetricsServiceRequest, resource: bytes, scope: bytes, metric: bytes) -> Metric:
    """A new metric in the request, in a resource and a scope of its own."""
    own = message.resource_metrics.add()
    own.ParseFromString(resource)
    inner = own.scope_metrics.add()
    inner.ParseFromString(scope)
    added = inner.metrics.add()
    added.ParseFromString(metric)
    return added
