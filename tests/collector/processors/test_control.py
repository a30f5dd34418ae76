"""Control totals from OTLP bytes: what is taken, and what is kept aside and why. Nothing here may become usage."""

from __future__ import annotations

import contextlib
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark.quantities import few_wire_parts
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Reason
from tallymark_collector.processors.control import quarantined_usage
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 60 * SECOND
END = BASE + 10 * SECOND
NAMES: dict[str, object] = {"tallymark.control.meter": "m", "tallymark.control.unit": "1"}
ACCOUNT: dict[str, object] = {**NAMES, "tallymark.control.account": "acme"}
TOTAL, CLOSED, EVIDENCE = (f"tallymark.control.{name}" for name in ("total", "closed", "evidence"))


def control(*metrics: Metric, **resource: str) -> ExportMetricsServiceRequest:
    return request(*metrics, scope="tallymark.control", **resource)


def total(*points: NumberDataPoint, temporality: int = 2, monotonic: bool = True) -> Metric:
    return sum_metric(points, TOTAL, "1", temporality, monotonic)


def decode(message: ExportMetricsServiceRequest) -> Decoded:
    decoded = decode_metrics("default", message.SerializeToString(), StreamCache(), TimeLimits(), NOW)
    assert decoded.points == [], "none of it is usage"
    return decoded


def reasons(message: ExportMetricsServiceRequest) -> list[Reason]:
    decoded = decode(message)
    assert (decoded.controls, decoded.closings, decoded.counts) == ([], [], [])
    assert decoded.rejected == len(decoded.quarantined)
    return [kept.refusal.reason for kept in decoded.quarantined]


def test_each_kind_is_taken() -> None:
    decoded = decode(
        control(
            total(number(BASE, END, 5, NAMES)),
            sum_metric([number(BASE, END, 1, {})], CLOSED, "1", temporality=2),
            sum_metric([number(BASE, END, 0.5, ACCOUNT)], EVIDENCE, "1", temporality=1),
        )
    )
    [one], [end], [count] = decoded.controls, decoded.closings, decoded.counts
    assert (one.producer.service, one.producer.instance, one.meter, one.unit) == ("shop", "one", "m", "1")
    assert (one.start_ns, one.time_ns, one.total) == (BASE, END, 5)
    assert (end.producer, end.start_ns, end.time_ns) == (one.producer, BASE, END)
    assert (count.account, count.meter, count.quantity) == ("acme", "m", Decimal("0.5"))
    assert (decoded.quarantined, decoded.unmatched) == ([], 0)


def test_a_name_of_a_later_sdk_is_left_alone() -> None:
    decoded = decode(control(sum_metric([number(BASE, END, 5, NAMES)], "tallymark.control.news")))
    assert (decoded.unmatched, decoded.quarantined) == (1, [])


def test_an_account_among_the_attributes_does_not_make_it_usage() -> None:
    decoded = decode(control(total(number(BASE, END, 5, {**NAMES, "tallymark.account.id": "acme"}))))
    assert len(decoded.controls) == 1


@given(st.integers(1, 2**200) | st.decimals(Decimal("1e-90"), 10**30, places=90))
def test_a_total_in_parts_is_exact(value: int | Decimal) -> None:
    values = few_wire_parts(int(value) if value == int(value) else value)
    assert len(values) <= 12
    points = [
        number(BASE, END, part, {**NAMES, "tallymark.control.part": n, "tallymark.control.parts": len(values)})
        for n, part in enumerate(values)
    ]
    [one] = decode(control(total(*reversed(points)))).controls
    assert one.total == value
    if len(points) > 1:
        assert reasons(control(total(*points[1:]))) == [Reason.CONTROL_INVALID] * (len(points) - 1)


def test_the_same_part_twice_is_one() -> None:
    two = [
        number(BASE, END, 5, {**NAMES, "tallymark.control.part": n, "tallymark.control.parts": 2}) for n in (0, 1, 0)
    ]
    [one] = decode(control(total(*two))).controls
    assert one.total == 10


def test_an_index_of_profiles_is_no_part() -> None:
    """Receivers take `string_value_strindex` as if it were absent (OTLP); older messages do not know it."""
    one = number(BASE, END, 5, NAMES)
    one.attributes.add(key="tallymark.control.part").value.MergeFromString(b"\x40\x07")
    assert [found.total for found in decode(control(total(one))).controls] == [5]


GOOD = number(BASE, END, 5, NAMES)
BAD = [
    (total(number(BASE, END, 5, {})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.meter": ""})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.meter": 7})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.meter": "a\0"})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.meter": "x" * 256})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.unit": "x" * 64})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.part": "0"})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.part": True})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.part": 1})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.part": -1})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, 5, {**NAMES, "tallymark.control.parts": 2**62})), Reason.CONTROL_INVALID),
    (total(number(BASE, END, -5, NAMES)), Reason.VALUE_NEGATIVE),
    (total(number(BASE, END, float("nan"), NAMES)), Reason.VALUE_NOT_FINITE),
    (total(number(BASE, END, float("inf"), NAMES)), Reason.VALUE_NOT_FINITE),
    (total(NumberDataPoint(start_time_unix_nano=BASE, time_unix_nano=END)), Reason.VALUE_MISSING),
    (total(number(BASE, 0, 5, NAMES)), Reason.TIME_MISSING),
    (total(number(0, END, 5, NAMES)), Reason.TIME_MISSING),
    (total(number(END, BASE, 5, NAMES)), Reason.TIME_REVERSED),
    (total(number(BASE, NOW + 3600 * SECOND, 5, NAMES)), Reason.TIME_AHEAD),
    (total(number(1, 2, 5, NAMES)), Reason.TIME_TOO_OLD),
    (total(GOOD, temporality=1), Reason.CONTROL_INVALID),
    (total(GOOD, monotonic=False), Reason.CONTROL_INVALID),
    (sum_metric([number(BASE, END, 5, NAMES)], EVIDENCE, "1", temporality=1), Reason.CONTROL_INVALID),
    (sum_metric([number(BASE, END, 5, ACCOUNT)], EVIDENCE, "1", temporality=2), Reason.CONTROL_INVALID),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_junk_is_kept_aside_with_its_reason(n: int) -> None:
    metric, reason = BAD[n]
    assert reasons(control(metric)) == [reason]


def test_a_metric_of_another_type_is_kept_aside() -> None:
    gauge = Metric(name=TOTAL)
    gauge.gauge.data_points.append(GOOD)
    assert reasons(control(gauge)) == [Reason.CONTROL_INVALID]


@pytest.mark.parametrize("instance", ["", "x" * 300, "a\0b"])
def test_nobody_can_be_held_to_it_without_an_instance(instance: str) -> None:
    message = control(total(GOOD, number(BASE, END + 1, 6, NAMES)))
    for attribute in message.resource_metrics[0].resource.attributes:
        if attribute.key == "service.instance.id":
            attribute.value.string_value = instance
    assert reasons(message) == [Reason.CONTROL_INVALID] * 2


def test_two_values_of_one_total_in_one_request_are_both_kept_aside() -> None:
    assert reasons(control(total(GOOD, number(BASE, END, 6, NAMES)))) == [Reason.VALUE_CONFLICT] * 2


@settings(max_examples=300)
@given(st.binary(max_size=200), st.data())
def test_no_bytes_raise_anything_but_a_malformed_request(junk: bytes, data: st.DataObject) -> None:
    body = bytearray(control(total(GOOD), sum_metric([GOOD], EVIDENCE, "1")).SerializeToString())
    at = data.draw(st.integers(0, len(body) - 1))
    body[at : at + data.draw(st.integers(0, 8))] = junk[: data.draw(st.integers(0, 8))]
    with contextlib.suppress(MalformedRequest):
        decode_metrics("default", bytes(body), StreamCache(), TimeLimits(), NOW)


def test_usage_in_quarantine_is_read_back() -> None:
    usage = request(sum_metric([number(BASE, END, 5, {}), number(BASE, END, 0.5, {"a": 1})], "m", "1"))
    found = list(quarantined_usage(usage.SerializeToString(), "default"))
    assert [(producer.instance, meter, unit, quantity) for producer, meter, unit, _, quantity in found] == [
        ("one", "m", "1", 5),
        ("one", "m", "1", Decimal("0.5")),
    ]
    assert len({identity for *_, identity, _ in found}) == 2
    assert list(quarantined_usage(control(total(GOOD)).SerializeToString(), "default")) == []
