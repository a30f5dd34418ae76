"""Metrics that a file says are usage: counters, histograms of both kinds, summaries; as levels gauges, UpDownCounters.

A point of the source becomes a point of each meter that has a source for it. Its stream is the source's own (resource,
scope, metric, all attributes) with the meter and the account; what the file drops from the series is still in it. So
streams that merge into one series stay apart, each with its own totals and resets, and a retry is found. What the file
says about value and dimensions is not in it: a request that is sent again across a change of the file is still known.

Running totals are kept by their `Source`, which is the same without the account: so a change of the file that sends
them to somebody else counts on from where they were. So are levels: what a stream stands at is one account's at a time.
Increases have a source too, so that one that comes again is found under whichever account it was billed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import KeyValueList
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering.amounts import scaled
from tallymark_collector.metering.conditions import failing
from tallymark_collector.metering.kinds import Header, alone, check_temporality, fits, header_of, mismatch, read
from tallymark_collector.metering.memory import Memory
from tallymark_collector.metering.naming import Named, named
from tallymark_collector.metering.origin import Group, Refused, kept
from tallymark_collector.metering.rules import Meter, MetricSource
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
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.processors.decoding import NO_RECORDED_VALUE
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.sent import Sent, identifying, origin_of_metered, source_of
from tallymark_collector.wire import points
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric

if TYPE_CHECKING:
    from tallymark_collector.processors.decoding import Decoded

PIECE: Final = 256
"""Points between two rests; each new one is looked into."""

Fitting = tuple[str, Meter, MetricSource]
"""(meter's name, meter, source)"""


@dataclass(slots=True)
class _Target:
    """What one meter makes of the points of one source stream."""

    meter: str
    source: MetricSource
    stream: Stream | None = None
    refused: Refused | None = None
    sender: UUID | None = None
    """Whose its points are, whatever is read of them and whoever is billed."""


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
        self._stored = redaction.attributes(group.attributes)
        """What all streams share of the resource."""

    def sources(self, name: str) -> Sequence[Fitting]:
        """Those of the file that a metric of this name may fit."""
        key = (self, name)
        if key not in self._memory:
            self._memory[key] = [one for one in self._sources if one[2].metric.matches(name)]
        return self._memory[key]  # type: ignore[return-value]

    def decode(self, metric: Metric, window: tuple[int, int], decoded: Decoded) -> bool:
        """Takes a metric that the file names, and returns True; False where it does not name it."""
        return at_once(self.decoding(metric, window, decoded))

    def decoding(self, metric: Metric, window: tuple[int, int], decoded: Decoded) -> Generator[None, None, bool]:
        """The same in pieces."""
        fitting = self.sources(metric.name)
        if not fitting:
            return False
        try:
            found = metrics_pb2.Metric.FromString(metric.SerializeToString())
        except DecodeError as error:
            yield from self._unreadable(metric, fitting[0][0], str(error), window, decoded)
            return True
        header = header_of(found)
        sources = [one for one in fitting if fits(header.kind, *one[1:])]
        if not sources:
            # A pattern means metrics of the types that its meter takes; whoever names one expects something of it.
            exact = [one for one in fitting if one[2].metric.exact]
            return bool(exact) and self._unsupported(found, header, exact[0], decoded)
        yield from self._decode(found, header, sources, window, decoded)
        return True

    def _unreadable(
        self, metric: Metric, meter: str, error: str, window: tuple[int, int], decoded: Decoded
    ) -> Generator[None, None, None]:
        """One of its points, perhaps: the others are not to suffer for it."""
        try:
            singles = points.alone(metric)
        except MalformedRequest:
            singles = []
        if len(singles) > 1:
            for done, single in enumerate(singles, 1):
                yield from self.decoding(single, window, decoded)
                if done % PIECE == 0:
                    yield
            return
        refusal = Refusal(Reason.ATTRIBUTES_INVALID, f"not an OTLP Metric: {error}")
        payload = wire.encode_metric(self._group.resource, self._group.scope, metric)
        decoded.rejected += 1
        decoded.keep([Quarantined(self._group.tenant, "", meter, 0, refusal, "metrics", payload, metered=True)])

    def _unsupported(self, metric: Any, header: Header, source: Fitting, decoded: Decoded) -> bool:
        found = getattr(metric, header.field).data_points if header.kind else ()
        if not found:
            return False
        refusal = Refusal(Reason.TYPE_UNSUPPORTED, f"meter {source[0]}: {mismatch(header.kind, *source[1:])}")
        time_ns = max(point.time_unix_nano for point in found)
        decoded.rejected += len(found)
        payload = self._payload(metric)
        decoded.keep(
            [Quarantined(self._group.tenant, "", source[0], time_ns, refusal, "metrics", payload, metered=True)]
        )
        return True

    def _decode(
        self, metric: Any, header: Header, sources: Sequence[Fitting], window: tuple[int, int], decoded: Decoded
    ) -> Generator[None, None, None]:
        for done, point in enumerate(getattr(metric, header.field).data_points, 1):
            if done % PIECE == 0:
                yield
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
                payload = self._payload(alone(metric, header, point))
                decoded.keep(kept(self._group.tenant, refused, point.time_unix_nano, "metrics", payload))
            elif not counted:
                decoded.pass_over(header.name)

    def _targets(self, header: Header, sources: Sequence[Fitting], point: Any) -> Sequence[_Target]:
        key = (self, header, KeyValueList(values=point.attributes).SerializeToString())
        if key not in self._memory:
            self._memory[key] = self._resolve(header, sources, point)
        return self._memory[key]  # type: ignore[return-value]

    def _resolve(self, header: Header, sources: Sequence[Fitting], point: Any) -> list[_Target]:
        targets: dict[str, _Target] = {}
        broken = self._group.broken
        attributes = Attributes()
        try:
            attributes = wire.decode_attributes(point.attributes)
        except MalformedRequest as error:
            broken = Refusal(Reason.ATTRIBUTES_INVALID, str(error))
        overflowed = attributes.get(conventions.OVERFLOW) is True
        for meter, declared, source in sources:
            # An overflow's point has lost the attributes that would tell.
            if meter not in targets and (broken or overflowed or failing(source.where, attributes) is None):
                refusal = broken or (validation.OVERFLOWED if overflowed and source.where else None)
                targets[meter] = self._target(
                    meter, declared.unit, source, header, attributes, point, refusal, unreadable=broken is not None
                )
        return list(targets.values())

    def _target(
        self,
        meter: str,
        unit: str,
        source: MetricSource,
        header: Header,
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
        if (wrong := check_temporality(header)) is not None:
            who = wrong
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
        is_increase = not header.is_level and header.temporality == Temporality.DELTA
        if is_increase and not unreadable:
            # The whole resource: it may name the account, and two that do are two, whoever sent them. The same bytes
            # have the same one.
            sender_id = fingerprint("metered increases", *sender, group.attributes)
        elif (header.is_level or header.temporality == Temporality.CUMULATIVE) and not unreadable:
            sender_id = fingerprint("metered source", *sender)
        if isinstance(who, Refusal):
            own = fingerprint("metered", *sender, account) if account and not unreadable else None
            target.refused = Refused(meter, account, who, own, sender_id)
            return target
        redaction = self._redaction
        series = Series(group.tenant, who.account, meter, unit, redaction.attributes(who.dimensions))
        reading = Reading(header.field, source.quantity, source.by)
        raw = tuple(item.SerializeToString() for item in point.attributes)
        adds_up = not header.is_level
        origin = Origin(
            group.resource, group.scope, header.name, header.unit, header.temporality, adds_up, raw, reading
        )
        identity = ("metered", *sender, series.account)
        own = fingerprint(*identity)
        temporality = Temporality(header.temporality) if adds_up else Temporality.LEVEL
        came_from = None
        if sender_id is not None:
            came_from = Source(sender_id if is_increase else source_of(sender_id, source.quantity), source.by)
        if came_from is not None and temporality is Temporality.CUMULATIVE and source.since is not None:
            came_from = came_from._replace(since_ns=source.since, earlier=fingerprint(*identity, source.since))

        def sent() -> Sent:
            payload = self._payload(alone(metrics_pb2.Metric(name=header.name, unit=header.unit), header, point))
            came = origin_of_metered(group.tenant, meter, "metrics", payload, kept=False)
            return Sent(came.stream, own, sender_id)

        kept = redacted_origin(redaction, origin, sent)
        target.sender = sender_id
        target.stream = Stream(own, series, temporality, self._stored, group.scope_name, kept, came_from)
        return target

    def _payload(self, metric: Any) -> bytes:
        """A request with this one metric, resource and scope as they came."""
        return wire.encode_metric(
            self._group.resource, self._group.scope, Metric.FromString(metric.SerializeToString())
        )


def _point(target: _Target, header: Header, point: Any, window: tuple[int, int]) -> Point | Refused | None:
    """What the meter makes of one point; None where that is nothing."""
    source, time_ns, start_ns = target.source, point.time_unix_nano, point.start_time_unix_nano
    before = source.since is not None and 0 < time_ns <= source.since
    if before and (target.stream is None or target.stream.temporality is not Temporality.CUMULATIVE):
        return None
    if target.refused is not None:
        return target.refused
    assert target.stream is not None, "a target without a refusal has a stream"
    stream, account = target.stream, target.stream.series.account
    value = read(point, source.quantity)
    if not isinstance(value, Refusal):
        value = scaled(value, source.by)
        size = abs(value) if header.is_level else value
        refusal = validation.check_quantity(size) or validation.check_times(start_ns, time_ns, *window)
        if refusal is None:
            return Point(stream, start_ns, time_ns, value)
        value = refusal
    if before:
        return None
    return Refused(target.meter, account, value, stream.id, target.sender)
