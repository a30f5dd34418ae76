"""What was kept, once more with an account: the identity that the item would have had."""

from __future__ import annotations

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.metering.kept import decode_kept
from tallymark_collector.model import Batch, Quarantined
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 1000 * SECOND
KONG = {"service.name": "kong", "service.instance.id": "one"}
RULES = parse_rules(
    """
meters:
  m:
    unit: "1"
    sources:
      - {metric: h, quantity: count, account: consumer}
      - {metric: calls, quantity: value, account: consumer}
      - {span: "*", account: consumer, spans_are_complete: true}
"""
)


def metrics(message: ExportMetricsServiceRequest, rules: Rules | None = RULES) -> Batch:
    metering = None if rules is None else Metering(rules)
    found = decode_metrics("default", message.SerializeToString(), StreamCache(), TimeLimits(), NOW, metering)
    return Batch(found.points, quarantined=found.quarantined)


def spans(message: ExportTraceServiceRequest) -> Batch:
    found = decode_spans("default", message.SerializeToString(), TimeLimits(), NOW, Metering(RULES))
    return Batch(found.points, found.evidence, found.quarantined)


def again(item: Quarantined, account: str | None, rules: Rules | None = RULES) -> Batch:
    return decode_kept(
        item.tenant,
        item.signal,
        item.meter,
        item.payload,
        rules=rules,
        account=account,
        limits=TimeLimits(),
        now_ns=NOW,
    )


def identities(batch: Batch) -> list[object]:
    return [(p.stream.id, p.stream.series.id, *p[1:5]) for p in batch.points]


def test_a_point_of_a_file_is_the_same_every_time_and_another_for_another_account() -> None:
    [kept] = metrics(metrics_of(KONG, histogram([histogram_point(BASE, NOW, 3, 1.0, {"x": 1})], "h"))).quarantined
    first = again(kept, "acme")
    assert [(p.stream.series.account, p.value) for p in first.points] == [("acme", 3)]
    assert identities(first) == identities(again(kept, "acme"))
    assert not first.quarantined
    assert first.points[0].stream.id != again(kept, "globex").points[0].stream.id
    assert again(kept, None).quarantined == [kept]


def test_an_account_that_is_named_stays() -> None:
    named = metrics_of(KONG, histogram([histogram_point(BASE, NOW, 3, 1.0, {"consumer": "globex"})], "h"))
    item = Quarantined("default", "", "m", NOW, None, "metrics", named.SerializeToString())  # type: ignore[arg-type]
    assert identities(again(item, "acme")) == identities(metrics(named))


def test_a_point_of_the_built_in_rule_gets_the_identity_that_it_would_have_had() -> None:
    def counter(attributes: dict[str, object]) -> ExportMetricsServiceRequest:
        return request(sum_metric([number(BASE, NOW, 5, {"http.route": "/a", **attributes})]))

    named = metrics(counter({"tallymark.account.id": "acme"}), None)
    for nobody in ({}, {"tallymark.account.id": ""}):
        [kept] = metrics(counter(nobody)).quarantined
        for rules in (None, RULES):
            assert [p.value for p in again(kept, "acme", rules).points] == [5]
    [kept] = metrics(counter({})).quarantined
    assert identities(again(kept, "acme", RULES)) == identities(named)


def test_a_metric_that_the_file_has_forgotten_does_not_become_a_meter_of_its_own() -> None:
    counter = sum_metric([number(BASE, NOW, 5, {"x": 1})], "calls", "1")
    [kept] = metrics(metrics_of(KONG, counter)).quarantined
    assert kept.meter == "m"
    assert [p.value for p in again(kept, "acme").points] == [5]
    assert not again(kept, "acme", None)


def test_spans_of_a_file_and_of_the_sdk() -> None:
    [kept] = spans(spans_of(KONG, [span(1, {"x": 1})])).quarantined
    batch = again(kept, "acme")
    assert [(e.account, e.quantity) for e in batch.evidence] == [("acme", 1)]
    assert identities(batch) == identities(spans(spans_of(KONG, [span(1, {"consumer": "acme"})])))
    [kept] = spans(spans_of(KONG, [span(2, {"tallymark.meter.m": 3})])).quarantined
    batch = again(kept, "acme")
    assert [(e.account, e.quantity) for e in batch.evidence] == [("acme", 3)]
    assert not batch.points
