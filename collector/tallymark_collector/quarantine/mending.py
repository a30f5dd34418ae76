"""What a person decides about an item, as a change of its payload. Plain functions: value in, value out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Origin, fingerprint
from tallymark_collector.processors import validation
from tallymark_collector.processors.sent import GAUGE, Came, origin_of_sum, read_mark
from tallymark_collector.quarantine.rules import Option
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, NumberDataPoint, Sum

_SHOWN: Final = 200
"""Characters of a value that the trail repeats."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person says about an item beside "bill it"."""

    account: str | None = None
    meter: str | None = None
    unit: str | None = None
    drop: tuple[str, ...] = ()
    additional: bool = False
    force: bool = False
    start_is_end: bool = False
    """Where it starts after it ends, it starts at its end."""

    def options(self) -> set[Option]:
        """The options that were given."""
        given = {
            Option.ACCOUNT: self.account is not None,
            Option.METER: self.meter is not None,
            Option.UNIT: self.unit is not None,
            Option.DROP: bool(self.drop),
            Option.ADDITIONAL: self.additional,
            Option.FORCE: self.force,
        }
        return {option for option, is_given in given.items() if is_given}


@dataclass(frozen=True, slots=True)
class Mended:
    """A payload to be read again."""

    payload: bytes
    changed: dict[str, tuple[str | None, str | None]]
    """By name: as it was, as it is now. Empty where nothing was changed: the point keeps its identity."""


def origin(tenant: str, payload: bytes) -> Came:
    """The identity of the one point in a metrics payload, by the rules of `processors.decoding`, but also where it has
    no account or its attributes cannot be read. Raises MalformedRequest."""
    resource = wire.parse_metrics(payload).resource_metrics[0]
    scope = resource.scope_metrics[0]
    metric = scope.metrics[0]
    header = _sum(metric)
    [number] = header.data_points
    mark = read_mark(number.attributes)
    sent = Origin(
        resource.resource,
        scope.scope,
        metric.name,
        metric.unit,
        header.aggregation_temporality,
        header.is_monotonic,
        tuple(number.attributes),
        GAUGE if _is_gauge(metric) else None,
    )
    stream = origin_of_sum(tenant, sent) if mark is None else mark.origin
    # A level is told by its time alone.
    start = 0 if _is_gauge(metric) or not header.is_monotonic else number.start_time_unix_nano
    return Came(stream, fingerprint(stream.hex, start, number.time_unix_nano))


def named_account(payload: bytes) -> str | None:
    """The account that the point in a metrics payload names, if that can be one. Raises MalformedRequest."""
    for resource in wire.parse_metrics(payload).resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for number in _sum(metric).data_points:
                    for _, item in _readable(number.attributes):
                        if item is not None and item.key == conventions.ACCOUNT:
                            return validation.account_name(wire.decode_attributes([item]).get(conventions.ACCOUNT))
    return None


def mend(signal: str, payload: bytes, decision: Decision) -> Mended:
    """The payload as the person wants it to be read. Raises MalformedRequest."""
    if signal == "traces":
        return _mend_spans(payload, decision)
    request = wire.parse_metrics(payload)
    changed: dict[str, tuple[str | None, str | None]] = {}
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for name, wanted in (("name", decision.meter), ("unit", decision.unit)):
                    before = getattr(metric, name)
                    if wanted is not None and wanted != before:
                        changed["meter" if name == "name" else name] = (_short(before), wanted)
                        setattr(metric, name, wanted)
                try:
                    header = _sum(metric)
                except MalformedRequest:
                    continue  # whoever reads it again says so
                for number in header.data_points:
                    _mend_number(number, decision, changed)
                if _is_gauge(metric):
                    metric.gauge = header.SerializeToString()
    return Mended(request.SerializeToString() if changed else payload, changed)


def _is_gauge(metric: Metric) -> bool:
    return metric.WhichOneof("data") == "gauge"


def _sum(metric: Metric) -> Sum:
    """A sum, or what a gauge holds, whose points lie in it as in a sum. Raises MalformedRequest."""
    if not _is_gauge(metric):
        return metric.sum
    try:
        return Sum.FromString(metric.gauge)
    except DecodeError as error:
        raise MalformedRequest(f"not an OTLP Gauge: {error}") from None


def _mend_number(
    number: NumberDataPoint, decision: Decision, changed: dict[str, tuple[str | None, str | None]]
) -> None:
    items = list(_readable(number.attributes))
    drop = {*decision.drop}
    if decision.account is not None:
        drop |= {conventions.ACCOUNT, conventions.OVERFLOW}
    kept = []
    for data, item in items:
        if item is not None and item.key in drop:
            changed[item.key] = (shown(item), None)
        elif item is None and "" in drop:
            changed["(unreadable attribute)"] = (data.hex()[:_SHOWN], None)
        else:
            kept.append(data)
    if decision.account is not None:
        account = KeyValue(key=conventions.ACCOUNT)
        account.value.string_value = decision.account
        kept.append(account.SerializeToString())
        changed[conventions.ACCOUNT] = (changed.get(conventions.ACCOUNT, (None, None))[0], decision.account)
    if len(kept) != len(items) or decision.account is not None:
        del number.attributes[:]
        number.attributes.extend(kept)
    if decision.start_is_end and number.start_time_unix_nano > number.time_unix_nano:
        changed["start_time_unix_nano"] = (str(number.start_time_unix_nano), str(number.time_unix_nano))
        number.start_time_unix_nano = number.time_unix_nano


def _mend_spans(payload: bytes, decision: Decision) -> Mended:
    try:
        request = ExportTraceServiceRequest.FromString(payload)
    except DecodeError as error:
        raise MalformedRequest(f"not an OTLP ExportTraceServiceRequest: {error}") from None
    changed: dict[str, tuple[str | None, str | None]] = {}
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                events = [event.attributes for event in span.events if event.name == conventions.USAGE_EVENT]
                for carrier in (span.attributes, *events):
                    _mend_carrier(carrier, decision, changed)
                if decision.start_is_end and span.start_time_unix_nano > span.end_time_unix_nano:
                    times = (str(span.start_time_unix_nano), str(span.end_time_unix_nano))
                    changed["start_time_unix_nano"] = times
                    span.start_time_unix_nano = span.end_time_unix_nano
    return Mended(request.SerializeToString() if changed else payload, changed)


def _mend_carrier(attributes: Any, decision: Decision, changed: dict[str, tuple[str | None, str | None]]) -> None:
    if not any(item.key.startswith(conventions.METER_PREFIX) for item in attributes):
        return
    for item in [item for item in attributes if item.key in decision.drop]:
        changed[item.key] = (shown(item), None)
        attributes.remove(item)
    if decision.account is None:
        return
    there = [item for item in attributes if item.key == conventions.ACCOUNT]
    try:
        said = wire.decode_attributes(there).get(conventions.ACCOUNT)
    except MalformedRequest:
        said = None
    if validation.check_account(said) is None:
        return  # it names its account; another part of the span does not
    for item in there:
        attributes.remove(item)
    attributes.add(key=conventions.ACCOUNT).value.string_value = decision.account
    changed[conventions.ACCOUNT] = (shown(there[-1]) if there else None, decision.account)


def _readable(attributes: Iterable[bytes]) -> Iterator[tuple[bytes, KeyValue | None]]:
    for data in attributes:
        try:
            yield data, KeyValue.FromString(data)
        except DecodeError:
            yield data, None


def shown(item: KeyValue) -> str:
    """An attribute's value as the trail repeats it."""
    value = item.value
    return _short(value.string_value if value.HasField("string_value") else str(value).strip())


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
