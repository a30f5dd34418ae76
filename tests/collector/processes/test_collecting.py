"""Searches for cycles of objects are seldom while requests are taken."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import gc
from benchmarks import ingest_load as load
from tallymark_collector.processes import collecting

bodies = load.requests(8000)
{change}
before = sum(generation["collections"] for generation in gc.get_stats())
kept = load.batches(bodies)
assert sum(map(len, kept)) == load.POINTS
print(sum(generation["collections"] for generation in gc.get_stats()) - before)
"""


def searches(change: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(change=change)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_a_collector_searches_once_in_thousands_of_points() -> None:
    usual, seldom = searches(""), searches("collecting.seldom()")
    assert 0 < seldom < 15 < usual
