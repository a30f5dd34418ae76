"""A segment's contents as OTLP requests, each small enough for any receiver: usage as delta sums, and in a scope of its
own what proves that all of it arrived (the control totals at the interval's end, and how much is on spans).

The same contents give the same bytes, in whichever process: what is sent again is known again by the collector.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    AGGREGATION_TEMPORALITY_DELTA,
    AggregationTemporality,
    NumberDataPoint,
    ScopeMetrics,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ProtoResource
from opentelemetry.sdk.resources import Resource

from tallymark import conventions, totals
from tallymark.quantities import Exact, Wire, add, few_wire_parts, shortest, wire_parts
from tallymark.recorder import totals_by_body
from tallymark.segment import Contents
from tallymark.streams import Described, attributes_of, decode
from tallymark.totals import Totals
from tallymark.yielding import restful

MAX_BATCH_POINTS: Final = 2_000

MAX_BATCH_BYTES: Final = 2 * 2**20
"""Half of gRPC's default limit of 4 MiB: a batch over the receiver's limit could never be sent."""

NOBODY: Final = b'{"resource":{},"schema_url":"","scope":["",""]}'

STREAMS_BETWEEN_RESTS: Final = 32

_FRAMING_BYTES: Final = 8  # a point's own tag and length, and its share of the metric's


@dataclass(frozen=True, slots=True)
class Request:
    """One export request, encoded."""

    body: bytes
    points: int
    amounts: Mapping[str, Exact]
    """Usage by meter, for reports."""


class _Metric(NamedTuple):
    scope: str
    name: str
    unit: str
    temporality: AggregationTemporality.ValueType


_TOTAL: Final = _Metric(conventions.CONTROL_SCOPE, conventions.CONTROL_TOTAL, "1", AGGREGATION_TEMPORALITY_CUMULATIVE)
_CLOSED: Final = _TOTAL._replace(name=conventions.CONTROL_CLOSED)
_EVIDENCE: Final = _TOTAL._replace(name=conventions.CONTROL_EVIDENCE, temporality=AGGREGATION_TEMPORALITY_DELTA)


def producer_record(resource: Resource, scope: str, version: str) -> bytes:
    """Who counts, as a segment's producer record."""
    attributes = {name: _plain(value) for name, value in resource.attributes.items()}
    return json.dumps({"resource": attributes, "schema_url": resource.schema_url, "scope": [scope, version]}).encode()


def requests_of(
    contents: Contents,
    producer: bytes,
    max_points: int = MAX_BATCH_POINTS,
    max_bytes: int = MAX_BATCH_BYTES,
    *,
    closing: bool = False,
) -> Iterator[Request]:
    """The sums of (start, end] as requests; `producer` stands in where the segment names none.

    What one value cannot carry exactly becomes several points of the stream, of which all but the first last one
    nanosecond each, at the interval's end. Control totals are in the last request, so that they tell of all the others;
    there are none where the segment does not say what was before it, or is damaged. With `closing` it is the last
    segment of its producer. Raises ValueError for records that Tallymark did not write.
    """
    filling = _Filling(contents.producer or producer, max_points, max_bytes)
    growth = totals.Growth()
    for body, total in restful(totals_by_body(contents).items(), STREAMS_BETWEEN_RESTS):
        stream = decode(body)
        metric, attributes = _wire_stream(stream)
        values = wire_parts(total)
        growth.add(stream, total, len(values))
        start_ns, end_ns = totals.interval(contents, len(values))
        for point, value in points_over(start_ns, end_ns, values, NumberDataPoint(attributes=_key_values(attributes))):
            yield from filling.add(metric, [point], 0 if stream.evidence else shortest(value))
    base = None if contents.damaged else totals.decode(contents.base)
    if base is not None and (growth.parts or closing):
        now = totals.after(base, contents, growth)
        if now.since_ns != base.since_ns and base.any:  # the clock was set back: that run is over
            yield from _control(filling, base, closing=True)
        if now.any:
            yield from _control(filling, now, closing=closing)
    yield from filling.rest()


def closing_requests(last: Totals, producer: bytes) -> Iterator[Request]:
    """What says that `last` are a producer's last totals."""
    filling = _Filling(producer, MAX_BATCH_POINTS, MAX_BATCH_BYTES)
    yield from _control(filling, last, closing=True)
    yield from filling.rest()


def _control(filling: _Filling, now: Totals, *, closing: bool) -> Iterator[Request]:
    for (meter, unit), total in sorted(now.amounts.items()):
        names: dict[str, object] = {conventions.CONTROL_METER: meter, conventions.CONTROL_UNIT: unit}
        values = few_wire_parts(total)
        points = []
        for number, value in enumerate(values):
            if len(values) > 1:
                names[conventions.CONTROL_PART] = number
                names[conventions.CONTROL_PARTS] = len(values)
            points.append(_number(names, now.since_ns, now.as_of_ns, value))
        yield from filling.add(_TOTAL, points)
    if closing:
        yield from filling.add(_CLOSED, [_number({}, now.since_ns, now.as_of_ns, 1)])


def _wire_stream(stream: Described) -> tuple[_Metric, Mapping[str, object]]:
    if not stream.evidence:
        return _Metric("", stream.meter, stream.unit, AGGREGATION_TEMPORALITY_DELTA), attributes_of(stream)
    names = (conventions.CONTROL_ACCOUNT, conventions.CONTROL_METER, conventions.CONTROL_UNIT)
    return _EVIDENCE, dict(zip(names, (stream.account, stream.meter, stream.unit), strict=True))


def _number(attributes: Mapping[str, object], start_ns: int, time_ns: int, value: Wire) -> NumberDataPoint:
    [(point, _)] = points_over(start_ns, time_ns, [value], NumberDataPoint(attributes=_key_values(attributes)))
    return point


def _key_values(attributes: Mapping[str, object]) -> list[KeyValue]:
    return [KeyValue(key=name, value=any_value(item)) for name, item in attributes.items()]


class _Filling:
    """Requests being filled one after the other; those that are full are given back."""

    def __init__(self, producer: bytes, max_points: int, max_bytes: int) -> None:
        self._producer = producer
        self._max_points = max_points
        self._max_bytes = max_bytes
        self._batch = _Batch(producer)

    def add(self, metric: _Metric, points: Sequence[NumberDataPoint], amount: Exact = 0) -> Iterator[Request]:
        """Adds points that must not be parted."""
        size = sum(point.ByteSize() + _FRAMING_BYTES for point in points)
        batch = self._batch
        if batch.points and (batch.points + len(points) > self._max_points or batch.size + size > self._max_bytes):
            yield from self.rest()
        self._batch.add(metric, points, size, amount)

    def rest(self) -> Iterator[Request]:
        """The request that is not full."""
        full, self._batch = self._batch, _Batch(self._producer)
        if full.points:
            yield full.request()


class _Batch:
    """A request being filled. The scope "" is the one that the producer's record names."""

    def __init__(self, producer: bytes) -> None:
        self.points = 0
        self._amounts: dict[str, Exact] = {}
        self._points: dict[_Metric, list[NumberDataPoint]] = {}
        known: dict[str, Any] = json.loads(producer or NOBODY)
        self._message = ExportMetricsServiceRequest()
        resource = self._message.resource_metrics.add()
        resource.resource.CopyFrom(
            ProtoResource(attributes=[KeyValue(key=k, value=any_value(v)) for k, v in known["resource"].items()])
        )
        resource.schema_url = known["schema_url"]
        self._resource = resource
        self._scope, self._version = known["scope"]
        self.size = self._message.ByteSize() + len(self._scope) + len(conventions.CONTROL_SCOPE) + 64

    def add(self, metric: _Metric, points: Iterable[NumberDataPoint], size: int, amount: Exact) -> None:
        own = self._points.get(metric)
        if own is None:
            own = self._points[metric] = []
            size += len(metric.name) + len(metric.unit) + 32
        before = len(own)
        own.extend(points)
        self.points += len(own) - before
        self.size += size
        if amount:
            self._amounts[metric.name] = add(self._amounts.get(metric.name, 0), amount)

    def request(self) -> Request:
        scopes: dict[str, ScopeMetrics] = {}
        for wanted, points in self._points.items():
            scope = scopes.get(wanted.scope)
            if scope is None:
                scope = scopes[wanted.scope] = self._resource.scope_metrics.add()
                scope.scope.name, scope.scope.version = wanted.scope or self._scope, self._version
            metric = scope.metrics.add(name=wanted.name, unit=wanted.unit)
            metric.sum.aggregation_temporality = wanted.temporality
            metric.sum.is_monotonic = True
            metric.sum.data_points.extend(points)
        return Request(self._message.SerializeToString(deterministic=True), self.points, self._amounts)


def points_over(
    begin_ns: int, end_ns: int, values: Sequence[Wire], like: NumberDataPoint
) -> Iterator[tuple[NumberDataPoint, Wire]]:
    """Points of one stream over (begin, end], one for each value, with the attributes of `like`."""
    for left, value in zip(reversed(range(len(values))), values, strict=True):
        point = NumberDataPoint()
        point.CopyFrom(like)
        point.start_time_unix_nano, point.time_unix_nano = begin_ns, end_ns - left
        begin_ns = end_ns - left
        if isinstance(value, int):
            point.as_int = value
        else:
            point.as_double = value
        yield point, value


def halves(body: bytes) -> tuple[bytes, bytes] | None:
    """A request's points in two requests, None when there is but one: to find the point that a receiver refuses."""
    parts = ExportMetricsServiceRequest.FromString(body), ExportMetricsServiceRequest.FromString(body)
    count = count_points(body)
    if count < 2:
        return None
    for which, part in enumerate(parts):
        seen = 0
        for resource in part.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    points = list(metric.sum.data_points)
                    kept = [p for n, p in enumerate(points, seen) if (n >= count // 2) == bool(which)]
                    seen += len(points)
                    del metric.sum.data_points[:]
                    metric.sum.data_points.extend(kept)
                kept_metrics = [m for m in scope.metrics if m.sum.data_points]
                del scope.metrics[:]
                scope.metrics.extend(kept_metrics)
            kept_scopes = [scope for scope in resource.scope_metrics if scope.metrics]
            del resource.scope_metrics[:]
            resource.scope_metrics.extend(kept_scopes)
    return parts[0].SerializeToString(deterministic=True), parts[1].SerializeToString(deterministic=True)


def count_points(body: bytes) -> int:
    """The points in a request."""
    message = ExportMetricsServiceRequest.FromString(body)
    return sum(
        len(metric.sum.data_points)
        for resource in message.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )


def any_value(value: object) -> AnyValue:
    """An attribute's value on the wire."""
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, (list, tuple)):
        return AnyValue(array_value=ArrayValue(values=[any_value(item) for item in value]))
    return AnyValue(string_value=str(value))


def _plain(value: object) -> object:
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    return [_plain(item) for item in value] if isinstance(value, Sequence) else str(value)
