"""What the SDK says beside the usage: control totals, the end of a run, how much is on spans. None of it is billed."""

from __future__ import annotations

import decimal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, TypeAlias

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import (
    Attributes,
    AttributeValue,
    Closing,
    ControlTotal,
    EvidenceCount,
    Origin,
    Producer,
    Quarantined,
    Reason,
    Refusal,
    Temporality,
)
from tallymark_collector.processors import validation
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, NumberDataPoint

MAX_PARTS: Final = 64
"""Points of one total."""
MAX_NAME: Final = 256
"""Characters of a service's name, namespace and instance."""

_TEMPORALITY: Final = {
    conventions.CONTROL_TOTAL: Temporality.CUMULATIVE,
    conventions.CONTROL_CLOSED: Temporality.CUMULATIVE,
    conventions.CONTROL_EVIDENCE: Temporality.DELTA,
}
# Doubles lie between 1e309 and 1e-340.
_EXACT: Final = decimal.Context(prec=1000, traps=[decimal.Inexact, decimal.InvalidOperation])

_Key: TypeAlias = "tuple[str, str, int, int]"


@dataclass(slots=True)
class Control:
    """What one metric says."""

    controls: list[ControlTotal] = field(default_factory=list)
    closings: list[Closing] = field(default_factory=list)
    counts: list[EvidenceCount] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    """One for each point that makes no sense."""
    unmatched: int = 0
    """1 for a metric of a name that is not known (yet): a later SDK may say more."""


class _RefusedError(Exception):
    """A point, or the whole metric, makes no sense."""

    def __init__(self, detail: str, reason: Reason = Reason.CONTROL_INVALID) -> None:
        super().__init__(detail)
        self.refusal = Refusal(reason, detail)


@dataclass(frozen=True, slots=True)
class _Part:
    """One point of a total."""

    number: NumberDataPoint
    value: Decimal
    part: int
    parts: int


def is_known(name: str) -> bool:
    """True for a metric of the scope `conventions.CONTROL_SCOPE` that this version reads."""
    return name in _TEMPORALITY


def decode(tenant: str, resource: bytes, scope: bytes, metric: Metric, window: tuple[int, int]) -> Control:
    """A metric of the scope `conventions.CONTROL_SCOPE`. Nothing that it holds raises."""
    if not is_known(metric.name):
        return Control(unmatched=1)
    return _Decoding(tenant, resource, scope, metric, window).run()


def producer_of(tenant: str, resource: Attributes) -> Producer | Refusal:
    """Who sends, by the attributes that identify a process."""
    names = (conventions.SERVICE_NAMESPACE, conventions.SERVICE_NAME, conventions.SERVICE_INSTANCE)
    values = [resource.get(name) for name in names]
    if values[-1] in (None, ""):
        return Refusal(Reason.CONTROL_INVALID, f"no {conventions.SERVICE_INSTANCE}: nobody can be held to it")
    texts = []
    for name, value in zip(names, values, strict=True):
        text = "" if value is None else value
        if not isinstance(text, str) or len(text) > MAX_NAME or "\0" in text:
            return Refusal(Reason.CONTROL_INVALID, f"{name} is no text of at most {MAX_NAME} characters without NUL")
        texts.append(text)
    return Producer(tenant, *texts)


class _Decoding:
    def __init__(self, tenant: str, resource: bytes, scope: bytes, metric: Metric, window: tuple[int, int]) -> None:
        self._tenant = tenant
        self._resource = resource
        self._scope = scope
        self._metric = metric
        self._window = window
        self._found = Control()

    def run(self) -> Control:
        metric = self._metric
        if metric.WhichOneof("data") != "sum":
            payload = wire.encode_metric(self._resource, self._scope, metric)
            refusal = Refusal(Reason.CONTROL_INVALID, f"{metric.name} is no sum")
            return Control(quarantined=[self._quarantined(0, refusal, payload)])
        numbers: Sequence[NumberDataPoint] = metric.sum.data_points
        try:
            producer = self._producer()
        except _RefusedError as error:
            for number in numbers:
                self._refuse(number, error.refusal)
            return self._found
        totals: dict[_Key, list[_Part]] = defaultdict(list)
        for number in numbers:
            try:
                self._decode(producer, number, totals)
            except _RefusedError as error:
                self._refuse(number, error.refusal)
            except MalformedRequest as error:
                self._refuse(number, Refusal(Reason.CONTROL_INVALID, str(error)))
        for (meter, unit, start_ns, time_ns), parts in totals.items():
            self._add_total(producer, meter, unit, start_ns, time_ns, parts)
        return self._found

    def _producer(self) -> Producer:
        header = self._metric.sum
        if header.aggregation_temporality != _TEMPORALITY[self._metric.name] or not header.is_monotonic:
            raise _RefusedError(
                f"{self._metric.name} is a monotonic sum, {_TEMPORALITY[self._metric.name].name.lower()}"
            )
        try:
            producer = producer_of(self._tenant, wire.decode_resource(self._resource))
        except MalformedRequest as error:
            raise _RefusedError(str(error)) from None
        if isinstance(producer, Refusal):
            raise _RefusedError(producer.detail)
        return producer

    def _decode(self, producer: Producer, number: NumberDataPoint, totals: dict[_Key, list[_Part]]) -> None:
        start_ns, time_ns = number.start_time_unix_nano, number.time_unix_nano
        refusal = validation.check_times(start_ns, time_ns, *self._window)
        value = validation.read_number(number)
        if refusal is not None:
            raise _RefusedError(refusal.detail, refusal.reason)
        if not start_ns:
            raise _RefusedError("it does not say since when", Reason.TIME_MISSING)
        if isinstance(value, Refusal):
            raise _RefusedError(value.detail, value.reason)
        if value < 0:
            raise _RefusedError(f"it cannot be {value:.6G}", Reason.VALUE_NEGATIVE)
        if self._metric.name == conventions.CONTROL_CLOSED:
            self._found.closings.append(Closing(producer, start_ns, time_ns))
            return
        attributes = wire.decode_point_attributes(tuple(number.attributes))
        meter = _text(attributes, conventions.CONTROL_METER, validation.MAX_METER_LENGTH)
        unit = _text(attributes, conventions.CONTROL_UNIT, validation.MAX_UNIT_LENGTH, empty=True)
        if self._metric.name == conventions.CONTROL_EVIDENCE:
            account = _text(attributes, conventions.CONTROL_ACCOUNT, validation.MAX_ACCOUNT_LENGTH)
            origin = self._origin(number)
            count = EvidenceCount(producer, account, meter, unit, start_ns, time_ns, value, origin)
            self._found.counts.append(count)
            return
        part, parts = (
            _whole(attributes.get(name), default)
            for name, default in ((conventions.CONTROL_PART, 0), (conventions.CONTROL_PARTS, 1))
        )
        if not 0 <= part < parts <= MAX_PARTS:
            raise _RefusedError(f"part {part} of {parts}: a total has at most {MAX_PARTS}, counted from 0")
        totals[meter, unit, start_ns, time_ns].append(_Part(number, value, part, parts))

    def _add_total(
        self, producer: Producer, meter: str, unit: str, start_ns: int, time_ns: int, parts: list[_Part]
    ) -> None:
        """A total whose parts are all here; otherwise they are refused: the sum of some would accuse the points."""
        known: dict[int, _Part] = {}
        for one in parts:
            if known.setdefault(one.part, one).value != one.value:
                refusal = Refusal(Reason.VALUE_CONFLICT, f"part {one.part} of it has two values")
                for each in parts:
                    self._refuse(each.number, refusal)
                return
        if any(one.parts != len(known) for one in parts):
            refusal = Refusal(Reason.CONTROL_INVALID, f"{len(known)} of {parts[0].parts} parts of a total are here")
            for one in parts:
                self._refuse(one.number, refusal)
            return
        total = Decimal(0)
        for one in known.values():
            total = _EXACT.add(total, one.value)
        self._found.controls.append(
            ControlTotal(producer, meter, unit, start_ns, time_ns, total, self._origin(parts[0].number))
        )

    def _origin(self, number: NumberDataPoint) -> Origin:
        metric = self._metric
        header = metric.sum
        return Origin(
            self._resource,
            self._scope,
            metric.name,
            metric.unit,
            header.aggregation_temporality,
            header.is_monotonic,
            tuple(number.attributes),
        )

    def _refuse(self, number: NumberDataPoint, refusal: Refusal) -> None:
        header = Metric(name=self._metric.name, unit=self._metric.unit)
        header.sum.aggregation_temporality = self._metric.sum.aggregation_temporality
        header.sum.is_monotonic = self._metric.sum.is_monotonic
        header.sum.data_points.append(number)
        payload = wire.encode_metric(self._resource, self._scope, header)
        self._found.quarantined.append(self._quarantined(number.time_unix_nano, refusal, payload))

    def _quarantined(self, time_ns: int, refusal: Refusal, payload: bytes) -> Quarantined:
        return Quarantined(self._tenant, "", self._metric.name, time_ns, refusal, "metrics", payload)


def _text(attributes: Attributes, name: str, most: int, *, empty: bool = False) -> str:
    value = attributes.get(name)
    if not isinstance(value, str) or not (value or empty) or len(value) > most or "\0" in value:
        raise _RefusedError(f"{name} is a text of {0 if empty else 1} to {most} characters, none NUL")
    return value


def _whole(value: AttributeValue, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise _RefusedError("the parts of a total are counted in integers")
    return value


def quarantined_usage(payload: bytes, tenant: str) -> Iterator[tuple[Producer, str, str, tuple[object, ...], Decimal]]:
    """Usage of the SDK's that an item of the quarantine holds: (producer, meter, unit, identity, quantity)."""
    for resource_metrics in wire.parse_metrics(payload).resource_metrics:
        producer = producer_of(tenant, wire.decode_resource(resource_metrics.resource))
        if isinstance(producer, Refusal):
            continue
        for scope in resource_metrics.scope_metrics:
            if wire.decode_scope(scope.scope).name != conventions.SCOPE_NAME:
                continue
            for metric in scope.metrics:
                for number in metric.sum.data_points:
                    value = validation.read_number(number)
                    if not isinstance(value, Refusal):
                        times = (number.start_time_unix_nano, number.time_unix_nano)
                        identity = (metric.name, metric.unit, *times, *sorted(number.attributes))
                        yield producer, metric.name, metric.unit, identity, value
