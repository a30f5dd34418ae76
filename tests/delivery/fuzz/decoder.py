"""Inputs against the decoder: nothing but MalformedRequest may come out, and what comes out has to hold together."""

from __future__ import annotations

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
    Origin,
    Quarantined,
    Reason,
)
from tallymark_collector.processors import control
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.spans import DecodedSpans, decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.quarantine import mending
from tallymark_collector.wire import otlp_json, parse_metrics
from tests.delivery.fuzz.by_file import MAX_LOOKED_AT, ByFile
from tests.delivery.fuzz.checks import LIMITS, check_evidence, check_point, check_stream, hold, same
from tests.delivery.fuzz.corpus import MESSAGES, NOW
from tests.delivery.fuzz.mutation import Input, Sent
from tests.delivery.fuzz.totals import whole_totals
from tests.delivery.fuzz.wire_format import Census, census

TENANT: Final = "default"
_KINDS: Final = ("gauge", "sum", "histogram", "exponential_histogram", "summary")


class Decoder:
    """Decodes inputs, and compares what comes out with itself and with counts of our own."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        # Small, so that it is full and forgotten many times.
        self._shared = StreamCache(limit=3000)
        self._checked: set[Origin] = set()
        self._by_file = ByFile()

    @property
    def all_counts(self) -> Counter[str]:
        """With those of what the file of meters has read."""
        return self.counts + self._by_file.counts

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
            found = self._read(given, body)
        except (MalformedRequest, TooLarge) as error:
            hold(
                isinstance(error, MalformedRequest) or (given.sent and given.sent.too_large), "too large", given.damage
            )
            self._refused(error)
            return None
        self.counts["accepted"] += 1
        self.counts["quarantined"] += len(found.quarantined)
        if given.sent is not None:
            self.counts["large"] += 1
            check_sent(given.sent, found)
        for item in found.quarantined[: None if given.sent is None else MAX_LOOKED_AT]:
            if not given.by_file:
                check_quarantined(item)
        return None

    def _read(self, given: Input, body: bytes) -> Decoded | DecodedSpans:
        if given.by_file:
            return self._by_file.take(given, body)
        return self._metrics(body) if given.signal == "metrics" else self._traces(body)

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
    # Of levels an end is a point too, where it says anything: `ended` are all of them.
    ends = sum(point.is_end for point in found.points)
    hold(ends <= counted.ended, "ends that nobody sent", ends, counted)
    points = len(found.points) - ends
    hold(points + refused == counted.usage + counted.kept_aside, "points", points, refused, counted)


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


def check_sent(sent: Sent, found: Decoded | DecodedSpans) -> None:
    """What is known from how an input was made."""
    evidence = len(found.evidence) if isinstance(found, DecodedSpans) else 0
    came = (len(found.points), evidence, found.rejected, len(found.quarantined), found.unmatched)
    hold(came == tuple(sent)[:5] and not sent.too_large, "not what was sent", came, sent)


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
