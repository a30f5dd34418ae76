"""Plays scenarios and reckons what became of them.

Whatever was recorded, by the tally, must be what the collector has, to the unit, for each account and meter. A run ends
by itself; its processes are known by their ids and are gone when it is over.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Context, Decimal
from pathlib import Path
from typing import Any, Final

import grpc
import psycopg

from tests.delivery.faults.scenario import KINDS, LAST, SLOW_S, TINY_DISK_BYTES, Life, Scenario, scenario
from tests.delivery.faults.tally import METERS, Tally
from tests.delivery.faults.wire import Wire
from tests.sdk.fake_collector import FakeCollector
from tests.support.failures import tail

PATIENCE_S: Final = 120.0
EXACT: Final = Context(prec=200)
Totals = dict[tuple[int, str], Decimal]


@dataclass
class Result:
    """What became of a run. `lost` and `doubled` count accounts' meters whose total is too small or too large."""

    scenario: Scenario
    real: bool
    lost: int = 0
    doubled: int = 0
    problems: list[str] = field(default_factory=list)
    processes: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """Faults that came about: a run may be over before its turn comes."""
    kept: Path | None = None
    """The run's folder, which is there only if something was wrong."""
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Then also the ends of the logs."""


class Recorders:
    """The program that forks recording processes. Used by one thread at a time."""

    def __init__(self) -> None:
        self._program = subprocess.Popen(
            [sys.executable, "-m", "tests.delivery.faults.recording"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
            env={name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "TALLYMARK_"))},
        )
        self._ended: dict[int, int] = {}

    def start(self, order: dict[str, Any]) -> int:
        """Starts a process; its id."""
        return int(self._ask({"start": order})["pid"])

    def ended(self) -> dict[int, int]:
        """Process id to exit status of all that have ended; negative is a signal."""
        self._ended.update({int(pid): status for pid, status in self._ask({"ended": None}).items()})
        return self._ended

    def wait(self, pids: Callable[[], Iterable[int]], seconds: float = PATIENCE_S) -> bool:
        """True when all of them have ended; False after so many seconds."""
        deadline = time.monotonic() + seconds
        while set(pids()) - self.ended().keys():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def close(self) -> None:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.close()
        self._program.wait(60)
        self._program.stdout.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(question) + "\n")
        self._program.stdin.flush()
        answer: dict[str, Any] = json.loads(self._program.stdout.readline())
        return answer


class Run:
    """One scenario in a folder of its own, over a wire of its own."""

    def __init__(self, planned: Scenario, recorders: Recorders, folder: Path, dsn: str | None, port: int) -> None:
        self.planned = planned
        self.recorders = recorders
        self.folder = folder
        self.disk = folder / "state"
        self.dsn = dsn
        self.port = port
        self.name = f"run{planned.seed}-{'real' if dsn else 'fake'}"
        self.result = Result(planned, dsn is not None)
        self.started: list[int] = []

    def play(self) -> Result:
        """All of it."""
        with ExitStack() as stack:
            self.disk.mkdir()
            if self.planned.tiny_disk:
                stack.enter_context(tiny_disk(self.disk))
            collector = None
            if self.dsn is None:
                collector = FakeCollector(self._answers())
                stack.callback(collector.stop)
            target = collector.port if collector else self.port
            self.wire = Wire(target, self.planned.seed, SLOW_S)
            stack.callback(self.wire.close)
            self.wire.chances = self.planned.chances
            self.tally = Tally(self.folder / "tally", self.planned.regions)
            stack.callback(self._end_all)
            for life in self.planned.lives:
                self._live(life)
            self._recover()
            self._reckon(stored_by_fake(collector, self.name) if collector else stored_by_real(self.dsn, self.name))
            if collector:
                self.result.problems += unproved(collector, must_be_closed="full disk" not in self.planned.kinds)
        self.result.processes = len(self.tally.pids()) + 1
        self.result.seen = self.wire.seen + told_of(self.folder / "log")
        return self.result

    def _answers(self) -> Callable[[int], Any]:
        rng = random.Random(self.planned.seed)

        def answer(number: int) -> Any:
            return grpc.StatusCode.UNAVAILABLE if self.wire.chances and rng.random() < 0.1 else None

        return answer

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        return {
            **order,
            "name": self.name,
            "port": self.wire.port,
            "tally": str(self.folder / "tally"),
            "regions": self.planned.regions,
            "state_dir": str(self.disk),
            "log": str(self.folder / "log"),
        }

    def _live(self, life: Life) -> None:
        if life.filled is not None:
            self._end_all()  # what an earlier process kept in memory from here on would be lost with it
        self.wire.go_away(life.away)
        pids = {order["region"]: self.recorders.start(self._order(order)) for order in life.orders}
        self.started += pids.values()
        steps: list[tuple[float, Callable[[], None]]] = []
        for at, region, name in life.kills:
            steps.append((at, lambda region=region, name=name: self._kill(region, pids.get(region), name)))
        if life.filled is not None:
            filler = self.disk / "filler"
            steps.append((life.filled[0], lambda: fill(filler)))
            steps.append((life.filled[1], lambda: filler.unlink(missing_ok=True)))
        began = time.monotonic()
        for at, step in sorted(steps, key=lambda step: step[0]):
            time.sleep(max(0.0, began + at - time.monotonic()))
            step()
        # Who was told to stay, and has not been killed, lives on: a service that is there while others come.
        staying = {order["region"] for order in life.orders if order["end"] == "stay"}
        others = [pid for region, pid in pids.items() if region not in staying]
        if not self.recorders.wait(lambda: others):
            self.result.problems.append("a process did not end")
            self._ask_where_they_are()

    def _kill(self, region: int, pid: int | None, name: str) -> None:
        pid = pid or self.tally.words[self.tally.of(region)]
        if pid and pid not in self.recorders.ended():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[name])

    def _ask_where_they_are(self) -> None:
        """Has whatever still lives write the stacks of its threads to its log, which a failure shows the end of."""
        for pid in self._alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(1)

    def _alive(self) -> set[int]:
        return {*self.started, *self.tally.pids()} - self.recorders.ended().keys()

    def _end_all(self) -> None:
        """Kills whatever still lives, also children that have only just been forked."""
        deadline = time.monotonic() + PATIENCE_S
        quiet = 0
        while quiet < 2 and time.monotonic() < deadline:
            for pid in (left := self._alive()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            quiet = 0 if left else quiet + 1
            time.sleep(0.005)

    def _recover(self) -> None:
        self._end_all()
        for pid in {*self.started, *self.tally.pids()}:
            status = self.recorders.ended().get(pid)
            if status not in (0, -signal.SIGKILL, -signal.SIGTERM):
                self.result.problems.append(f"a process ended with {status}")
        self.wire.chances = {}
        self.wire.go_away(False)
        (self.disk / "filler").unlink(missing_ok=True)
        last = self.recorders.start(self._order(LAST))
        self.started.append(last)
        if not self.recorders.wait(lambda: [last]):
            self.result.problems.append("the last process did not end")
            self._ask_where_they_are()
        elif status := self.recorders.ended()[last]:
            self.result.problems.append(f"the last process ended with {status}")
        left = [str(path.relative_to(self.disk)) for path in self.disk.rglob("*") if path.is_file()]
        if left:
            self.result.problems.append(f"left on the disk: {left}")

    def _reckon(self, stored: Totals) -> None:
        for (account, meter), right in self.tally.totals().items():
            got = stored.get((account, meter), Decimal(0))
            if got in right:
                continue
            self.result.problems.append(f"{meter} of account {account}: {got} stored, recorded {sorted(right)}")
            if got > max(right):
                self.result.doubled += 1
            else:
                self.result.lost += 1


def stored_by_fake(collector: FakeCollector, name: str) -> Totals:
    """Each point once; an AssertionError where one came with two values."""
    found: Totals = {}
    for (_, meter, _, attributes, _, _), value in collector.points().items():
        account = {key: raw[2:].decode() for key, raw in attributes}["tallymark.account.id"]
        if meter in METERS:
            key = int(account.removeprefix(f"{name}-")), meter
            found[key] = EXACT.add(found.get(key, Decimal(0)), value)
    return found


def unproved(collector: FakeCollector, must_be_closed: bool) -> list[str]:
    """Where what is stored is not what producers say that they have recorded, or one is not said to have ended: where
    a disk was full its end may not be known."""
    last: dict[tuple[str, str, int], tuple[int, Decimal]] = {}
    for (producer, meter, _, since, at), total in collector.control().items():
        last[producer, meter, since] = max(last.get((producer, meter, since), (0, Decimal(0))), (at, total))
    told: dict[tuple[str, str], Decimal] = {}
    for (producer, meter, _), (_, total) in last.items():
        told[producer, meter] = EXACT.add(told.get((producer, meter), Decimal(0)), total)
    counted: dict[tuple[str, str], Decimal] = {}
    for (producer, meter, *_), value in collector.points().items():
        counted[producer, meter] = EXACT.add(counted.get((producer, meter), Decimal(0)), value)
    problems = [
        f"{key[1]} of producer {key[0]}: {counted.get(key)} stored, told of {told.get(key)}"
        for key in sorted({*told, *counted})
        if told.get(key) != counted.get(key)
    ]
    closed = collector.closed()
    for producer, since in sorted({(producer, since) for producer, _, since in last}):
        end = max(at for (one, _, began), (at, _) in last.items() if (one, began) == (producer, since))
        if must_be_closed and closed.get((producer, since), 0) < end:
            problems.append(f"producer {producer}: the run since {since} is not closed at {end}")
    return problems


def stored_by_real(dsn: str | None, name: str) -> Totals:
    """What is billed; an AssertionError where anything was kept aside."""
    assert dsn is not None
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        rows = connection.execute(
            "SELECT account, meter, sum(quantity) FROM usage_hourly WHERE account LIKE %s AND meter = ANY(%s) "
            "GROUP BY account, meter",
            (f"{name}-%", list(METERS)),
        ).fetchall()
        aside = connection.execute("SELECT count(*) FROM usage_quarantine").fetchone()
    assert aside == (0,), f"{aside} in quarantine"
    return {(int(account.removeprefix(f"{name}-")), meter): quantity for account, meter, quantity in rows}


def told_of(log: Path) -> Counter[str]:
    """What the processes' logs tell of."""
    text = log.read_text() if log.exists() else ""
    return Counter({"disk": text.count("kept in memory"), "merged": text.count("the outbox is full")})


@contextmanager
def tiny_disk(folder: Path) -> Iterator[None]:
    """A file system of its own that can be full, where the user may mount one; else the folder as it is."""
    options = ["-t", "tmpfs", "-o", f"size={TINY_DISK_BYTES},mode=0700", "tallymark-faults", str(folder)]
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    )
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def fill(path: Path) -> None:
    """Takes what room is left on a tiny disk."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        for _ in range(TINY_DISK_BYTES // 4096):
            file.write(bytes(4096))


def play(
    planned: Sequence[Scenario],
    folder: Path,
    dsn: str | None = None,
    port: int = 0,
    workers: int = 3,
    log: Path | None = None,
) -> list[Result]:
    """Runs the scenarios, some at a time; against the real collector where one is named, which writes that log."""
    local = threading.local()
    opened: list[Recorders] = []

    def one(scene: Scenario) -> Result:
        if not hasattr(local, "recorders"):
            local.recorders = Recorders()
            opened.append(local.recorders)
        own = Path(tempfile.mkdtemp(prefix=f"seed{scene.seed}-", dir=folder))
        run = Run(scene, local.recorders, own, dsn, port)
        try:
            result = run.play()
        except Exception as error:
            result = run.result
            result.problems.append(f"{type(error).__name__}: {error}")
        if result.problems:
            result.kept = own
            result.logs["its processes' log"] = tail(own / "log")
            if log is not None:
                result.logs["the collector's log"] = tail(log)
        else:
            shutil.rmtree(own)
        return result

    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, planned))
    finally:
        for recorders in opened:
            recorders.close()


def scenarios(first_seed: int, count: int) -> list[Scenario]:
    """One for each seed, each kind in turn."""
    return [scenario(seed, KINDS[seed % len(KINDS)]) for seed in range(first_seed, first_seed + count)]
