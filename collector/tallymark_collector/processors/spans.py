"""From a traces request to evidence: spans that carry `tallymark.meter.<name>`, and their `tallymark.usage` events."""

from __future__ import annotations

import decimal
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import AttributeValue, Evidence, Point, Quarantined, Reason, Refusal, without_nul
from tallymark_collector.processors import validation
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.processors.described import described, too_large
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.set_aside import SetAside

if TYPE_CHECKING:
    from tallymark_collector.metering import Metering

_TRACE_ID_BYTES: Final = 16
_SPAN_ID_BYTES: Final = 8
MAX_METERS: Final = 64
"""Of one span, or of one event of it."""
_MAX_TEXT: Final = 1024
"""Characters of a span's name, a service or a user that are kept."""
# A span may say the same meter of the same account as often as OpenTelemetry allows events: 60 digits and some.
_EXACT: Final = decimal.Context(prec=100, traps=[decimal.Inexact, decimal.InvalidOperation])


PIECE: Final = 256
"""Spans that are decoded at once, most of which are looked into; then others have their turn."""
PIECE_BYTES: Final = 256 * 1024
"""The same of their bytes, and of their resources'."""


@dataclass(slots=True)
class DecodedSpans(SetAside):
    """What a request holds, in its order. (Of a resource that is too large, all spans are one item.)"""

    evidence: list[Evidence] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    """Of spans that the file of meters says are usage."""
    unmatched: int = 0
    """Spans that are not evidence."""
    foreign: Counter[str] = field(default_factory=Counter)
    """The same by the span's name."""


def decode_spans(
    tenant: str,
    body: bytes,
    limits: validation.TimeLimits,
    now_ns: int,
    metering: Metering | None = None,
    redaction: Redaction = STANDARD,
) -> DecodedSpans:
    """Evidence of an ExportTraceServiceRequest. Raises MalformedRequest where the request as a whole cannot be read,
    TooLarge where what of it cannot be billed is too much to be kept."""
    decoded = DecodedSpans()
    at_once(decoding_spans(tenant, body, limits, now_ns, decoded, metering, redaction))
    return decoded


def decoding_spans(
    tenant: str,
    body: bytes,
    limits: validation.TimeLimits,
    now_ns: int,
    decoded: DecodedSpans,
    metering: Metering | None = None,
    redaction: Redaction = STANDARD,
) -> Generator[None, None, None]:
    """The same in pieces (`PIECE`)."""
    try:
        request = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise MalformedRequest(f"not an OTLP ExportTraceServiceRequest: {error}") from None
    window = limits.window(now_ns)
    spans = taken = 0
    for resource_spans in request.resource_spans:
        resource, of_resource = resource_spans.resource, resource_spans.resource.SerializeToString()
        for scope_spans in resource_spans.scope_spans:
            scope, of_scope = scope_spans.scope, scope_spans.scope.SerializeToString()
            taken += len(of_resource) + len(of_scope)
            unfit = _unfit(of_resource, of_scope, redaction)
            if unfit is not None:
                decoded.keep(_whole(tenant, resource, scope_spans, metering, unfit, decoded))
                continue
            metered = None if metering is None else metering.spans(tenant, resource, scope)
            for span in scope_spans.spans:
                spans += 1
                taken += span.ByteSize()
                if spans >= PIECE or taken >= PIECE_BYTES:
                    spans = taken = 0
                    yield
                rejected = decoded.rejected
                is_usage = metered is not None and metered.decode(span, window, decoded)
                is_evidence = _decode_span(tenant, resource, span, window, decoded, redaction)
                decoded.rejected = min(decoded.rejected, rejected + 1)
                if not (is_usage or is_evidence):
                    decoded.unmatched += 1
                    decoded.foreign[span.name] += 1


def _unfit(resource: bytes, scope: bytes, redaction: Redaction) -> Refusal | None:
    """Why usage of a resource and scope is kept as one, or None."""
    if refusal := too_large("resource", resource) or too_large("scope", scope):
        return refusal
    try:
        return described(resource, scope, redaction).refusal
    except MalformedRequest:
        return None


def _whole(
    tenant: str,
    resource: Resource,
    scope_spans: ScopeSpans,
    metering: Metering | None,
    refusal: Refusal,
    decoded: DecodedSpans,
) -> Iterator[Quarantined]:
    """What may be usage or evidence as one item, as it came: many would be as many copies of what is too large."""
    request = ExportTraceServiceRequest()
    kept = request.resource_spans.add(resource=resource).scope_spans.add(scope=scope_spans.scope)
    for span in scope_spans.spans:
        if _carriers(span) or (metering is not None and metering.names_span(tenant, span.name)):
            kept.spans.append(span)
        else:
            decoded.unmatched += 1
            decoded.foreign[span.name] += 1
    if kept.spans:
        decoded.rejected += len(kept.spans)
        latest = max(span.end_time_unix_nano for span in kept.spans)
        yield Quarantined(tenant, "", "", latest, refusal, "traces", request.SerializeToString())


def _carriers(span: Span) -> list[Sequence[KeyValue]]:
    """The attributes of a span, and of its events, that tell usage. Names first: what other spans carry is not even
    decoded."""
    carriers = [span.attributes, *(e.attributes for e in span.events if e.name == conventions.USAGE_EVENT)]
    return [items for items in carriers if any(item.key.startswith(conventions.METER_PREFIX) for item in items)]


def _decode_span(
    tenant: str,
    resource: Resource,
    span: Span,
    window: tuple[int, int],
    decoded: DecodedSpans,
    redaction: Redaction,
) -> bool:
    usage = _carriers(span)
    if not usage:
        return False
    found: dict[tuple[str, str], Evidence] = {}
    refusals: list[Refusal] = []
    for items in usage:
        for item in _read(tenant, resource, span, items, window, redaction):
            if isinstance(item, Refusal):
                refusals.append(item)
            else:
                same = found.get((item.account, item.meter))
                quantity = item.quantity if same is None else _EXACT.add(item.quantity, same.quantity)
                found[item.account, item.meter] = item._replace(quantity=quantity)
    decoded.evidence.extend(found.values())
    if refusals:
        alone = ExportTraceServiceRequest()
        kept = alone.resource_spans.add(resource=resource)
        kept.scope_spans.add().spans.append(span)
        payload = alone.SerializeToString()
        decoded.rejected += 1
        decoded.keep(
            Quarantined(tenant, "", "", span.end_time_unix_nano, refusal, "traces", payload) for refusal in refusals
        )
    return True


def _read(
    tenant: str,
    resource: Resource,
    span: Span,
    items: Iterable[KeyValue],
    window: tuple[int, int],
    redaction: Redaction,
) -> Iterator[Evidence | Refusal]:
    try:
        attributes = wire.decode_attributes(items)
        service = wire.decode_attributes(resource.attributes).get(conventions.SERVICE_NAME)
    except MalformedRequest as error:
        yield Refusal(Reason.ATTRIBUTES_INVALID, str(error))
        return
    refusal = validation.check_account(attributes.get(conventions.ACCOUNT)) or validation.check_times(
        span.start_time_unix_nano, span.end_time_unix_nano, *window
    )
    refusal = check_ids(span) or refusal
    if refusal is not None:
        yield refusal
        return
    account = validation.account_name(attributes.get(conventions.ACCOUNT))
    assert account is not None, "check_account refuses a span without an account"
    user = attributes.get(conventions.USER)
    names = [name for name, _ in attributes if name.startswith(conventions.METER_PREFIX)]
    if len(names) > MAX_METERS:  # each is a row with a copy of the other attributes
        yield Refusal(Reason.ATTRIBUTES_INVALID, f"{len(names)} meters at once, at most {MAX_METERS} are taken")
        return
    rest = redaction.attributes(attributes.without(conventions.ACCOUNT, conventions.USER, *names))
    rest = validation.shortened(rest)
    for name in names:
        meter = name.removeprefix(conventions.METER_PREFIX)
        quantity = validation.check_meter(meter) or read_quantity(attributes.get(name))
        if isinstance(quantity, Refusal):
            yield quantity
            continue
        yield Evidence(
            tenant=tenant,
            account=account,
            meter=meter,
            trace_id=span.trace_id,
            span_id=span.span_id,
            start_ns=span.start_time_unix_nano,
            time_ns=span.end_time_unix_nano,
            quantity=quantity,
            name=evidence_text(redaction.text(span.name)),
            service=evidence_text(service or ""),
            user=None if user is None else evidence_text(redaction.text(str(user))),
            attributes=rest,
        )


def evidence_text(value: AttributeValue) -> str:
    """A text of evidence as it is kept."""
    return without_nul(str(value)[:_MAX_TEXT])


def check_ids(span: Span) -> Refusal | None:
    """What is wrong with what identifies a span."""
    if len(span.trace_id) != _TRACE_ID_BYTES or len(span.span_id) != _SPAN_ID_BYTES:
        return Refusal(Reason.ATTRIBUTES_INVALID, "trace_id has 16 bytes and span_id 8")
    return None


def read_quantity(value: AttributeValue) -> Decimal | Refusal:
    """A span attribute as an exact quantity: an integer, a double as its shortest decimal, or a decimal as text."""
    match value:
        case bool():
            quantity = None
        case int():
            quantity = Decimal(value)
        case float() if math.isfinite(value):
            quantity = wire.shortest_decimal(value)
        case str():
            try:
                quantity = Decimal(value)
            except InvalidOperation:
                quantity = None
        case _:
            quantity = None
    if quantity is None or not quantity.is_finite():
        return Refusal(Reason.VALUE_NOT_FINITE, f"the quantity {str(value)[:64]!r} is not a finite number")
    return validation.check_quantity(quantity) or quantity
