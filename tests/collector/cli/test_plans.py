"""`tallymark plans`: every problem with its line, and applying the same file again changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.collector.cli.conftest import PLANS, Run, execute

BAD = PLANS.replace("unit_price: 0.0004", "unit_price: -1").replace("{plan: free,", "{plan: fre,")


def test_check_a_good_file_needs_no_database(offline: Run, plans: Path) -> None:
    result = offline("plans", "check", str(plans))
    assert result.exit_code == 0
    assert result.stdout == f"{plans}: good: plans 2, meters 2, accounts 2, in EUR\n"
    assert json.loads(offline("plans", "check", str(plans), "--json").stdout) == {
        "file": str(plans),
        "problems": [],
        "warnings": [],
        "currency": "EUR",
        "meters": ["api.requests", "egress"],
        "plans": ["free", "pro"],
        "accounts": 2,
    }


def test_check_says_every_problem_with_its_line(offline: Run, plans: Path) -> None:
    plans.write_text(BAD)
    result = offline("plans", "check", str(plans))
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first.startswith(f"{plans}:10: plans.pro.charges[1].unit_price: must not be negative")
    assert second.startswith(f"{plans}:14: accounts.globex.plan: ")
    as_json = offline("plans", "check", str(plans), "--json")
    assert as_json.exit_code == 1
    assert [(p["line"], p["field"]) for p in json.loads(as_json.stdout)["problems"]] == [
        (10, "plans.pro.charges[1].unit_price"),
        (14, "accounts.globex.plan"),
    ]


def test_apply_refuses_a_bad_file_and_changes_nothing(run: Run, plans: Path, dsn: str) -> None:
    plans.write_text(BAD)
    result = run("plans", "apply", str(plans))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 2
    assert f"{plans}:10: " in result.stderr
    as_json = run("plans", "apply", str(plans), "--json")
    assert (as_json.exit_code, len(json.loads(as_json.stdout)["problems"])) == (1, 2)
    assert execute(dsn, "SELECT FROM plan_version") == 0


def test_apply_reports_what_changed(run: Run, plans: Path) -> None:
    first = run("plans", "apply", str(plans))
    assert first.exit_code == 0
    assert first.stdout == "new plan versions: 2 (pro v1, free v1)\naccounts changed: 2 (acme, globex); unchanged: 0\n"
    again = run("plans", "apply", str(plans))
    assert again.stdout == "new plan versions: none\naccounts changed: none; unchanged: 2\n"

    plans.write_text(PLANS.replace("0.0004", "0.0005").replace("  acme:", "  other:"))
    assert json.loads(run("plans", "apply", str(plans), "--json").stdout) == {
        "new_versions": ["pro v2"],
        "unchanged_plans": ["free"],
        "changed_accounts": ["other"],
        "unchanged_accounts": 1,
        "only_in_database": ["acme"],
    }


LEVELS = """currency: EUR
meters:
  seats: {unit: "{seat}", aggregation: latest}
  peak: {unit: "{seat}", aggregation: max}
  said: {unit: "{seat}", aggregation: max, across: sum}
  once: {unit: "{seat}", aggregation: latest, across: latest}
  held: {unit: "{seat}", aggregation: integral}
plans:
  pro:
    charges: [{meter: peak, unit_price: '1'}]
accounts: {}
"""


def test_what_several_processes_come_to_should_be_said(run: Run, plans: Path, tmp_path: Path) -> None:
    """Of meters that may be levels: during a deploy two tell of the same seats."""
    plans.write_text(LEVELS)
    for command in ("check", "apply"):
        result = run("plans", command, str(plans))
        assert result.exit_code == 0
        first, second = result.stderr.splitlines()
        assert f"{plans}:3: meters.seats.across: is not said: of levels (gauges, UpDownCounters) the latest is" in first
        assert f"{plans}:4: meters.peak.across: is not said: of levels (gauges, UpDownCounters) the max is" in second
        assert "say `across: latest`" in first
    warnings = json.loads(run("plans", "check", str(plans), "--json").stdout)["warnings"]
    assert [(one["line"], one["field"]) for one in warnings] == [(3, "meters.seats.across"), (4, "meters.peak.across")]
    # What a file of meters makes of increases tells no level.
    meters = tmp_path / "meters.yaml"
    meters.write_text("meters: {peak: {unit: '{seat}', sources: [{span: s, account: a, spans_are_complete: true}]}}")
    warned = run("plans", "check", str(plans), "--meters", str(meters), "--json")
    assert [one["field"] for one in json.loads(warned.stdout)["warnings"]] == ["meters.seats.across"], warned.stdout


def test_a_change_of_a_closed_period_is_refused(run: Run, plans: Path) -> None:
    run("plans", "apply", str(plans))
    plans.write_text(PLANS.replace("{plan: free, since: 2024-03-01", "{plan: pro, since: 2024-03-01"))
    result = run("plans", "apply", str(plans))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "account 'globex'" in result.stderr
    assert "`until`" in result.stderr


def test_a_file_that_cannot_be_read(offline: Run, tmp_path: Path) -> None:
    for command in ("check", "apply"):
        result = offline("plans", command, str(tmp_path / "missing.yaml"))
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"the plans file {tmp_path}/missing.yaml cannot be read: No such file" in result.stderr
        assert "Is a directory" in offline("plans", command, str(tmp_path)).stderr


def test_a_command_is_needed(offline: Run) -> None:
    result = offline("plans")
    assert result.exit_code == 2
    assert "apply" in result.output
    assert "error" not in result.output


def test_a_database_that_takes_no_writes_now_is_another_status(run: Run, plans: Path, dsn: str) -> None:
    read_only = "format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database())"
    execute(dsn, f"DO $$BEGIN EXECUTE {read_only}; END$$")
    result = run("plans", "apply", str(plans))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "read-only transaction" in result.stderr
    assert result.stderr.count("\n") == 1
