"""SIGKILL of recording processes at any moment: what was recorded is delivered, once, to the unit.

Each process counts for itself, outside of Tallymark, in a shared file: what it is about to record, and what it has
recorded. A call under way when the process dies may be in what is delivered or not; no other difference is allowed.
TALLYMARK_TEST_KILLS and TALLYMARK_TEST_SEED make longer and other runs.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest

from tallymark import parcels
from tests.sdk.fake_collector import FakeCollector

KILLS = int(os.environ.get("TALLYMARK_TEST_KILLS", "20"))
SEED = int(os.environ.get("TALLYMARK_TEST_SEED", "0")) or random.SystemRandom().randint(1, 10**9)

THREADS, ACCOUNTS = 3, 3
METERS = ("whole", "tenths", "fine", "wide")
UNIT = {
    "whole": Decimal(1),
    "tenths": Decimal("0.1"),
    "fine": Decimal("1e-6"),
    "wide": Decimal("4e18") + Decimal("0.5"),
}
SLOTS = THREADS * ACCOUNTS * len(METERS)

RECORDING = f"""
import mmap, random, sys, threading, time
from decimal import Decimal
import tallymark

tally_path, seed, threads, accounts = sys.argv[1], int(sys.argv[2]), {THREADS}, {ACCOUNTS}
meters = {METERS!r}
units = [1, 0.1, Decimal("1e-6"), Decimal("4e18") + Decimal("0.5")]
with open(tally_path, "r+b") as file:
    tally = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
tallymark.configure(interval=0.05, shutdown_timeout=0.1)

def declared(name, unit):
    @tallymark.track_usage(name, quantity=lambda result: result)
    def handler(count):
        return unit * count if isinstance(unit, (int, Decimal)) else count / 10
    return handler

handlers = [declared(name, unit) for name, unit in zip(meters, units)]

def work(thread):
    rng = random.Random(seed * 1000 + thread)
    while True:
        account, meter = rng.randrange(accounts), rng.randrange(len(meters))
        count = 1 if meters[meter] == "wide" else rng.randint(1, 999)
        at = 2 * ((thread * accounts + account) * len(meters) + meter)
        with tallymark.identify(account=f"account-{{account}}"):
            tally[at] += count
            handlers[meter](count)
            tally[at + 1] += count
        if rng.random() < 0.02:
            time.sleep(rng.random() * 0.02)

for thread in range(threads):
    threading.Thread(target=work, args=(thread,), daemon=True).start()
print("recording", flush=True)
time.sleep(60)
"""

MERGING = RECORDING.replace(
    "tallymark.configure(interval=0.05",
    """from tallymark import outbox, runtime
runtime.current().outbox.max_bytes = 4_000
tallymark.configure(interval=0.002""",
)
"""The same with an outbox that is full after a few cuts, so that it merges all the time."""

LAST = """
import time, tallymark
from tallymark import runtime
tallymark.configure(interval=0.05)
tallymark.record("last")
deadline = time.monotonic() + 90
own = runtime.current()
while (
    not tallymark.flush(1)
    or own.outbox.batches(own=False)
    or own.recovery.is_needed(own.letters.place, own.journal.where())
):
    assert time.monotonic() < deadline, "not everything was recovered"
    time.sleep(0.05)
assert tallymark.shutdown(60)
"""


class Processes:
    """Recording processes and what they say they recorded."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.tallies: list[Path] = []
        self.environ = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "TALLYMARK_ENDPOINT": endpoint,
            "TALLYMARK_STATE_DIR": str(folder / "state"),
            "TALLYMARK_TIMEOUT": "1",
            "OTEL_SERVICE_NAME": "killed",
        }

    def start(self, seed: int, source: str = RECORDING) -> subprocess.Popen[bytes]:
        tally = self.folder / f"tally-{len(self.tallies)}"
        tally.write_bytes(bytes(max(SLOTS * 16, mmap.PAGESIZE)))
        self.tallies.append(tally)
        return subprocess.Popen(
            [sys.executable, "-c", source, str(tally), str(seed)],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def finish(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", LAST], env=self.environ, capture_output=True, text=True, timeout=150, check=False
        )
        assert done.returncode == 0, done.stderr

    def recorded(self) -> dict[tuple[str, str], set[Decimal]]:
        """Each (account, meter) with the totals that are right: one for each choice of the calls under way."""
        found: dict[tuple[str, str], set[Decimal]] = {}
        for path in self.tallies:
            numbers = memoryview(path.read_bytes()).cast("q")
            for thread in range(THREADS):
                for account in range(ACCOUNTS):
                    for meter, name in enumerate(METERS):
                        at = 2 * ((thread * ACCOUNTS + account) * len(METERS) + meter)
                        before, after = numbers[at], numbers[at + 1]
                        totals = found.setdefault((f"account-{account}", name), {Decimal(0)})
                        found[f"account-{account}", name] = {
                            t + n * UNIT[name] for t in totals for n in (before, after)
                        }
        return found


def delivered(collector: FakeCollector) -> dict[tuple[str, str], Decimal]:
    totals: dict[tuple[str, str], Decimal] = {}
    for (_, meter, _, attributes, _, _), value in collector.points().items():
        account = {name: raw[2:].decode() for name, raw in attributes}.get("tallymark.account.id", "")
        totals[account, meter] = totals.get((account, meter), Decimal(0)) + value
    return totals


def check(processes: Processes, collector: FakeCollector, told: str) -> None:
    processes.finish()
    got = delivered(collector)
    assert got.pop(("", "last")) == 1
    want = processes.recorded()
    assert sum(1 for totals in want.values() if totals != {0}) > 0, told
    wrong = {key: (got.get(key, 0), totals) for key, totals in want.items() if got.get(key, Decimal(0)) not in totals}
    assert not wrong, f"{told}: {wrong}"
    assert set(got) <= set(want), told
    left = [p for p in (processes.folder / "state").rglob("*") if p.is_file()]
    assert left == [], told


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Any:
    import decimal

    with decimal.localcontext() as context:
        context.prec = 100
        context.traps[decimal.Inexact] = True
        yield


def test_what_killed_processes_recorded_is_delivered_once(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    told = f"seed {SEED}, {KILLS} kills"
    print(told)

    def answer(number: int) -> Any:
        # Away now and then; takes a request and loses the acknowledgement; takes a request.
        roll = rng.random()
        if roll < 0.2:
            return grpc.StatusCode.UNAVAILABLE
        return (grpc.StatusCode.UNAVAILABLE, "stored") if roll < 0.4 else None

    collector = FakeCollector(answer)
    processes = Processes(tmp_path, collector.endpoint)
    try:
        kills = 0
        while kills < KILLS:
            together = [processes.start(rng.randrange(10**6)) for _ in range(rng.choice((1, 2, 3)))]
            if rng.random() < 0.85:
                for process in together:
                    assert process.stdout is not None
                    process.stdout.readline()
            time.sleep(rng.uniform(0, 0.35))
            for process in together:
                process.send_signal(signal.SIGKILL)
                kills += 1
                time.sleep(rng.uniform(0, 0.01))
            for process in together:
                process.wait(60)
                assert process.stdout is not None
                process.stdout.close()
        collector.answer = lambda number: None
        check(processes, collector, told)
    finally:
        collector.stop()


def test_what_was_recorded_while_the_collector_was_away_is_delivered_once(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    collector = FakeCollector()
    processes = Processes(tmp_path, collector.endpoint)
    port = collector.port
    try:
        for away in (False, True, True, False):
            if away:
                collector.stop()
            process = processes.start(rng.randrange(10**6))
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.1, 0.4))
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            process.stdout.close()
            if away:
                stored = collector.stored
                collector = FakeCollector(port=port)
                collector.stored = stored
        check(processes, collector, f"seed {SEED}")
    finally:
        collector.stop()


def test_what_was_merged_while_processes_were_killed_is_delivered_once(tmp_path: Path) -> None:
    rng = random.Random(SEED)

    def answer(number: int) -> Any:
        # Takes some and tells nobody: what has been attempted must not be merged.
        return (grpc.StatusCode.UNAVAILABLE, "stored") if rng.random() < 0.3 else grpc.StatusCode.UNAVAILABLE

    collector = FakeCollector(answer)
    processes = Processes(tmp_path, collector.endpoint)
    merged = rounds = 0
    try:
        # A machine that is slow merges nothing in a few rounds: there are more until it has.
        while rounds < max(KILLS // 2, 4) or (merged == 0 and rounds < 60):
            rounds += 1
            process = processes.start(rng.randrange(10**6), MERGING)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.05, 0.5))
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            process.stdout.close()
            merged += sum(bool(parcels.replaced_by(path)) for path in (tmp_path / "state").rglob("*.otlp"))
        collector.answer = lambda number: None
        check(processes, collector, f"seed {SEED}")
        assert merged > 0, "nothing was merged"
    finally:
        collector.stop()
