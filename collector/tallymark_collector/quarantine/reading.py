"""An item's payload for people: which process sent what, of when, with which attributes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering.rules import KINDS, STATUSES
from tallymark_collector.model import Attributes, Refusal, Temporality, attributes_json
from tallymark_collector.processors import validation
from tallymark_collector.quarantine.rules import Kind
from tallymark_collector.wire import points
from tallymark_collector.wire.tallymark_metrics_view_pb2 import NumberDataPoint, Sum

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_UNREADABLE: Final = "(not readable)"


@dataclass(frozen=True, slots=True)
class Content:
    """What a payload says."""

    kind: Kind
    facts: dict[str, str] = field(default_factory=dict)


def time_text(ns: int) -> str:
    """A time in nanoseconds since the Unix epoch as ISO 8601 in UTC, to the nanosecond where it has that."""
    if ns == 0:
        return "(not given)"
    instant = (_EPOCH + timedelta(seconds=ns // 1_000_000_000)).isoformat().removesuffix("+00:00")
    fraction = f"{ns % 1_000_000_000:09d}".rstrip("0")
    return f"{instant}.{fraction}Z" if fraction else f"{instant}Z"


def read(signal: str, payload: bytes, *, metered: bool = False) -> Content:
    """A payload of the quarantine; `metered`: one that a file of meters made usage. Never raises: what cannot be read
    is said to be so."""
    try:
        return _span(payload, metered) if signal == "traces" else _metric(payload, metered)
    except (DecodeError, MalformedRequest, IndexError) as error:
        return Content(Kind.OTHER, {"payload": f"{_UNREADABLE}: {error}; {len(payload)} bytes"})


def _metric(payload: bytes, metered: bool) -> Content:
    resource = wire.parse_metrics(payload).resource_metrics[0]
    scope = resource.scope_metrics[0]
    metric = scope.metrics[0]
    kind_of_data = metric.WhichOneof("data") or "nothing"
    name, version = _scope(scope.scope)
    facts = {
        "resource": _resource(resource.resource),
        "scope": f"{name} {version}".strip(),
        "metric": metric.name,
        "unit": metric.unit,
    }
    if kind_of_data not in ("sum", "gauge"):
        return _other(facts, metrics_pb2.Metric.FromString(metric.SerializeToString()), metered)
    # A gauge's points lie in it as in a sum.
    header = metric.sum if kind_of_data == "sum" else Sum.FromString(metric.gauge)
    facts["type"] = (
        "gauge" if kind_of_data == "gauge" else _sum_type(header.aggregation_temporality, header.is_monotonic)
    )
    if (held := sum(map(points.number, scope.metrics))) > 1:
        facts["points"] = f"{held:,}, of which this is one"
    for number in header.data_points[-1:]:
        facts["attributes"] = _point_attributes(number)
        facts["start time"] = time_text(number.start_time_unix_nano)
        facts["time"] = time_text(number.time_unix_nano)
        facts["value"] = _value(number)
    if name == conventions.CONTROL_SCOPE:
        return Content(Kind.CONTROL, facts)
    if kind_of_data == "gauge" or not header.is_monotonic:
        return Content(Kind.LEVEL, facts)
    return Content(_kind(header.aggregation_temporality), facts)


def _other(facts: dict[str, str], metric: metrics_pb2.Metric, metered: bool) -> Content:
    """A metric that is no sum: which only a file of meters can make usage."""
    kind = metric.WhichOneof("data")
    if kind is None:
        return Content(Kind.OTHER, {**facts, "type": "nothing"})
    data = getattr(metric, kind)
    temporality = Temporality.CUMULATIVE if kind == "summary" else getattr(data, "aggregation_temporality", None)
    facts["type"] = kind.replace("_", " ")
    if temporality is not None and kind != "summary":
        facts["type"] += f", {_temporality(temporality)}"
    if len(data.data_points) > 1:
        facts["points"] = f"{len(data.data_points):,}, of which this is the first"
    for point in data.data_points[:1]:
        facts["attributes"] = _shown(point.attributes)
        facts["start time"] = time_text(point.start_time_unix_nano)
        facts["time"] = time_text(point.time_unix_nano)
        has_sum = kind == "summary" or point.HasField("sum")
        facts["count"] = str(point.count)
        facts["sum"] = repr(point.sum) if has_sum else "(not given)"
    return Content(_kind(temporality) if metered and temporality is not None else Kind.OTHER, facts)


def _kind(temporality: int) -> Kind:
    return Kind.CUMULATIVE if temporality == Temporality.CUMULATIVE else Kind.DELTA


def _span(payload: bytes, metered: bool) -> Content:
    request = ExportTraceServiceRequest.FromString(payload)
    resource = request.resource_spans[0]
    span = resource.scope_spans[0].spans[0]
    facts = {
        "resource": _shown(resource.resource.attributes),
        "span": span.name,
        "span kind": _name(KINDS, span.kind - 1),
        "status": _name(STATUSES, span.status.code),
        "trace": span.trace_id.hex(),
        "span id": span.span_id.hex(),
        "attributes": _shown(span.attributes),
    }
    for position, event in enumerate((e for e in span.events if e.name == conventions.USAGE_EVENT), 1):
        facts[f"usage event {position}"] = _shown(event.attributes)
    facts["start time"] = time_text(span.start_time_unix_nano)
    facts["time"] = time_text(span.end_time_unix_nano)
    return Content(Kind.USAGE_SPAN if metered else Kind.SPAN, facts)


def _name(names: Sequence[str], code: int) -> str:
    return names[code] if 0 <= code < len(names) else "unspecified"


def _sum_type(temporality: int, monotonic: bool) -> str:
    return f"sum, {_temporality(temporality)}{'' if monotonic else ', may fall'}"


def _temporality(temporality: int) -> str:
    names = {int(Temporality.DELTA): "increase (delta)", int(Temporality.CUMULATIVE): "running total (cumulative)"}
    return names.get(temporality, f"temporality {temporality}")


def _resource(data: bytes) -> str:
    try:
        return attributes_json(wire.decode_resource(data))
    except MalformedRequest:
        return _UNREADABLE


def _scope(data: bytes) -> tuple[str, str]:
    try:
        scope = wire.decode_scope(data)
    except MalformedRequest:
        return _UNREADABLE, ""
    return scope.name, scope.version


def _point_attributes(number: NumberDataPoint) -> str:
    try:
        return attributes_json(wire.decode_point_attributes(tuple(number.attributes)))
    except MalformedRequest:
        return _UNREADABLE


def _shown(items: Iterable[KeyValue]) -> str:
    try:
        return attributes_json(wire.decode_attributes(items))
    except MalformedRequest:
        return attributes_json(Attributes.of({item.key: _UNREADABLE for item in items}))


def _value(number: NumberDataPoint | metrics_pb2.NumberDataPoint) -> str:
    value = validation.read_number(number)  # type: ignore[arg-type]
    return f"none: {value.detail}" if isinstance(value, Refusal) else f"{value:f}"
