"""What was kept in quarantine, once more: with an account for what names none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.metering.engine import Metering
from tallymark_collector.metering.rules import Rules
from tallymark_collector.model import Batch
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits


def decode_kept(
    tenant: str,
    signal: str,
    meter: str,
    payload: bytes,
    *,
    rules: Rules | None,
    account: str | None,
    limits: TimeLimits,
    now_ns: int,
    redaction: Redaction = STANDARD,
) -> Batch:
    """What an item of the quarantine (`Quarantined`'s tenant, signal, meter and payload) is with these rules, `account`
    given to what names none. Raises MalformedRequest.

    The same item, rules and account give the same identities, so writing the batch again changes nothing. They are
    those that the item would have had if its producer had named the account. What other meters make of the same payload
    is not in it: of those each has its own item, or has counted it.
    """
    metering = None if rules is None else Metering(rules, account=account, redaction=redaction)
    if signal == "traces":
        body = payload if account is None else _named_spans(payload, account)
        spans = decode_spans(tenant, body, limits, now_ns, metering, redaction, kept=True)
        return _of_meter(meter, Batch(spans.points, spans.evidence, spans.quarantined))
    body = payload if account is None else _named_metrics(tenant, meter, payload, account, metering)
    cache = StreamCache(redaction=redaction, kept=True)
    decoded = decode_metrics(tenant, body, cache, limits, now_ns, metering)
    batch = Batch(
        decoded.points,
        quarantined=decoded.quarantined,
        controls=decoded.controls,
        closings=decoded.closings,
        counts=decoded.counts,
    )
    return _of_meter(meter, batch)


def _of_meter(meter: str, batch: Batch) -> Batch:
    """The batch less other meters; of a span with the SDK's usage the item has none, and all of it is meant."""
    if not meter:
        return batch
    return replace(
        batch,
        points=[point for point in batch.points if point.stream.series.meter == meter],
        evidence=[one for one in batch.evidence if one.meter == meter],
        quarantined=[one for one in batch.quarantined if one.meter == meter],
    )


def _named_metrics(tenant: str, meter: str, payload: bytes, account: str, metering: Metering | None) -> bytes:
    """The request with the account on points that are usage without a file and name none.

    A metric that no rule names any more is left alone: it was another meter's, and must not become one of its own.
    """
    request = wire.parse_metrics(payload)
    attribute = _account(account).SerializeToString()
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            metered = None if metering is None else metering.metrics(tenant, resource.resource, scope.scope)
            ours = wire.decode_scope(scope.scope).name == conventions.SCOPE_NAME
            for metric in scope.metrics:
                if not ours and metric.name != meter:
                    continue
                if metered is not None and metered.decode(metric, (0, 0), Decoded()):
                    continue
                for point in metric.sum.data_points:
                    if not any(_names_account(KeyValue.FromString(item)) for item in point.attributes):
                        point.attributes.append(attribute)
    return request.SerializeToString()


def _named_spans(payload: bytes, account: str) -> bytes:
    """The request with the account wherever the SDK wrote usage beside none."""
    request = ExportTraceServiceRequest.FromString(payload)
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                events = [event.attributes for event in span.events if event.name == conventions.USAGE_EVENT]
                for items in (span.attributes, *events):
                    if _has_usage(items) and not any(map(_names_account, items)):
                        items.append(_account(account))
    return request.SerializeToString()


def _has_usage(items: Iterable[KeyValue]) -> bool:
    return any(item.key.startswith(conventions.METER_PREFIX) for item in items)


def _names_account(item: KeyValue) -> bool:
    """True for an attribute that names an account, or was meant to: an empty one names nobody."""
    return (
        item.key == conventions.ACCOUNT
        and item.value.WhichOneof("value") is not None
        and (item.value.WhichOneof("value") != "string_value" or bool(item.value.string_value))
    )


def _account(account: str) -> KeyValue:
    found = KeyValue(key=conventions.ACCOUNT)
    found.value.string_value = account
    return found
