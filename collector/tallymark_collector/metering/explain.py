"""What captured telemetry would bill, item by item, and why the rest would not.

Every point and span goes alone through the decoder that `serve` uses, so that what comes out is that item's. Why one
did not count is then asked of the rules. At the end cumulative totals become increases, as the store makes them.

By their own names usage is what `serve` takes for it once it has seen these files: whether a point names nobody does
not depend on which metric or request it stands in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering.captured import Captured, items, latest, named
from tallymark_collector.metering.conditions import failing
from tallymark_collector.metering.engine import Metering, why_not_group
from tallymark_collector.metering.kinds import fits, mismatch
from tallymark_collector.metering.origin import Group
from tallymark_collector.metering.rules import MetricSource, Rules, SpanSource
from tallymark_collector.metering.spans import recorded_meters, why_not_span
from tallymark_collector.model import Attributes, Point, Quarantined, Source, Stream, Temporality
from tallymark_collector.processors.aside import redacted_item
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.levels import Told, succeed
from tallymark_collector.processors.meters import Meter
from tallymark_collector.processors.redaction import STANDARD
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.temporality import increases
from tallymark_collector.processors.validation import TimeLimits

TENANT = "default"


class Item(NamedTuple):
    """One point or span, and what one meter makes of it."""

    place: str
    signal: str
    name: str
    outcome: str
    """counted, level (what a stream stands at, which is no amount), base (a total that bills nothing, from which later
    ones count), quarantined, evidence (it shows usage that the SDK counts in metrics), or passed over."""
    meter: str = ""
    account: str = ""
    quantity: Decimal | None = None
    """What is counted; of a cumulative metric its total, of which the increase is billed; a level."""
    why: str = ""


class Line(NamedTuple):
    """What an account would be billed of a meter."""

    meter: str
    unit: str
    account: str
    quantity: Decimal
    points: int


class Standing(NamedTuple):
    """What an account stands at, of a meter of levels, by the last that each stream told."""

    meter: str
    unit: str
    account: str
    level: Decimal
    streams: int
    points: int
    """Of all that they told."""


class Whole(NamedTuple):
    """The first totals of a meter's streams, where they are billed as they are."""

    meter: str
    streams: int
    quantity: Decimal
    oldest: int
    """When the first of them began to count, in nanoseconds since the Unix epoch."""


@dataclass(slots=True)
class Explained:
    """Everything about the captured files."""

    items: list[Item] = field(default_factory=list)
    usage: list[Line] = field(default_factory=list)
    levels: list[Standing] = field(default_factory=list)
    duplicates: int = 0
    """Points that were there before, under the same identity."""
    whole: list[Whole] = field(default_factory=list)
    """Running totals of which everything is billed that they had counted before they were first seen."""

    @property
    def quarantined(self) -> list[Item]:
        """What could not be billed as it is."""
        return [item for item in self.items if item.outcome == "quarantined"]


def explain(rules: Rules, captured: Iterable[Captured], tenant: str = TENANT) -> Explained:
    """What the requests would bill with these rules, as if they arrived from this tenant at the latest time in them."""
    requests = list(captured)
    decoding = _Decoding(tenant, Metering(rules), max(map(latest, requests), default=0), named(requests))
    found = Explained()
    points: list[tuple[Item, Point]] = []
    for one in requests:
        for name, request in items(one):
            for made, point in decoding.explained(one, STANDARD.text(name), request):
                if point is None:
                    found.items.append(made)
                else:
                    points.append((made, point))
    _add_up([one for one in points if one[1].stream.temporality is not Temporality.LEVEL], found)
    _stand([one for one in points if one[1].stream.temporality is Temporality.LEVEL], found)
    order = {"quarantined": 0, "counted": 1, "level": 2, "base": 3, "evidence": 4, "passed over": 5}
    found.items.sort(key=lambda item: order[item.outcome])
    return found


class _Decoding:
    """The decoders that `serve` uses, with what they take."""

    def __init__(self, tenant: str, metering: Metering, latest: int, known: Container[Meter]) -> None:
        self._tenant = tenant
        self._metering = metering
        self._latest = latest
        self._known = known
        self._cache = StreamCache()

    def explained(self, one: Captured, name: str, request: Any) -> Iterator[tuple[Item, Point | None]]:
        """What each meter makes of a request's only item."""
        if request is None:
            yield Item(one.place, one.signal, name, "passed over", why="logs are no usage"), None
            return
        body = request.SerializeToString()
        made: list[tuple[Item, Point | None]] = []
        quarantined: list[Quarantined]
        if one.signal == "metrics":
            how = (self._cache, TimeLimits(), self._latest, self._metering, self._known)
            decoded = decode_metrics(self._tenant, body, *how)
            points, quarantined = decoded.points, decoded.quarantined
            if decoded.controls or decoded.closings or decoded.counts:
                made.append((Item(one.place, one.signal, name, "passed over", why="control data of the SDK"), None))
        else:
            spans = decode_spans(self._tenant, body, TimeLimits(), self._latest, self._metering)
            points, quarantined = spans.points, spans.quarantined
            billed = {point.stream.series.meter for point in points}
            why = "the SDK counts it"
            made += [
                (Item(one.place, one.signal, name, "evidence", e.meter, e.account, e.quantity, why), None)
                for e in spans.evidence
                if e.meter not in billed
            ]
        for point in points:
            series = point.stream.series
            item = Item(one.place, one.signal, name, "counted", series.meter, series.account, point.value)
            made.append((item, point))
        for refused in quarantined:
            reason, detail = redacted_item(STANDARD, refused).refusal
            why = f"{reason.value}: {detail}"
            item = Item(one.place, one.signal, name, "quarantined", refused.meter, refused.account, None, why)
            made.append((item, None))
        if not made:
            why = _why(self._metering.rules, request, self._tenant)
            made.append((Item(one.place, one.signal, name, "passed over", why=why), None))
        yield from made


def _add_up(points: list[tuple[Item, Point]], found: Explained) -> None:
    """Deltas once each, and the increases of totals, as the store would."""
    known: dict[object, Decimal] = {}
    totals: dict[tuple[object, int], list[tuple[Item, Point]]] = defaultdict(list)
    sums: dict[tuple[str, str, str], list[Decimal]] = defaultdict(list)

    def count(stream: Stream, value: Decimal) -> None:
        series = stream.series
        sums[series.meter, series.unit, series.account].append(value)

    for item, point in points:
        if point.stream.temporality is Temporality.CUMULATIVE:
            source = point.stream.source
            totals[(point.stream.id if source is None else source.id, point.start_ns)].append((item, point))
            continue
        key = (point.stream.id, *point[1:3], point.cause)
        if key not in known:
            known[key] = point.value
            count(point.stream, point.value)
            found.items.append(item)
        elif known[key] == point.value:
            found.duplicates += 1
        else:
            why = f"value_conflict: {known[key]} was there before for the same stream and interval"
            found.items.append(item._replace(outcome="quarantined", why=why))
    wholes: dict[str, list[Point]] = defaultdict(list)
    for (_, start_ns), several in totals.items():
        first = min((point for _, point in several), key=lambda point: point.time_ns)
        result = increases(start_ns, (), [point for _, point in several])
        refused = {id(point): refusal for point, refusal in result.refused}
        found.duplicates += result.duplicates
        for item, point in several:
            if id(point) in refused:
                reason, detail = refused[id(point)]
                found.items.append(item._replace(outcome="quarantined", why=f"{reason.value}: {detail}"))
            else:
                billed = any(one.time_ns == point.time_ns for one in result.points)
                found.items.append(_as_total(item, point, first=point.time_ns == first.time_ns, billed=billed))
        for point in result.points:
            count(point.stream, point.value)
            if first.stream.source is not None and point.start_ns == start_ns and point.time_ns == first.time_ns:
                wholes[point.stream.series.meter].append(point)
    found.whole = [
        Whole(meter, len(points), sum((p.value for p in points), Decimal(0)), min(p.start_ns for p in points))
        for meter, points in sorted(wholes.items())
    ]
    found.usage = [Line(*key, sum(values, Decimal(0)), len(values)) for key, values in sorted(sums.items())]


def _stand(points: list[tuple[Item, Point]], found: Explained) -> None:
    """Levels, each once, and what accounts stand at in the end, as the store has it."""
    sources: dict[UUID, list[tuple[int, Point]]] = defaultdict(list)
    for position, (_, level) in enumerate(points):
        # One that names its account by itself needs no file: its stream is its own.
        stream = level.stream
        source = stream.source or Source(stream.id, Decimal(1))
        sources[source.id].append((position, level._replace(stream=replace(stream, source=source))))
    last: dict[tuple[str, str, str], list[Decimal]] = defaultdict(list)
    told: Counter[tuple[str, str, str]] = Counter()
    for several in sources.values():
        timeline: list[Told] = []
        there = succeed(timeline, several).there
        for position, _ in several:
            item, value = points[position]
            if position not in there:
                found.items.append(item._replace(outcome="level", why="what its stream stands at from then on"))
            elif there[position] == value.value:
                found.duplicates += 1
            else:
                why = f"value_conflict: its stream stood at {there[position]} at this time before"
                found.items.append(item._replace(outcome="quarantined", why=why))
        told.update(map(_key, timeline))
        last[_key(timeline[-1])].append(timeline[-1].value)
    found.levels = [Standing(*key, sum(last[key], Decimal(0)), len(last[key]), told[key]) for key in sorted(told)]


def _key(told: Told) -> tuple[str, str, str]:
    series = told.stream.series
    return series.meter, series.unit, series.account


def _as_total(item: Item, point: Point, *, first: bool, billed: bool) -> Item:
    source, start_ns = point.stream.source, point.start_ns
    if point.is_base:
        return item._replace(outcome="base", why="it is from before `since`: what comes later counts from it")
    if not first:
        return item._replace(why="total, its increase is billed")
    rest = "what it has counted is not billed, later totals count from it"
    if source is not None and start_ns < source.since_ns:
        return item._replace(
            outcome="base", why=f"the first total that is seen of a stream that began before `since`: {rest}"
        )
    if point.value and not billed:
        return item._replace(outcome="base", why=f"the first total of a stream that does not say its start: {rest}")
    return item._replace(why="the first total that is seen of its stream, all of it is billed")


def _why(rules: Rules, request: Any, tenant: str) -> str:
    """Why none of the rules takes a request's only item: of the rule that came closest."""
    if isinstance(request, ExportMetricsServiceRequest):
        return _why_metric(rules, request, tenant)
    return _why_span(rules, request, tenant)


def _why_metric(rules: Rules, request: ExportMetricsServiceRequest, tenant: str) -> str:
    outer = request.resource_metrics[0]
    [metric] = outer.scope_metrics[0].metrics
    group = _group(tenant, outer.resource, outer.scope_metrics[0].scope)
    kind = wire.kind_of(metric)
    reasons = []
    for name, meter, place, source in rules.sources(MetricSource):
        if not source.metric.matches(metric.name):
            continue
        why = why_not_group(source, group)
        if why is None and not fits(kind, meter, source):
            why = mismatch(kind, meter, source)
        if why is None:
            point = getattr(metric, metric.WhichOneof("data") or "sum").data_points[0]
            why = _why_point(source, _attributes(point.attributes), point.time_unix_nano)
        reasons.append(f"{name}, source {place + 1}: {why}")
    return "; ".join(reasons) or "no source has this name"


def _why_span(rules: Rules, request: ExportTraceServiceRequest, tenant: str) -> str:
    outer = request.resource_spans[0]
    [span] = outer.scope_spans[0].spans
    group = _group(tenant, outer.resource, outer.scope_spans[0].scope)
    reasons = []
    for meter, _, place, source in rules.sources(SpanSource):
        if not source.span.matches(span.name):
            continue
        why = why_not_group(source, group) or why_not_span(source, span)
        if why is None and meter in recorded_meters(span):
            why = "the SDK has counted it"
        if why is None:
            why = _why_point(source, _attributes(span.attributes), span.end_time_unix_nano)
        reasons.append(f"{meter}, source {place + 1}: {why}")
    return "; ".join(reasons) or "no source has this name"


def _why_point(source: MetricSource | SpanSource, attributes: Attributes, time_ns: int) -> str:
    name = failing(source.where, attributes)
    if name is not None:
        return f"{name} is {STANDARD.value(name, attributes.get(name))!r}, not {source.where[name].written}"
    if source.since is not None and time_ns <= source.since:
        return "it is from before `since`"
    return "it carries no value"


def _attributes(items: Any) -> Attributes:
    try:
        return wire.decode_attributes(items)
    except MalformedRequest:
        return Attributes()


def _group(tenant: str, resource: Any, scope: Any) -> Group:
    return Group(
        tenant,
        b"",
        b"",
        _attributes(resource.attributes),
        scope.name,
        scope.version,
        _attributes(scope.attributes),
        None,
    )
