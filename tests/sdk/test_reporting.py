import pytest

from tallymark import reporting
from tallymark.reporting import Reporter


def test_one_line_a_kind_and_period_with_the_number_held_back(caplog: pytest.LogCaptureFixture) -> None:
    often, seldom = Reporter(every_s=0), Reporter(every_s=60)
    for n in range(3):
        often.warning("kind", "value %s", n)
        seldom.warning("kind", "value %s", n)
        seldom.error("other", "value %s", n)
    assert len(caplog.records) == 5
    seldom._next["kind"] = 0
    seldom.warning("kind", "value %s", 9)
    assert caplog.messages[-1] == "value 9 (and 2 more like it since the last line)"
    assert {r.name for r in caplog.records} == {"tallymark"}


def test_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "MAX_KINDS", 10)
    reporter = Reporter()
    for n in range(100):
        reporter.warning(str(n), "x")
    assert len(reporter._next) <= 10


def test_a_message_that_cannot_be_formatted_raises_nothing() -> None:
    Reporter().warning("kind", "%d %d", "not a number")
