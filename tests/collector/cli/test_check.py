"""`tallymark check`: what does not fit is told with file and line, and by the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.collector.cli.conftest import PLANS, Run, cells

ROOT = Path(__file__).parents[3]
DEMO_PLANS = ROOT / "collector/tallymark_collector/demo/plans.yaml"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code and plans, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    Path("plans.yaml").write_text(PLANS.replace("  egress: {unit: By}\n", "  egress: {unit: By}\n  idle: {unit: s}\n"))
    Path("app.py").write_text("import tallymark\n\n\n@tallymark.track_usage('api.requests')\ndef f(): ...\n")
    return tmp_path


def problems(result: Any) -> list[tuple[str, int, str, str]]:
    return [(p["file"], p["line"], p["severity"], p["rule"]) for p in json.loads(result.stdout)["problems"]]


def test_all_is_well(offline: Run, service: Path) -> None:
    result = offline("check", "--plans", "plans.yaml")
    assert result.exit_code == 0
    assert cells(result.stdout) == [
        ["meter", "unit", "where", "plans"],
        ["api.requests", "{request}", "app.py:4", "pro"],
        ["files 1, meters 1, errors 0, warnings 0"],
    ]


def test_every_problem_with_its_place(offline: Run, service: Path) -> None:
    Path("more.py").write_text(
        "from tallymark import record, track_usage\n"
        "record('api.request')\n"
        "track_usage('egress')\n"
        "track_usage('idle', unit='s')\n"
        "track_usage('new', len)\n"
        "track_usage('new')\n"
        "record(name())\n"
        "track_usage('other', unit=name())\n"
        "record('new', unit='By')\n"
        "record('new')\n"
    )
    Path("broken.py").write_text("def")
    Path("plans.yaml").write_text(Path("plans.yaml").read_text().replace("api.requests", "api.requests.v2"))
    Path("app.py").unlink()
    result = offline("check", ".", "--plans", "plans.yaml", "--json")
    assert result.exit_code == 1
    assert problems(result) == [
        ("broken.py", 1, "error", "unreadable"),
        ("more.py", 2, "error", "unknown-meter"),
        ("more.py", 3, "error", "unit-mismatch"),
        ("more.py", 3, "error", "unpriced-meter"),
        ("more.py", 4, "error", "unpriced-meter"),
        ("more.py", 5, "error", "unknown-meter"),
        ("more.py", 6, "error", "unit-mismatch"),
        ("more.py", 7, "warning", "computed-name"),
        ("more.py", 8, "error", "unknown-meter"),
        ("more.py", 8, "warning", "computed-unit"),
        ("more.py", 9, "error", "unit-mismatch"),
        ("plans.yaml", 3, "warning", "never-recorded"),
    ]
    text = offline("check", ".", "--plans", "plans.yaml").stdout
    for line in (
        "more.py:2: error: meter 'api.request' is not in plans.yaml; did you mean api.requests.v2: nobody is billed for"
        " it",
        "more.py:3: error: meter 'egress' has the unit '{request}' here and 'By' in plans.yaml:4: not priced",
        "more.py:3: error: meter 'egress' is in plans.yaml, but no plan has a charge for it: nobody is billed for it",
        "more.py:6: error: meter 'new' has the unit '{request}' here and '1' in more.py:5: one meter has one unit",
        "more.py:7: warning: the meter's name, name(), is computed at run time; it is not checked",
        "plans.yaml:3: warning: meter 'api.requests.v2' is priced (pro) and nothing records it, as far as names are not"
        " computed at run time; did you mean api.request",
        "files 2, meters 5, errors 9, warnings 3",
    ):
        assert line in text.splitlines()


def test_warnings_count_where_that_is_asked_for(offline: Run, service: Path) -> None:
    Path("app.py").write_text("import tallymark\ntallymark.record(name())\n")
    assert offline("check", "app.py").exit_code == 0
    assert offline("check", "app.py", "--strict").exit_code == 1


def test_without_plans_declarations_are_compared_with_each_other(offline: Run, service: Path) -> None:
    result = offline("check", "app.py")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (
        0,
        "files 1, meters 1, errors 0, warnings 0; compared with no plans, name them by --plans",
    )
    Path("other.py").write_text("import tallymark\ntallymark.record('api.requests', unit='By')\n")
    again = offline("check")
    assert again.exit_code == 1
    assert "other.py:2: error: meter 'api.requests' has the unit 'By' here and '{request}' in app.py:4" in again.stdout


def test_a_recording_has_the_unit_of_its_declaration(offline: Run, service: Path) -> None:
    Path("other.py").write_text("import tallymark\ntallymark.record('api.requests')\ntallymark.record('alone')\n")
    found = json.loads(offline("check", "--json").stdout)
    assert found["problems"] == []
    assert [(m["meter"], m["unit"], len(m["places"])) for m in found["meters"]] == [
        ("alone", "1", 1),
        ("api.requests", "{request}", 2),
    ]
    assert found["meters"][1]["places"][0] == {"file": "app.py", "line": 4, "call": "declares"}


def test_bad_plans_and_paths(offline: Run, service: Path) -> None:
    assert offline("check", "nowhere").exit_code == 2
    missing = offline("check", "--plans", "missing.yaml")
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert "missing.yaml cannot be read: No such file" in missing.stderr
    Path("plans.yaml").write_text(PLANS.replace("0.0004", "-1"))
    bad = offline("check", "--plans", "plans.yaml")
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert "plans.yaml:10: plans.pro.charges[1].unit_price: must not be negative" in bad.stderr
    as_json = offline("check", "--plans", "plans.yaml", "--json")
    assert as_json.exit_code == 1
    assert problems(as_json) == [("plans.yaml", 10, "error", "plans")]


def test_the_projects_own_examples(offline: Run) -> None:
    demo = offline("check", str(ROOT / "collector/tallymark_collector/demo"), "--plans", str(DEMO_PLANS), "--json")
    assert demo.exit_code == 0
    found = json.loads(demo.stdout)
    assert found["problems"] == []
    every = ["starter", "growth", "scale"]
    assert [(m["meter"], m["unit"], len(m["places"]), m["plans"]) for m in found["meters"]] == [
        ("api.requests", "{request}", 3, every),
        ("egress.bytes", "By", 1, every),
        ("llm.tokens", "{token}", 1, every),
    ]
    examples = json.loads(offline("check", str(ROOT / "examples"), "--json").stdout)
    assert examples["problems"] == []
    assert {(m["meter"], m["unit"]) for m in examples["meters"]} >= {
        ("api.requests", "{request}"),
        ("compute", "s"),
        ("greetings", "{greeting}"),
        ("pages", "{page}"),
    }


@pytest.mark.parametrize(
    ("aggregation", "fits"), [("max", False), ("count", False), ("integral", False), ("sum", True)]
)
def test_what_the_sdk_sends_is_no_single_event(offline: Run, service: Path, aggregation: str, fits: bool) -> None:
    """No invoice could be made of it: told before the first call is metered."""
    plans = Path("plans.yaml").read_text()
    Path("plans.yaml").write_text(
        plans.replace('unit: "{request}"', f'unit: "{{request}}", aggregation: {aggregation}')
    )
    result = offline("check", "--plans", "plans.yaml")
    assert result.exit_code == (0 if fits else 1)
    message = (
        f"app.py:4: error: meter 'api.requests' is billed by its {aggregation} (plans.yaml:3), which needs a point"
    )
    assert (message in result.stdout) is not fits
