"""A segment's contents as OTLP requests: delta sums, each request small enough for any receiver.

The same contents give the same bytes, in whichever process: what is sent again is known again by the collector.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA, NumberDataPoint
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ProtoResource
from opentelemetry.sdk.resources import Resource

from tallymark import quantities
from tallymark.quantities import Exact, Wire
from tallymark.recorder import total_of
from tallymark.segment import Contents
from tallymark.streams import attributes_of

MAX_BATCH_POINTS: Final = 2_000

SET_BACK_NS: Final = 1_000
"""Length that an interval is given whose beginning the clock took back."""

MAX_BATCH_BYTES: Final = 2 * 2**20
"""Half of gRPC's default limit of 4 MiB: a batch over the receiver's limit could never be sent."""

NOBODY: Final = b'{"resource":{},"schema_url":"","scope":["",""]}'

_FRAMING_BYTES: Final = 8  # a point's own tag and length, and its share of the metric's


@dataclass(frozen=True, slots=True)
class Request:
    """One export request, encoded."""

    body: bytes
    points: int
    amounts: Mapping[str, Exact]
    """Quantity by meter, for reports."""


def producer_record(resource: Resource, scope: str, version: str) -> bytes:
    """Who counts, as a segment's producer record."""
    attributes = {name: _plain(value) for name, value in resource.attributes.items()}
    return json.dumps({"resource": attributes, "schema_url": resource.schema_url, "scope": [scope, version]}).encode()


def requests_of(
    contents: Contents, producer: bytes, max_points: int = MAX_BATCH_POINTS, max_bytes: int = MAX_BATCH_BYTES
) -> Iterator[Request]:
    """The sums of (start, end] as requests; `producer` stands in where the segment names none.

    What one value cannot carry exactly becomes several points of the stream, of which all but the first last one
    nanosecond each, at the interval's end. Raises ValueError for records that Tallymark did not write.
    """
    batch = _Batch(contents.producer or producer)
    for stream, total in total_of(contents).items():
        values = quantities.wire_parts(total)
        if contents.end_ns < contents.start_ns:
            # The clock has been set back: the beginning was in the future, the end is right.
            begin_ns, end_ns = contents.end_ns - SET_BACK_NS, contents.end_ns
        else:
            begin_ns, end_ns = contents.start_ns, max(contents.end_ns, contents.start_ns + len(values))
        attributes = [KeyValue(key=name, value=any_value(value)) for name, value in attributes_of(stream).items()]
        for point, value in points_over(begin_ns, end_ns, values, NumberDataPoint(attributes=attributes)):
            size = point.ByteSize() + _FRAMING_BYTES
            if batch.points and (batch.points >= max_points or batch.size + size > max_bytes):
                yield batch.request()
                batch = _Batch(contents.producer or producer)
            batch.add(stream.meter, stream.unit, point, size, quantities.shortest(value))
    if batch.points:
        yield batch.request()


class _Batch:
    """A request being filled."""

    def __init__(self, producer: bytes) -> None:
        self.points = 0
        self._amounts: dict[str, Exact] = {}
        self._points: dict[tuple[str, str], list[NumberDataPoint]] = {}
        known: dict[str, Any] = json.loads(producer or NOBODY)
        self._message = ExportMetricsServiceRequest()
        resource = self._message.resource_metrics.add()
        resource.resource.CopyFrom(
            ProtoResource(attributes=[KeyValue(key=k, value=any_value(v)) for k, v in known["resource"].items()])
        )
        resource.schema_url = known["schema_url"]
        self._scope = resource.scope_metrics.add()
        self._scope.scope.name, self._scope.scope.version = known["scope"]
        self.size = self._message.ByteSize()

    def add(self, meter: str, unit: str, point: NumberDataPoint, size: int, amount: Exact) -> None:
        own = self._points.get((meter, unit))
        if own is None:
            own = self._points[meter, unit] = []
            size += len(meter) + len(unit) + 32
        own.append(point)
        self.points += 1
        self.size += size
        self._amounts[meter] = quantities.add(self._amounts.get(meter, 0), amount)

    def request(self) -> Request:
        for (meter, unit), points in self._points.items():
            metric = self._scope.metrics.add(name=meter, unit=unit)
            metric.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_DELTA
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
