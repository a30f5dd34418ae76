"""Inputs against the decoder: nothing but MalformedRequest may come out, and what comes out has to hold together."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tallymark import conventions
from tallymark_collector.errors import MalformedRequest, TooLarge
from tallymark_collector.model import (
    Evidence,
    Origin,
    Point,
    Quarantined,
    Reason,
    Stream,
    Temporality,
    attributes_json,
    fingerprint,
)
from tallymark_collector.processors import control, validation
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.spans import DecodedSpans, decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.quarantine import mending
from tallymark_collector.wire import otlp_json, parse_metrics
from tests.delivery.fuzz.corpus import MESSAGES, NOW
from tests.delivery.fuzz.mutation import Input
from tests.delivery.fuzz.totals import whole_totals
from tests.delivery.fuzz.wire_format import Census, census

TENANT: Final = "default"
LIMITS: Final = validation.TimeLimits()
_KINDS: Final = ("gauge", "sum", "histogram", "exponential_histogram", "summary")


class Broken(AssertionError):  # noqa: N818 - a promise
    """Something that must never be."""


def hold(condition: object, what: str, *particulars: object) -> None:
    """Raises Broken where the condition does not hold."""
    if not condition:
        raise Broken(": ".join([what, *(repr(one)[:400] for one in particulars)]))


class Decoder:
    """Decodes inputs, and compares what comes out with itself and with counts of our own."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        # Small, so that it is full and forgotten many times.
        self._shared = StreamCache(limit=3000)
        self._checked: set[Origin] = set()

    def take(self, given: Input) -> None:
        """Raises whatever the decoder raises beside its own refusals, and Broken."""
        self.counts["inputs"] += 1
        try:
            body = protobuf_of(given)
        except (MalformedRequest, TooLarge) as error:
            self._refused(error)
            return None
        if given.signal == "logs":
            return self._count_logs(body)
        try:
            found = self._metrics(body) if given.signal == "metrics" else self._traces(body)
        except MalformedRequest as error:
            self._refused(error)
            return None
        self.counts["accepted"] += 1
        self.counts["quarantined"] += len(found.quarantined)
        for item in found.quarantined:
            check_quarantined(item)
        return None

    def _refused(self, error: Exception) -> None:
        self.counts["refused"] += 1
        str(error).encode()  # it is sent to the client

    def _count_logs(self, body: bytes) -> None:
        try:
            MESSAGES["logs"].FromString(body)
        except DecodeError:
            self.counts["refused"] += 1
        else:
            self.counts["accepted"] += 1

    def _metrics(self, body: bytes) -> Decoded:
        cache = StreamCache()
        found = decode_metrics(TENANT, body, cache, LIMITS, NOW)
        hold(same(found, decode_metrics(TENANT, body, cache, LIMITS, NOW)), "what is known is read otherwise")
        hold(same(found, decode_metrics(TENANT, body, self._shared, LIMITS, NOW)), "what others sent changes it")
        for point in found.points:
            check_point(point)
            if point.stream.origin not in self._checked:
                if len(self._checked) > 3000:
                    self._checked.clear()
                self._checked.add(point.stream.origin)
                check_stream(point.stream)
        self.counts["points"] += len(found.points)
        counted = census(body)
        if counted.repeated:
            self.counts["a message that can be there once is there twice"] += 1
            return found
        check_counted(body, counted, found)
        return found

    def _traces(self, body: bytes) -> DecodedSpans:
        found = decode_spans(TENANT, body, LIMITS, NOW)
        again = decode_spans(TENANT, body, LIMITS, NOW)
        # A NaN among the attributes is not equal to itself.
        hold(found == again or repr(found) == repr(again), "the second reading is another")
        for item in found.evidence:
            check_evidence(item)
        self.counts["evidence"] += len(found.evidence)
        check_spans(body, found)
        return found


def protobuf_of(given: Input) -> bytes:
    """The input in protobuf. Raises MalformedRequest, TooLarge."""
    if given.media == "protobuf":
        return given.body
    return otlp_json.to_protobuf(given.body, MESSAGES[given.signal], 4_000_000)


def same(one: Decoded, other: Decoded) -> bool:
    """Whether two readings come to the same, streams compared by what they are."""
    return (
        len(one.points) == len(other.points)
        and all(map(_same_point, one.points, other.points))
        and one.quarantined == other.quarantined
        and one.controls == other.controls
        and one.closings == other.closings
        and one.counts == other.counts
        and (one.rejected, one.unmatched) == (other.rejected, other.unmatched)
    )


def _same_point(one: Point, other: Point) -> bool:
    if one[1:] != other[1:]:
        return False
    first, second = one.stream, other.stream
    if first is second:
        return True
    return (
        (first.id, first.series.id, first.temporality) == (second.id, second.series.id, second.temporality)
        and first.scope_name == second.scope_name
        # A NaN among the attributes is not equal to itself.
        and (first.resource == second.resource or fingerprint(first.resource) == fingerprint(second.resource))
    )


def check_point(point: Point) -> None:
    """What the store relies on."""
    stream, start_ns, time_ns, value, *_ = point
    _check_quantity(abs(value) if stream.temporality is Temporality.LEVEL else value)
    _check_times(start_ns, time_ns)


def check_stream(stream: Stream) -> None:
    """Likewise, of what its points share."""
    series = stream.series
    _check_text("account", series.account, validation.MAX_ACCOUNT_LENGTH)
    _check_text("meter", series.meter, validation.MAX_METER_LENGTH)
    hold("\0" not in series.unit and len(series.unit) <= validation.MAX_UNIT_LENGTH, "unit", series.unit)
    for attributes in (series.attributes, stream.resource):
        text = attributes_json(attributes)
        hold("\\u0000" not in text, "NUL in what becomes jsonb", text)
        json.loads(text, parse_constant=_no_constant)


def check_evidence(item: Evidence) -> None:
    """Likewise."""
    hold(item.quantity >= 0 and item.quantity.is_finite(), "quantity", item.quantity)
    _check_times(item.start_ns, item.time_ns)
    _check_text("account", item.account, validation.MAX_ACCOUNT_LENGTH)
    _check_text("meter", item.meter, validation.MAX_METER_LENGTH)
    for text in (item.name, item.service, item.user or ""):
        hold("\0" not in text, "NUL", text)
        text.encode()
    json.loads(attributes_json(item.attributes), parse_constant=_no_constant)


def _check_quantity(value: Decimal) -> None:
    hold(type(value) is Decimal and value.is_finite() and value >= 0, "quantity", value)
    exponent = value.as_tuple().exponent
    hold(value < 10**validation.MAX_WHOLE_DIGITS, "digits before the point", value)
    hold(isinstance(exponent, int) and exponent >= -conventions.MAX_DECIMALS, "digits behind the point", value)


def _check_times(start_ns: int, time_ns: int) -> None:
    oldest, latest = LIMITS.window(NOW)
    hold(0 <= start_ns <= time_ns and oldest <= time_ns <= latest, "times", start_ns, time_ns)


def _check_text(what: str, text: str, most: int) -> None:
    hold(type(text) is str and 0 < len(text) <= most and "\0" not in text, what, text)
    text.encode()


def _no_constant(name: str) -> None:
    raise Broken(f"{name} is no JSON")


def check_counted(body: bytes, counted: Census, found: Decoded) -> None:
    """Every point that was sent is a point, is refused, or is known to be nothing that is billed."""
    try:
        request = ExportMetricsServiceRequest.FromString(body)
    except DecodeError:
        pass  # where attributes cannot be read only their points are refused
    else:
        official = sum(
            len(getattr(metric, metric.WhichOneof("data")).data_points)
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.WhichOneof("data") in _KINDS
        )
        unread = counted.points - official
        hold(unread == 0 or counted.control, "we count other points than protobuf", counted, official)
    told = control_points(found, body)
    whole = [item for item in found.quarantined if item.refusal.reason is Reason.RESOURCE_TOO_LARGE]
    of_control = [item for item in found.quarantined if _scope_of(item) == conventions.CONTROL_SCOPE]
    kept = sum(census(item.payload).control for item in whole)
    kept += sum(item.refusal.reason is not Reason.RESOURCE_TOO_LARGE for item in of_control)
    hold(told + kept == counted.control, "control points", told, kept, counted)
    refused = found.rejected - kept
    hold(
        len(found.points) + refused == counted.usage + counted.kept_aside, "points", len(found.points), refused, counted
    )


def control_points(found: Decoded, body: bytes) -> int:
    """How many control points of a request became totals, ends and counts; the totals are added up again."""
    sizes = whole_totals(body) if found.controls else {}
    parts = 0
    for told in found.controls:
        key = (told.origin.resource, told.meter, told.unit, told.start_ns, told.time_ns, Fraction(told.total))
        hold(sizes.get(key), "a total that nobody sent", told, sizes)
        parts += sizes[key].pop(0)
    return parts + len(found.closings) + len(found.counts)


def _scope_of(item: Quarantined) -> str:
    if item.signal != "metrics":
        return ""
    scopes = [s.scope for r in parse_metrics(item.payload).resource_metrics for s in r.scope_metrics]
    return StreamCache().scope_name(scopes[0]) if scopes else ""


def check_quarantined(item: Quarantined) -> None:
    """What is kept can be read again, comes to the same refusal, and a person's decisions find their way into it."""
    item.refusal.detail.encode()
    mended = mending.mend(item.signal, item.payload, _GIVEN_AWAY)
    mending.mend(item.signal, item.payload, _DROPPED)
    if item.signal == "traces":
        spans = decode_spans(TENANT, item.payload, LIMITS, NOW)
        hold(item in spans.quarantined, "another refusal the second time", item, spans)
        return
    again = decode_metrics(TENANT, item.payload, StreamCache(), LIMITS, NOW)
    hold(not again.points, "refused, and billed the second time", item)
    if _scope_of(item) == conventions.CONTROL_SCOPE:
        return  # one part of a total is refused for another reason than two that contradict each other
    if not again.quarantined:
        # Under a foreign scope a metric is usage for what its other points say.
        alone = census(item.payload)
        hold(alone.usage + alone.kept_aside == 0, "it is lost the second time", item)
        again = decode_metrics(TENANT, mended.payload, StreamCache(), LIMITS, NOW)
        hold(len(again.points) + len(again.quarantined) == 1, "it is lost with an account", item, again)
    else:
        hold(again.quarantined == [item], "another refusal the second time", item, again.quarantined)
    with suppress(MalformedRequest):  # where resource or attributes cannot be read
        mending.named_account(item.payload)
    with suppress(MalformedRequest):
        for _ in control.quarantined_usage(item.payload, TENANT):
            pass


_GIVEN_AWAY: Final = mending.Decision(account="acme")
_DROPPED: Final = mending.Decision(drop=("http.route",), start_is_end=True)


def check_spans(body: bytes, found: DecodedSpans) -> None:
    """Every span that carries usage is evidence or refused; what is said twice is added up exactly."""
    spans = usage = 0
    expected: set[tuple[bytes, bytes]] = set()
    carrying: list[tuple[Span, Iterable[KeyValue]]] = []
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                spans += 1
                carriers = [span.attributes, *(e.attributes for e in span.events if e.name == conventions.USAGE_EVENT)]
                if any(one.key.startswith(conventions.METER_PREFIX) for items in carriers for one in items):
                    usage += 1
                    expected.add((span.trace_id, span.span_id))
                    carrying += [(span, items) for items in carriers]
    hold(spans == usage + found.unmatched, "spans", spans, usage, found.unmatched)
    known = {(item.trace_id, item.span_id) for item in found.evidence}
    for item in found.quarantined:
        [kept] = ExportTraceServiceRequest.FromString(item.payload).resource_spans
        known |= {(span.trace_id, span.span_id) for scope in kept.scope_spans for span in scope.spans}
    hold(known == expected, "spans that are neither evidence nor refused", known, expected)
    if not found.quarantined and usage == len(expected):
        said: dict[tuple[object, ...], Fraction] = defaultdict(Fraction)
        for span, items in carrying:
            for key, quantity in _said(span, items).items():
                said[key] += quantity
        shown = {(i.trace_id, i.span_id, i.account, i.meter): Fraction(i.quantity) for i in found.evidence}
        hold(shown == said, "evidence is not what the spans say", shown, said)


def _said(span: Span, items: Iterable[KeyValue]) -> dict[tuple[object, ...], Fraction]:
    """What one carrier of a span says, all of which can be read."""
    values = {item.key: item.value for item in items}
    account = values.get(conventions.ACCOUNT, AnyValue())
    name = account.string_value if account.HasField("string_value") else str(account.int_value)
    found = {}
    for key, value in values.items():
        if key.startswith(conventions.METER_PREFIX):
            text = str(getattr(value, value.WhichOneof("value")))
            found[span.trace_id, span.span_id, name, key.removeprefix(conventions.METER_PREFIX)] = Fraction(
                Decimal(text)
            )
    return found
