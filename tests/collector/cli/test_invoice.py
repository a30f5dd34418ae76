"""`tallymark invoice`: amounts worked out by hand, and no invoice where an hour differs from its points."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tallymark_collector.model import Attributes, Point, Series, Stream
from tests.collector.cli.conftest import Run, cells, execute, fill, used
from tests.support.usage import stream


@pytest.fixture
def billed(run: Run, plans: Path, dsn: str) -> None:
    """March 2024 of acme in Zurich is from 23:00 UTC of 29 February to 22:00 UTC of 31 March."""
    acme = stream("acme")
    fill(
        dsn,
        used(acme, "2024-02-29T22:59:59", 1000),
        used(acme, "2024-02-29T23:00:00", 5),
        used(acme, "2024-03-15T12:00:00", 12_345),
        used(acme, "2024-03-31T22:00:00", 7),
        used(stream("globex", "egress"), "2024-03-02T00:00:00", "7.50"),
    )
    assert run("plans", "apply", str(plans)).exit_code == 0


@pytest.mark.usefixtures("billed")
def test_the_invoice_of_a_closed_period(run: Run) -> None:
    result = run("invoice", "--account", "acme", "--at", "2024-03-01")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "period   2024-03-01 00:00+01:00 to 2024-04-01 00:00+02:00 (monthly, Europe/Zurich)" in result.stdout
    assert "preliminary" not in result.stdout
    # 12,350 requests less 100 are 12,250, of 4 hundredths of a cent: 490 cents.
    assert cells(result.stdout)[3:] == [
        ["description", "quantity", "unit", "unit price", "amount", "currency"],
        ["Base fee", "1", "29.00", "29.00", "EUR"],
        ["Requests, included (100 per period)", "100", "{request}", "0", "0.00", "EUR"],
        ["Requests", "12,250", "{request}", "0.0004", "4.90", "EUR"],
        ["total", "33.90", "EUR"],
    ]


@pytest.mark.usefixtures("billed")
def test_json_of_one_account(run: Run) -> None:
    document = json.loads(run("invoice", "--account", "acme", "--at", "2024-03-31T21:59:59Z", "--json").stdout)
    assert (document["total"], document["currency"], document["preliminary"]) == ("33.90", "EUR", False)
    assert document["period"] == {
        "index": 0,
        "start": "2024-02-29T23:00:00Z",
        "end": "2024-03-31T22:00:00Z",
        "cycle": "monthly",
        "time_zone": "Europe/Zurich",
    }
    assert [(line["quantity"], line["amount"]) for line in document["lines"] if line["meter"]] == [
        ("100", "0.00"),
        ("12250", "4.90"),
    ]
    april = json.loads(run("invoice", "--account", "acme", "--at", "2024-03-31T22:00Z", "--json").stdout)
    assert april["total"] == "29.00"


@pytest.mark.usefixtures("billed")
def test_a_day_begins_where_the_account_is(run: Run) -> None:
    assert run("invoice", "--account", "globex", "--at", "2024-03-01").exit_code == 0
    before = run("invoice", "--account", "globex", "--at", "2024-03-01T00:00:00Z")
    assert (before.exit_code, before.stdout) == (2, "")
    assert "'globex' has no period at 2024-03-01T00:00:00+00:00" in before.stderr


@pytest.mark.usefixtures("billed")
def test_usage_without_a_price_is_seen(run: Run) -> None:
    result = run("invoice", "--account", "globex", "--at", "2024-03-02")
    assert result.exit_code == 0
    assert "NOT PRICED" in result.stdout
    assert result.stderr.startswith("warning: account 'globex': 7.50 of meter 'egress' (unit '{request}')")
    [entry] = json.loads(run("invoice", "--account", "globex", "--at", "2024-03-02", "--json").stdout)["unpriced"]
    assert (entry["meter"], entry["quantity"]) == ("egress", "7.50")


@pytest.mark.usefixtures("billed")
def test_an_open_period_is_preliminary(run: Run, dsn: str) -> None:
    fill(dsn, used(stream("acme"), f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S}", 1100))
    result = run("invoice", "--account", "acme")
    assert result.exit_code == 0
    assert "period still open: preliminary\n" in result.stdout
    document = json.loads(run("invoice", "--account", "acme", "--json").stdout)
    assert (document["preliminary"], document["total"]) == (True, "29.40")


@pytest.mark.usefixtures("billed")
def test_all_accounts_that_have_a_period(run: Run) -> None:
    documents = json.loads(run("invoice", "--at", "2024-03-15", "--json").stdout)
    assert [(d["account"], d["total"]) for d in documents] == [("acme", "33.90"), ("globex", "0.00")]
    assert json.loads(run("invoice", "--at", "2024-02-01", "--json").stdout) == []
    shown = run("invoice", "--at", "2024-03-15").stdout
    assert shown.index("acme") < shown.index("globex")


@pytest.mark.usefixtures("billed")
def test_no_invoice_on_a_difference(run: Run, dsn: str) -> None:
    assert execute(dsn, "UPDATE usage_hour SET quantity = 1 WHERE bucket = '2024-03-15T12:00Z'") == 1
    result = run("invoice", "--account", "acme", "--at", "2024-03-15")
    assert result.exit_code == 1
    assert "total" not in result.stdout
    assert ["default", "acme", "2024-03-15T12:00:00Z", "api.requests", "12,345", "1", "hour"] in cells(result.stdout)
    assert "`tallymark audit --repair`" in result.stderr

    listed = run("invoice", "--at", "2024-03-15", "--json")
    assert listed.exit_code == 1
    acme, globex = json.loads(listed.stdout)
    assert (acme["account"], acme["differences"][0]["raw"], "total" in acme) == ("acme", "12345", False)
    assert globex["total"] == "0.00"

    assert run("invoice", "--account", "acme", "--at", "2024-05-01").exit_code == 0, "other periods are not held up"
    assert run("audit", "--repair").exit_code == 0
    assert json.loads(run("invoice", "--account", "acme", "--at", "2024-03-15", "--json").stdout)["total"] == "33.90"


@pytest.mark.usefixtures("billed")
def test_no_invoice_where_increases_are_not_what_the_totals_say(run: Run, dsn: str) -> None:
    """The cached hours are right about the points; the points are not what the producer sent."""
    execute(
        dsn,
        "INSERT INTO tallymark.usage_sample SELECT account, stream, 1, 2, 99 FROM tallymark.usage_stream"
        " WHERE account = 'acme'",
    )
    result = run("invoice", "--account", "acme", "--at", "2024-03-15", "--json")
    assert result.exit_code == 1
    acme = json.loads(result.stdout)
    assert (acme["differences"], [drift["sampled"] for drift in acme["drifts"]]) == ([], ["99"])
    assert "total" not in acme
    shown = run("invoice", "--account", "acme", "--at", "2024-03-15")
    assert shown.exit_code == 1
    assert "sampled" in shown.stdout


@pytest.mark.usefixtures("billed")
def test_an_account_that_cannot_be_priced_does_not_hide_the_others(run: Run, dsn: str) -> None:
    execute(dsn, "DELETE FROM plan_version WHERE plan = 'pro'")
    result = run("invoice", "--at", "2024-03-15", "--json")
    assert result.exit_code == 2
    acme, globex = json.loads(result.stdout)
    assert acme == {"account": "acme", "error": "plan 'pro' is in no catalogue that was applied"}
    assert globex["total"] == "0.00"
    assert "plan 'pro'" in result.stderr


@pytest.mark.usefixtures("billed")
def test_refusals(run: Run) -> None:
    unknown = run("invoice", "--account", "[red]", "--at", "2024-03-15")
    assert unknown.exit_code == 2
    assert "account '[red]' has no subscription: add it to the plans file" in unknown.stderr
    assert "has no time zone" in run("invoice", "--at", "2024-03-15T00:00").stderr
    ahead = run("invoice", "--at", "2999-01-01")
    assert ahead.exit_code == 2
    assert "too far ahead" in ahead.stderr


AGGREGATED = """\
currency: EUR
meters:
  upload.size: {unit: By, aggregation: max}
  users: {unit: "{request}", aggregation: unique, of: user.id}
plans:
  pro:
    charges:
      - {meter: upload.size, unit_price: 2, name: Largest upload}
      - {meter: users, included: 1, unit_price: 5, name: Users}
accounts:
  acme: {plan: pro, since: 2024-03-01}
  globex: {plan: pro, since: 2024-03-01}
"""


@pytest.fixture
def aggregated(run: Run, dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "aggregated.yaml"
    file.write_text(AGGREGATED)
    uploads = {
        account: replace(stream(account, "upload.size"), scope_name="access.log", series=series(account))
        for account in ("acme", "globex")
    }
    users = [stream("acme", "users", **{"user.id": user}) for user in ("ann", "bob", "cyd")] + [stream("acme", "users")]
    fill(
        dsn,
        *(event(uploads["acme"], f"2024-03-05T10:00:0{second}", size) for second, size in enumerate((3, 70, 5))),
        *(used(each, "2024-03-06T10:00:00", 2) for each in users),
        used(stream("acme"), "2024-03-06T10:00:00", 11),
        # Of the SDK: how much of an outage its sum holds, nobody knows.
        used(replace(uploads["globex"], scope_name="tallymark"), "2024-03-05T10:00:00", 4),
    )
    assert run("plans", "apply", str(file)).exit_code == 0


def event(of: Stream, at: str, quantity: int) -> Point:
    """As a line of an access log: it happened at that time, and not over an interval."""
    point = used(of, at, quantity)
    return point._replace(start_ns=point.time_ns)


def series(account: str) -> Series:
    return Series("default", account, "upload.size", "By", Attributes())


@pytest.mark.usefixtures("aggregated")
def test_lines_say_what_is_no_sum(run: Run) -> None:
    result = run("invoice", "--account", "acme", "--at", "2024-03-15")
    assert result.exit_code == 0
    assert cells(result.stdout)[3:8] == [
        ["description", "quantity", "unit", "unit price", "amount", "currency"],
        ["Largest upload (max)", "70", "By", "2", "140.00", "EUR"],
        ["Users, included (1 per period) (unique user.id)", "1", "{user.id}", "0", "0.00", "EUR"],
        ["Users (unique user.id)", "2", "{user.id}", "5", "10.00", "EUR"],
        ["total", "150.00", "EUR"],
    ]
    assert "2 of meter 'users' (unit '{request}') have no attribute 'user.id'" in result.stderr
    document = json.loads(run("invoice", "--account", "acme", "--at", "2024-03-15", "--json").stdout)
    assert [line["aggregation"] for line in document["lines"]] == ["max", *["unique user.id"] * 2]
    assert len(document["remarks"]) == 1


@pytest.mark.usefixtures("aggregated")
def test_what_cannot_be_told_is_no_invoice(run: Run) -> None:
    result = run("invoice", "--at", "2024-03-15", "--json")
    assert result.exit_code == 2
    acme, globex = json.loads(result.stdout)
    assert acme["total"] == "150.00"
    assert globex["error"].startswith("account 'globex': the meter 'upload.size' cannot be billed by its max: it needs")
    alone = run("invoice", "--account", "globex", "--at", "2024-03-15")
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert "cannot be billed by its max" in alone.stderr


@pytest.mark.usefixtures("aggregated")
def test_usage_is_shown_as_it_is_billed(run: Run) -> None:
    result = run("usage", "--account", "acme")
    assert cells(result.stdout) == [
        ["account", "meter", "unit", "aggregation", "quantity", "points"],
        ["acme", "api.requests", "{request}", "sum", "11", "1"],
        ["acme", "upload.size", "By", "max", "70", "3"],
        ["acme", "users", "{user.id}", "unique user.id", "3", "4"],
    ]
    [early] = json.loads(run("usage", "--account", "acme", "--to", "2024-03-05T10:00:01Z", "--json").stdout)
    assert (early["quantity"], early["aggregation"], early["points"]) == ("3", "max", 1)
    both = run("usage", "--meter", "upload.size", "--json")
    assert [row["quantity"] for row in json.loads(both.stdout)] == ["70", None]
    assert "account 'globex': no max of meter 'upload.size': it needs points" in both.stderr
    daily = run("usage", "--by", "account,day", "--json")
    assert [(row["meter"], row["quantity"]) for row in json.loads(daily.stdout)] == [("api.requests", "11")]
    assert "left out: upload.size, users: quantities that are no sums can only be grouped by" in daily.stderr
    alone = run("usage", "--by", "day", "--meter", "users")
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert "the meter 'users' is billed by its unique user.id" in alone.stderr
