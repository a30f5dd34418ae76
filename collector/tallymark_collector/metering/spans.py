"""Spans that a file says are usage: each one point, and evidence of itself.

A span is identified by its trace_id and span_id, so it counts once in each meter, however often and in whatever batch
it comes. The points of a service, meter and account share one stream, of which they are instants at the spans' ends;
`Point.cause` holds 64 bits over the two identifiers and tells them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering.amounts import scaled
from tallymark_collector.metering.conditions import failing
from tallymark_collector.metering.memory import Memory
from tallymark_collector.metering.naming import Named, named
from tallymark_collector.metering.origin import Group, Refused, kept
from tallymark_collector.metering.rules import KINDS, STATUSES, Number, SpanSource
from tallymark_collector.metering.sampling import sign_of_sampling
from tallymark_collector.model import (
    Attributes,
    Evidence,
    Origin,
    Point,
    Reason,
    Refusal,
    Series,
    Stream,
    Temporality,
    fingerprint,
)
from tallymark_collector.processors import validation
from tallymark_collector.processors.aside import redact_spans, redacted_span
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.spans import check_ids, evidence_text, read_quantity

if TYPE_CHECKING:
    from tallymark_collector.processors.spans import DecodedSpans

_NANOSECOND: Final = Decimal("1e-9")

Fitting = tuple[str, str, SpanSource]
"""(meter's name, meter's unit, source)"""


class SpanGroup:
    """The spans of one resource and scope."""

    def __init__(
        self, group: Group, sources: Sequence[Fitting], account: str | None, memory: Memory, redaction: Redaction
    ) -> None:
        self._group = group
        self._sources = sources
        self._account = account
        self._memory = memory
        self._redaction = redaction
        self._empty = ExportTraceServiceRequest()
        spans = self._empty.resource_spans.add(resource=Resource.FromString(group.resource)).scope_spans.add()
        spans.scope.ParseFromString(group.scope)
        stored = ExportTraceServiceRequest()
        stored.CopyFrom(self._empty)
        redact_spans(redaction, stored)
        self._envelope = stored.SerializeToString()
        names = (conventions.SERVICE_NAMESPACE, conventions.SERVICE_NAME)
        self._service = Attributes((name, value) for name, value in group.attributes if name in names)
        """What all streams share of the resource, whichever process it was."""
        self._service_sent = Resource(attributes=wire.encode_attributes(self._service)).SerializeToString()

    def decode(self, span: Span, window: tuple[int, int], decoded: DecodedSpans) -> bool:
        """Takes what the file says of a span; False where that is nothing."""
        fitting = [one for one in self._sources if why_not_span(one[2], span) is None]
        if not fitting:
            return False
        try:
            attributes = wire.decode_attributes(span.attributes)
        except MalformedRequest as error:
            broken = Refusal(Reason.ATTRIBUTES_INVALID, str(error))
            self._refuse(
                span, [Refused(meter, "", broken) for meter in dict.fromkeys(one[0] for one in fitting)], decoded
            )
            return True
        refused: list[Refused] = []
        taken = False
        for meter, unit, source in self._counting(span, fitting, attributes):
            made = self._count(span, attributes, meter, unit, source, window)
            if isinstance(made, Refused):
                refused.append(made)
            elif made is not None:
                decoded.points.append(made[0])
                decoded.evidence.append(made[1])
                taken = True
        if refused:
            self._refuse(span, refused, decoded)
        return taken or bool(refused)

    def _counting(self, span: Span, fitting: Sequence[Fitting], attributes: Attributes) -> Iterator[Fitting]:
        """Of each meter the first source that fits."""
        done = set(recorded_meters(span))
        for one in fitting:
            if one[0] not in done and failing(one[2].where, attributes) is None:
                done.add(one[0])
                yield one

    def _count(
        self, span: Span, attributes: Attributes, meter: str, unit: str, source: SpanSource, window: tuple[int, int]
    ) -> tuple[Point, Evidence] | Refused | None:
        group = self._group
        end = span.end_time_unix_nano
        if source.since is not None and 0 < end <= source.since:
            return None
        refusal = group.broken or check_ids(span) or validation.check_times(span.start_time_unix_nano, end, *window)
        if refusal is None and source.sampled is None and (sign := sign_of_sampling(span)) is not None:
            detail = (
                f"{sign}: other spans are missing; bill from a metric, or say `sampled: allow` in the file of meters"
            )
            refusal = Refusal(Reason.SPAN_SAMPLED, detail)
        who = refusal or named(source, attributes, group.attributes, self._account)
        if isinstance(who, Refusal):
            return Refused(meter, "", who)
        quantity = quantity_of(span, attributes, source)
        if isinstance(quantity, Refusal):
            return Refused(meter, who.account, quantity)
        kept_whole = (self._envelope, redacted_span(self._redaction, span))
        point = Point(self._stream(meter, unit, who), end, end, quantity, span_cause(span), kept_whole)
        user = attributes.get(conventions.USER)
        evidence = Evidence(
            tenant=group.tenant,
            account=who.account,
            meter=meter,
            trace_id=span.trace_id,
            span_id=span.span_id,
            start_ns=span.start_time_unix_nano,
            time_ns=end,
            quantity=quantity,
            name=evidence_text(self._redaction.text(span.name)),
            service=evidence_text(group.attributes.get(conventions.SERVICE_NAME) or ""),
            user=None if user is None else evidence_text(self._redaction.text(str(user))),
            attributes=validation.shortened(self._redaction.attributes(attributes.without(conventions.USER))),
            billed=True,
        )
        return point, evidence

    def _stream(self, meter: str, unit: str, who: Named) -> Stream:
        # Written out: as keys of a dictionary 1, 1.0 and True are one, as dimensions they are three.
        key = (self, meter, unit, who.account, repr(who.dimensions))
        if key not in self._memory:
            dimensions = self._redaction.attributes(who.dimensions)
            series = Series(self._group.tenant, who.account, meter, unit, dimensions)
            service = self._service
            identity = fingerprint("metered span", series.tenant, service, series.meter, series.account)
            origin = Origin(self._service_sent, b"", series.meter, series.unit, int(Temporality.DELTA), True, ())
            self._memory[key] = Stream(identity, series, Temporality.DELTA, service, self._group.scope_name, origin)
        return self._memory[key]  # type: ignore[return-value]

    def _refuse(self, span: Span, refused: Sequence[Refused], decoded: DecodedSpans) -> None:
        decoded.rejected += 1
        payload = self._alone(span)
        decoded.keep(kept(self._group.tenant, refused, span.end_time_unix_nano, "traces", payload))

    def _alone(self, span: Span) -> bytes:
        """A request with this one span, resource and scope as they came."""
        alone = ExportTraceServiceRequest()
        alone.CopyFrom(self._empty)
        alone.resource_spans[0].scope_spans[0].spans.append(span)
        return alone.SerializeToString()


def why_not_span(source: SpanSource, span: Span) -> str | None:
    """Why a span is not this source's, whatever its attributes, or None."""
    if not source.span.matches(span.name):
        return f"its name is not {source.span.text}"
    if source.kind and not (1 <= span.kind <= len(KINDS) and KINDS[span.kind - 1] in source.kind):
        return f"its kind is not {' or '.join(source.kind)}"
    code = span.status.code
    if source.status and not (0 <= code < len(STATUSES) and STATUSES[code] in source.status):
        return f"its status is not {' or '.join(source.status)}"
    return None


def recorded_meters(span: Span) -> Iterator[str]:
    """Meters whose usage the SDK has written on the span: it counts that by itself, in metrics."""
    carriers = [span.attributes, *(event.attributes for event in span.events if event.name == conventions.USAGE_EVENT)]
    for items in carriers:
        for item in items:
            if item.key.startswith(conventions.METER_PREFIX):
                yield item.key.removeprefix(conventions.METER_PREFIX)


def quantity_of(span: Span, attributes: Attributes, source: SpanSource) -> Decimal | Refusal:
    """How much a span is of its meter."""
    if source.quantity == "spans":
        value: Decimal | Refusal = Decimal(1)
    elif source.quantity == "duration":
        value = (span.end_time_unix_nano - span.start_time_unix_nano) * _NANOSECOND
    else:
        assert isinstance(source.quantity, Number), "the file has no other quantity"
        name = source.quantity.attribute
        written = attributes.get(name)
        if written is None:
            detail = f"the span has no {name}; if such spans use nothing, add `where: {{{name}: {{present: true}}}}`"
            return Refusal(Reason.VALUE_MISSING, detail)
        value = read_quantity(written)
    if isinstance(value, Refusal):
        return value
    value = scaled(value, source.by)
    return validation.check_quantity(value) or value


def span_cause(span: Span) -> int:
    """64 bits over what identifies a span, never 0."""
    digest = hashlib.blake2b(span.trace_id + span.span_id, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1
