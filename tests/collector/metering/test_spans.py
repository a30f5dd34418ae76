"""Spans as a file of meters reads them."""

from __future__ import annotations

from decimal import Decimal

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.metering.sampling import sign_of_sampling
from tallymark_collector.model import Reason
from tallymark_collector.processors.spans import DecodedSpans, decode_spans
from tallymark_collector.processors.validation import TimeLimits
from tests.support.telemetry import span, spans_of
from tests.support.usage import BASE, SECOND, key_values

NOW = BASE + 1000 * SECOND
ENVOY = {"service.name": "envoy", "service.instance.id": "one"}
ACME = {"tenant": "acme"}


def rules(fields: str = "", unit: str = '"1"', complete: str = "spans_are_complete: true") -> Rules:
    source = f'span: "*", account: tenant, {complete}, {fields}'
    return parse_rules(f"meters: {{m: {{unit: {unit}, sources: [{{{source}}}]}}}}")


def decode(rules_: Rules, *spans: Span, resource: dict[str, object] | None = None) -> DecodedSpans:
    return again(rules_, spans_of(resource or ENVOY, spans).SerializeToString())


def again(rules_: Rules, body: bytes) -> DecodedSpans:
    return decode_spans("default", body, TimeLimits(), NOW, Metering(rules_))


def test_a_span_is_one_unit_at_its_end_and_evidence_of_itself() -> None:
    found = decode(rules("dimensions: [route]"), span(1, {**ACME, "route": "/a", "user.id": "u", "peer": 1}))
    [point], [evidence] = found.points, found.evidence
    assert (point.start_ns, point.time_ns, point.value) == (BASE + SECOND, BASE + SECOND, 1)
    assert dict(point.stream.series.attributes) == {"route": "/a"}
    assert (evidence.account, evidence.meter, evidence.quantity, evidence.user) == ("acme", "m", 1, "u")
    assert (evidence.start_ns, evidence.time_ns, evidence.service) == (BASE, BASE + SECOND, "envoy")
    assert dict(evidence.attributes) == {"route": "/a", "peer": 1, "tenant": "acme"}


def identity(rules_: Rules, one: Span, **resource: object) -> object:
    [point] = decode(rules_, one, resource={**ENVOY, **resource}).points
    return point.stream.id, point.start_ns, point.time_ns, point.cause


def test_identity_is_the_spans_own_whatever_comes_with_it() -> None:
    file = rules()
    first = identity(file, span(1, ACME))
    assert identity(file, span(1, {**ACME, "decorated": "later"})) == first
    assert identity(file, span(1, ACME), **{"cloud.region": "eu", "service.instance.id": "two"}) == first
    assert identity(rules("dimensions: [tenant], factor: 2"), span(1, ACME)) == first
    others = [
        identity(file, span(2, ACME)),
        identity(file, span(1, {"tenant": "globex"})),
        identity(file, span(1, ACME, span_id=b"12345678")),
        identity(file, span(1, ACME, trace_id=b"1" * 16)),
    ]
    assert len({first, *others}) == 5


def test_dimensions_of_other_types_are_other_series() -> None:
    spans = [span(n, {**ACME, "x": value}) for n, value in enumerate([1, True, 1.0, "1", 1])]
    series = [point.stream.series.id for point in decode(rules("dimensions: [x]"), *spans).points]
    assert len(set(series)) == 4
    assert series[0] == series[4]


@pytest.mark.parametrize(
    ("fields", "unit", "quantity"),
    [
        ("quantity: duration", "s", "1.5"),
        ("quantity: duration, factor: 1000", "ms", "1500"),
        ("quantity: {attribute: tokens}", '"{token}"', "12"),
        ("quantity: {attribute: text}", '"{token}"', "0.10"),
        ("quantity: {attribute: double}, factor: 1/8", "By", "0.0125"),
    ],
)
def test_quantities(fields: str, unit: str, quantity: str) -> None:
    one = span(1, {**ACME, "tokens": 12, "text": "0.10", "double": 0.1}, end_time_unix_nano=BASE + SECOND * 3 // 2)
    [point] = decode(rules(fields, unit), one).points
    assert point.value == Decimal(quantity)


def test_kind_status_and_attributes_choose() -> None:
    file = rules("kind: [server, consumer], status: [unset, ok], where: {code: {to: 499}}")
    chosen = [span(1, {**ACME, "code": 200}), span(2, {**ACME, "code": 499}, kind=5, status=Status(code=1))]  # type: ignore[arg-type]
    others = [
        span(3, {**ACME, "code": 200}, kind=3),
        span(4, {**ACME, "code": 200}, kind=0),
        span(5, {**ACME, "code": 200}, status=Status(code=2)),  # type: ignore[arg-type]
        span(6, {**ACME, "code": 500}),
        span(7, ACME),
    ]
    found = decode(file, *chosen, *others)
    assert len(found.points) == 2
    assert (found.unmatched, found.foreign, found.rejected) == (5, {"ingress": 5}, 0)


@pytest.mark.parametrize(
    ("fields", "one", "reason", "said"),
    [
        ("", span(1, {"x": 1}), Reason.ACCOUNT_MISSING, "looked at tenant"),
        ("quantity: {attribute: n}", span(1, ACME), Reason.VALUE_MISSING, "where: {n: {present: true}}"),
        ("quantity: {attribute: n}", span(1, {**ACME, "n": "many"}), Reason.VALUE_NOT_FINITE, "'many'"),
        ("quantity: {attribute: n}", span(1, {**ACME, "n": -1}), Reason.VALUE_NEGATIVE, "-1"),
        ("", span(1, ACME, span_id=b"short"), Reason.ATTRIBUTES_INVALID, "span_id 8"),
        ("", span(1, ACME, end_time_unix_nano=NOW + 10_000 * SECOND), Reason.TIME_AHEAD, "skew"),
        ("", span(1, ACME, trace_state="ot=th:8"), Reason.SPAN_SAMPLED, "ot=th:8"),
    ],
)
def test_what_is_kept_aside_and_why(fields: str, one: Span, reason: Reason, said: str) -> None:
    found = decode(rules(fields), one)
    assert (found.points, found.evidence, found.rejected, found.unmatched) == ([], [], 1, 0)
    [kept] = found.quarantined
    assert kept.refusal.reason is reason
    assert said in kept.refusal.detail
    assert kept.payload == spans_of(ENVOY, [one]).SerializeToString()
    assert again(rules(fields), kept.payload).quarantined == [kept]


def test_what_the_sdk_wrote_on_a_span_is_not_counted_from_the_span_again() -> None:
    sdk = {"tallymark.account.id": "acme", "tallymark.meter.m": 2, **ACME}
    found = decode(rules(), span(1, sdk))
    assert not found.points
    assert [(e.meter, e.quantity) for e in found.evidence] == [("m", 2)]
    event = span(2, ACME)
    event.events.add(name="tallymark.usage", attributes=key_values({k: v for k, v in sdk.items() if k != "tenant"}))
    assert not decode(rules(), event).points
    # Another meter's usage on the span is not this one's.
    other = decode(rules(), span(3, {"tallymark.account.id": "acme", "tallymark.meter.other": 2, **ACME}))
    assert [p.value for p in other.points] == [1]
    assert sorted(e.meter for e in other.evidence) == ["m", "other"]


def test_a_span_that_is_refused_twice_is_one_rejected_span() -> None:
    found = decode(rules(), span(1, {"tallymark.meter.other": 1}))
    assert found.rejected == 1
    assert sorted(kept.meter for kept in found.quarantined) == ["", "m"]


def test_sampled_spans_count_where_a_person_allows_it() -> None:
    found = decode(rules(complete="sampled: allow"), span(1, ACME, trace_state="ot=th:8"))
    assert len(found.points) == 1


@pytest.mark.parametrize(
    ("fields", "is_sampled"),
    [
        ({}, False),
        ({"trace_state": "ot=th:0"}, False),
        ({"trace_state": "ot=th:000"}, False),
        ({"trace_state": "ot=th:"}, True),
        ({"trace_state": "ot=th:zz"}, True),
        ({"trace_state": "ot=rv:abc"}, False),
        ({"trace_state": "a=1, ot=rv:abc;th:fd70a4"}, True),
        ({"trace_state": "ot=p:0;r:3"}, False),
        ({"trace_state": "ot=p:63"}, True),
        ({"trace_state": "other=th:8"}, False),
        ({"flags": 0}, False),
        ({"flags": 1}, False),
        ({"flags": 0x300}, True),
        ({"flags": 0x301}, False),
    ],
)
def test_signs_of_sampling(fields: dict[str, object], is_sampled: bool) -> None:
    assert (sign_of_sampling(span(1, {}, **fields)) is not None) is is_sampled
