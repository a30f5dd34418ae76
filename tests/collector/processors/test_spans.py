"""Spans as evidence: what counts, what is refused, and what a host puts on its spans beside the usage."""

from __future__ import annotations

from decimal import Decimal

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Reason, attributes_json
from tallymark_collector.processors.spans import DecodedSpans, decode_spans
from tallymark_collector.processors.validation import MAX_ATTRIBUTE_TEXT, MAX_ATTRIBUTES, TimeLimits
from tests.support.usage import BASE, SECOND, key_values

NOW = BASE + 60 * SECOND
USAGE = {"tallymark.account.id": "acme", "tallymark.meter.api.requests": 2}


def span(attributes: dict[str, object], **fields: object) -> Span:
    times = {"start_time_unix_nano": BASE, "end_time_unix_nano": NOW}
    ids = {"trace_id": b"t" * 16, "span_id": b"s" * 8}
    return Span(**{**ids, **times, "name": "GET", **fields}, attributes=key_values(attributes))  # type: ignore[arg-type]


def decode(*spans: Span) -> DecodedSpans:
    request = ExportTraceServiceRequest()
    request.resource_spans.add().scope_spans.add().spans.extend(spans)
    return decode_spans("default", request.SerializeToString(), TimeLimits(), NOW)


def test_long_and_many_attributes_do_not_cost_the_evidence() -> None:
    host = {"prompt": "x" * 50_000, "sql": "a\0b", **{f"a{i}": i for i in range(200)}}
    [evidence] = decode(span({**USAGE, **host})).evidence
    assert evidence.quantity == 2
    assert len(evidence.attributes) == MAX_ATTRIBUTES
    [long] = decode(span({**USAGE, "prompt": "x" * 50_000, "sql": "a\0b"})).evidence
    assert dict(long.attributes)["prompt"] == "x" * MAX_ATTRIBUTE_TEXT
    assert "\\u0000" not in attributes_json(long.attributes)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (span({"tallymark.meter.api.requests": 2}), Reason.ACCOUNT_MISSING),
        (span({**USAGE, "tallymark.meter.": 1}), Reason.METER_INVALID),
        (span({**USAGE, "tallymark.meter." + "x" * 300: 1}), Reason.METER_INVALID),
        (span({**USAGE, "tallymark.meter.api.requests": -1}), Reason.VALUE_NEGATIVE),
        (span({**USAGE, "tallymark.meter.api.requests": "many"}), Reason.VALUE_NOT_FINITE),
        (span({**USAGE, "tallymark.meter.api.requests": "1e999999999"}), Reason.VALUE_OUT_OF_RANGE),
        (span({**USAGE, "tallymark.meter.api.requests": True}), Reason.VALUE_NOT_FINITE),
        (span(USAGE, trace_id=b"short"), Reason.ATTRIBUTES_INVALID),
        (span(USAGE, end_time_unix_nano=NOW + 3600 * SECOND), Reason.TIME_AHEAD),
    ],
)
def test_what_cannot_be_evidence_is_kept_whole_and_harms_no_other(bad: Span, reason: Reason) -> None:
    decoded = decode(bad, span(USAGE, span_id=b"another1"))
    assert reason in [kept.refusal.reason for kept in decoded.quarantined]
    assert decoded.rejected == 1
    assert (b"another1", "api.requests") in [(e.span_id, e.meter) for e in decoded.evidence]
    kept = ExportTraceServiceRequest.FromString(decoded.quarantined[0].payload)
    assert kept.resource_spans[0].scope_spans[0].spans[0] == bad


def test_nesting_without_end_is_that_spans_refusal_and_foreign_spans_are_not_decoded() -> None:
    foreign, ours = span({}), span(USAGE)
    for one in (foreign, ours):
        value = one.attributes.add(key="deep").value
        for _ in range(30):
            value = value.array_value.values.add()
        value.int_value = 1
    decoded = decode(foreign, ours, span(USAGE, span_id=b"another1"))
    assert (decoded.unmatched, decoded.rejected, len(decoded.evidence)) == (1, 1, 1)


def test_quantities_are_exact() -> None:
    for given, right in ((3, 3), (0.1, Decimal("0.1")), ("0.30", Decimal("0.3")), ("9" * 24, Decimal("9" * 24))):
        [evidence] = decode(span({**USAGE, "tallymark.meter.api.requests": given})).evidence
        assert evidence.quantity == right


def test_malformed() -> None:
    with pytest.raises(MalformedRequest):
        decode_spans("default", b"\x0a\xff\xff\xff\xff\x0f", TimeLimits(), NOW)


def test_what_a_span_says_twice_of_a_meter_is_added_up_exactly() -> None:
    twice = span({**USAGE, "tallymark.meter.api.requests": "1000000000000000000000000"})
    more = twice.events.add(name="tallymark.usage")
    more.attributes.extend(key_values({**USAGE, "tallymark.meter.api.requests": "0.000000000000000000000000000001"}))
    [evidence] = decode(twice).evidence
    assert evidence.quantity == Decimal("1000000000000000000000000.000000000000000000000000000001")
