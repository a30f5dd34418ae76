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
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import AttributeValue, Evidence, Point, Quarantined, Reason, Refusal, without_nul
from tallymark_collector.processors import validation
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.processors.described import resource_of, scope_of, why_whole
from tallymark_collector.processors.pace import Pace
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.set_aside import SetAside

if TYPE_CHECKING:
    from tallymark_collector.metering import Metering
    from tallymark_collector.metering.spans import SpanGroup

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
BYTES_A_SPAN: Final = 1024
"""Of spans, resources and scopes: what is as much work as a small span."""


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

    def pass_over(self, name: str) -> None:
        """Counts what is not evidence."""
        self.unmatched += 1
        self.foreign[name] += 1


def decode_spans(
    tenant: str,
    body: bytes,
    limits: validation.TimeLimits,
    now_ns: int,
    metering: Metering | None = None,
    redaction: Redaction = STANDARD,
    *,
    kept: bool = False,
) -> DecodedSpans:
    """Evidence of an ExportTraceServiceRequest. Raises MalformedRequest where the request as a whole cannot be read,
    TooLarge where what of it cannot be billed is too much to be kept. `kept`: out of quarantine, where what people
    release was let in before, whatever the limits of resources were."""
    decoded = DecodedSpans()
    at_once(decoding_spans(tenant, body, limits, now_ns, decoded, metering, redaction, kept=kept))
    return decoded


def decoding_spans(
    tenant: str,
    body: bytes,
    limits: validation.TimeLimits,
    now_ns: int,
    decoded: DecodedSpans,
    metering: Metering | None = None,
    redaction: Redaction = STANDARD,
    *,
    kept: bool = False,
) -> Generator[None, None, None]:
    """The same in pieces (`PIECE`)."""
    try:
        request = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise MalformedRequest(f"not an OTLP ExportTraceServiceRequest: {error}") from None
    work = _Request(tenant, limits.window(now_ns), decoded, metering, redaction, kept=kept)
    for resource_spans in request.resource_spans:
        yield from work.decode(resource_spans)


class _Request:
    """One request on its way."""

    def __init__(
        self,
        tenant: str,
        window: tuple[int, int],
        decoded: DecodedSpans,
        metering: Metering | None,
        redaction: Redaction,
        *,
        kept: bool,
    ) -> None:
        self._tenant = tenant
        self._window = window
        self._decoded = decoded
        self._metering = metering
        self._redaction = redaction
        self._kept = kept
        self._pace = Pace(PIECE)

    def decode(self, resource_spans: ResourceSpans) -> Generator[None, None, None]:
        resource = resource_spans.resource
        if self._pace.full(1 + resource.ByteSize() // BYTES_A_SPAN):
            yield
        if (refusal := self._unfit("resource", resource)) is not None:
            yield from self._whole(resource, resource_spans.scope_spans, refusal)
            return
        for scope_spans in resource_spans.scope_spans:
            scope = scope_spans.scope
            if self._pace.full(1 + scope.ByteSize() // BYTES_A_SPAN):
                yield
            if not scope_spans.spans:
                continue
            if (refusal := self._unfit("scope", scope)) is not None:
                yield from self._whole(resource, [scope_spans], refusal)
                continue
            metered = None if self._metering is None else self._metering.spans(self._tenant, resource, scope)
            for span in scope_spans.spans:
                if self._pace.full(1 + span.ByteSize() // BYTES_A_SPAN):
                    yield
                self._span(resource, span, metered)

    def _unfit(self, what: str, message: Resource | InstrumentationScope) -> Refusal | None:
        if self._kept:
            return None
        read = resource_of if what == "resource" else scope_of
        return why_whole(what, message.SerializeToString(), lambda data: read(data, self._redaction).refusal)

    def _span(self, resource: Resource, span: Span, metered: SpanGroup | None) -> None:
        decoded = self._decoded
        rejected = decoded.rejected
        is_usage = metered is not None and metered.decode(span, self._window, decoded)
        is_evidence = _decode_span(self._tenant, resource, span, self._window, decoded, self._redaction)
        decoded.rejected = min(decoded.rejected, rejected + 1)
        if not (is_usage or is_evidence):
            decoded.pass_over(span.name)

    def _whole(self, resource: Resource, scopes: Sequence[ScopeSpans], refusal: Refusal) -> Generator[None, None, None]:
        """Keeps what may be usage or evidence as one item, as it came: many would be as many copies of what is too
        large."""
        request = ExportTraceServiceRequest()
        kept = request.resource_spans.add(resource=resource)
        latest = number = 0
        for scope_spans in scopes:
            usage = []
            for span in scope_spans.spans:
                if self._pace.full(1 + span.ByteSize() // BYTES_A_SPAN):
                    yield
                if _carriers(span) or (
                    self._metering is not None and self._metering.names_span(self._tenant, span.name)
                ):
                    usage.append(span)
                    latest = max(latest, span.end_time_unix_nano)
                else:
                    self._decoded.pass_over(span.name)
            if usage:
                number += len(usage)
                within = kept.scope_spans.add(spans=usage)
                if scope_spans.HasField("scope"):
                    within.scope.CopyFrom(scope_spans.scope)
        if number:
            item = Quarantined(self._tenant, "", "", latest, refusal, "traces", request.SerializeToString())
            self._decoded.keep([item])
            self._decoded.rejected += number


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
