"""`tallymark import`: options, the rehearsal, what is told, and exit statuses."""

from __future__ import annotations

import gzip
import json
import os
import pty
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psycopg
import pytest

from tests.collector.cli.conftest import Run, cells, program
from tests.support.logs import EVENT_MAPPING

NOW = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(hours=1)
BY_HAND = [
    "--format",
    "combined",
    "--account",
    "user",
    "--meter",
    "api.requests:{request}",
    "--meter",
    "egress:By=bytes",
]


def line(second: int = 0, user: str = "acme", size: int | str = 10) -> str:
    at = (NOW + timedelta(seconds=second)).strftime("%d/%b/%Y:%H:%M:%S +0000")
    return f'10.0.0.1 - {user} [{at}] "GET /a HTTP/1.1" 200 {size} "-" "curl"\n'


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "access.log"
    file.write_text(line() + line() + line(1, "globex", "-"))
    return file


def test_an_import_by_options(run: Run, log: Path) -> None:
    result = run("import", str(log), "--source", "web-1", *BY_HAND)
    assert result.exit_code == 0, result.stderr
    table = cells(result.stdout)
    assert table[:4] == [
        ["account", "meter", "unit", "quantity"],
        ["acme", "api.requests", "{request}", "2"],
        ["acme", "egress", "By", "20"],
        ["globex", "api.requests", "{request}", "1"],
    ]
    assert result.stderr == "", "nothing in a pipe"
    [usage] = [each for each in json.loads(run("usage", "--json").stdout) if each["meter"] == "egress"]
    assert usage["quantity"] == "20"
    again = json.loads(run("import", str(log), "--source", "web-1", *BY_HAND, "--json").stdout)
    assert (again["before"], again["accepted"], again["totals"]) == (3, 0, [])


def test_json_says_all(run: Run, log: Path) -> None:
    log.write_text(log.read_text() + "bad\n\n" + line(2)[:-1])
    result = run("import", str(log), "--source", "web-1", *BY_HAND, "--json")
    assert result.exit_code == 1, "a line was rejected"
    assert json.loads(result.stdout) == {
        "tenant": "default",
        "source": "web-1",
        "files": 1,
        "before": 0,
        "lines": 5,
        "accepted": 3,
        "duplicates": 0,
        "conflicts": 0,
        "rejected": 1,
        "skipped": 0,
        "blank": 1,
        "left": 1,
        "points": 5,
        "quarantined": 0,
        "unclosed": [],
        "reasons": {"expected the identity (-)": 1},
        "totals": [
            {"account": "acme", "meter": "api.requests", "unit": "{request}", "quantity": "2"},
            {"account": "acme", "meter": "egress", "unit": "By", "quantity": "20"},
            {"account": "globex", "meter": "api.requests", "unit": "{request}", "quantity": "1"},
        ],
    }
    assert "the last line has no line end" in result.stderr


def billed(run: Run, tenant: str) -> dict[tuple[str, str], str]:
    usage = json.loads(run("usage", "--tenant", tenant, "--json").stdout)
    return {(each["account"], each["meter"]): each["quantity"] for each in usage}


USED = {("acme", "api.requests"): "2", ("acme", "egress"): "20", ("globex", "api.requests"): "1"}


@pytest.mark.parametrize("by_variable", [False, True])
def test_usage_becomes_that_of_the_tenant_that_is_named(
    run: Run, log: Path, monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    run("tenants", "set", "acme-corp")
    named = ["--tenant", "acme-corp"]
    if by_variable:
        monkeypatch.setenv("TALLYMARK_TENANT", "acme-corp")
        named = []
    result = run("import", str(log), "--source", "web-1", *BY_HAND, *named)
    assert result.exit_code == 0, result.stderr
    assert "tenant acme-corp, source web-1: files 1, " in result.stdout, "whose usage it became"
    assert billed(run, "acme-corp") == USED
    assert billed(run, "default") == {}


def test_a_file_of_two_tenants_bills_each_once(run: Run, log: Path) -> None:
    log.write_text(log.read_text() + "bad\n")
    run("tenants", "set", "acme-corp")
    tenants = ("acme-corp", "default")
    for tenant in (*tenants, *tenants):
        rejects = str(log.with_name(f"{tenant}.rejects"))
        options = ["--source", "web-1", "--tenant", tenant, "--rejects-file", rejects, "--json"]
        result = run("import", str(log), *options, *BY_HAND)
        assert json.loads(result.stdout)["tenant"] == tenant
    assert [billed(run, tenant) for tenant in tenants] == [USED, USED]
    assert json.loads(log.with_name("acme-corp.rejects").read_text())["tenant"] == "acme-corp"


def test_a_tenant_that_nobody_has_made_is_a_slip(run: Run, dsn: str, log: Path) -> None:
    result = run("import", str(log), "--source", "web-1", *BY_HAND, "--tenant", "acme-crop")
    assert result.exit_code == 2
    assert "there is no tenant 'acme-crop': there are default" in result.stderr
    assert "`tallymark tenants set acme-crop` makes it" in result.stderr
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        for table in ("usage_point", "usage_import_source"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    run("tenants", "set", "acme-crop")
    assert run("import", str(log), "--source", "web-1", *BY_HAND, "--tenant", "acme-crop").exit_code == 0


def test_a_rehearsal_says_whose_usage_it_would_be(offline: Run, log: Path) -> None:
    arguments = ["import", str(log), "--source", "web-1", *BY_HAND, "--dry-run", "--tenant"]
    assert json.loads(offline(*arguments, "acme-corp", "--json").stdout)["tenant"] == "acme-corp"
    assert "tenant acme-corp, source web-1: files 1, " in offline(*arguments, "acme-corp").stdout
    result = offline(*arguments, "Acme Corp")
    assert result.exit_code == 2
    assert "'Acme Corp' is no name of a tenant" in result.stderr


def test_rejects_of_another_tenant_are_not_mixed(run: Run, log: Path) -> None:
    log.write_text("bad\n")
    run("tenants", "set", "acme-corp")
    options = ["--source", "web-1", *BY_HAND]
    assert run("import", str(log), *options, "--tenant", "acme-corp").exit_code == 1
    result = run("import", str(log), *options)
    assert result.exit_code == 2
    assert "holds rejects of the tenant 'acme-corp': move it away, or name another with" in result.stderr
    rejects = log.with_name("access.log.rejects")
    rejects.write_text(json.dumps(json.loads(rejects.read_text()) | {"text": line().rstrip("\n")}) + "\n")
    result = run("import", str(rejects), *options, "--rejects")
    assert result.exit_code == 1
    assert "it was rejected of the tenant …" in result.stdout
    rejects.with_name("access.log.rejects.rejects").unlink()
    assert run("import", str(rejects), *options, "--rejects", "--tenant", "acme-corp").exit_code == 0
    assert billed(run, "acme-corp") == {("acme", "api.requests"): "1", ("acme", "egress"): "10"}
    assert billed(run, "default") == {}


def test_rejects_that_name_no_tenant_are_the_default_ones(run: Run, log: Path) -> None:
    """A reject file of before, whose records said no tenant."""
    log.write_text("bad\n")
    options = ["--source", "web-1", *BY_HAND]
    run("import", str(log), *options)
    rejects = log.with_name("access.log.rejects")
    record = json.loads(rejects.read_text()) | {"text": line().rstrip("\n")}
    del record["tenant"]
    rejects.write_text(json.dumps(record) + "\n")
    assert run("import", str(log), *options).exit_code == 0, "the same reject file is taken"
    assert run("import", str(rejects), *options, "--rejects").exit_code == 0
    assert billed(run, "default") == {("acme", "api.requests"): "1", ("acme", "egress"): "10"}


def test_a_rehearsal_needs_no_database_and_leaves_nothing(offline: Run, log: Path) -> None:
    log.write_text("bad\n" + log.read_text())
    result = offline("import", str(log), "--source", "web-1", *BY_HAND, "--dry-run", "--lines", "3", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["lines"], told["accepted"], told["rejected"]) == (3, 2, 1)
    assert [(each["line"], each["meter"], each["quantity"]) for each in told["first"]] == [
        (2, "api.requests", "1"),
        (2, "egress", "10"),
        (3, "api.requests", "1"),
        (3, "egress", "10"),
    ]
    assert told["faults"] == [{"file": str(log), "line": 1, "reason": "expected the identity (-) at character 4"}]
    assert [each.name for each in log.parent.iterdir()] == ["access.log"]
    text = offline("import", str(log), "--source", "web-1", *BY_HAND, "--dry-run").stdout
    assert f"{log}:1: expected the identity" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what a line bills: --mapping FILE, or --format and --account"),
        (["--format", "combined"], "options:1: account: is required"),
        (["--format", "combined", "--account", "usr"], "an access log has no field 'usr'; did you mean user"),
        (["--mapping", "m.yaml", "--account", "a"], "--mapping says all that a line bills: leave out --account"),
        (["--mapping", "missing.yaml"], "the mapping missing.yaml cannot be read: No such file"),
        (["--format", "csv", "--account", "a", "--meter", "="], "--meter '=' is not like"),
        ([*BY_HAND, "--oldest", "soon"], "--oldest 'soon' is no time"),
        ([*BY_HAND, "--source", ""], "--source needs a name of 1 to 128 characters"),
    ],
)
def test_what_cannot_be_meant(offline: Run, log: Path, arguments: list[str], said: str) -> None:
    result = offline("import", str(log), "--source", "web-1", *arguments, "--dry-run")
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n", "the header of {} has no 'at', 'customer', 'n', which the mapping names: it has 'a', 'b'"),
        (b"at,at\n", "the header of {} names 'at' twice"),
        (b'at,"x\n' + b"y\n" * 2000, "the header of {} cannot be read: a quote is opened and never closed"),
        (b"caf\xe9\n", "the header of {} cannot be read: byte 4 is not UTF-8"),
    ],
)
def test_a_header_that_does_not_fit(run: Run, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "events.csv"
    file.write_bytes(content)
    options = ["--format", "csv", "--account", "customer", "--time", "at", "--meter", "tokens=n"]
    result = run("import", str(file), "--source", "x", *options)
    assert result.exit_code == 2
    assert said.format(file) in result.stderr


def test_rejects_of_csv_are_mended_with_their_columns(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    file.write_text(f'at,customer,n\n{NOW.isoformat()},acme,1\n{NOW.isoformat()},"ac\nme",many\n')
    options = ["--source", "x", "--format", "csv", "--account", "customer", "--time", "at", "--meter", "tokens=n"]
    assert run("import", str(file), *options).exit_code == 1
    rejects = Path(f"{file}.rejects")
    record = json.loads(rejects.read_text())
    assert (record["line"], record["columns"]) == (3, ["at", "customer", "n"])
    rejects.write_text(json.dumps(record | {"text": record["text"].replace("many", "41")}) + "\n")
    assert run("import", str(rejects), *options, "--rejects").exit_code == 0
    usage = json.loads(run("usage", "--json").stdout)
    assert [(each["account"], each["quantity"]) for each in usage] == [("ac\nme", "41"), ("acme", "1")]


CALLS = ["--format", "csv", "--account", "customer", "--time", "at", "--meter", "tokens=n"]


def calls(count: int, odd: dict[int, str]) -> str:
    """Rows of CSV; those on the lines of `odd` have that for a name. The header is line 1."""
    rows = [
        f"{(NOW + timedelta(seconds=n)).isoformat()},acme,{odd.get(n, 'pipe')},1,{n}\n" for n in range(2, count + 2)
    ]
    return "at,customer,name,n,row\n" + "".join(rows)


def test_quotes_that_open_no_field_cost_nothing(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "calls.csv"
    file.write_text(calls(1000, {100: '5" pipe', 600: '5" pipe'}))
    told = json.loads(run("import", str(file), "--source", "x", *CALLS, "--json").stdout)
    assert (told["accepted"], told["rejected"], told["left"]) == (1000, 0, 0)


def test_a_stray_quote_that_opens_a_field_costs_its_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "calls.csv"
    file.write_text(calls(1000, {100: '"5 pipe', 600: '"5 pipe', 700: '"5 pipe', 800: '"a" b'}))
    told = json.loads(run("import", str(file), "--source", "x", *CALLS, "--json").stdout)
    assert (told["accepted"], told["rejected"], told["left"]) == (996, 4, 0)
    records = [json.loads(each) for each in Path(f"{file}.rejects").read_text().splitlines()]
    assert [each["line"] for each in records] == [100, 600, 700, 800]
    assert ["in line 600" in records[0]["reason"], "in line 700" in records[1]["reason"]] == [True, True]
    assert import_mended(run, f"{file}.rejects", records) == {("acme", "tokens"): "1000"}


def import_mended(run: Run, path: str, records: list[dict[str, str]]) -> dict[tuple[str, str], str]:
    rejects = "".join(json.dumps(each | {"text": each["text"].replace('"', "")}) + "\n" for each in records)
    Path(path).write_text(rejects)
    mended = run("import", path, "--source", "x", *CALLS, "--rejects")
    assert mended.exit_code == 0, mended.stdout
    return billed(run, "default")


def test_two_stray_quotes_that_make_a_record_swallow_no_line(run: Run, tmp_path: Path) -> None:
    """Ditto marks: what lies between them is a field to CSV, and the record has its five fields."""
    file = tmp_path / "calls.csv"
    file.write_text(calls(100, {40: '"', 60: '"'}))
    told = json.loads(run("import", str(file), "--source", "x", *CALLS, "--json").stdout)
    assert (told["accepted"], told["rejected"]) == (79, 21)
    assert sum(told["reasons"].values()) == 21
    records = [json.loads(each) for each in Path(f"{file}.rejects").read_text().splitlines()]
    assert [each["line"] for each in records] == list(range(40, 61))
    assert "from line 40 to line 60" in records[7]["reason"]
    assert import_mended(run, f"{file}.rejects", records) == {("acme", "tokens"): "100"}


def test_text_of_many_lines_between_quotes_is_one_record(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "calls.csv"
    file.write_text(calls(100, {40: '"one, two\n\nthree, four, five, six, seven\n""eight"""', 41: '"\n\n"'}))
    result = run("import", str(file), "--source", "x", *CALLS, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["accepted"], told["lines"], told["rejected"]) == (100, 106, 0)


def test_lines_behind_an_open_quote_are_told(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "calls.csv"
    file.write_text(calls(999, {900: '"5 pipe'}))
    arguments = ["import", str(file), "--source", "x", *CALLS]
    result = run(*arguments, "--json")
    told = json.loads(result.stdout)
    assert (told["accepted"], told["rejected"], told["left"]) == (898, 0, 101)
    assert told["unclosed"] == [{"file": str(file), "line": 900, "lines": 101}]
    assert result.exit_code == 1, "whole lines are not billed"
    assert f"{file}:900: a quote opens a field and is never closed, so 101 whole lines" in result.stderr
    assert "no line end" not in result.stderr
    rehearsed = run(*arguments, "--dry-run")
    assert rehearsed.exit_code == 1
    assert "101 whole lines" in rehearsed.stderr
    final = json.loads(run(*arguments, "--final", "--json").stdout)
    assert (final["before"], final["accepted"], final["rejected"], final["left"]) == (899, 100, 1, 0)


def test_a_line_that_is_still_being_written_between_quotes_is_no_fault(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "calls.csv"
    file.write_text(calls(9, {}) + f'{NOW.isoformat()},acme,"5 pi')
    result = run("import", str(file), "--source", "x", *CALLS, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["accepted"], told["left"], told["unclosed"]) == (9, 1, [])
    assert "the last line has no line end" in result.stderr


def test_a_file_whose_quotes_mean_nothing(run: Run, tmp_path: Path) -> None:
    file, mapping = tmp_path / "calls.tsv", tmp_path / "calls.yaml"
    file.write_text(calls(99, {7: '"5 pipe', 50: '""', 90: '"a"b'}).replace(",", "\t"))
    mapping.write_text(
        'format: csv\ndelimiter: "\\t"\nquote: none\ntime: {field: at}\naccount: customer\n'
        "meters: [{meter: tokens, field: n, dimensions: {name: name}}]\n"
    )
    arguments = ["import", str(file), "--source", "x", "--mapping", str(mapping), "--json"]
    told = json.loads(run(*arguments).stdout)
    assert (told["accepted"], told["rejected"], told["left"]) == (99, 0, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_compressed_comes_through_a_pipe_too(dsn: str, log: Path, packed: bool) -> None:
    content = log.read_bytes()
    arguments = ["import", "-", "--source", "web-1", *BY_HAND, "--json", "--rejects-file", f"{log}.rejects"]
    done = subprocess.run(
        [sys.executable, "-m", "tallymark_collector", *arguments, "--database", dsn],
        input=gzip.compress(content) if packed else content,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted"] == 3


def test_events_by_a_mapping_through_a_pipe(dsn: str, tmp_path: Path) -> None:
    mapping = tmp_path / "events.yaml"
    mapping.write_text(EVENT_MAPPING)
    events = "".join(
        json.dumps({"id": n % 3, "at": NOW.isoformat(), "customer": "acme", "tokens": 5}) + "\n" for n in range(4)
    )
    arguments = ["import", "-", "--source", "api", "--mapping", str(mapping), "--json", "--database", dsn]
    missing = program(*arguments, input=events)
    assert missing.returncode == 2
    assert "standard input has no name to call its rejects by: give --rejects-file" in missing.stderr
    arguments += ["--rejects-file", str(tmp_path / "rejects")]
    counted = [json.loads(program(*arguments, input=events).stdout) for _ in range(2)]
    assert [(each["accepted"], each["duplicates"]) for each in counted] == [(3, 1), (0, 4)]
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        assert connection.execute("SELECT sum(quantity) FROM usage_hourly").fetchone() == (15,)


def test_what_was_read_of_a_damaged_file_is_kept(run: Run, log: Path) -> None:
    whole = gzip.compress("".join(line(n // 100) for n in range(20_000)).encode())
    packed = log.with_name("access.log.gz")
    packed.write_bytes(whole[: len(whole) // 2])
    result = run("import", str(packed), "--source", "web-1", *BY_HAND)
    assert result.exit_code == 2
    assert "is damaged, or not whole yet, after line" in result.stderr
    packed.write_bytes(whole)
    told = json.loads(run("import", str(packed), "--source", "web-1", *BY_HAND, "--json").stdout)
    assert told["before"] > 0
    assert told["before"] + told["accepted"] == 20_000


def test_missing_files_and_databases(run: Run, tmp_path: Path, log: Path) -> None:
    result = run("import", str(tmp_path / "none"), "--source", "web-1", *BY_HAND)
    assert result.exit_code == 2
    assert "cannot be read: No such file or directory" in result.stderr
    result = run("import", str(log), "--source", "web-1", *BY_HAND, "--database", "host=127.0.0.1 port=1 dbname=x")
    assert result.exit_code == 2
    assert "cannot connect to the database" in result.stderr


def test_a_terminal_shows_a_bar(dsn: str, log: Path) -> None:
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def drain() -> None:
        try:
            while piece := os.read(ours, 4096):
                seen.append(piece)
        except OSError:
            pass

    thread = threading.Thread(target=drain)
    thread.start()
    arguments = ["import", str(log), "--source", "web-1", *BY_HAND, "--database", dsn]
    done = subprocess.run(
        [sys.executable, "-m", "tallymark_collector", *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
        check=True,
    )
    os.close(theirs)
    thread.join(60)
    os.close(ours)
    shown = b"".join(seen).decode()
    assert "100%" in shown
    assert "3 lines" in shown
    assert b"api.requests" in done.stdout


def test_a_slip_in_the_source_bills_nothing(run: Run, log: Path) -> None:
    assert run("import", str(log), "--source", "web 1", *BY_HAND).exit_code == 0
    result = run("import", str(log), "--source", "web1", *BY_HAND)
    assert result.exit_code == 2
    assert f"{log} begins with the 3 lines of {log} that the source 'web 1' has" in result.stderr
    assert "Import it with --source 'web 1', or with --again" in result.stderr
    assert billed(run, "default") == USED
    meant = json.loads(run("import", str(log), "--source", "web1", *BY_HAND, "--again", "--json").stdout)
    assert meant["accepted"] == 3
