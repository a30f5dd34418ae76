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

from tests.delivery.contract.tally import Tally

PIECE: Final = 5_000
"""Lines that `tallymark import` commits together."""
PATIENCE_S: Final = 60.0
_OPTIONS: Final = ("--format", "json", "--time", "at", "--id", "id", "--account", "customer")
_METERS: Final = ("--meter", "imported.calls:{call}", "--meter", "imported.units:{unit}=units")
_BEGUN_SQL: Final = "SELECT FROM tallymark.usage_import_source WHERE name = %s"


def write(file: Path, run: str, tally: Tally, rng: random.Random) -> None:
    """A file of events, of one piece or of more; adds what they come to."""
    began = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(hours=5)
    with file.open("w") as lines:
        for line in range(rng.choice([300, PIECE + 300])):
            account, units = f"{run}-imported-{rng.randrange(3)}", rng.randint(1, 99)
            at = (began + timedelta(milliseconds=rng.randrange(3_600_000))).isoformat()
            lines.write(json.dumps({"id": line, "at": at, "customer": account, "units": units}) + "\n")
            tally.use(account, "imported.calls", 1)
            tally.use(account, "imported.units", units)


def killed_and_repeated(file: Path, source: str, dsn: str, past: str, rng: random.Random) -> None:
    """Imports the file through `dsn`. `past` is the same database past every fault. Raises AssertionError where the
    last process does not take it all."""
    command = [sys.executable, "-m", "tallymark_collector", "import", str(file), "--source", source]
    command += ["--database", dsn, "--rejects-file", f"{file}.rejects", "--json", *_OPTIONS, *_METERS]
    _killed(command, source, past, rng)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if done.returncode:
        raise AssertionError(f"the import ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")


def _killed(command: Sequence[str], source: str, past: str, rng: random.Random) -> None:
    """Starts it, and kills it at some time after its first word to the database."""
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        with psycopg.connect(past, autocommit=True) as connection:
            while not connection.execute(_BEGUN_SQL, [source]).rowcount:
                if first.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the import has not begun: it ended with {first.poll()}")
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
    finally:
        first.kill()
        first.wait(10)
