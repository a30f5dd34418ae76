"""What is kept of telemetry as OTLP: streams' origins, and payloads in quarantine, without the credentials in it.

Of a payload goes, beside the values that `redaction` names, what is never billed and may hold anything: exemplars,
descriptions, a span's links, its status message and its events without usage. Its item's digest, and the mark on a
metrics payload, are of what came: what a client sends again is the same item, and a release bills it under the identity
that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tallymark import conventions
from tallymark_collector.model import Origin, Quarantined, Refusal
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.secret_texts import REDACTED
from tallymark_collector.processors.sent import GAUGE, MARK, Sent, origin_of_metered, sum_as_sent
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, MetricsRequest, Sum

UNREADABLE: Final = b"\x0a\x01\xff"
"""Stands for what cannot be read, and so cannot be searched: neither a KeyValue, a Resource, a scope nor a metric's
data. What was refused because it cannot be read stays refused."""
MIN_QUOTED: Final = 4
"""Characters of a redacted value that a sentence about the item may not repeat; shorter ones are in any sentence."""
_QUOTED: Final = (64, 32)
"""Sentences cut what they quote to so many characters."""

PIECE: Final = 256
"""Items between two rests, each of which is read and written again: some ten milliseconds."""

_Removed = list[str]


def redacted_origin(redaction: Redaction, origin: Origin, sent: Callable[[], Sent] | None) -> Origin:
    """A stream's origin, of which its points' payloads are made, with the mark that `sent` gives; the same object where
    there is nothing to redact."""
    removed: _Removed = []
    resource = _resource(redaction, origin.resource, removed)
    scope = _scope(redaction, origin.scope, removed)
    attributes = _encoded(redaction, origin.attributes, removed)
    unchanged = resource == origin.resource and scope == origin.scope and attributes == list(origin.attributes)
    if unchanged and not any(map(_is_mark, attributes)):
        return origin
    if sent is not None:
        attributes = [*_without_mark(attributes), sent().attribute().SerializeToString()]
    return origin._replace(resource=resource, scope=scope, attributes=tuple(attributes))


def redacted_item(redaction: Redaction, item: Quarantined) -> Quarantined:
    """An item as it may be kept; the same object where nothing is to be redacted. Never raises."""
    if not redaction.on and MARK.encode() not in item.payload:
        return item  # a mark that a client sent would be believed at a release
    removed: _Removed = []
    payload = (_traces if item.signal == "traces" else _metrics)(redaction, item, removed)
    detail = redaction.text(item.refusal.detail)
    for value in sorted(set(removed), key=len, reverse=True):
        for quoted in (value, *(value[:length] for length in _QUOTED if len(value) > length)):
            if len(quoted) >= MIN_QUOTED:
                detail = detail.replace(quoted, REDACTED).replace(repr(quoted)[1:-1], REDACTED)
    if payload == item.payload and detail == item.refusal.detail:
        return item
    return item._replace(payload=payload, refusal=Refusal(item.refusal.reason, detail), digest_of_sent=item.digest())


def redacting(redaction: Redaction, items: Sequence[Quarantined]) -> Generator[None, None, list[Quarantined]]:
    """The same of many, in pieces (see `resting`)."""
    found: list[Quarantined] = []
    for start in range(0, len(items), PIECE):
        if start:
            yield
        found += [redacted_item(redaction, item) for item in items[start : start + PIECE]]
    return found


def redact_spans(redaction: Redaction, request: ExportTraceServiceRequest, removed: _Removed | None = None) -> None:
    """Takes out of spans what may not be kept, in place."""
    if not redaction.on:
        return
    removed = [] if removed is None else removed
    request.DiscardUnknownFields()
    for resource in request.resource_spans:
        redact_items(redaction, resource.resource.attributes, removed)
        for scope in resource.scope_spans:
            redact_items(redaction, scope.scope.attributes, removed)
            for span in scope.spans:
                _redact_span(redaction, span, removed)


def redacted_span(redaction: Redaction, span: Span) -> bytes:
    """A span as it may be kept, encoded."""
    if not redaction.on:
        return span.SerializeToString()
    kept = Span()
    kept.CopyFrom(span)
    kept.DiscardUnknownFields()
    _redact_span(redaction, kept, [])
    return kept.SerializeToString()


def redact_items(redaction: Redaction, items: Iterable[KeyValue], removed: _Removed) -> bool:
    """Redacts attributes in place, and adds the texts that went to `removed`. True if there were any."""
    changed = False
    for item in items:
        changed |= _redact_value(redaction, item.key, item.value, removed)
    return changed


def _redact_value(redaction: Redaction, name: str, value: AnyValue, removed: _Removed) -> bool:
    kind = value.WhichOneof("value")
    if kind == "kvlist_value" and not redaction.names_secret(name):
        return redact_items(redaction, value.kvlist_value.values, removed)
    if kind == "array_value":
        several = value.array_value.values
        if redaction.names_secret(name) and several:
            removed += [text for one in several for text in _texts(one)]
            if len(several) == 1 and several[0].string_value == REDACTED:
                return False
            del several[1:]
            several[0].string_value = REDACTED
            return True
        changed = [_redact_value(redaction, name, one, removed) for one in several]
        return any(changed)
    if kind in (None, "bool_value"):
        return False
    if kind == "string_value":
        stored = redaction.value(name, value.string_value)
        if stored == value.string_value:
            return False
        removed.append(value.string_value)
        value.string_value = str(stored)
        return True
    if redaction.names_secret(name):
        removed += _texts(value)
        value.string_value = REDACTED
        return True
    return False


def _texts(value: AnyValue) -> list[str]:
    match value.WhichOneof("value"):
        case "string_value":
            return [value.string_value]
        case "array_value":
            return [text for one in value.array_value.values for text in _texts(one)]
        case "kvlist_value":
            return [text for one in value.kvlist_value.values for text in _texts(one.value)]
        case "int_value" | "double_value" as kind:
            return [str(getattr(value, kind))]
        case _:
            return []


def _redact_span(redaction: Redaction, span: Span, removed: _Removed) -> None:
    redact_items(redaction, span.attributes, removed)
    kept = [event for event in span.events if event.name == conventions.USAGE_EVENT]
    for event in kept:
        redact_items(redaction, event.attributes, removed)
    if len(kept) != len(span.events):
        del span.events[:]
        span.events.extend(kept)
    span.name = redaction.text(span.name)
    span.ClearField("links")
    span.status.ClearField("message")
    # What says that other spans are missing is read again at a release; other vendors' members are theirs.
    members = [member for member in span.trace_state.split(",") if member.strip().startswith("ot=")]
    span.trace_state = ",".join(members)


def _traces(redaction: Redaction, item: Quarantined, removed: _Removed) -> bytes:
    try:
        request = ExportTraceServiceRequest.FromString(item.payload)
    except DecodeError:
        return UNREADABLE
    redact_spans(redaction, request, removed)
    return request.SerializeToString()


def _metrics(redaction: Redaction, item: Quarantined, removed: _Removed) -> bytes:
    try:
        request = MetricsRequest.FromString(item.payload)
    except DecodeError:
        return UNREADABLE
    request.DiscardUnknownFields()
    for resource in request.resource_metrics:
        before = resource.resource
        resource.resource = _resource(redaction, before, removed)
        for within in resource.scope_metrics:
            scope = within.scope
            within.scope = _scope(redaction, scope, removed)
            changed = (resource.resource, within.scope) != (before, scope)
            for metric in within.metrics:
                origin = Origin(before, scope, metric.name, metric.unit, 0, False, ())
                _redact_metric(redaction, metric, item, origin, removed, changed)
    return request.SerializeToString()


def _redact_metric(
    redaction: Redaction, metric: Metric, item: Quarantined, origin: Origin, removed: _Removed, changed: bool
) -> None:
    kind = metric.WhichOneof("data")
    if kind == "sum":
        header = metric.sum
        origin = origin._replace(temporality=header.aggregation_temporality, monotonic=header.is_monotonic)
        _redact_sum(redaction, header, item, origin, removed, changed)
    elif kind == "gauge":
        try:
            gauge = Sum.FromString(metric.gauge)
        except DecodeError:
            metric.gauge = UNREADABLE
            return
        gauge.DiscardUnknownFields()
        _redact_sum(redaction, gauge, item, origin._replace(reading=GAUGE), removed, changed)
        metric.gauge = gauge.SerializeToString()
    elif kind is not None:
        _redact_other(redaction, metric, kind, item, removed, changed)


def _redact_sum(
    redaction: Redaction, data: Sum, item: Quarantined, origin: Origin, removed: _Removed, changed: bool
) -> None:
    for number in data.data_points:
        came = tuple(number.attributes)
        attributes = _encoded(redaction, came, removed)
        if not changed and attributes == list(came) and not any(map(_is_mark, came)):
            continue
        attributes = _without_mark(attributes)
        if len(data.data_points) == 1:
            sent = (
                _metered_as_sent(item) if item.metered else sum_as_sent(item.tenant, origin._replace(attributes=came))
            )
            attributes.append(sent.attribute().SerializeToString())
        del number.attributes[:]
        number.attributes.extend(attributes)


def _redact_other(
    redaction: Redaction, metric: Metric, kind: str, item: Quarantined, removed: _Removed, changed: bool
) -> None:
    """A histogram or summary, which our view of OTLP leaves as bytes."""
    try:
        whole = metrics_pb2.Metric.FromString(metric.SerializeToString())
    except DecodeError:
        setattr(metric, kind, UNREADABLE)
        return
    data: Any = getattr(whole, kind)
    data.DiscardUnknownFields()
    for point in data.data_points:
        if kind != "summary":
            point.ClearField("exemplars")
        found = redact_items(redaction, point.attributes, removed)
        kept = [one for one in point.attributes if one.key != MARK]
        if item.metered and len(data.data_points) == 1 and (found or changed or len(kept) < len(point.attributes)):
            kept.append(_metered_as_sent(item).attribute())
        del point.attributes[:]
        point.attributes.extend(kept)
    setattr(metric, kind, data.SerializeToString())


def _metered_as_sent(item: Quarantined) -> Sent:
    came = origin_of_metered(item.tenant, item.meter, item.signal, item.payload, kept=False)
    return Sent(came.stream, item.stream, item.source)


def _is_mark(data: bytes) -> bool:
    if MARK.encode() not in data:
        return False
    try:
        return KeyValue.FromString(data).key == MARK
    except DecodeError:
        return False


def _without_mark(attributes: Iterable[bytes]) -> list[bytes]:
    return [data for data in attributes if not _is_mark(data)]


def _resource(redaction: Redaction, data: bytes, removed: _Removed) -> bytes:
    stored, texts = _redacted_group(redaction, Resource, data)
    removed += texts
    return stored


def _scope(redaction: Redaction, data: bytes, removed: _Removed) -> bytes:
    stored, texts = _redacted_group(redaction, InstrumentationScope, data)
    removed += texts
    return stored


@lru_cache(maxsize=128)
def _redacted_group(
    redaction: Redaction, message: type[Resource] | type[InstrumentationScope], data: bytes
) -> tuple[bytes, tuple[str, ...]]:
    try:
        found = message.FromString(data)
    except DecodeError:
        return UNREADABLE, ()
    removed: _Removed = []
    changed = redact_items(redaction, found.attributes, removed)
    return (found.SerializeToString() if changed else data), tuple(removed)


def _encoded(redaction: Redaction, attributes: Sequence[bytes], removed: _Removed) -> list[bytes]:
    """Attributes, each still a KeyValue message."""
    found = []
    for data in attributes:
        try:
            item = KeyValue.FromString(data)
        except DecodeError:
            found.append(UNREADABLE)
        else:
            found.append(item.SerializeToString() if redact_items(redaction, [item], removed) else data)
    return found
