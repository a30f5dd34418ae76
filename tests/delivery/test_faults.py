"""Recording processes are broken in every way that we know: recorded equals stored, to the unit, in every run.

`make faults RUNS=5000` makes more of them. TALLYMARK_TEST_FAULTS and TALLYMARK_TEST_SEED say how many here, and which.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from tests.delivery.faults import harness
from tests.delivery.faults.scenario import KINDS, scenario
from tests.delivery.faults.table import failures
from tests.delivery.faults.tally import THREADS, UNITS, Tally
from tests.support.collector import running

RUNS = int(os.environ.get("TALLYMARK_TEST_FAULTS", "204"))
SEED = int(os.environ.get("TALLYMARK_TEST_SEED", "0")) or random.SystemRandom().randrange(10**8)
BATCH = 17
REAL_EVERY = 6
"""Of so many batches one is against the real collector."""

results: list[harness.Result] = []


@pytest.mark.parametrize("first", range(0, RUNS, BATCH))
def test_what_was_recorded_is_stored(first: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    planned = harness.scenarios(SEED + first, min(BATCH, RUNS - first))
    print(f"seeds {SEED + first} to {SEED + first + len(planned) - 1}")
    if first // BATCH % REAL_EVERY == REAL_EVERY - 1:
        dsn = request.getfixturevalue("faults_database")
        log = tmp_path / "collector.log"
        with running(dsn, log=log) as collector:
            found = harness.play(planned, tmp_path, dsn, collector.port, log=log)
    else:
        found = harness.play(planned, tmp_path)
    results.extend(found)
    assert not any(result.problems for result in found), "\n".join(failures(found))


@pytest.fixture
def faults_database(embedded_server: str) -> str:
    """A database that the collector migrates itself."""
    import psycopg
    from psycopg.conninfo import make_conninfo

    name = f"tallymark_faults_{os.getpid()}_{random.randrange(10**9)}"
    with psycopg.connect(embedded_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return make_conninfo(embedded_server, dbname=name)


def test_a_signal_in_the_midst_of_waiting_ends_a_process() -> None:
    """Its handler runs in the thread that waits, which may hold the event's lock."""
    program = """if True:
        import os, signal, threading
        from tests.delivery.faults.recording import ending
        stop = threading.Event()
        signal.signal(signal.SIGTERM, ending(stop))
        signal.alarm(60)
        with stop._cond:
            signal.raise_signal(signal.SIGTERM)
        os._exit(0 if stop.wait(60) else 1)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=150, check=False)
    assert done.returncode == 0


def test_every_kind_is_in_turn() -> None:
    assert [kind in found.kinds for kind, found in zip(KINDS, harness.scenarios(0, len(KINDS)), strict=True)] == [
        True
    ] * len(KINDS)
    assert scenario(7, "fork") == scenario(7, "fork")


def test_the_reckoning_sees_a_single_unit(tmp_path: Path) -> None:
    """The harness itself: less than what was recorded is lost, more is doubled, the call under way may be either."""
    run = harness.Run(scenario(1, "fork"), None, tmp_path, None, 0)  # type: ignore[arg-type]
    run.tally = tally = Tally(tmp_path / "tally", 2)
    for region in range(2):
        for thread in range(THREADS):
            at = tally.at(region, thread, 0, 0)
            tally.words[at] = tally.words[at + 1] = 100
    tally.words[tally.at(1, 0, 0, 0)] += 7
    for got, lost, doubled in ((399, 1, 0), (400, 0, 0), (403, 1, 0), (407, 0, 0), (408, 0, 1)):
        run.result.lost = run.result.doubled = 0
        run._reckon({(0, "whole"): Decimal(got)})
        assert (got, run.result.lost, run.result.doubled) == (got, lost, doubled)
    assert set(UNITS) == {"whole", "tenths", "fine", "wide"}


def test_a_failed_run_is_told_with_what_its_processes_wrote(tmp_path: Path) -> None:
    planned = scenario(1, "fork")
    good = harness.Result(planned, real=False)
    logs = {"its processes' log": ["the outbox is full"], "the collector's log": []}
    bad = harness.Result(planned, real=True, problems=["2 units lost"], kept=tmp_path, logs=logs)
    lines = failures([good, bad])
    assert "  2 units lost" in lines
    assert "  again: make faults RUNS=1 SEED=1 ARGS='--real-share 1'" in lines
    assert "    the outbox is full" in lines
    assert len([line for line in lines if line.startswith("FAILED: seed 1 ")]) == 1
