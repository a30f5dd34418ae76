"""SIGKILL of a release of many items, in several transactions: each is open, or done with its point; run again, all is
done, once."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import psycopg
import pytest

from tallymark_collector.quarantine.settling import GROUP
from tests.collector.cli.conftest import program
from tests.support.collector import running
from tests.support.usage import SECOND, number, request, sum_metric

ITEMS = 10 * GROUP
KILLS = 5
_STATE_SQL = """
SELECT (SELECT coalesce(sum(quantity), 0) FROM usage_point), (SELECT coalesce(sum(quantity), 0) FROM quarantine_action),
       (SELECT count(*) FROM quarantine_action), (SELECT count(*) FROM usage_quarantine_open),
       (SELECT coalesce(sum(quantity), 0) FROM usage_hourly)"""


def state(connection: psycopg.Connection) -> tuple[int, int]:
    """How many are done and open, in one moment in which the points are those of what is done."""
    with connection.transaction():
        # As `Store.reading`: on TimescaleDB a statement at READ COMMITTED, planned before a piece of a table is there,
        # may see what else was committed with it.
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("LOCK TABLE usage_daily IN ACCESS SHARE MODE")
        row = connection.execute(_STATE_SQL).fetchone()
    assert row is not None
    points, noted, done, still_open, shown = row
    assert points == noted == shown
    assert done + still_open == ITEMS
    return done, still_open


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_done_is_done_with_its_points(dsn: str, seed: int) -> None:
    rng = random.Random(seed)
    now = time.time_ns() // SECOND * SECOND
    values = [rng.randint(1, 10**6) for _ in range(ITEMS)]
    points = [number(now - (n + 1) * SECOND, now - n * SECOND, value, {}) for n, value in enumerate(values)]
    body = request(sum_metric(points)).SerializeToString()
    command = ["quarantine", "attribute", "--all", "--account", "acme", "--yes", "--by", "anne", "--database", dsn]
    # Connected once: who connects each time sees a release of which nothing is left, on a machine that is busy.
    with running(dsn) as collector, psycopg.connect(dsn, options="-c search_path=tallymark") as watching:
        collector.send(body)
        assert state(watching) == (0, ITEMS)
        killed = 0
        for _ in range(KILLS):
            done_before, _ = state(watching)
            process = subprocess.Popen(
                [sys.executable, "-m", "tallymark_collector", *command], stdout=subprocess.DEVNULL
            )
            try:
                wanted = done_before + rng.randint(1, 12)
                while process.poll() is None and state(watching)[0] < wanted:
                    time.sleep(0.002)
            finally:
                process.kill()
            killed += process.wait(60) == -9
            collector.send(body)  # the service tries again, as if it had had no answer
            state(watching)
        last = program(*command)
        assert last.returncode == 0, last.stderr
        collector.send(body)
        assert killed > 0, f"seed {seed}: nothing was killed"
        assert state(watching) == (ITEMS, 0)
        rows = watching.execute("SELECT account, sum(quantity), sum(points) FROM usage_hourly GROUP BY 1").fetchall()
    assert rows == [("acme", sum(values), ITEMS)]
