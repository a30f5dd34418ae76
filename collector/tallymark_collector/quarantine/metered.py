"""Items that a file of meters made of other people's telemetry: read again with such a file, for their own meter alone.
Plain functions: value in, value out.

The identity of what comes of it is the one that `serve` with the same file would give: a point that is released may
come again, and is a duplicate then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering.captured import Captured
from tallymark_collector.metering.conditions import Condition, failing
from tallymark_collector.metering.engine import why_not_group
from tallymark_collector.metering.explain import Item as Explained
from tallymark_collector.metering.explain import explain
from tallymark_collector.metering.kept import decode_kept
from tallymark_collector.metering.naming import account_of
from tallymark_collector.metering.origin import Group
from tallymark_collector.metering.rules import Rules, SpanSource
from tallymark_collector.metering.spans import why_not_span
from tallymark_collector.model import Attributes, Batch, Evidence, Point, Reason, Refusal, Temporality
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.secret_texts import REDACTED
from tallymark_collector.processors.sent import Came, Sent, mark_of_metered, origin_of_metered, source_of
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.quarantine.items import ID_SHOWN, Item
from tallymark_collector.quarantine.mending import Decision, Mended, shown

_START: Final = "start_time_unix_nano"


class Metered(NamedTuple):
    """What an item comes to."""

    point: Point
    evidence: Sequence[Evidence]
    origin: Came
    changed: dict[str, tuple[str | None, str | None]]
    apart: bool
    """True if it is no longer what was sent, so that it needs an identity of its own."""


def read_metered(
    item: Item,
    decision: Decision,
    rules: Rules | None,
    limits: TimeLimits,
    now_ns: int,
    redaction: Redaction = STANDARD,
) -> Metered | str:
    """The one point of an item's meter, or a sentence that says why there is none. Raises MalformedRequest."""
    if rules is None:
        return (
            f"a file of meters made it usage of meter {item.meter!r}: give that file, --meters FILE (TALLYMARK_METERS)"
        )
    if decision.account is not None and (named := item.account or _named_account(item, rules)):
        return f"it names account {named!r} itself: its usage cannot become another's"
    if (name := _asked_of_redacted(item, rules)) is not None:
        return (
            f"{rules.file} asks for {name}, which was redacted: nobody knows any more which source it fits."
            " Discard it, and charge it otherwise"
        )
    mended = mend(item, decision)
    batch = decode(item, mended.payload, rules, decision.account, limits, now_ns, redaction)
    if batch.quarantined:
        return _still(item, batch.quarantined[0].refusal)
    if not batch.points:
        return _not_named(item, rules)
    if len(batch.points) > 1:
        return f"there are {len(batch.points)} points in it, and each is a decision of its own"
    [point] = batch.points
    if item.signal == "traces" and _START in mended.changed and not point.value:
        return "it starts after it ends, so nobody knows how much it is: discard it"
    changed = dict(mended.changed)
    if decision.account is not None:
        changed[conventions.ACCOUNT] = (None, decision.account)
    # A span is what its identifiers say, whatever is left out of it; and a level means its time alone.
    is_level = point.stream.temporality is Temporality.LEVEL
    left_out = mended.changed.keys() - {_START} if is_level else mended.changed.keys()
    apart = item.signal == "metrics" and (bool(left_out) or decision.additional)
    if is_level:
        point = _decided(point)
    return Metered(point, batch.evidence, origin(item), changed, apart)


def decode(
    item: Item,
    payload: bytes,
    rules: Rules,
    account: str | None,
    limits: TimeLimits,
    now_ns: int,
    redaction: Redaction = STANDARD,
) -> Batch:
    """What the file makes of a payload for the item's meter. Raises MalformedRequest."""
    sent = mark_of_metered(item.signal, payload)
    try:
        found = decode_kept(
            item.tenant,
            item.signal,
            item.meter,
            payload,
            rules=rules,
            # Where the account stood may be redacted: whom it named is known.
            account=account or item.account or None,
            limits=limits,
            now_ns=now_ns,
            redaction=redaction,
        )
    except DecodeError as error:
        raise MalformedRequest(str(error)) from None
    # A metric that the file has forgotten might be a meter by its own name: it was never meant as that.
    return Batch(
        points=[
            _as_sent(point, sent, account)
            for point in found.points
            # A base bills nothing; but one that the limit kept out is what later totals count from.
            if point.metered and (not point.is_base or item.reason == Reason.STREAMS_LIMITED.value)
        ],
        evidence=found.evidence,
        quarantined=[one for one in found.quarantined if one.metered],
    )


def _as_sent(point: Point, sent: Sent | None, account: str | None) -> Point:
    """The point in the stream that it was sent for: what is left of a redacted one tells another."""
    if sent is None:
        return point
    source = point.stream.source
    if source is not None and sent.source is not None:
        reading = point.stream.origin.reading
        assert reading is not None, "a source's points are read by a file of meters"
        is_increase = point.stream.temporality is Temporality.DELTA
        # What the file reads of it by now may be another number.
        whose = sent.source if is_increase else source_of(sent.source, reading.quantity)
        source = source._replace(id=whose, earlier=None)
    identity = point.stream.id if sent.stream is None or account is not None else sent.stream
    return point._replace(stream=replace(point.stream, id=identity, source=source))


def _decided(level: Point) -> Point:
    """A level that is whose a person says, whatever the time around it was billed as."""
    source = level.stream.source
    assert source is not None, "a file of meters took it"
    return level._replace(stream=replace(level.stream, source=source._replace(decided=True)))


def explained(item: Item, rules: Rules) -> list[Explained]:
    """What each meter of a file would make of the item's payload, and why. Raises MalformedRequest."""
    captured = Captured(item.id[:ID_SHOWN], item.signal, _request(item.signal, item.payload))
    return explain(rules, [captured], item.tenant).items


def mend(item: Item, decision: Decision) -> Mended:
    """The payload less what a person left out. Raises MalformedRequest."""
    request = _request(item.signal, item.payload)
    changed: dict[str, tuple[str | None, str | None]] = {}
    drop = {*decision.drop}
    if decision.account is not None:
        drop.add(conventions.OVERFLOW)
    for one in _items(request):
        for attribute in [each for each in one.attributes if each.key in drop]:
            changed[attribute.key] = (shown(attribute), None)
            one.attributes.remove(attribute)
        end = one.end_time_unix_nano if item.signal == "traces" else one.time_unix_nano
        if decision.start_is_end and one.start_time_unix_nano > end:
            changed[_START] = (str(one.start_time_unix_nano), str(end))
            one.start_time_unix_nano = end
    return Mended(request.SerializeToString() if changed else item.payload, changed)


def origin(item: Item) -> Came:
    """Who the item was when it came, for its meter: a span by its identifiers, a point by the stream that it came from
    and its times. Raises MalformedRequest."""
    return origin_of_metered(item.tenant, item.meter, item.signal, item.payload, kept=True)


def _request(signal: str, payload: bytes) -> ExportMetricsServiceRequest | ExportTraceServiceRequest:
    message = ExportTraceServiceRequest if signal == "traces" else ExportMetricsServiceRequest
    try:
        return message.FromString(payload)
    except DecodeError as error:
        raise MalformedRequest(str(error)) from None


def _items(request: Any) -> list[Any]:
    """Its data points or spans."""
    if isinstance(request, ExportTraceServiceRequest):
        return [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
    metrics = [m for resource in request.resource_metrics for scope in resource.scope_metrics for m in scope.metrics]
    return [point for m in metrics if (kind := m.WhichOneof("data")) for point in getattr(m, kind).data_points]


def _only(request: Any) -> Any:
    found = _items(request)
    if len(found) != 1:
        raise MalformedRequest(f"there are {len(found)} points or spans in it, and each is a decision of its own")
    return found[0]


def _attributes(items: Any) -> Attributes | bytes:
    try:
        return wire.decode_attributes(items)
    except MalformedRequest:
        return b"".join(sorted(item.SerializeToString() for item in items))


def _named_account(item: Item, rules: Rules) -> str | None:
    """The account that the item as it came names for its meter, whatever else is wrong with it: by the first source
    that fits it. None where that is nobody, or its attributes cannot be read. Raises MalformedRequest."""
    request = _request(item.signal, item.payload)
    one = _only(request)
    if isinstance(request, ExportTraceServiceRequest):
        outer: Any = request.resource_spans[0]
        scope, name = outer.scope_spans[0].scope, one.name
    else:
        outer = request.resource_metrics[0]
        scope, name = outer.scope_metrics[0].scope, outer.scope_metrics[0].metrics[0].name
    resource, own, more = map(_attributes, (outer.resource.attributes, one.attributes, scope.attributes))
    if isinstance(resource, bytes) or isinstance(own, bytes) or isinstance(more, bytes):
        return None
    group = Group(item.tenant, b"", b"", resource, scope.name, scope.version, more, None)
    for source in rules.meters[item.meter].sources if item.meter in rules.meters else ():
        if isinstance(source, SpanSource) is not (item.signal == "traces") or why_not_group(source, group) is not None:
            continue
        asked = source.span if isinstance(source, SpanSource) else source.metric
        other = isinstance(source, SpanSource) and why_not_span(source, one) is not None
        if asked.matches(name) and not other and failing(source.where, own) is None:
            account = account_of(source.account, own, resource)
            return account if isinstance(account, str) else None
    return None


def _asked_of_redacted(item: Item, rules: Rules) -> str | None:
    """An attribute of the item, or of its resource, that a source of its meter and tenant asks for and of which
    something was redacted."""
    request: Any = _request(item.signal, item.payload)
    one = _only(request)
    outer = request.resource_spans[0] if item.signal == "traces" else request.resource_metrics[0]
    meter = rules.meters.get(item.meter)
    sources = [] if meter is None else [source for source in meter.sources if source.is_of(item.tenant)]
    for attributes, asked in (
        (one.attributes, [source.where for source in sources]),
        (outer.resource.attributes, [source.resource for source in sources]),
    ):
        redacted = {each.key for each in attributes if REDACTED.encode() in each.value.SerializeToString()}
        for name, of in (pair for conditions in asked for pair in conditions.items()):
            # That it is there still holds.
            if name in redacted and replace(of, present=None) != Condition():
                return name
    return None


def _still(item: Item, refusal: Refusal) -> str:
    hint = {
        Reason.TIME_AHEAD: " (or --force)",
        Reason.ACCOUNT_MISSING: f" (`tallymark quarantine attribute {item.id[:ID_SHOWN]} --account ACCOUNT`)",
    }.get(refusal.reason, "")
    return f"it stays in quarantine: {refusal.reason.value}: {refusal.detail}{hint}"


def _not_named(item: Item, rules: Rules) -> str:
    if item.meter not in rules.meters:
        return f"{rules.file} has no meter {item.meter!r}: give the file that made it usage"
    said = "; ".join(one.why for one in explained(item, rules) if one.outcome == "passed over")
    why = f" ({said})" if said else ""
    return f"by {rules.file} it is no usage of meter {item.meter!r}{why}: give the file that says so"
