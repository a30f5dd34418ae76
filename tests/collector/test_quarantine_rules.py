"""What people are told of every Reason, and what a decision makes of a payload: plain functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tallymark_collector.model import Reason
from tallymark_collector.quarantine.mending import Decision, mend, origin
from tallymark_collector.quarantine.reading import read, time_text
from tallymark_collector.quarantine.rules import RULES, UNKNOWN, Kind, Option, rule
from tests.support.usage import BASE, SECOND, number, request, sum_metric


def test_every_reason_is_explained() -> None:
    lacking = sorted(reason.value for reason in set(Reason) - set(RULES))
    assert not lacking, f"quarantine/rules.py has no entry for {', '.join(lacking)}: say what it means and what to do"


def test_the_page_tells_of_every_reason() -> None:
    page = (Path(__file__).parents[2] / "docs/quarantine.md").read_text("utf-8")
    lacking = sorted(reason.value for reason in Reason if f"`{reason.value}`" not in page)
    assert not lacking, f"docs/quarantine.md has no line for {', '.join(lacking)}"


@pytest.mark.parametrize("reason", [*Reason, None])
def test_an_explanation_is_whole(reason: Reason | None) -> None:
    told = UNKNOWN if reason is None else RULES[reason]
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
