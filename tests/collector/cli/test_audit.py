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
from tests.support.usage import stream

BREAK = "UPDATE usage_hour SET quantity = 99 WHERE account = 'acme' AND bucket = '2024-03-01T10:00Z'"
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
    assert result.stdout == "compared 3 cached sums with 4 points\nnothing differs\n"
    assert json.loads(run("audit", "--json").stdout) == {
        "clean": True,
        "hours": 3,
        "points": 4,
        "differences": [],
        "drifts": [],
        "overlaps": [],
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
    assert done.stdout == "compared 3 cached sums with 4 points\nnothing differs\n"


def test_an_interrupt_ends_it_quietly(dsn: str) -> None:
    with psycopg.connect(dsn) as holding:
        holding.execute("LOCK TABLE tallymark.usage_point IN ACCESS EXCLUSIVE MODE")
        command = [sys.executable, "-m", "tallymark_collector", "audit", "--database", dsn]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                with psycopg.connect(dsn, autocommit=True) as another:
                    while another.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount == 0:
                        assert process.poll() is None
                        time.sleep(0.02)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
            finally:
                process.kill()
    assert (process.returncode, out, err) == (130, "", "")
