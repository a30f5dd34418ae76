"""What people are told of every Reason, and what a decision makes of a payload: plain functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.model import Reason
from tallymark_collector.quarantine.mending import Decision, mend, origin
from tallymark_collector.quarantine.reading import read, time_text
from tallymark_collector.quarantine.rules import METERED, RULES, UNKNOWN, Kind, Option, Rule, rule
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, request, sum_metric


def test_every_reason_is_explained() -> None:
    lacking = sorted(reason.value for reason in set(Reason) - set(RULES))
    assert not lacking, f"quarantine/rules.py has no entry for {', '.join(lacking)}: say what it means and what to do"


def test_the_page_tells_of_every_reason() -> None:
    page = (Path(__file__).parents[2] / "docs/quarantine.md").read_text("utf-8")
    lacking = sorted(reason.value for reason in Reason if f"`{reason.value}`" not in page)
    assert not lacking, f"docs/quarantine.md has no line for {', '.join(lacking)}"


@pytest.mark.parametrize("told", [*RULES.values(), *METERED.values(), UNKNOWN])
def test_an_explanation_is_whole(told: Rule) -> None:
    assert told.meaning.endswith(".")
    for clause in (told.remedy, told.release, *told.never.values()):
        assert clause, "nothing is left unsaid"
        assert clause[-1] not in ".;,", "it is put into a sentence"
    if told.needs or told.takes:
        assert set(told.never) != set(Kind), "options of what cannot be released would promise something"
    assert not told.needs & told.takes


def test_a_reason_of_a_newer_version_is_told_to_be_one() -> None:
    assert rule("from_the_future") is UNKNOWN
    assert all(UNKNOWN.refusal(kind) for kind in Kind)


def test_of_a_file_of_meters_some_reasons_are_others() -> None:
    assert rule("account_missing", metered=True) is METERED[Reason.ACCOUNT_MISSING]
    assert rule("account_missing") is RULES[Reason.ACCOUNT_MISSING]
    assert rule("value_negative", metered=True) is RULES[Reason.VALUE_NEGATIVE]
    assert rule("from_the_future", metered=True) is UNKNOWN
    for told in METERED.values():
        assert not {Option.METER, Option.UNIT} & (told.needs | told.takes), "its name and unit are the file's"
    conflict = rule("value_conflict", metered=True)
    assert conflict.refusal(Kind.USAGE_SPAN)
    assert not conflict.refusal(Kind.DELTA)


def test_every_option_of_a_decision_is_seen() -> None:
    whole = Decision("acme", "m", "u", ("a",), additional=True, force=True)
    assert (Decision().options(), whole.options()) == (set(), set(Option))
    assert Decision(account="", meter="", unit="").options() == {Option.ACCOUNT, Option.METER, Option.UNIT}


def test_times_are_utc_to_the_nanosecond() -> None:
    assert time_text(0) == "(not given)"
    assert time_text(1_790_000_000_000_000_000) == "2026-09-21T14:13:20Z"
    assert time_text(1_790_000_000_123_456_789) == "2026-09-21T14:13:20.123456789Z"
    assert time_text(1_790_000_000_500_000_000) == "2026-09-21T14:13:20.5Z"
    assert time_text(2**64 - 1) == "2554-07-21T23:34:33.709551615Z"


@pytest.mark.parametrize("signal", ["metrics", "traces"])
@pytest.mark.parametrize("payload", [b"", b"\xff\xff", b"\x0a\x00", b"\x0a\x02\x12\x00", b"\x0a\x04\x12\x02\x12\x00"])
def test_what_cannot_be_read_is_said_to_be_so(signal: str, payload: bytes) -> None:
    content = read(signal, payload)
    assert content.facts, content
    assert content.kind in (Kind.OTHER, Kind.SPAN)


def payload(attributes: dict[str, object], **more: str) -> bytes:
    return request(sum_metric([number(BASE, BASE + SECOND, 1, attributes)]), **more).SerializeToString()


def test_nothing_decided_changes_nothing() -> None:
    sent = payload({"a": 1})
    for decision in (Decision(), Decision(force=True, additional=True), Decision(drop=("b",), meter="api.requests")):
        mended = mend("metrics", sent, decision)
        assert (mended.payload, mended.changed) == (sent, {})


def test_what_is_changed_is_told() -> None:
    sent = payload({"a": 1, "b": "x", "tallymark.account.id": True, "otel.metric.overflow": True})
    mended = mend("metrics", sent, Decision("acme", "jobs", "{job}", ("b",)))
    assert mended.changed == {
        "meter": ("api.requests", "jobs"),
        "unit": ("{request}", "{job}"),
        "b": ("x", None),
        "tallymark.account.id": ("bool_value: true", "acme"),
        "otel.metric.overflow": ("bool_value: true", None),
    }
    facts = read("metrics", mended.payload).facts
    assert (facts["metric"], facts["unit"], facts["value"]) == ("jobs", "{job}", "1")
    assert facts["attributes"] == '{"a":1,"tallymark.account.id":"acme"}'


def test_who_a_point_was_does_not_depend_on_its_wrapping() -> None:
    one = origin("default", payload({"a": 1, "b": 2}))
    assert origin("default", payload({"b": 2, "a": 1})) == one
    assert origin("default", payload({"a": 1, "b": 2}, **{"k8s.pod.name": "x"})) == one
    others = [
        origin("other", payload({"a": 1, "b": 2})),
        origin("default", payload({"a": 1, "b": "2"})),
        origin("default", payload({"a": 1, "b": 2}, producer="two")),
    ]
    assert len({one.stream, *(other.stream for other in others)}) == 4
    later = request(sum_metric([number(BASE, BASE + SECOND + 1, 1, {"a": 1, "b": 2})])).SerializeToString()
    assert origin("default", later).stream == one.stream
    assert origin("default", later).point != one.point


def of_kind(name: str) -> Metric:
    """A metric of this type that says 3 and 1.5, where it can."""
    metric = Metric(name="m", unit="s")
    data = getattr(metric, name)
    if name not in ("summary", "gauge"):
        data.aggregation_temporality = 1
    point = data.data_points.add(start_time_unix_nano=BASE, time_unix_nano=BASE + SECOND)
    if name == "gauge":
        point.as_double = 1.5
    else:
        point.count, point.sum = 3, 1.5
    return metric


@pytest.mark.parametrize(
    ("name", "kind", "type_"),
    [
        ("histogram", Kind.DELTA, "histogram, increase (delta)"),
        ("exponential_histogram", Kind.DELTA, "exponential histogram, increase (delta)"),
        ("summary", Kind.CUMULATIVE, "summary"),
        ("gauge", Kind.LEVEL, "gauge"),
    ],
)
def test_what_is_no_sum_can_be_read(name: str, kind: Kind, type_: str) -> None:
    sent = request(of_kind(name)).SerializeToString()
    numbers = {"value": "1.5"} if name == "gauge" else {"count": "3", "sum": "1.5"}
    for metered in (True, False):
        content = read("metrics", sent, metered=metered)
        by_itself = Kind.LEVEL if name == "gauge" else Kind.OTHER
        assert content.kind is (kind if metered else by_itself), "usage only by a file"
        assert {key: content.facts.get(key) for key in ("type", *numbers)} == {"type": type_, **numbers}
        assert content.facts["time"] == time_text(BASE + SECOND)


def test_of_several_points_the_first_is_shown() -> None:
    several = histogram([histogram_point(BASE, BASE + n, n, None, {"n": n}) for n in (1, 2)], "h", temporality=2)
    content = read("metrics", metrics_of({}, several).SerializeToString(), metered=True)
    assert content.kind is Kind.CUMULATIVE
    assert content.facts["points"] == "2, of which this is the first"
    assert (content.facts["attributes"], content.facts["count"], content.facts["sum"]) == (
        '{"n":1}',
        "1",
        "(not given)",
    )


def test_spans_are_told_apart_by_what_they_are() -> None:
    sent = spans_of({"service.name": "envoy"}, [span(1, {"a": 1}, kind=99)]).SerializeToString()
    assert read("traces", sent).kind is Kind.SPAN
    content = read("traces", sent, metered=True)
    assert content.kind is Kind.USAGE_SPAN
    assert (content.facts["span kind"], content.facts["status"]) == ("unspecified", "unset")
