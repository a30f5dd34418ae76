"""One file of meters for several tenants: what a source takes is that of the tenants it names."""

from __future__ import annotations

from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.metering.captured import Captured
from tallymark_collector.metering.explain import explain
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.spans import DecodedSpans, decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, sum_metric

NOW = BASE + 1000 * SECOND
GATEWAY: dict[str, object] = {"service.name": "kong", "service.instance.id": "one"}
RULES = parse_rules("""
meters:
  requests:
    unit: "{request}"
    sources:
      - {tenants: [acme-corp], metric: h, quantity: count, account: {attribute: key, map: {k1: paul, k2: anne}}}
      - {tenants: [globex, initech], metric: h, quantity: count, account: {attribute: key, map: {k1: lisa}}}
      - {tenants: [acme-corp], span: "*", account: key, spans_are_complete: true}
  egress:
    unit: By
    sources:
      - {tenants: [acme-corp], metric: egress, quantity: value, account: key}
      - {metric: "egress", quantity: value, account: {resource: customer}}
""")
METRICS = metrics_of(GATEWAY, histogram([histogram_point(BASE, NOW, 3, 1.5, {"key": "k1"})], "h"))
EGRESS = metrics_of({**GATEWAY, "customer": "all"}, sum_metric([number(BASE, NOW, 7, {"key": "k1"})], "egress", "By"))
SPANS = spans_of(GATEWAY, [span(1, {"key": "k1"})])
METERING, CACHE = Metering(RULES), StreamCache()
"""One of each for all tenants, as in a collector."""


def metrics(tenant: str, message: object = METRICS) -> Decoded:
    body = message.SerializeToString()  # type: ignore[attr-defined]
    return decode_metrics(tenant, body, CACHE, TimeLimits(), NOW, METERING)


def spans(tenant: str) -> DecodedSpans:
    return decode_spans(tenant, SPANS.SerializeToString(), TimeLimits(), NOW, METERING)


def accounts(found: Decoded | DecodedSpans) -> list[tuple[str, str]]:
    return [(point.stream.series.tenant, point.stream.series.account) for point in found.points]


def test_one_name_is_another_account_of_each_tenant() -> None:
    for _ in range(2):  # also once it is remembered
        assert accounts(metrics("acme-corp")) == [("acme-corp", "paul")]
        assert accounts(metrics("globex")) == [("globex", "lisa")]
        assert accounts(metrics("initech")) == [("initech", "lisa")]


def test_what_is_another_tenants_alone_is_no_usage_and_nobodys() -> None:
    for found in (metrics("default"), metrics("default")):
        assert (found.points, found.quarantined, found.foreign) == ([], [], {"h": 1})
    assert accounts(spans("acme-corp")) == [("acme-corp", "k1")]
    found_spans = spans("globex")
    assert (found_spans.points, found_spans.evidence, found_spans.quarantined) == ([], [], [])
    assert found_spans.unmatched == 1


def test_a_source_without_tenants_takes_what_those_before_it_have_not() -> None:
    assert accounts(metrics("acme-corp", EGRESS)) == [("acme-corp", "k1")]
    assert accounts(metrics("globex", EGRESS)) == [("globex", "all")]


def test_a_metric_that_names_its_account_is_the_files_for_its_tenants_alone() -> None:
    named = metrics_of(
        GATEWAY, sum_metric([number(BASE, NOW, 3, {"tallymark.account.id": "x", "key": "k1"})], "egress", "By")
    )
    rules = parse_rules(
        "meters: {out: {unit: By, sources: [{tenants: [a], metric: egress, quantity: value, account: key}]}}"
    )
    found = {}
    for tenant in ("a", "b"):
        decoded = decode_metrics(tenant, named.SerializeToString(), StreamCache(), TimeLimits(), NOW, Metering(rules))
        [point] = decoded.points
        found[tenant] = (point.stream.series.meter, point.stream.series.account)
    assert found == {"a": ("out", "k1"), "b": ("egress", "x")}


def test_it_is_explained_for_a_tenant_and_why_not_for_another() -> None:
    captured = [Captured("a", "metrics", METRICS), Captured("b", "traces", SPANS)]
    of_acme, of_globex, of_default = (explain(RULES, captured, tenant) for tenant in ("acme-corp", "globex", "default"))
    assert [line.account for line in of_acme.usage] == ["k1", "paul"]
    assert [line.account for line in of_globex.usage] == ["lisa"]
    assert of_default.usage == []
    [why] = [item.why for item in of_globex.items if item.signal == "traces"]
    assert why == "requests, source 3: it is tenant globex's, the source takes acme-corp's"
    [why] = [item.why for item in of_default.items if item.signal == "metrics"]
    assert why == (
        "requests, source 1: it is tenant default's, the source takes acme-corp's; "
        "requests, source 2: it is tenant default's, the source takes globex, initech's"
    )


def test_the_meters_of_a_tenant() -> None:
    assert list(RULES.of("acme-corp").meters) == ["requests", "egress"]
    assert list(RULES.of("default").meters) == ["egress"]
    assert RULES.of("default").meters["egress"] is RULES.meters["egress"]
