"""`tallymark meters` and `plans` with a file of meters that is several tenants'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.collector.cli.conftest import Run, cells
from tests.collector.cli.test_meters import CAPTURED, written

OF_TENANTS = """\
meters:
  gateway.requests:
    unit: "{request}"
    sources:
      - {tenants: [acme-corp, globex], metric: http.server.request.duration, quantity: count, account: consumer}
  others:
    unit: "{request}"
    sources: [{tenants: initech, metric: http.server.request.duration, quantity: count, account: consumer}]
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "meters.yaml"
    file.write_text(OF_TENANTS)
    return file


def test_captured_telemetry_is_a_tenants(
    offline: Run, rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["meters", "check", str(rules), str(written(tmp_path, "json", CAPTURED[0]))]
    result = offline(*arguments, "--tenant", "globex")
    assert result.exit_code == 0, result.stderr
    assert ["gateway.requests", "{request}", "acme", "9", "2"] in cells(result.stdout)
    assert "meter others: none of its sources is tenant globex's" in result.stdout
    assert "tenant globex: requests 1, counted 2, " in result.stdout
    monkeypatch.setenv("TALLYMARK_TENANT", "initech")
    found = json.loads(offline(*arguments, "--json").stdout)
    assert (found["tenant"], [line["meter"] for line in found["usage"]]) == ("initech", ["others"])
    nobodys = json.loads(offline(*arguments, "--tenant", "default", "--json").stdout)
    assert (nobodys["usage"], nobodys["quarantined"]) == ([], 0)
    assert "it is tenant default's, the source takes acme-corp, globex's" in nobodys["items"][0]["why"]
    slip = offline(*arguments, "--tenant", "Globex")
    assert (slip.exit_code, slip.stdout) == (2, "")
    assert "'Globex' is no name of a tenant" in slip.stderr


def test_the_list_says_whose_a_source_is(offline: Run, rules: Path) -> None:
    listed = json.loads(offline("meters", "list", str(rules), "--json").stdout)["meters"]
    assert [source["where"] for meter in listed.values() for source in meter["sources"]] == [
        "tenant acme-corp or globex",
        "tenant initech",
    ]


def test_a_tenants_plans_need_no_price_of_what_is_another_tenants(
    offline: Run, run: Run, rules: Path, tmp_path: Path
) -> None:
    plans = tmp_path / "plans.yaml"
    plans.write_text(
        'currency: EUR\nmeters: {gateway.requests: {unit: "{request}"}}\n'
        "plans: {p: {charges: [{meter: gateway.requests, unit_price: 1}]}}\naccounts: {}\n"
    )
    assert "'others'" in offline("plans", "check", str(plans), "--meters", str(rules)).stdout
    run("tenants", "set", "globex")
    run("tenants", "set", "initech")
    for command in ("check", "apply"):
        arguments = ["plans", command, str(plans), "--meters", str(rules), "--tenant"]
        result = run(*arguments, "globex")
        assert result.exit_code == 0, result.stderr
        refused = run(*arguments, "initech")
        assert refused.exit_code == 1
        assert "'others'" in refused.stdout + refused.stderr
