"""OTLP's messages as the collector reads and writes them.

Metrics come through a view of our own (`proto/tallymark_metrics_view.proto`) that leaves attributes as bytes;
resources, scopes, attributes and spans are decoded with OpenTelemetry's own classes.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from decimal import Decimal
from typing import Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import (
    AnyValue,
    ArrayValue,
    InstrumentationScope,
    KeyValue,
    KeyValueList,
)
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from tallymark import conventions
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Attributes, AttributeValue, Evidence, Origin, Point
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, MetricsRequest

INT64_MAX: Final = 2**63 - 1
MAX_DEPTH: Final = 16
"""Nesting of arrays and maps inside an attribute; deeper is malformed."""
MAX_VALUES: Final = 10_000
"""Values in the arrays and maps of one attribute, all together: each takes some hundred bytes once it is decoded."""

_EXACT: Final = decimal.Context(prec=1000, traps=[decimal.Inexact, decimal.InvalidOperation])


def parse_metrics(body: bytes) -> MetricsRequest:
    """An ExportMetricsServiceRequest. Raises MalformedRequest."""
    try:
        return MetricsRequest.FromString(body)
    except DecodeError as error:
        raise MalformedRequest(f"not an OTLP ExportMetricsServiceRequest: {error}") from None


def decode_resource(data: bytes) -> Attributes:
    """A Resource message's attributes. Raises MalformedRequest."""
    try:
        return decode_attributes(Resource.FromString(data).attributes)
    except DecodeError as error:
        raise MalformedRequest(f"a resource is not an OTLP Resource: {error}") from None


def decode_scope(data: bytes) -> InstrumentationScope:
    """An InstrumentationScope message. Raises MalformedRequest."""
    try:
        return InstrumentationScope.FromString(data)
    except DecodeError as error:
        raise MalformedRequest(f"a scope is not an OTLP InstrumentationScope: {error}") from None


def decode_point_attributes(data: tuple[bytes, ...]) -> Attributes:
    """A data point's attributes, each still a KeyValue message. Raises MalformedRequest."""
    try:
        return decode_attributes([KeyValue.FromString(item) for item in data])
    except DecodeError as error:
        raise MalformedRequest(f"a data point's attribute is not an OTLP KeyValue: {error}") from None


def decode_attributes(items: Iterable[KeyValue]) -> Attributes:
    """Attributes of a repeated KeyValue field; of a name given twice, the last value counts."""
    return Attributes.of({item.key: _value(item.value) for item in items})


class _Room:
    """Of the values that an attribute may hold, how many are left."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def take(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise MalformedRequest(f"an attribute holds more than {MAX_VALUES:,} values")


def _value(value: AnyValue) -> AttributeValue:
    match value.WhichOneof("value"):
        case "array_value" | "kvlist_value":
            return _nested(value, 0, _Room())
        case kind:
            return _single(value, kind)


def _nested(value: AnyValue, depth: int, room: _Room) -> AttributeValue:
    if depth > MAX_DEPTH:
        raise MalformedRequest(f"an attribute is nested deeper than {MAX_DEPTH} levels")
    match value.WhichOneof("value"):
        case "array_value":
            values = value.array_value.values
            room.take(len(values))
            return tuple(_nested(item, depth + 1, room) for item in values)
        case "kvlist_value":
            items = value.kvlist_value.values
            room.take(len(items))
            return Attributes.of({item.key: _nested(item.value, depth + 1, room) for item in items})
        case kind:
            return _single(value, kind)


def _single(value: AnyValue, kind: str | None) -> AttributeValue:
    match kind:
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "bytes_value":
            return value.bytes_value
        case _:
            return None


def encode_attributes(attributes: Attributes) -> list[KeyValue]:
    """Attributes as OTLP has them."""
    return [KeyValue(key=name, value=_any_value(value)) for name, value in attributes]


def _any_value(value: AttributeValue) -> AnyValue:
    match value:
        case None:
            return AnyValue()
        case str():
            return AnyValue(string_value=value)
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case bytes():
            return AnyValue(bytes_value=value)
        case Attributes():
            return AnyValue(kvlist_value=KeyValueList(values=encode_attributes(value)))
        case tuple():
            return AnyValue(array_value=ArrayValue(values=map(_any_value, value)))


def encode_point(point: Point) -> bytes:
    """An ExportMetricsServiceRequest with this one point, for the quarantine."""
    return encode_number(point.stream.origin, point.start_ns, point.time_ns, point.value)


def encode_number(origin: Origin, start_ns: int, time_ns: int, value: Decimal) -> bytes:
    """An ExportMetricsServiceRequest with one point of a sum, or of whatever a file of meters took the value from, for
    the quarantine."""
    if origin.reading is not None:
        return _encode_reading(origin, start_ns, time_ns, value)
    request = MetricsRequest()
    resource = request.resource_metrics.add(resource=origin.resource)
    metric = resource.scope_metrics.add(scope=origin.scope).metrics.add(name=origin.name, unit=origin.unit)
    metric.sum.aggregation_temporality = origin.temporality
    metric.sum.is_monotonic = origin.monotonic
    number = metric.sum.data_points.add(
        attributes=origin.attributes, start_time_unix_nano=start_ns, time_unix_nano=time_ns
    )
    if value == int(value) and abs(value) <= INT64_MAX:
        number.as_int = int(value)
    else:
        number.as_double = float(value)
    return request.SerializeToString()


def _encode_reading(origin: Origin, start_ns: int, time_ns: int, value: Decimal) -> bytes:
    """What was read stands where it was read; the point's other numbers are not known any more."""
    assert origin.reading is not None, "only what a file of meters has read comes here"
    kind, quantity, factor = origin.reading
    metric = metrics_pb2.Metric(name=origin.name, unit=origin.unit)
    data = getattr(metric, kind)
    if kind not in ("summary", "gauge"):
        data.aggregation_temporality = origin.temporality
    if kind == "sum":
        data.is_monotonic = origin.monotonic
    point = data.data_points.add(start_time_unix_nano=start_ns, time_unix_nano=time_ns)
    point.attributes.extend(KeyValue.FromString(item) for item in origin.attributes)
    measured = _EXACT.divide(value, factor)
    if quantity == "count":
        point.count = int(measured)
    elif quantity == "sum":
        point.sum = float(measured)
    elif measured == int(measured) and abs(measured) <= INT64_MAX:
        point.as_int = int(measured)
    else:
        point.as_double = float(measured)
    return encode_metric(origin.resource, origin.scope, Metric.FromString(metric.SerializeToString()))


def encode_metric(resource: bytes, scope: bytes, metric: Metric) -> bytes:
    """An ExportMetricsServiceRequest with this one metric, unknown fields included, for the quarantine."""
    request = MetricsRequest()
    request.resource_metrics.add(resource=resource).scope_metrics.add(scope=scope).metrics.append(metric)
    return request.SerializeToString()


def encode_span(envelope: bytes, span: bytes) -> bytes:
    """An ExportTraceServiceRequest with this one span, for the quarantine; `envelope` is one that has its resource and
    scope."""
    request = ExportTraceServiceRequest.FromString(envelope)
    request.resource_spans[0].scope_spans[0].spans.add().ParseFromString(span)
    return request.SerializeToString()


def kind_of(metric: Metric | metrics_pb2.Metric) -> str:
    """A metric's type, as OTLP's Metric calls it, but for `updowncounter`, a sum that can fall; "" for one without
    data."""
    kind = metric.WhichOneof("data") or ""
    return "updowncounter" if kind == "sum" and not metric.sum.is_monotonic else kind


def encode_evidence(item: Evidence) -> bytes:
    """An ExportTraceServiceRequest with a span that says what this evidence says, for the quarantine."""
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add()
    spans.resource.attributes.add(key=conventions.SERVICE_NAME).value.string_value = item.service
    span = spans.scope_spans.add().spans.add(
        trace_id=item.trace_id,
        span_id=item.span_id,
        name=item.name,
        start_time_unix_nano=item.start_ns,
        end_time_unix_nano=item.time_ns,
    )
    said = {conventions.ACCOUNT: item.account, f"{conventions.METER_PREFIX}{item.meter}": str(item.quantity)}
    if item.user is not None:
        said[conventions.USER] = item.user
    for key, text in said.items():
        span.attributes.add(key=key).value.string_value = text
    return request.SerializeToString()


def shortest_decimal(value: float) -> Decimal:
    """The shortest decimal that reads back as this double: 0.1 is 0.1, not 0.1000000000000000055."""
    return Decimal(repr(value))
