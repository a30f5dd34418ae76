"""A file of events that is imported by a process that is killed in its midst, and by another one after it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final

import psycopg

from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store import imports
from tests.delivery.contract.tally import Tally

PIECE: Final = 5_000
"""Lines that `tallymark import` commits together."""
PATIENCE_S: Final = 60.0
_OPTIONS: Final = ("--format", "json", "--time", "at", "--id", "id", "--account", "customer")
_METERS: Final = ("--meter", "imported.calls:{call}", "--meter", "imported.units:{unit}=units")
_BEGAN: Final = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(hours=5)
# The source is there with the first piece. Whoever imports it has its lock from the first word on.
_BEGUN_SQL: Final = """
SELECT FROM tallymark.usage_import_source WHERE source = %(source)s
UNION ALL
SELECT FROM pg_locks
WHERE locktype = 'advisory'
  AND (classid::bigint << 32) | objid::bigint = hashtextextended('tallymark.import.' || %(source)s::uuid, 0)"""


def write(file: Path, run: str, tally: Tally, rng: random.Random) -> None:
    """A file of events, of one piece or of more; adds what they come to."""
    file.write_text("".join(_event(run, n, tally, rng) for n in range(rng.choice([300, PIECE + 300]))))


def begin_otherwise(file: Path, run: str, tally: Tally, rng: random.Random) -> None:
    """Puts one more event before the others: a file that nobody knows, most of whose lines may have been billed."""
    file.write_text(_event(run, -1, tally, rng) + file.read_text())


def _event(run: str, number: int, tally: Tally, rng: random.Random) -> str:
    account, units = f"{run}-imported-{rng.randrange(3)}", rng.randint(1, 99)
    tally.use(account, "imported.calls", 1)
    tally.use(account, "imported.units", units)
    at = (_BEGAN + timedelta(milliseconds=rng.randrange(3_600_000))).isoformat()
    return json.dumps({"id": number, "at": at, "customer": account, "units": units}) + "\n"


def command(file: Path, source: str, dsn: str) -> list[str]:
    """What imports the file."""
    found = [sys.executable, "-m", "tallymark_collector", "import", str(file), "--source", source]
    return [*found, "--database", dsn, "--rejects-file", f"{file}.rejects", "--json", *_OPTIONS, *_METERS]


def finish(command: Sequence[str]) -> None:
    """Raises AssertionError where it does not take every line, now or before."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if done.returncode:
        raise AssertionError(f"the import ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")


def kill(command: Sequence[str], source: str, past: str, rng: random.Random) -> None:
    """Starts it, and kills it at some time after its first word to the database, which is asked by way of `past`."""
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        with psycopg.connect(past, autocommit=True) as connection:
            begun = {"source": imports.source_id(DEFAULT_TENANT, source)}
            ended = False
            while not connection.execute(_BEGUN_SQL, begun).rowcount:
                if ended or time.monotonic() > deadline:
                    raise AssertionError(f"the import has not begun: it ended with {first.poll()}")
                ended = first.poll() is not None  # it may have done all of its work since it was asked for
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
    finally:
        first.kill()
        first.wait(60)
