"""`tallymark usage`: exact numbers in three forms, and refusals that say what to write."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import psycopg
import pytest

from tests.collector.cli.conftest import Run, cells, fill, used
from tests.support.usage import stream

GET = {"http.route": "/orders", "http.response.status_code": 200}


@pytest.fixture
def filled(dsn: str) -> None:
    acme, globex = stream("acme", **GET), stream("globex")
    fill(
        dsn,
        used(acme, "2024-03-01T10:00:00", 1_234_000),
        used(acme, "2024-03-01T10:30:00", "567.25"),
        used(acme, "2024-03-02T00:00:00", 1),
        used(globex, "2024-03-01T23:59:59", "0.0000001"),
        used(stream("globex", "egress"), "2024-03-01T12:00:00", "1E+21"),
    )


@pytest.mark.usefixtures("filled")
def test_the_table(run: Run) -> None:
    result = run("usage")
    assert result.exit_code == 0
    assert cells(result.stdout) == [
        ["account", "meter", "unit", "quantity", "points"],
        ["acme", "api.requests", "{request}", "1,234,568.25", "3"],
        ["globex", "api.requests", "{request}", "0.0000001", "1"],
        ["globex", "egress", "{request}", "1,000,000,000,000,000,000,000", "1"],
    ]
    lines = [line.rstrip() for line in result.stdout.splitlines() if "{request}" in line]
    assert len({len(line) for line in lines}) == 1, "numbers end in one column"
    assert result.stderr == ""


@pytest.mark.usefixtures("filled")
def test_json_is_exact(run: Run) -> None:
    by_flag, by_format = run("usage", "--json"), run("usage", "--format", "json")
    assert by_flag.stdout == by_format.stdout
    assert json.loads(by_flag.stdout) == [
        {"account": "acme", "meter": "api.requests", "unit": "{request}", "quantity": "1234568.25", "points": 3},
        {"account": "globex", "meter": "api.requests", "unit": "{request}", "quantity": "0.0000001", "points": 1},
        {"account": "globex", "meter": "egress", "unit": "{request}", "quantity": "1" + "0" * 21, "points": 1},
    ]


@pytest.mark.usefixtures("filled")
def test_csv_is_exact_and_has_times_in_utc(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(run("usage", "--by", "day,account,status", "--format", "csv").stdout)))
    assert [(r["day"], r["account"], r["meter"], r["status"], Decimal(r["quantity"])) for r in rows] == [
        ("2024-03-01T00:00:00Z", "acme", "api.requests", "200", Decimal("1234567.25")),
        ("2024-03-01T00:00:00Z", "globex", "api.requests", "", Decimal("0.0000001")),
        ("2024-03-01T00:00:00Z", "globex", "egress", "", Decimal(10**21)),
        ("2024-03-02T00:00:00Z", "acme", "api.requests", "200", Decimal(1)),
    ]


RANGES = [
    (["--from", "2024-03-01", "--to", "2024-03-02"], "1234567.25"),
    (["--from", "2024-03-02"], "1"),
    (["--to", "2024-03-01T10:30Z"], "1234000"),
    (["--from", "2024-03-01T11:30:00+01:00", "--to", "2024-03-01T12:00:00.5+0100"], "567.25"),
    (["--from", "2024-03-01 10:00:00.000001Z", "--to", "2024-03-02T00:00:00z"], "567.25"),
]


@pytest.mark.usefixtures("filled")
def test_ranges_are_half_open_to_the_microsecond_and_filters(run: Run) -> None:
    for arguments, total in RANGES:
        rows = json.loads(run("usage", "--account", "acme", "--json", *arguments).stdout)
        assert [row["quantity"] for row in rows] == [total], arguments
    rows = json.loads(run("usage", "--account", "globex", "--meter", "egress", "--by", "account", "--json").stdout)
    assert [(row["account"], row["meter"]) for row in rows] == [("globex", "egress")]


def test_an_unknown_dimension(run: Run) -> None:
    result = run("usage", "--by", "account,color")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot group by color: choose from account, meter, unit, plan, route" in result.stderr


def test_nothing_used_is_an_empty_result_and_a_pipe_stays_quiet(run: Run) -> None:
    assert json.loads(run("usage", "--json").stdout) == []
    assert run("usage", "--format", "csv").stdout == "account,meter,unit,quantity,points\n"
    table = run("usage")
    assert cells(table.stdout) == [["account", "meter", "unit", "quantity", "points"]]
    assert table.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "2024-03-01T10:00"], ["--from '2024-03-01T10:00' has no time zone", "2024-03-01T10:00Z"]),
        (["--to", "yesterday"], ["--to 'yesterday'", "a day such as 2026-09-01"]),
        (["--from", "2024-02-30"], ["--from '2024-02-30'"]),
        (["--from", "2024-03-01T25:00Z"], ["--from '2024-03-01T25:00Z'"]),
        (["--from", "0001-01-01T00:00+14:00"], ["from 1970-01-01 on"]),
        (["--from", "2024-03-02", "--to", "2024-03-01"], ["--to 2024-03-01 lies before --from 2024-03-02"]),
        (["--json", "--format", "csv"], ["--json and --format csv contradict each other"]),
        (["--format", "xml"], ["--format", "'xml'", "'csv'"]),
        (["--frm", "2024-03-02"], ["No such option: --frm", "tallymark usage --help"]),
    ],
)
def test_refusals_say_what_is_wrong_and_what_to_do(offline: Run, arguments: list[str], says: list[str]) -> None:
    result = offline("usage", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for piece in says:
        assert piece in result.stderr


def test_names_are_shown_as_they_are(run: Run, dsn: str) -> None:
    names = ["[red]x[/red]", "[/]", ":smile:", "\\[b]", "bell\x07\x1b[31m", "a\nb", "Zürich"]
    fill(dsn, *(used(stream(name), "2024-03-01T10:00:00", 1) for name in names))
    shown = [row[0] for row in cells(run("usage").stdout)[1:]]
    assert sorted(shown) == sorted(["[red]x[/red]", "[/]", ":smile:", "\\[b]", r"bell\x07\x1b[31m", r"a\nb", "Zürich"])
    assert {row["account"] for row in json.loads(run("usage", "--json").stdout)} == set(names)
    rows = csv.DictReader(io.StringIO(run("usage", "--format", "csv").stdout, newline=""))
    assert {row["account"] for row in rows} == set(names)


def test_long_names_and_numbers_are_not_cut_in_a_pipe(run: Run, dsn: str) -> None:
    fill(dsn, used(stream("a" * 256, "m" * 200), "2024-03-01T10:00:00", "9" * 60))
    text = run("usage").stdout
    assert "a" * 256 in text
    assert "m" * 200 in text
    assert ",".join(["999"] * 20) in text


@pytest.mark.usefixtures("filled")
def test_as_of_a_moment_of_the_past(run: Run, dsn: str) -> None:
    """Two points were recorded two hours ago, the others just now."""
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        connection.execute(
            "UPDATE usage_point SET recorded_at = recorded_at - interval '2 hours' WHERE quantity IN (1, 567.25)"
        )
    hour_ago = (datetime.now(timezone.utc) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    found = json.loads(run("usage", "--as-of", hour_ago, "--json").stdout)
    assert [(row["account"], row["quantity"], row["points"]) for row in found] == [("acme", "568.25", 2)]
    tomorrow = run("usage", "--as-of", "2099-01-01")
    assert (tomorrow.exit_code, "may still change" in tomorrow.stderr) == (2, True)
    assert "--as-of '2024-03-01T10' is no time" in run("usage", "--as-of", "2024-03-01T10").stderr
