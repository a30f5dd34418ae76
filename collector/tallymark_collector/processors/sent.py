"""Who a point was when it came, whatever is changed of it later: by what was sent, before anything was redacted.

What is stored of a point with a credential in it cannot tell that any more. So it carries a mark: an attribute with the
identities that the point had.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, Final, NamedTuple
from uuid import UUID

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Attributes, Origin, Reading, fingerprint

GAUGE: Final = Reading("gauge", "value", Decimal(1))
"""Of a gauge's stream: its value as it is."""
MARK: Final = "tallymark.redacted"
"""The attribute, on points in quarantine alone. What clients send under this name is theirs, and believed nowhere."""


class Sent(NamedTuple):
    """What a mark says."""

    origin: UUID
    """The stream as it came, also where it has no account or cannot be read: what decisions about it hang on."""
    stream: UUID | None = None
    """The stream that its points were, or would have been, stored under; None where that was not known."""
    source: UUID | None = None
    """The source of which it was, where a file of meters took it."""

    def attribute(self) -> KeyValue:
        """The mark."""
        found = KeyValue(key=MARK)
        known = [self.origin, self.stream, self.source]
        while known[-1] is None:
            known.pop()
        found.value.string_value = " ".join("-" if one is None else one.hex for one in known)
        return found


def identifying(resource: Attributes) -> Attributes:
    """The attributes that say which process sent a point.

    With `service.instance.id` those three that OpenTelemetry calls identifying: a gateway may decorate the rest
    without making another stream of it. Without it, all of them: better two streams than two processes in one.
    """
    if resource.get(conventions.SERVICE_INSTANCE) is None:
        return resource
    names = (conventions.SERVICE_NAMESPACE, conventions.SERVICE_NAME, conventions.SERVICE_INSTANCE)
    return Attributes((key, value) for key, value in resource if key in names)


def stream_of(tenant: str, origin: Origin) -> UUID:
    """The identity of the stream that a sum's or gauge's point belongs to, made of what was sent. Raises
    MalformedRequest."""
    scope = wire.decode_scope(origin.scope)
    return stream_identity(
        tenant,
        identifying(wire.decode_resource(origin.resource)),
        (scope.name, scope.version, wire.decode_attributes(scope.attributes)),
        origin,
        wire.decode_point_attributes(origin.attributes),
    )


def stream_identity(
    tenant: str, sender: Attributes, scope: tuple[str, str, Attributes], origin: Origin, attributes: Attributes
) -> UUID:
    """The same of what is decoded: the sender's identifying attributes, the scope's name, version and attributes, and
    the point's attributes."""
    return fingerprint(
        "stream",
        tenant,
        sender,
        *scope,
        origin.name,
        origin.unit,
        "sum" if origin.reading is None else "gauge",
        origin.temporality,
        origin.monotonic,
        attributes,
    )


def sum_as_sent(tenant: str, origin: Origin) -> Sent:
    """Who a sum's or gauge's point was when it came."""
    try:
        stream = stream_of(tenant, origin)
    except MalformedRequest:
        stream = None
    return Sent(origin_of_sum(tenant, origin), stream)


def origin_of_sum(tenant: str, origin: Origin) -> UUID:
    """The same by the rules of `processors.decoding`, but also where it has no account or cannot be read."""
    is_sum = origin.reading is None
    return fingerprint(
        "quarantined",
        tenant,
        _resource(origin.resource),
        *_scope(origin.scope),
        origin.name,
        origin.unit,
        *((origin.temporality, origin.monotonic) if is_sum else ("gauge",)),
        _attributes(origin.attributes),
    )


class Came(NamedTuple):
    """Who an item's point or span was when it came, for its meter."""

    stream: UUID
    point: UUID


def origin_of_metered(tenant: str, meter: str, signal: str, payload: bytes, *, kept: bool) -> Came:
    """The same of what a file of meters makes usage of `meter`: a span by its identifiers, a point by the stream that
    it came from and its times. `kept`: out of quarantine, where a mark is ours. Raises MalformedRequest."""
    if signal == "traces":
        spans = _parsed(ExportTraceServiceRequest, payload)
        one = _only([s for resource in spans.resource_spans for scope in resource.scope_spans for s in scope.spans])
        span = fingerprint("metered span", tenant, meter, one.trace_id, one.span_id)
        return Came(span, span)
    resource = _parsed(ExportMetricsServiceRequest, payload).resource_metrics[0]
    scope = resource.scope_metrics[0]
    [metric] = scope.metrics
    data: Any = getattr(metric, metric.WhichOneof("data") or "sum")
    one = _only(data.data_points)
    marks = (parse_mark(item.value.string_value) for item in one.attributes if kept and item.key == MARK)
    mark = next(marks, None)
    sender = _readable(resource.resource.attributes)
    kind = wire.kind_of(metric)
    stream = fingerprint(
        "metered",
        tenant,
        meter,
        sender if isinstance(sender, bytes) else identifying(sender),
        scope.scope.name,
        scope.scope.version,
        _readable(scope.scope.attributes),
        metric.name,
        metric.unit,
        kind,
        int(getattr(data, "aggregation_temporality", 0)),
        _readable(one.attributes),
    )
    stream = mark.origin if mark is not None else stream
    # A level is told by its time alone.
    start_ns = 0 if kind in ("gauge", "updowncounter") else one.start_time_unix_nano
    return Came(stream, fingerprint(stream.hex, start_ns, one.time_unix_nano))


def source_of(sender: UUID, quantity: str) -> UUID:
    """The source of running totals or levels: whose they are, and what a file of meters reads of them."""
    return fingerprint("metered source", sender.hex, quantity)


def mark_of_metered(signal: str, payload: bytes) -> Sent | None:
    """The mark on the point of such an item, if it has one."""
    if signal == "traces":
        return None
    try:
        request = ExportMetricsServiceRequest.FromString(payload)
    except DecodeError:
        return None
    metrics = [m for resource in request.resource_metrics for scope in resource.scope_metrics for m in scope.metrics]
    points = [point for m in metrics if (kind := m.WhichOneof("data")) for point in getattr(m, kind).data_points]
    marks = [item.value.string_value for point in points for item in point.attributes if item.key == MARK]
    return parse_mark(marks[0]) if marks else None


def _parsed(message: Any, payload: bytes) -> Any:
    try:
        return message.FromString(payload)
    except DecodeError as error:
        raise MalformedRequest(str(error)) from None


def _only(found: Sequence[Any]) -> Any:
    if len(found) != 1:
        raise MalformedRequest(f"there are {len(found)} points or spans in it, and each is a decision of its own")
    return found[0]


def _readable(items: Any) -> Attributes | bytes:
    try:
        return wire.decode_attributes(items)
    except MalformedRequest:
        return b"".join(sorted(item.SerializeToString() for item in items))


def read_mark(attributes: Iterable[bytes]) -> Sent | None:
    """What the mark among a point's attributes says, each still a KeyValue message; None where there is none."""
    for data in attributes:
        if MARK.encode() not in data:
            continue
        try:
            item = KeyValue.FromString(data)
        except DecodeError:
            continue
        if item.key == MARK:
            return parse_mark(item.value.string_value)
    return None


def parse_mark(text: object) -> Sent | None:
    """A mark's value, read."""
    try:
        origin, *rest = str(text).split(" ")
        return Sent(UUID(hex=origin), *(None if one == "-" else UUID(hex=one) for one in rest[:2]))
    except ValueError:
        return None


def _resource(data: bytes) -> Attributes | bytes:
    try:
        return identifying(wire.decode_resource(data))
    except MalformedRequest:
        return data


def _scope(data: bytes) -> tuple[object, ...]:
    try:
        scope = wire.decode_scope(data)
        return scope.name, scope.version, wire.decode_attributes(scope.attributes)
    except MalformedRequest:
        return (data,)


def _attributes(data: tuple[bytes, ...]) -> Attributes | tuple[bytes, ...]:
    try:
        return wire.decode_point_attributes(data)
    except MalformedRequest:
        return tuple(sorted(data))
