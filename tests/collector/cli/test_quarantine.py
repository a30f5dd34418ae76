"""`tallymark quarantine`: what people see and say, and what is on an invoice before and after."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tallymark_collector.cli.app import app
from tallymark_collector.metering import Metering, read_rules
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store
from tests.collector.cli.conftest import Run, cells, program
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import SECOND, number, request, sum_metric

ACCOUNT = "tallymark.account.id"
MARCH = 1_710_500_000 * SECOND
"""15 March 2024, 10:53:20 UTC."""


def send(dsn: str, *points: Any, **metric: Any) -> None:
    """The points as one request that arrived in March 2024."""

    async def write() -> None:
        store = Store(dsn)
        await store.open()
        try:
            body = request(sum_metric(points, **metric)).SerializeToString()
            await Pipeline(store, now_ns=lambda: MARCH).metrics("default", body)
        finally:
            await store.close()

    asyncio.run(write())


@pytest.fixture
def waiting(dsn: str) -> None:
    """Usage of acme, what contradicts it, usage of nobody, and a negative value."""
    acme = {ACCOUNT: "acme"}
    send(dsn, number(MARCH - SECOND, MARCH, 200, acme))
    send(dsn, number(MARCH - SECOND, MARCH, 1000, acme))
    send(dsn, *(number(MARCH - n * SECOND, MARCH - n * SECOND + 1, n, {"n": n}) for n in range(2, 5)))
    send(
        dsn,
        number(
            MARCH - SECOND,
            MARCH,
            -1,
            {ACCOUNT: "[red]globex"},
        ),
    )


def listed(run: Run, *arguments: str) -> list[dict[str, Any]]:
    return json.loads(run("quarantine", "list", "--json", *arguments).stdout)["items"]  # type: ignore[no-any-return]


def id_of(run: Run, reason: str) -> str:
    [entry] = listed(run, "--reason", reason)
    return str(entry["id"])


def total(run: Run, account: str) -> str:
    rows = json.loads(run("usage", "--json", "--account", account).stdout)
    return rows[0]["quantity"] if rows else "0"


@pytest.mark.usefixtures("waiting")
def test_the_list_and_its_summary(run: Run) -> None:
    result = run("quarantine", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = cells(result.stdout)
    assert rows[0] == ["id", "time", "account", "meter", "reason", "detail", "arrived"]
    assert [row[-1] for row in rows if row[0] == "total"] == ["5"]
    assert ["account_missing", "3", "bills it to the account that is given (`attribute`)"] in rows
    assert "[red]globex" in result.stdout
    document = json.loads(run("quarantine", "list", "--json").stdout)
    assert document["reasons"] == {"account_missing": 3, "value_conflict": 1, "value_negative": 1}
    assert (document["open"], {len(item["id"]) for item in document["items"]}) == (5, {32})
    assert rows[1][0] == document["items"][0]["id"][:12]
    short = run("quarantine", "list", "--limit", "2")
    assert "quarantine list" not in short.stdout
    assert short.stderr == "2 of 5 are shown: see --limit\n"


@pytest.mark.usefixtures("waiting")
def test_what_is_listed_can_be_narrowed(run: Run) -> None:
    assert [item["reason"] for item in listed(run, "--account", "acme")] == ["value_conflict"]
    assert len(listed(run, "--account", "")) == 3
    assert len(listed(run, "--meter", "api.requests")) == 5
    assert listed(run, "--meter", "other") == []
    run("tenants", "set", "other")
    assert listed(run, "--tenant", "other") == []
    assert listed(run, "--since", "2999-01-01") == []
    assert len(listed(run, "--since", "2024-03-15T00:00Z")) == 5
    assert run("quarantine", "list", "--account", "nobody").stdout == "nothing is open\n"
    refusal = run("quarantine", "list", "--reason", "whim")
    assert refusal.exit_code == 2
    assert "--reason 'whim' is none: account_missing, attribute_overflow," in refusal.stderr
    assert "--since '15 March' is no time" in run("quarantine", "list", "--since", "15 March").stderr


@pytest.mark.usefixtures("waiting")
def test_an_item_is_explained(run: Run, plans: Path) -> None:
    assert run("plans", "apply", str(plans)).exit_code == 0
    item = id_of(run, "value_conflict")
    shown = run("quarantine", "show", item[:8])
    assert (shown.exit_code, shown.stderr) == (0, "")
    for sentence in (
        f"id          {item}",
        "state       open",
        "detail      200 was stored before for the same stream and interval, 1000 came now",
        'resource    {"service.instance.id":"one","service.name":"shop"}',
        "type        sum, increase (delta)",
        'attributes  {"tallymark.account.id":"acme"}',
        "time        2024-03-15T10:53:20Z",
        "value       1000",
        "What this means. Another quantity is stored",
        "Stored for the same stream and interval: 200, written 20",
        "in the period 2024-02-29T23:00:00Z to 2024-03-31T22:00:00Z of account 'acme' (plan pro). It has ended",
        "Release: --additional bills it beside what is stored",
    ):
        assert sentence in shown.stdout, shown.stdout
    document = json.loads(run("quarantine", "show", item, "--json").stdout)
    assert (document["state"], document["kind"], document["history"]) == ("open", "increase", [])
    assert (document["stored"][0]["quantity"], document["content"]["value"]) == ("200", "1000")
    assert [period["ended"] for period in document["periods"]] == [True]
    never = run("quarantine", "show", id_of(run, "value_negative"))
    assert "Release: none: usage is never negative" in never.stdout
    unknown = run("quarantine", "show", "00000000000000")
    assert (unknown.exit_code, unknown.stdout) == (2, "")


@pytest.mark.usefixtures("waiting")
def test_an_invoice_says_what_is_not_on_it_and_has_it_once_released(run: Run, plans: Path) -> None:
    assert run("plans", "apply", str(plans)).exit_code == 0
    of_march = ("invoice", "--account", "acme", "--at", "2024-03-15")
    before = run(*of_march)
    assert before.exit_code == 0
    assert before.stderr == (
        "warning: account 'acme': points in quarantine 1, not on this invoice:"
        " tallymark quarantine list --account acme\n"
        "warning: points in quarantine of the same time that name no account 3, on no invoice:"
        " tallymark quarantine list --account ''\n"
    )
    document = json.loads(run(*of_march, "--json").stdout)
    # 200 requests less 100 at 0.0004 are 0.04.
    assert (document["total"], document["in_quarantine"]) == ("29.04", {"account": 1, "no_account": 3})
    assert run("invoice", "--account", "acme", "--at", "2024-04-15").stderr == ""
    assert run("quarantine", "release", id_of(run, "value_conflict"), "--additional").exit_code == 0
    assert run("quarantine", "attribute", "--reason", "account_missing", "--account", "acme", "--yes").exit_code == 0
    after = run(*of_march, "--json")
    # 1,000 and 2 + 3 + 4 more.
    assert (json.loads(after.stdout)["total"], after.stderr) == ("29.44", "")
    assert json.loads(after.stdout)["in_quarantine"] == {"account": 0, "no_account": 0}
    assert total(run, "acme") == "1209"
    assert run("audit").exit_code == 0
    status = json.loads(run("status", "--json", "--endpoint", "127.0.0.1:1").stdout)
    assert status["quarantine"] == {"value_negative": 1}


@pytest.mark.usefixtures("waiting")
def test_many_at_once_and_again(run: Run) -> None:
    bulk = ("quarantine", "attribute", "--reason", "account_missing", "--account", "acme", "--by", "anne", "--yes")
    done = run(*bulk)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        "attribute to account 'acme': items 3, points that are new 3, points that were there 0, spans that are new 0\n"
    )
    again = run(*bulk)
    assert (again.exit_code, again.stdout[:38]) == (0, "attribute to account 'acme': items 0, ")
    assert total(run, "acme") == "209"


@pytest.mark.usefixtures("waiting")
def test_who_comes_second_is_told(run: Run) -> None:
    item = id_of(run, "value_conflict")
    discard = ("quarantine", "discard", item, "--because", "measured twice", "--by")
    assert run(*discard, "anne").exit_code == 0
    second = run("quarantine", "release", item, "--additional", "--by", "boris")
    assert second.exit_code == 1
    assert f"warning: {item[:12]} was discarded by anne (database user " in second.stderr
    assert second.stderr.endswith("Z: measured twice\n")
    shown = run("quarantine", "show", item).stdout
    assert "state       discarded by anne" in shown
    assert "It is closed; `tallymark quarantine reopen` opens it again." in shown
    assert run("quarantine", "reopen", item[:10], "--by", "boris", "--because", "it was not").exit_code == 0
    assert run("quarantine", "release", item, "--additional", "--by", "boris").exit_code == 0
    refusal = run("quarantine", "reopen", item)
    assert refusal.exit_code == 1
    assert "cannot be opened again, it is billed: released by boris" in refusal.stderr
    trail = json.loads(run("quarantine", "history", "--json").stdout)
    assert [(done["action"], done["acted_by"], done["because"]) for done in trail] == [
        ("released", "boris", ""),
        ("reopened", "boris", "it was not"),
        ("discarded", "anne", "measured twice"),
    ]
    assert {done["id"] for done in trail} == {item}
    assert (trail[0]["quantity"], trail[0]["inserted"]) == ("1000", 1)
    rows = cells(run("quarantine", "history", item[:6]).stdout)
    assert [row[2] for row in rows] == ["action", "released", "reopened", "discarded"]
    assert total(run, "acme") == "1200"


@pytest.mark.usefixtures("waiting")
def test_what_cannot_be_done_is_told_and_the_rest_is_done(run: Run) -> None:
    result = run("quarantine", "attribute", "--all", "--account", "acme", "--yes", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (len(document["done"]), document["already"], document["left"]) == (3, [], 0)
    why = sorted(entry["why"].split("(")[1].split(")")[0] for entry in document["refused"])
    assert why == ["value_conflict", "value_negative"]
    assert total(run, "acme") == "209"


REFUSED = [
    (["release"], "say which items: ids, --reason, --meter, --account, or --all"),
    (["release", "abcdef", "--all"], "both together are ambiguous"),
    (["release", "--reason", "value_negative", "--yes"], "value_negative cannot be released: usage is never negative"),
    (["release", "--reason", "account_missing", "--yes"], "account_missing needs a decision, --account"),
    (["release", "--reason", "value_conflict", "--yes"], "value_conflict needs a decision, --additional"),
    (["release", "--all", "--meter-name", ""], "--meter-name has 1 to 255 characters"),
    (["release", "--all", "--unit", "x" * 64], "--unit has at most 63 characters"),
    (["release", "--all"], "release 5 items: give --yes to do so without being asked"),
    (["discard", "--all", "--because", " "], "--because is empty"),
    (["discard", "--all"], "--because"),
    (["attribute", "--all"], "--account"),
    (["release", "abcdef0123"], "has an id that begins with 'abcdef0123'"),
]


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a)[:40] for a, _ in REFUSED])
def test_refusals_change_nothing(run: Run, arguments: list[str], sentence: str) -> None:
    result = run("quarantine", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert len(listed(run)) == 5


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(("answer", "left"), [("n", 5), ("y", 2)])
def test_a_person_is_asked(run: Run, dsn: str, answer: str, left: int) -> None:
    here, there = pty.openpty()
    try:
        command = [sys.executable, "-m", "tallymark_collector", "quarantine", "discard"]
        asked = subprocess.Popen(
            [*command, "--reason", "account_missing", "--because", "a test", "--database", dsn],
            stdin=there,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.write(here, f"{answer}\n".encode())
        _, stderr = asked.communicate(timeout=60)
    finally:
        os.close(here)
        os.close(there)
    assert "discard 3 items?" in stderr
    assert len(listed(run)) == left


def test_bytes_that_are_no_text_are_refused(dsn: str) -> None:
    for option in (b"--because", b"--by"):
        arguments = [b"--because", b"x", option, b"\xff", b"--all", b"--yes", b"--database", dsn.encode()]
        command = [sys.executable.encode(), b"-m", b"tallymark_collector", b"quarantine", b"discard", *arguments]
        result = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert (result.returncode, result.stderr) == (2, b"error: " + option + b" is not UTF-8\n")


def test_who_decides_may_stand_in_the_environment(dsn: str) -> None:
    """A container's user may have no name."""
    send(dsn, number(MARCH - SECOND, MARCH, 1, {}))
    environment = {**os.environ, "TALLYMARK_DATABASE": dsn, "TALLYMARK_BY": "the nightly job"}
    done = program("quarantine", "discard", "--all", "--yes", "--because", "a test", "--json", env=environment)
    assert done.returncode == 0
    assert [action["acted_by"] for action in json.loads(done.stdout)["done"]] == ["the nightly job"]


METERS = """\
meters:
  requests:
    unit: "{request}"
    sources:
      - {metric: h, quantity: count, account: consumer}
      - {span: "GET *", account: consumer, spans_are_complete: true}
  seconds:
    unit: s
    sources: [{metric: h, quantity: sum, account: consumer}]
"""


@pytest.fixture
def meters(dsn: str, tmp_path: Path) -> str:
    """A file of meters, and what it made usage of nobody: a histogram's point for two meters, and a span."""
    file = tmp_path / "meters.yaml"
    file.write_text(METERS)
    resource = {"service.name": "kong", "service.instance.id": "one"}
    point = histogram_point(MARCH - SECOND, MARCH, 7, 1.25, {"route": "[red]/a"})
    times = {"start_time_unix_nano": MARCH - SECOND, "end_time_unix_nano": MARCH}

    async def write() -> None:
        store = Store(dsn)
        await store.open()
        try:
            pipeline = Pipeline(store, now_ns=lambda: MARCH, metering=Metering(read_rules(file)))
            await pipeline.metrics("default", metrics_of(resource, histogram([point], "h")).SerializeToString())
            spans = spans_of(resource, [span(1, {"x": 1}, name="GET /a", **times)])
            await pipeline.traces("default", spans.SerializeToString())
        finally:
            await store.close()

    asyncio.run(write())
    return str(file)


def test_an_item_of_a_file_of_meters_is_explained(run: Run, meters: str) -> None:
    by_meter = {(item["meter"], item["signal"]): item["id"] for item in listed(run)}
    assert sorted(by_meter) == [("requests", "metrics"), ("requests", "traces"), ("seconds", "metrics")]
    shown = run("quarantine", "show", by_meter["seconds", "metrics"], "--meters", meters)
    assert (shown.exit_code, shown.stderr) == (0, "")
    for sentence in (
        "meter       seconds, by a file of meters",
        "what it is  increase",
        "metric      h",
        "type        histogram, increase (delta)",
        'attributes  {"route":"[red]/a"}',
        "time        2024-03-15T10:53:20Z",
        "count       7",
        "sum         1.25",
        "What this means. It is usage by a file of meters",
        f"By {meters}:",
        "Release: bills it, read with the file (--meters)",
    ):
        assert sentence in shown.stdout, shown.stdout
    assert "bucket" not in shown.stdout
    rows = cells(shown.stdout)
    for meter in ("requests", "seconds"):
        [row] = [row for row in rows if row[:2] == [meter, "quarantined"]]
        assert row[-1].startswith(f"account_missing: meter {meter}: nothing names the account: looked at consumer")
    plain = json.loads(run("quarantine", "show", by_meter["seconds", "metrics"], "--json").stdout)
    assert (plain["metered"], plain["kind"], "by_file" in plain) == (True, "increase", False)
    of_span = json.loads(run("quarantine", "show", by_meter["requests", "traces"], "--meters", meters, "--json").stdout)
    assert of_span["kind"] == "span that is usage"
    assert (of_span["content"]["span"], of_span["content"]["span kind"]) == ("GET /a", "server")
    assert [(one["meter"], one["outcome"]) for one in of_span["by_file"]] == [("requests", "quarantined")]


def test_an_item_that_another_file_passes_over_says_why(run: Run, meters: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(METERS.replace("metric: h,", "metric: h, where: {route: /b},").replace("GET", "PUT"))
    [item] = [item["id"] for item in listed(run, "--meter", "seconds")]
    shown = run("quarantine", "show", item, "--meters", str(other))
    assert "passed over" in shown.stdout
    assert "route is '[red]/a', not /b" in shown.stdout
    refused = run("quarantine", "attribute", item, "--account", "acme", "--meters", str(other))
    assert refused.exit_code == 1
    assert "it is no usage of meter 'seconds'" in refused.stderr
    assert "route is '[red]/a', not /b" in refused.stderr
    other.write_text("meters: {}")
    wrong = run("quarantine", "attribute", item, "--account", "acme", "--meters", str(other))
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert run("quarantine", "show", item, "--meters", str(tmp_path / "none.yaml")).exit_code == 2
    assert len(listed(run)) == 3


def test_usage_of_nobody_is_told_and_attributed_with_the_file(run: Run, meters: str, plans: Path) -> None:
    assert run("plans", "apply", str(plans)).exit_code == 0
    told = "warning: usage that names no account, not among this: items in quarantine 3:"
    nobody = run("usage", "--json")
    assert (json.loads(nobody.stdout), nobody.stderr) == ([], f"{told} tallymark quarantine list --account ''\n")
    assert run("usage", "--json", "--account", "acme").stderr == ""
    assert run("usage", "--json", "--to", "2024-03-01").stderr == ""
    assert "items in quarantine 1:" in run("usage", "--json", "--meter", "seconds").stderr
    status = json.loads(run("status", "--json", "--endpoint", "127.0.0.1:1").stdout)
    assert status["unattributed"] == {"requests": 2, "seconds": 1}
    document = json.loads(run("invoice", "--account", "acme", "--at", "2024-03-15", "--json").stdout)
    assert document["in_quarantine"] == {"account": 0, "no_account": 3}
    bulk = ("quarantine", "attribute", "--reason", "account_missing", "--account", "acme", "--yes")
    without = run(*bulk)
    assert (without.exit_code, without.stdout[:36]) == (1, "attribute to account 'acme': items 0")
    assert without.stderr.count("give that file, --meters FILE (TALLYMARK_METERS)") == 3
    # Of one meter: the other's item of the same point stays.
    one = run(*bulk, "--meter", "requests", "--meters", meters)
    assert (one.exit_code, one.stderr) == (0, "")
    assert "items 2, points that are new 2, points that were there 0, spans that are new 1" in one.stdout
    assert [item["meter"] for item in listed(run)] == ["seconds"]
    rest = CliRunner().invoke(
        app, [*bulk], env={"TALLYMARK_DATABASE": run.keywords["database"], "TALLYMARK_METERS": meters}
    )  # type: ignore[attr-defined]
    assert (rest.exit_code, listed(run)) == (0, [])
    rows = json.loads(run("usage", "--json", "--by", "account,meter").stdout)
    assert {(row["account"], row["meter"]): row["quantity"] for row in rows} == {
        ("acme", "requests"): "8",
        ("acme", "seconds"): "1.25",
    }
    assert run("usage", "--json").stderr == ""
    assert run("audit").exit_code == 0


def test_another_tenant_s_items_are_not_settled(run: Run, meters: str) -> None:
    run("tenants", "set", "other")
    ids = [item["id"] for item in listed(run)]
    for arguments in (["attribute", "--account", "acme", "--meters", meters], ["discard", "--because", "x"]):
        other = run("quarantine", *arguments, *ids, "--tenant", "other")
        assert (other.exit_code, other.stdout) == (2, "")
        assert "no item of tenant 'other'" in other.stderr
        chosen = run("quarantine", *arguments, "--all", "--yes", "--tenant", "other")
        assert " items 0," in chosen.stdout
    assert [item["id"] for item in listed(run)] == ids


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["list", "--json"],
        ["show", "abcd"],
        ["history"],
        ["history", "abcd"],
        ["release", "--all", "--yes"],
        ["release", "--reason", "value_conflict", "--additional", "--yes"],
        ["attribute", "--account", "acme", "--all", "--yes"],
        ["discard", "--all", "--yes", "--because", "x"],
        ["discard", "abcd", "--because", "x"],
        ["reopen", "abcd"],
    ],
)
def test_a_tenant_that_nobody_has_made_is_a_slip(run: Run, arguments: list[str]) -> None:
    """It must not read as "nothing is open"."""
    result = run("quarantine", *arguments, "--tenant", "defualt")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no tenant 'defualt': there are default" in result.stderr
    assert len(listed(run)) == 5
