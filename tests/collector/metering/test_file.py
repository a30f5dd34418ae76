"""The file of meters: what it may say, and everything that is wrong with it at once."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from tallymark_collector.metering import MetersError, parse_rules, read_rules
from tallymark_collector.metering.rules import MetricSource, SpanSource

WRONG = """\
meters:
  api.requests:
    unit: "{request}"
    sources:
      - metric: http.server.request.duration
        quantity: counts
        where:
          http.response.status_code: {form: 200}
          http.route: 2xx
        account: []
        factor: 1/3
        dimension: [x]
        tenants: [acme-corp, Acme Corp, {a: b}]
      - span: "GET *"
        account: {atribute: x}
        scope: tallymark
      - spam: x
  x:
    unit: "a b"
    aggregation: max
    sources: []
  egress:
    unit: By
    sources:
      - metric: a
        quantity: value
        account: x
        dimensions: {a: {resource: b}, c: d, e: {resources: x}}
        since: yesterday
      - span: "*"
        quantity: {attribut: x}
        account: {attribute: a, resource: b}
        sampled: "yes"
        kind: [servers]
"""
SAID = [
    ":6: meters[\"api.requests\"].sources[0].quantity: expected one of value, count, sum, got 'counts'; did you mean",
    ':8: meters["api.requests"].sources[0].where["http.response.status_code"]: a condition is a text, a list of texts,',
    ':9: meters["api.requests"].sources[0].where["http.route"]: 2xx would be taken letter by letter; write 2??, or',
    ':10: meters["api.requests"].sources[0].account: must not be empty',
    ':11: meters["api.requests"].sources[0].factor: 1/3 is no finite decimal',
    ':12: meters["api.requests"].sources[0].dimension: unknown field; did you mean dimensions?',
    ":13: meters[\"api.requests\"].sources[0].tenants[1]: 'Acme Corp' is no name of a tenant: 1 to 63 of a-z, 0-9,",
    ':13: meters["api.requests"].sources[0].tenants[2]: expected text, got',
    ':15: meters["api.requests"].sources[1].account.atribute: unknown field; did you mean attribute?',
    ':16: meters["api.requests"].sources[1].scope: tallymark is the scope of Tallymark\'s own SDK',
    ':17: meters["api.requests"].sources[2]: a source is either `metric: name` or `span: name`',
    ":19: meters.x.unit: 'a b' is no unit of UCUM",
    ":20: meters.x.aggregation: what a period is billed by (max) is said in the plans file; here it is sum",
    ":21: meters.x.sources: must not be empty",
    ":28: meters.egress.sources[0].dimensions.e.resources: unknown field; did you mean resource?",
    ":29: meters.egress.sources[0].since: expected a time such as 2026-12-01T00:00:00Z, or a day (UTC)",
    ":31: meters.egress.sources[1].quantity.attribut: unknown field; did you mean attribute?",
    ":32: meters.egress.sources[1].account: name one attribute",
    ":33: meters.egress.sources[1].sampled: can only be allow, got the text 'yes'",
    ":34: meters.egress.sources[1].kind: expected one of internal, server,",
]


def test_everything_wrong_is_told_at_once_with_its_line() -> None:
    with pytest.raises(MetersError) as raised:
        parse_rules(WRONG)
    told = [str(problem) for problem in raised.value.problems]
    assert len(told) == len(SAID), told
    for line, said in zip(told, SAID, strict=True):
        assert line.startswith(f"meters.yaml{said}"), line


def source(fields: str, unit: str = '"1"') -> MetricSource | SpanSource:
    return parse_rules(f"meters: {{m: {{unit: {unit}, sources: [{{account: a, {fields}}}]}}}}").meters["m"].sources[0]


def refused(fields: str, unit: str = '"1"') -> str:
    with pytest.raises(MetersError) as raised:
        source(fields, unit)
    [problem] = raised.value.problems
    return problem.message


SPAN = 'span: "*", spans_are_complete: true'


@pytest.mark.parametrize(
    ("fields", "unit", "said"),
    [
        ('span: "*"', '"1"', "say `spans_are_complete: true` if nothing samples"),
        (f"{SPAN}, sampled: allow", '"1"', "contradict each other"),
        ('span: "*", spans_are_complete: false', '"1"', "can only be true"),
        (f"{SPAN}, quantity: duration", "ms", "a duration is in s, the meter's unit is 'ms': say by which `factor`"),
        (SPAN, "By", "a number of spans has no unit, the meter's is 'By'"),
        (f"{SPAN}, quantity: {{attribute: n}}, source_unit: kBy", "By", "`source_unit` is 'kBy'"),
        ("metric: a, quantity: count", "By", "a count has no unit, the meter's is 'By'"),
        ("metric: a, quantity: value, factor: 0", "s", "it must be above 0"),
        ("metric: a, quantity: value, factor: 1e3", "s", "expected an exact factor"),
        ("metric: a, quantity: value, factor: -1", "s", "expected an exact factor"),
        ("metric: a, quantity: value, factor: 1/0", "s", "it must be above 0"),
        ("metric: a, quantity: value, factor: 1/10000000000000000000000000000000", "s", "30 after the point"),
        ("metric: a, quantity: value, where: {a: {from: 3, to: 2}}", "s", "is empty; swap them"),
        ("metric: a, quantity: value, where: {a: {present: maybe}}", "s", "present is true or false"),
        ("metric: a, quantity: value, where: {a: []}", "s", "an empty list matches nothing"),
        ("metric: a, quantity: value, dimensions: [tallymark.account.id]", "s", "is the account, not a dimension"),
        ("metric: a, quantity: value, dimensions: [a, {resource: a}]", "s", "a is given twice"),
        ("metric: a, span: b, quantity: value", "s", "with one of them"),
    ],
)
def test_what_is_refused(fields: str, unit: str, said: str) -> None:
    assert said in refused(fields, unit)


@pytest.mark.parametrize(
    ("aggregation", "source", "said"),
    [
        ("max", "metric: a, quantity: value", "the plans file; here it is sum or level"),
        ("levels", "metric: a, quantity: value", "did you mean level"),
        ("level", "metric: a, quantity: count", "a count is no level; say `quantity: value`"),
        ("level", "metric: a, quantity: sum", "a sum is no level"),
        ("level", "span: a, sampled: allow", "sources[0]: a span is an event and stands at no level"),
    ],
)
def test_a_meter_of_levels_has_levels_alone(aggregation: str, source: str, said: str) -> None:
    with pytest.raises(MetersError) as raised:
        parse_rules(f"meters: {{m: {{unit: '1', aggregation: {aggregation}, sources: [{{account: a, {source}}}]}}}}")
    [problem] = raised.value.problems
    assert said in problem.message


@pytest.mark.parametrize(
    ("written", "factor"),
    [
        ("1/1000", "0.001"),
        ("1000", "1000"),
        ("0.25", "0.25"),
        ("3/8", "0.375"),
        ("1 / 1024", "0.0009765625"),
        ("2/6.4", "0.3125"),
    ],
)
def test_factors_are_exact(written: str, factor: str) -> None:
    assert source(f"metric: a, quantity: value, factor: {written}").by == Decimal(factor)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("2026-01-01", 1767225600), ("2026-01-01T01:00+01:00", 1767225600), ("2026-01-01T00:00:01Z", 1767225601)],
)
def test_since(written: str, seconds: int) -> None:
    assert source(f'metric: a, quantity: value, since: "{written}"').since == seconds * 10**9


def test_lines_and_files(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("meters:\n  a: {unit: s, sources: [{metric: a, quantity: value, account: x}]}\n")
    assert read_rules(file).lines == {"a": 2}
    for content, said in ((b"", "is empty"), (b"meters:\n", "needs at least one meter"), (b"\xff", "is not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(MetersError, match=said):
            read_rules(file)


def test_tenants_are_all_or_those_that_are_named() -> None:
    everybodys = source("metric: x, quantity: value")
    assert everybodys.tenants == ()
    assert everybodys.is_of("acme-corp")
    for fields in ("tenants: [acme-corp, globex]", 'tenants: "globex"'):
        found = source(f"metric: x, quantity: value, {fields}")
        assert found.is_of("globex")
        assert not found.is_of("default")
    assert source(f"{SPAN}, tenants: [globex]").tenants == ("globex",)


@pytest.mark.parametrize("given", ["[]", "{a: b}", "~", "[~]", "[[a]]", '""', '"*"', "Acme", "[a, a]"])
def test_what_is_no_list_of_tenants_is_refused(given: str) -> None:
    """It must not be taken for nobody's, nor for everybody's."""
    for what in ("metric: x, quantity: value", SPAN):
        assert refused(f"{what}, tenants: {given}")
