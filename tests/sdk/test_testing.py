"""What users of `tallymark.testing` lean on: assertions that tell the truth, and a fixture that is no burden."""

from __future__ import annotations

import asyncio
import json
import threading
from decimal import Decimal
from pathlib import Path

import pytest

import tallymark
from tallymark import identify, record, track_usage
from tallymark.assembly import Runtime
from tallymark.identity import Identity, current_identity
from tallymark.testing import Captured, capture_usage


def fill() -> None:
    with identify(account="acme", plan="pro"):
        record("llm.tokens", 2, unit="{token}", attributes={"model": "small", "cached": True})
        record("llm.tokens", 1, unit="{token}", attributes={"model": "large"})
    with identify(account="globex"):
        record("llm.tokens", 40, unit="{token}")
        record("egress", 0.1, unit="By")
        record("egress", 0.2, unit="By")


def test_what_was_billed(captured_usage: Captured) -> None:
    fill()
    captured_usage.assert_billed("llm.tokens", 3, account="acme")
    captured_usage.assert_billed("llm.tokens", 43)
    captured_usage.assert_billed("llm.tokens", 3, plan="pro", unit="{token}")
    captured_usage.assert_billed("llm.tokens", 40, plan=None)
    captured_usage.assert_billed("llm.tokens", 2, attributes={"model": "small"})
    captured_usage.assert_billed("llm.tokens", 1, account="acme", attributes={"cached": None})
    captured_usage.assert_billed("llm.tokens", 0, attributes={"cached": 1})
    captured_usage.assert_billed("llm.tokens", 0, account="nobody")
    for amount in (0.3, Decimal("0.3")):
        captured_usage.assert_billed("egress", amount, account="globex")
    assert captured_usage.total("egress") == Decimal("0.3")
    assert captured_usage.total("llm.tokens", attributes={"model": "large"}) == 1
    captured_usage.assert_nothing_else()


def test_a_failure_shows_what_was_recorded_instead(captured_usage: Captured) -> None:
    fill()
    record("images", float("nan"))
    with pytest.raises(AssertionError) as caught:
        captured_usage.assert_billed("llm.tokens", 4, account="acme")
    assert str(caught.value).splitlines() == [
        "llm.tokens to 'acme': 4 should have been billed, 3 was",
        "recorded in all:",
        "  egress      0.3  By       account='globex'",
        "  llm.tokens    2  {token}  account='acme'    plan='pro'  cached=True model='small'",
        "  llm.tokens    1  {token}  account='acme'    plan='pro'  model='large'",
        "  llm.tokens   40  {token}  account='globex'",
        "  images: 1 recordings refused, for their quantity",
    ]


def test_a_wrong_unit_is_a_failure(captured_usage: Captured) -> None:
    fill()
    with pytest.raises(AssertionError, match=r"egress to 'globex': the unit should be 'KiBy', it is 'By'"):
        captured_usage.assert_billed("egress", 0.3, account="globex", unit="KiBy")


def test_usage_of_nobody_is_not_billed(captured_usage: Captured) -> None:
    record("calls", 2)
    with pytest.raises(AssertionError, match=r"2 should have been billed, 0 was\nsome names no account"):
        captured_usage.assert_billed("calls", 2)
    captured_usage.assert_recorded("calls", 2)
    captured_usage.assert_recorded("calls", 2, account=None)
    captured_usage.assert_billed("calls", 0)
    captured_usage.assert_nothing_else()


def test_usage_of_nobody_is_something_else(captured_usage: Captured) -> None:
    with identify(account="acme"):
        record("of.nobody", 2)
    record("of.nobody", 1)
    captured_usage.assert_billed("of.nobody", 2)
    with pytest.raises(AssertionError, match=r"more was recorded than was asserted:\n  of.nobody  1  1  no account\n"):
        captured_usage.assert_nothing_else()


def test_nothing_else_sees_what_came_after_the_assertion(captured_usage: Captured) -> None:
    with identify(account="acme"):
        record("calls", 2)
        captured_usage.assert_billed("calls", 2, account="acme")
        captured_usage.assert_nothing_else()
        record("calls", 1)
    with pytest.raises(AssertionError, match="after the assertion of calls to 'acme': 3 instead of 2"):
        captured_usage.assert_nothing_else()


def test_nothing_at_all(captured_usage: Captured) -> None:
    captured_usage.assert_nothing()
    assert str(captured_usage) == "  nothing"
    with identify(account="acme"):
        record("calls")
    captured_usage.assert_nothing("images")
    captured_usage.assert_nothing(account="globex")
    for meter, account in ((None, "acme"), ("calls", "acme")):
        with pytest.raises(AssertionError, match=r"to 'acme' was to be recorded in no amount\nrecorded in all:"):
            captured_usage.assert_nothing(meter, account=account)


def test_an_expectation_that_is_no_quantity(captured_usage: Captured) -> None:
    with pytest.raises(ValueError, match="negative"):
        captured_usage.assert_billed("calls", -1)


def test_whoever_is_left_identified_is_seen_and_forgotten() -> None:
    with identify(account="outside"), capture_usage() as usage:
        assert usage.identity.account == "outside"
        identify(account="left over")
        assert usage.identity == Identity("left over")
    with identify(account="outside"):
        with capture_usage():
            identify(account="left over")
        assert current_identity().account == "outside"


async def test_in_a_coroutine_and_its_threads(captured_usage: Captured) -> None:
    @track_usage("jobs")
    async def job() -> None:
        await asyncio.sleep(0)

    identify(account="acme")
    await asyncio.gather(job(), job(), asyncio.to_thread(record, "jobs", 3, unit="{request}"))
    captured_usage.assert_billed("jobs", 5, account="acme", unit="{request}")


def test_a_service_that_configures_itself_neither_writes_nor_sends(
    fresh: Runtime, captured_usage: Captured, state_dir: Path
) -> None:
    threads = set(threading.enumerate())
    tallymark.configure(endpoint="http://localhost:1")
    with identify(account="acme"):
        record("calls")
    assert tallymark.flush(0)
    assert tallymark.shutdown(0)
    tallymark.configure(endpoint="http://localhost:2", disabled=True)
    captured_usage.assert_billed("calls", 1, account="acme")
    assert set(threading.enumerate()) <= threads, "those of tests before may end meanwhile"
    assert not state_dir.exists()
    with pytest.raises(tallymark.SettingsError):
        tallymark.configure(endpoint="nonsense://")


SERVICE = """
    import pytest
    from tallymark import identify, record

    def test_first(captured_usage):
        identify(account="acme")
        record("tokens", 3)
        captured_usage.assert_billed("tokens", 3, account="acme")

    def test_second(captured_usage):
        record("tokens", 1)
        captured_usage.assert_billed("tokens", 4, account="acme")
"""


def test_the_fixture_is_there_by_itself(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SERVICE)
    result = pytester.runpytest_subprocess("-p", "no:asyncio", "-W", "error")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["E*tokens to 'acme': 4 should have been billed, 0 was", "E*tokens  1  1  no account", "*:11: AssertionError"]
    )
    result.stdout.no_fnmatch_line("*testing.py*")


def test_the_fixture_can_be_left_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SERVICE)
    result = pytester.runpytest_subprocess("-p", "no:tallymark")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["E*fixture 'captured_usage' not found"])
    assert "captured_usage" in pytester.runpytest_subprocess("--fixtures").stdout.str()


def test_who_does_not_use_it_does_not_pay_for_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_nothing_is_imported():
            assert "pytest_tallymark" in sys.modules
            assert not [name for name in sys.modules if name.split(".")[0] in ("tallymark", "opentelemetry", "google")]
        """
    )
    pytester.runpytest_subprocess("-p", "no:asyncio", "-W", "error").assert_outcomes(passed=1)


def test_coverage_of_the_package_starts_before_it_is_imported(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(captured_usage): captured_usage.assert_nothing()")
    pytester.runpytest_subprocess("--cov=tallymark", "--cov-report=json").assert_outcomes(passed=1)
    files = json.loads((pytester.path / "coverage.json").read_text())["files"]
    (names,) = (found for name, found in files.items() if name.endswith("tallymark/conventions.py"))
    assert names["summary"]["covered_lines"] > 20
    assert names["summary"]["missing_lines"] == 0, "it holds nothing that would not run when it is imported"
