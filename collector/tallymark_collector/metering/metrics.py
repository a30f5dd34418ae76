"""Metrics that a file says are usage: counters, histograms of both kinds, and summaries.

A point of the source becomes a point of each meter that has a source for it. Its stream is the source's own (resource,
scope, metric, all attributes) with the meter and the account; what the file drops from the series is still in it. So
streams that merge into one series stay apart, each with its own totals and resets, and a retry is found. What the file
says about value and dimensions is not in it: a request that is sent again across a change of the file is still known.

Running totals are kept by their `Source`, which is the same without the account: so a change of the file that sends
them to somebody else counts on from where they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import KeyValueList
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering.amounts import scaled
from tallymark_collector.metering.conditions import failing
from tallymark_collector.metering.memory import Memory
from tallymark_collector.metering.naming import Named, named
from tallymark_collector.metering.origin import Group, Refused, kept
from tallymark_collector.metering.rules import MetricSource
from tallymark_collector.model import (
    Attributes,
    Origin,
    Point,
    Quarantined,
    Reading,
    Reason,
    Refusal,
    Series,
    Source,
    Stream,
    Temporality,
    fingerprint,
)
from tallymark_collector.processors import validation
from tallymark_collector.processors.aside import redacted_origin
from tallymark_collector.processors.decoding import NO_RECORDED_VALUE
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.sent import Sent, identifying, origin_of_metered, source_of
from tallymark_collector.wire.points import alone
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric

if TYPE_CHECKING:
    from tallymark_collector.processors.decoding import Decoded

QUANTITIES: Final = {
    "sum": ("value",),
    "histogram": ("count", "sum"),
    "exponential_histogram": ("count", "sum"),
    "summary": ("count", "sum"),
    "gauge": (),
    "updowncounter": (),
}
"""What can be read of each type of metric."""
_TYPES: Final = {
    "sum": "a counter",
    "histogram": "a histogram",
    "exponential_histogram": "an exponential histogram",
    "summary": "a summary",
    "gauge": "a gauge",
    "updowncounter": "a sum that can fall (UpDownCounter)",
}

Fitting = tuple[str, str, MetricSource]
"""(meter's name, meter's unit, source)"""


@dataclass(slots=True)
class _Target:
    """What one meter makes of the points of one source stream."""

    meter: str
    source: MetricSource
    stream: Stream | None = None
    refused: Refused | None = None
    sender: UUID | None = None
    """Of running totals: whose they are, whatever is read of them."""


class _Header(NamedTuple):
    """A metric less its points."""

    name: str
    unit: str
    kind: str
    temporality: int


class MetricGroup:
    """The metrics of one resource and scope."""

    def __init__(
        self, group: Group, sources: Sequence[Fitting], account: str | None, memory: Memory, redaction: Redaction
    ) -> None:
        self._group = group
        self._sources = sources
        self._account = account
        self._memory = memory
        self._redaction = redaction

    def sources(self, name: str) -> Sequence[Fitting]:
        """Those of the file that a metric of this name may fit."""
        key = (self, name)
        if key not in self._memory:
            self._memory[key] = [one for one in self._sources if one[2].metric.matches(name)]
        return self._memory[key]  # type: ignore[return-value]

    def decode(self, metric: Metric, window: tuple[int, int], decoded: Decoded) -> bool:
        """Takes a metric that the file names, and returns True; False where it does not name it."""
        fitting = self.sources(metric.name)
        if not fitting:
            return False
        try:
            found = metrics_pb2.Metric.FromString(metric.SerializeToString())
        except DecodeError as error:
            self._unreadable(metric, fitting[0][0], str(error), window, decoded)
            return True
        header = _header(found)
        sources = [one for one in fitting if one[2].quantity in QUANTITIES.get(header.kind, ())]
        if not sources:
            # A pattern says which type it means by its `quantity`; whoever names one metric expects something of it.
            exact = [one for one in fitting if one[2].metric.exact]
            return bool(exact) and self._unsupported(found, header, exact[0], decoded)
        self._decode(found, header, sources, window, decoded)
        return True

    def _unreadable(self, metric: Metric, meter: str, error: str, window: tuple[int, int], decoded: Decoded) -> None:
        """One of its points, perhaps: the others are not to suffer for it."""
        try:
            singles = alone(metric)
        except MalformedRequest:
            singles = []
        if len(singles) > 1:
            for single in singles:
                self.decode(single, window, decoded)
            return
        refusal = Refusal(Reason.ATTRIBUTES_INVALID, f"not an OTLP Metric: {error}")
        payload = wire.encode_metric(self._group.resource, self._group.scope, metric)
        decoded.rejected += 1
        decoded.quarantined.append(
            Quarantined(self._group.tenant, "", meter, 0, refusal, "metrics", payload, metered=True)
        )

    def _unsupported(self, metric: Any, header: _Header, source: Fitting, decoded: Decoded) -> bool:
        points = getattr(metric, metric.WhichOneof("data")).data_points if metric.WhichOneof("data") else ()
        if not points:
            return False
        detail = f"meter {source[0]}: it is {_TYPES[header.kind]}, which has no {source[2].quantity} that can be billed"
        refusal = Refusal(Reason.TYPE_UNSUPPORTED, detail)
        time_ns = max(point.time_unix_nano for point in points)
        decoded.rejected += len(points)
        decoded.quarantined.append(
            Quarantined(
                self._group.tenant, "", source[0], time_ns, refusal, "metrics", self._payload(metric), metered=True
            )
        )
        return True

    def _decode(
        self, metric: Any, header: _Header, sources: Sequence[Fitting], window: tuple[int, int], decoded: Decoded
    ) -> None:
        for point in getattr(metric, metric.WhichOneof("data")).data_points:
            if point.flags & NO_RECORDED_VALUE:
                continue
            refused = []
            counted = 0
            for target in self._targets(header, sources, point):
                made = _point(target, header, point, window)
                if isinstance(made, Point):
                    decoded.points.append(made)
                    counted += 1
                elif made is not None:
                    refused.append(made)
            if refused:
                decoded.rejected += 1
                payload = self._payload(_alone(metric, header, point))
                items = kept(self._group.tenant, refused, point.time_unix_nano, "metrics", payload)
                decoded.quarantined.extend(items)
            elif not counted:
                decoded.pass_over(header.name)

    def _targets(self, header: _Header, sources: Sequence[Fitting], point: Any) -> Sequence[_Target]:
        key = (self, header, KeyValueList(values=point.attributes).SerializeToString())
        if key not in self._memory:
            self._memory[key] = self._resolve(header, sources, point)
        return self._memory[key]  # type: ignore[return-value]

    def _resolve(self, header: _Header, sources: Sequence[Fitting], point: Any) -> list[_Target]:
        targets: dict[str, _Target] = {}
        broken = self._group.broken
        attributes = Attributes()
        try:
            attributes = wire.decode_attributes(point.attributes)
        except MalformedRequest as error:
            broken = Refusal(Reason.ATTRIBUTES_INVALID, str(error))
        overflowed = attributes.get(conventions.OVERFLOW) is True
        for meter, unit, source in sources:
            # An overflow's point has lost the attributes that would tell.
            if meter not in targets and (broken or overflowed or failing(source.where, attributes) is None):
                refusal = broken or (validation.OVERFLOWED if overflowed and source.where else None)
                targets[meter] = self._target(
                    meter, unit, source, header, attributes, point, refusal, unreadable=broken is not None
                )
        return list(targets.values())

    def _target(
        self,
        meter: str,
        unit: str,
        source: MetricSource,
        header: _Header,
        attributes: Attributes,
        point: Any,
        refusal: Refusal | None,
        *,
        unreadable: bool,
    ) -> _Target:
        group = self._group
        target = _Target(meter, source)
        who = refusal or named(source, attributes, group.attributes, self._account)
        account = who.account if isinstance(who, Named) else ""
        problem = source.check_source_unit(header.unit, unit)
        if header.temporality not in (Temporality.DELTA, Temporality.CUMULATIVE):
            who = Refusal(Reason.TEMPORALITY_MISSING, f"{header.temporality} is neither delta nor cumulative")
        elif problem is not None:
            who = Refusal(Reason.METER_INVALID, problem)
        sender = (
            group.tenant,
            identifying(group.attributes),
            group.scope_name,
            group.scope_version,
            group.scope_attributes,
            *header,
            attributes,
            meter,
        )
        sender_id = None
        if header.temporality == Temporality.CUMULATIVE and not unreadable:
            sender_id = fingerprint("metered source", *sender)
        if isinstance(who, Refusal):
            own = fingerprint("metered", *sender, account) if account and not unreadable else None
            target.refused = Refused(meter, account, who, own, sender_id)
            return target
        redaction = self._redaction
        series = Series(group.tenant, who.account, meter, unit, redaction.attributes(who.dimensions))
        resource = redaction.attributes(group.attributes)
        reading = Reading(header.kind, source.quantity, source.by)
        raw = tuple(item.SerializeToString() for item in point.attributes)
        origin = Origin(group.resource, group.scope, header.name, header.unit, header.temporality, True, raw, reading)
        identity = ("metered", *sender, series.account)
        own = fingerprint(*identity)
        temporality = Temporality(header.temporality)
        totals = None
        if sender_id is not None:
            since, earlier = source.since or 0, None if source.since is None else fingerprint(*identity, source.since)
            totals = Source(source_of(sender_id, source.quantity), source.by, since, earlier)

        def sent() -> Sent:
            payload = self._payload(_alone(metrics_pb2.Metric(name=header.name, unit=header.unit), header, point))
            came = origin_of_metered(group.tenant, meter, "metrics", payload, kept=False)
            return Sent(came.stream, own, sender_id)

        kept = redacted_origin(redaction, origin, sent)
        target.sender = sender_id
        target.stream = Stream(own, series, temporality, resource, group.scope_name, kept, totals)
        return target

    def _payload(self, metric: Any) -> bytes:
        """A request with this one metric, resource and scope as they came."""
        return wire.encode_metric(
            self._group.resource, self._group.scope, Metric.FromString(metric.SerializeToString())
        )


def kind_of(metric: Any) -> str:
    """A key of `QUANTITIES`, or "" for a metric without data."""
    kind = metric.WhichOneof("data") or ""
    return "updowncounter" if kind == "sum" and not metric.sum.is_monotonic else kind


def _header(metric: Any) -> _Header:
    kind = kind_of(metric)
    match kind:
        case "sum" | "histogram" | "exponential_histogram":
            temporality = getattr(metric, kind).aggregation_temporality
        case "summary":
            temporality = Temporality.CUMULATIVE
        case _:
            temporality = 0
    return _Header(metric.name, metric.unit, kind, int(temporality))


def _alone(metric: Any, header: _Header, point: Any) -> Any:
    """The metric with this one point."""
    single = metrics_pb2.Metric(name=metric.name, unit=metric.unit, description=metric.description)
    data = getattr(single, header.kind)
    if header.kind != "summary":
        data.aggregation_temporality = header.temporality
    if header.kind == "sum":
        data.is_monotonic = True
    data.data_points.append(point)
    return single


def _point(target: _Target, header: _Header, point: Any, window: tuple[int, int]) -> Point | Refused | None:
    """What the meter makes of one point; None where that is nothing."""
    source, time_ns, start_ns = target.source, point.time_unix_nano, point.start_time_unix_nano
    before = source.since is not None and 0 < time_ns <= source.since
    if before and (target.stream is None or target.stream.source is None):
        return None
    if target.refused is not None:
        return target.refused
    assert target.stream is not None, "a target without a refusal has a stream"
    stream, account = target.stream, target.stream.series.account
    value = read(point, source.quantity)
    if not isinstance(value, Refusal):
        value = scaled(value, source.by)
        refusal = validation.check_quantity(value) or validation.check_times(start_ns, time_ns, *window)
        if refusal is None:
            return Point(stream, start_ns, time_ns, value)
        value = refusal
    if before:
        return None
    return Refused(target.meter, account, value, stream.id, target.sender)


def read(point: Any, quantity: str) -> Decimal | Refusal:
    """One number of a point, as it was measured."""
    if quantity == "value":
        return validation.read_number(point)
    if quantity == "count":
        return Decimal(point.count)
    if not isinstance(point, metrics_pb2.SummaryDataPoint) and not point.HasField("sum"):
        return Refusal(Reason.VALUE_MISSING, "the histogram's point has no sum")
    if not math.isfinite(point.sum):
        return Refusal(Reason.VALUE_NOT_FINITE, f"the sum is {point.sum}")
    return wire.shortest_decimal(point.sum)
