"""`tallymark audit`: exit status 1 with the bucket that was broken by hand, 0 after the repair."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import psycopg
import pytest

from tallymark_collector.model import Temporality
from tests.collector.cli.conftest import Run, cells, execute, fill, program, used
from tests.support.control import closed, on_spans, told
from tests.support.usage import point, stream

BREAK = "UPDATE usage_hour SET quantity = 99 WHERE account = 'acme' AND bucket = '2024-03-01T10:00Z'"
SAID = "compared 3 cached sums with 4 points\nnothing differs\nproducers that send no control totals: 1\n"
DIFFERENCE = {
    "tenant": "default",
    "account": "acme",
    "bucket": "2024-03-01T10:00:00Z",
    "meter": "api.requests",
    "raw": "7.5",
    "aggregated": "99",
    "width": "hour",
}


@pytest.fixture
def filled(dsn: str) -> None:
    acme = stream("acme")
    fill(
        dsn,
        used(acme, "2024-03-01T10:00:00", 5),
        used(acme, "2024-03-01T10:59:59", "2.5"),
        used(acme, "2024-03-01T11:00:00", 1),
        used(stream("globex"), "2024-03-01T10:00:00", 3),
    )


@pytest.mark.usefixtures("filled")
def test_nothing_differs(run: Run) -> None:
    result = run("audit")
    assert result.exit_code == 0
    assert result.stdout == SAID
    assert json.loads(run("audit", "--json").stdout) == {
        "clean": True,
        "hours": 3,
        "points": 4,
        "differences": [],
        "drifts": [],
        "overlaps": [],
        "completeness": [],
        "unproved_producers": 1,
        "evidence": [],
    }


@pytest.mark.usefixtures("filled")
def test_a_difference_is_shown_and_repaired(run: Run, dsn: str) -> None:
    assert execute(dsn, BREAK) == 1
    found = run("audit")
    assert found.exit_code == 1
    assert ["default", "acme", "2024-03-01T10:00:00Z", "api.requests", "7.5", "99", "hour"] in cells(found.stdout)
    as_json = run("audit", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["differences"] == [DIFFERENCE]

    repaired = run("audit", "--repair", "--json")
    assert repaired.exit_code == 0
    document = json.loads(repaired.stdout)
    assert (document["clean"], document["repaired"], document["differences"]) == (True, 1, [])
    again = run("audit", "--repair")
    assert again.exit_code == 0
    assert "made again from their points: 0" in again.stdout
    assert json.loads(run("status", "--json").stdout)["hours_waiting"] == 0


BOUNDS = [
    (["--account", "globex"], 0),
    (["--account", "acme"], 1),
    (["--from", "2024-03-01T11:00Z"], 0),
    (["--to", "2024-03-01T10:00Z"], 0),
    (["--from", "2024-03-01T10:20Z", "--to", "2024-03-01T10:40Z"], 1),
]


@pytest.mark.usefixtures("filled")
def test_bounds_are_whole_hours(run: Run, dsn: str) -> None:
    execute(dsn, BREAK)
    for arguments, status in BOUNDS:
        assert run("audit", *arguments).exit_code == status, arguments


@pytest.mark.usefixtures("filled")
def test_what_only_a_person_can_judge_stays_after_a_repair(run: Run, dsn: str) -> None:
    total = stream("acme", "jobs", temporality=Temporality.CUMULATIVE)
    fill(dsn, used(total, "2024-03-01T10:00:00", 5))
    execute(dsn, "UPDATE usage_sample SET value = 6")
    overlapping = used(stream("globex"), "2024-03-01T10:00:00", 1)
    fill(dsn, overlapping._replace(start_ns=overlapping.start_ns - 1000, time_ns=overlapping.time_ns - 1000))
    result = run("audit", "--repair", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert [(d["account"], d["billed"], d["sampled"]) for d in document["drifts"]] == [("acme", "5", "6")]
    assert [o["account"] for o in document["overlaps"]] == ["globex"]
    shown = run("audit").stdout
    assert "1 cumulative streams" in shown
    assert "1 intervals overlap" in shown


def test_a_naive_time_and_a_reversed_range_are_refused(offline: Run) -> None:
    assert "has no time zone" in offline("audit", "--from", "2024-03-01T10:00:00").stderr
    assert offline("audit", "--from", "2024-03-02", "--to", "2024-03-01").exit_code == 2


@pytest.mark.usefixtures("filled")
def test_as_a_program_in_a_pipe_only_the_result_is_written(dsn: str) -> None:
    done = program("audit", "--database", dsn)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == SAID


def test_an_interrupt_ends_it_quietly(dsn: str) -> None:
    with psycopg.connect(dsn) as holding:
        holding.execute("LOCK TABLE tallymark.usage_point IN ACCESS EXCLUSIVE MODE")
        command = [sys.executable, "-m", "tallymark_collector", "audit", "--database", dsn]

        def interruptible() -> None:  # a shell makes what it runs in the background ignore it, with all its children
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
        ) as process:
            try:
                with psycopg.connect(dsn, autocommit=True) as another:
                    while another.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount == 0:
                        assert process.poll() is None
                        time.sleep(0.02)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
    assert (process.returncode, out, err) == (130, "", "")


LOST = {
    "tenant": "default",
    "namespace": "",
    "service": "shop",
    "producer": "one",
    "meter": "api.requests",
    "unit": "{request}",
    "status": "missing",
    "as_of": "2026-09-21T14:00:20Z",
    "counted": "5",
    "control": "12",
    "difference": "7",
    "since": "2026-09-21T14:00:10Z",
    "until": "2026-09-21T14:00:20Z",
    "in_quarantine": "0",
    "discarded": "0",
    "uncovered": "0",
    "closed": True,
}


def test_what_is_missing_is_shown_with_its_producer_and_time(run: Run, dsn: str) -> None:
    fill(dsn, point(stream(), 0, 10, 5), controls=[told(10, 5), told(20, 12)], closings=[closed(20)])
    found = run("audit", "--tolerance", "0")
    assert found.exit_code == 1
    assert "producers and meters: 0 complete, 1 missing, 0 too many, 0 not yet closed\n" in found.stdout
    state = "missing 7 since 2026-09-21T14:00:10Z, first told at 2026-09-21T14:00:20Z"
    row = ["default", "shop", "one", "api.requests", "{request}", state, "2026-09-21T14:00:20Z", "5", "12"]
    assert row in cells(found.stdout)
    as_json = run("audit", "--json", "--tolerance", "0")
    document = json.loads(as_json.stdout)
    [one] = document["completeness"]
    assert one.pop("last_seen").endswith("Z")
    assert (as_json.exit_code, document["clean"], one) == (1, False, LOST)
    assert run("audit", "--tolerance", "3600").exit_code == 0, "it may be on its way"
    assert json.loads(run("audit", "--account", "acme", "--json").stdout)["completeness"] is None
    assert run("audit", "--tolerance", "-1").exit_code == 2


def test_what_is_complete_is_listed_while_the_list_is_short(run: Run, dsn: str) -> None:
    fill(dsn, point(stream(), 0, 10, 5), controls=[told(10, 5)], closings=[closed(10)])
    said = run("audit", "--tolerance", "0")
    assert said.exit_code == 0
    assert any(row[3:6] == ["api.requests", "{request}", "complete"] for row in cells(said.stdout) if len(row) > 6)
    names = [f"p{n}" for n in range(25)]
    fill(
        dsn,
        *(point(stream(producer=name), 0, 10, 5) for name in names),
        controls=[told(10, 5, of=name) for name in names],
        closings=[closed(10, of=name) for name in names[1:]],
    )
    said = run("audit", "--tolerance", "0")
    assert "producers and meters: 25 complete, 0 missing, 0 too many, 1 not yet closed\n" in said.stdout
    assert [row[2] for row in cells(said.stdout) if len(row) > 6 and row[1] == "shop"] == ["p0"]


def test_spans_that_did_not_come_are_missing(run: Run, dsn: str) -> None:
    fill(dsn, counts=[on_spans(10, 3)])
    found = run("audit", "--tolerance", "0")
    assert found.exit_code == 1
    assert "accounts and meters on spans: 0 equal, 1 missing, 0 with more\n" in found.stdout
    assert ["default", "acme", "api.requests", "3", "0", "3", "0"] in cells(found.stdout)
    [one] = json.loads(run("audit", "--json", "--account", "acme", "--tolerance", "0").stdout)["evidence"]
    assert (one["counted"], one["shown"], one["missing"], one["more"]) == ("3", "0", "3", "0")
    assert json.loads(run("audit", "--json", "--account", "globex").stdout)["evidence"] == []
