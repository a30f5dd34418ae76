"""`tallymark invoice --finalize`, `--correct`, `--verify`: what a person and a program see, and with which status."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psycopg
import pytest

from tallymark_collector import application
from tallymark_collector.settings import Settings
from tests.collector.cli.conftest import Run, cells, execute, fill, used
from tests.support.usage import stream

MARCH = ("--at", "2024-03-15")
ACME = ("--account", "acme", *MARCH)


def arrived(dsn: str) -> None:
    """What is there came a while ago: what comes just now is waited for."""
    execute(dsn, "UPDATE usage_point SET recorded_at = recorded_at - interval '2 minutes'")


@pytest.fixture
def billed(run: Run, plans: Path, dsn: str) -> None:
    """March 2024 of acme in Zurich: 12,350 requests are 4.90 and the base fee."""
    acme = stream("acme")
    fill(dsn, used(acme, "2024-03-15T12:00:00", 12_345), used(acme, "2024-02-29T23:00:00", 5))
    fill(dsn, used(stream("globex", "egress"), "2024-03-02T12:00:00", "7.50"))
    arrived(dsn)
    assert run("plans", "apply", str(plans)).exit_code == 0


@pytest.mark.usefixtures("billed")
def test_a_draft_becomes_a_document_and_what_is_shown_from_then_on(run: Run, dsn: str) -> None:
    draft = json.loads(run("invoice", *ACME, "--json").stdout)
    assert (draft["status"], draft["total"]) == ("draft", "33.90")
    result = run("invoice", *ACME, "--finalize", "--by", "anne")
    assert (result.exit_code, result.stderr) == (0, "")
    name = cells(result.stdout)[0][1]
    assert len(name) == 32
    assert "by anne" in result.stdout
    assert ["total", "33.90", "EUR"] in cells(result.stdout)

    execute(dsn, "DELETE FROM usage_hour")
    execute(dsn, "UPDATE usage_point SET quantity = 1 WHERE quantity = 12345")
    shown = run("invoice", *ACME)
    assert shown.exit_code == 0
    assert cells(shown.stdout)[0] == ["invoice", name]
    assert ["total", "33.90", "EUR"] in cells(shown.stdout)
    document = json.loads(run("invoice", *ACME, "--json").stdout)
    assert (document["status"], document["preliminary"], document["new"]) == ("finalized", False, False)
    assert (document["invoice"], document["total"], document["corrections"]) == (name, "33.90", [])
    assert document["lines"] == [
        {**line, "points": 2 if line["meter"] else None, "charge": document["lines"][n]["charge"]}
        for n, line in enumerate(draft["lines"])
    ]
    verified = run("invoice", *ACME, "--verify")
    assert verified.exit_code == 1
    assert f"error: what was billed is not what is stored: {name}: points were 2 with the digest" in verified.stderr
    execute(dsn, "UPDATE usage_point SET quantity = 12345 WHERE quantity = 1")
    verified = run("invoice", *ACME, "--verify")
    assert verified.exit_code == 0
    assert "verified: the points are what they were when they were billed" in verified.stdout


@pytest.mark.usefixtures("billed")
def test_late_usage_is_shown_apart_and_billed_by_a_debit_note(run: Run, dsn: str) -> None:
    invoice = json.loads(run("invoice", *ACME, "--finalize", "--json").stdout)
    fill(dsn, used(stream("acme"), "2024-03-20T12:00:00", 1000))
    shown = run("invoice", *ACME)
    assert shown.exit_code == 0
    assert ["total", "33.90", "EUR"] in cells(shown.stdout)
    assert shown.stdout.index("CAME LATER") > shown.stdout.index("total")
    assert ["api.requests", "{request}", "1,000", "1"] in cells(shown.stdout)
    assert "usage came after the period was finalised and is on no document" in shown.stderr
    assert run("invoice", *ACME, "--verify").exit_code == 0, "what came later is no change"
    execute(dsn, "UPDATE usage_point SET recorded_at = clock_timestamp() + interval '1 hour' WHERE quantity = 1000")
    refused = run("invoice", *ACME, "--correct")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "1 points of the period arrived just now; try again in a minute" in refused.stderr
    execute(dsn, "UPDATE usage_point SET recorded_at = clock_timestamp() - interval '61 seconds' WHERE quantity = 1000")
    corrected = run("invoice", *ACME, "--correct", "--json")
    assert corrected.exit_code == 0, corrected.stderr
    document = json.loads(corrected.stdout)
    [correction] = document["corrections"]
    assert (correction["kind"], correction["corrects"], correction["total"]) == (
        "debit_note",
        invoice["invoice"],
        "0.40",
    )
    assert (document["total"], document["total_with_corrections"], document["later"]) == ("33.90", "34.30", [])
    again = json.loads(run("invoice", "--correct", *MARCH, "--json").stdout)
    assert [(one["account"], one["new"], len(one["corrections"])) for one in again] == [("acme", False, 1)]
    shown = run("invoice", *ACME)
    assert "total with corrections: 34.30 EUR" in shown.stdout


@pytest.mark.usefixtures("billed")
def test_all_accounts_and_what_is_in_the_way_of_one(run: Run, dsn: str) -> None:
    execute(
        dsn,
        "INSERT INTO usage_quarantine (account, digest, tenant, meter, reason, detail, signal, time, payload)"
        " VALUES ('acme', 'x', 'default', 'api.requests', 'value_conflict', '', 'metrics', '2024-03-10', '')",
    )
    result = run("invoice", *MARCH, "--finalize", "--json")
    assert result.exit_code == 1
    acme, globex = json.loads(result.stdout)
    assert (acme["account"], [one["kind"] for one in acme["obstacles"]]) == ("acme", ["quarantine"])
    assert (globex["account"], globex["status"], globex["new"]) == ("globex", "finalized", True)
    assert "1 points of the period are open in quarantine; see tallymark quarantine list" in result.stderr
    assert "knowingly: --despite quarantine --because TEXT" in result.stderr
    accepted = run("invoice", *ACME, "--finalize", "--despite", "quarantine", "--because", "agreed")
    assert accepted.exit_code == 0, accepted.stderr
    assert ["because", "agreed"] in cells(accepted.stdout)
    assert ["despite", "1 points of the period are open in quarantine; see tallymark quarantine list"] in cells(
        accepted.stdout
    )


@pytest.mark.usefixtures("billed")
def test_what_makes_no_sense_is_told(run: Run) -> None:
    for options, sentence in [
        (("--finalize", "--correct"), "three things: give one of them"),
        (("--because", "x"), "are for --finalize and --correct"),
        (("--finalize", "--despite", "quarantine"), "needs a reason"),
        (("--finalize", "--despite", "drift", "--because", "x"), "drift cannot be accepted; what can is overlap"),
        (("--finalize", "--grace", "nan"), "--grace"),
        (("--finalize", "--grace", "-1"), "--grace"),
        (("--finalize", "--by", "a\0b"), "holds a NUL"),
        (("--verify",), "is not finalised at 2024-03-14T23:00:00+00:00: there is nothing to verify"),
        (("--correct",), "has no finalised period at 2024-03-14T23:00:00+00:00"),
        (("--finalize", "--account", "nobody"), "has no subscription"),
    ]:
        result = run("invoice", *ACME, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert sentence in result.stderr


@pytest.mark.usefixtures("plans")
def test_without_a_time_it_is_the_latest_period_that_is_over(run: Run, plans: Path) -> None:
    assert run("plans", "apply", str(plans)).exit_code == 0
    running = run("invoice", "--account", "globex", "--finalize", "--at", f"{datetime.now(timezone.utc):%FT%TZ}")
    assert running.exit_code == 1
    assert "its period has not ended, it does so at" in running.stderr
    made = json.loads(run("invoice", "--account", "globex", "--finalize", "--grace", "0", "--json").stdout)
    end = datetime.fromisoformat(made["period"]["end"].replace("Z", "+00:00"))
    assert timedelta(0) < datetime.now(timezone.utc) - end < timedelta(days=32)
    [verified] = json.loads(run("invoice", "--verify", "--grace", "0", "--json").stdout)
    assert (verified["invoice"], verified["changed"]) == (made["invoice"], [])


@pytest.mark.usefixtures("billed")
def test_two_processes_at_once_make_one_document(dsn: str) -> None:
    command = [sys.executable, "-m", "tallymark_collector", "invoice", *ACME, "--finalize", "--json", "--database", dsn]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(one.pop("new") for one in found) == [False, True]
    assert found[0] == found[1]
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT count(*) FROM tallymark.invoices").fetchone() == (1,)


@pytest.mark.parametrize("what", ["unfinalized", "unsettled"])
def test_retention_waits_unless_it_is_told_not_to(offline: Run, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    waits = []

    async def served(settings: Settings, _: object) -> None:
        waits.append(getattr(settings.retention, f"keep_{what}"))

    monkeypatch.setattr(application, "serve", served)
    for options in ((), (f"--drop-{what}",), (f"--keep-{what}",)):
        assert offline("serve", *options).exit_code == 0
    monkeypatch.setenv(f"TALLYMARK_KEEP_{what.upper()}", "false")
    assert offline("serve").exit_code == 0
    assert waits == [True, False, True, False]
