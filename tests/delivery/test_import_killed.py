"""An import is killed at any point and run again: every line is billed once, every bad line rejected once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.support.logs import fetch, some_lines, sums

RUNS = 24
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.engines("embedded", "postgres")
def test_killed_imports_are_exact(dsn: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("TALLYMARK_TEST_SEED", "20260901"))
    lines = some_lines(600, Random(seed))
    bad = [f"bad line {n}\n" for n in range(12)]
    mixed = lines + bad
    Random(seed).shuffle(mixed)
    (tmp_path / "access.log").write_text("".join(mixed))
    done = subprocess.run(
        [sys.executable, "-m", "tests.delivery.import_driver", dsn, str(tmp_path), str(seed), str(RUNS)],
        capture_output=True,
        text=True,
        timeout=570,
        cwd=ROOT,
        check=False,
    )
    print(f"seed {seed}\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    runs = [json.loads(each) for each in done.stdout.splitlines()]
    assert len(runs) == RUNS
    assert all(each["last"] == 0 for each in runs), done.stderr
    killed = [how for each in runs for how, status in each["deaths"] if status == -9]
    assert len(killed) >= RUNS, "most of the processes died before they were done"
    assert len({how[1] for how in killed if isinstance(how, list)}) == 3, "at every step"

    rows = fetch(
        dsn,
        """SELECT t.resource ->> 'service.instance.id', p.account, e.meter, sum(p.quantity)
           FROM usage_point p JOIN usage_stream t USING (account, stream)
           JOIN usage_series e ON e.account = p.account AND e.series = p.series GROUP BY 1, 2, 3""",
    )
    expected = sums(lines)
    for number in range(RUNS):
        found = {(account, meter): quantity for source, account, meter, quantity in rows if source == f"run {number}"}
        assert found == expected, f"seed {seed}, run {number}: {runs[number]}"
        rejects = (tmp_path / f"{number}.rejects").read_text().splitlines()
        assert sorted(json.loads(each)["text"] + "\n" for each in rejects) == sorted(bad), f"seed {seed}, run {number}"
    assert fetch(dsn, "SELECT count(*) FROM usage_quarantine") == [(0,)]
    assert fetch(dsn, "SELECT count(*) FROM usage_import_line") == [(RUNS * len(lines),)]
