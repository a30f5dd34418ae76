"""Plays runs against two collectors on one database, and reckons what became of them.

What gateways had acknowledged must be stored, to the unit, for each tenant, account and meter: once. Nothing may be set
aside, and no client may be told anything that would make it give up. Each gateway has a tenant of its own; the second
collector is of two processes.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from tallymark_collector.settings import DEFAULT_TENANT
from tests.delivery.contract import foreign
from tests.delivery.contract.access import admitted
from tests.delivery.contract.database import DATABASE, BreakableServer
from tests.delivery.contract.faults import FAULTS, SLOW
from tests.delivery.contract.link import Link
from tests.delivery.contract.load import Gateway
from tests.delivery.contract.reckoning import Reckoning
from tests.delivery.contract.sending import Sender
from tests.delivery.contract.tally import Tally
from tests.delivery.contract.targets import CALL_S, Grpc, Http, Target
from tests.delivery.faults.wire import Wire
from tests.support.collector import Collector
from tests.support.failures import tail

KINDS: Final = tuple(FAULTS)
GATEWAYS: Final = ("north", "south")
PROCESSES: Final = (1, 2)
"""Of each collector."""
LEAST_REQUESTS: Final = 8
PATIENCE_S: Final = 120.0
DATABASE_TIMEOUT_S: Final = 2.0
"""Longer than any write takes here, shorter than what `disk slow` lasts at times."""
RUNS_OF_A_WORLD: Final = 100
"""Then its disk has to be emptied."""


@dataclass
class Result(Reckoning):
    """What became of a run."""

    seed: int = 0
    kinds: tuple[str, ...] = ()
    answers: Counter[str] = field(default_factory=Counter)
    resident: int = 0
    """Bytes of the largest process's memory at the end."""
    logs: dict[str, list[str]] = field(default_factory=dict)
    """The ends of the collectors' logs, where there are problems."""


class World:
    """One database and the collectors on it, used by one run after another."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.run = ""
        self.imported = Tally()
        self.database = BreakableServer(folder / "database")
        stack.callback(self.database.close)
        _migrate(self.database.dsn)
        # Before the collectors start, which take everything as long as nobody has a token.
        admitted(self.database.dsn, ["first"])
        meters = folder / "meters.yaml"
        meters.write_text(foreign.FILE)
        self.links: list[Link] = []
        self.collectors: list[Collector] = []
        self.wires: list[Wire] = []
        for number, processes in enumerate(PROCESSES):
            link = Link(folder / f"link{number}", self.database.socket)
            stack.callback(link.close)
            self.links.append(link)
            collector = Collector(
                self.dsn(number),
                *("--database-timeout", str(DATABASE_TIMEOUT_S)),
                *("--meters", str(meters), "--processes", str(processes)),
                log=folder / f"collector{number}.log",
            )
            collector.start()
            stack.callback(collector.kill_all)
            wire = Wire(collector.port, number, slow_s=CALL_S + 0.5)
            stack.callback(wire.close)
            self.collectors.append(collector)
            self.wires.append(wire)
        self.kinds = [kind for kind in KINDS if kind != "disk full" or self.database.can_be_full]
        """What can be done here: to fill a disk, one has to be mounted first."""

    def dsn(self, number: int) -> str:
        """The database as that collector reaches it."""
        return f"host={self.links[number].folder} user=postgres dbname={DATABASE}"

    def targets(self) -> list[Target]:
        """Every way in: over gRPC through the wires, and over HTTP."""
        found: list[Target] = [Grpc(wire.port) for wire in self.wires for _ in range(2)]
        for collector in self.collectors:
            found += [Http(collector.http_port, as_json=as_json) for as_json in (False, True)]
        return found

    def begin(self, run: str) -> None:
        """A run, with logs of its own and nothing left behind by those before."""
        self.run, self.imported = run, Tally()
        for link in self.links:
            link.bury()
        for collector in self.collectors:
            assert collector.log is not None
            collector.log.write_bytes(b"")

    def mend(self) -> None:
        """Nothing is broken any more."""
        for wire in self.wires:
            wire.chances = {}
            wire.go_away(False)
        self.database.repair()

    def logs(self) -> dict[str, list[str]]:
        """The ends of the collectors' logs."""
        return {one.log.name: tail(one.log) for one in self.collectors if one.log is not None}


@contextmanager
def worlds(folder: Path) -> Iterator[World]:
    """A world in a folder that is there."""
    with ExitStack() as stack:
        yield World(folder, stack)


def planned(seed: int, possible: list[str]) -> tuple[str, ...]:
    """What happens in the run of this seed, in order."""
    rng = random.Random(seed)
    others = [kind for kind in possible if rng.random() < 0.08 and kind not in SLOW]
    kinds = [possible[seed % len(possible)], *others]
    rng.shuffle(kinds)
    return tuple(kinds)


def play(world: World, seed: int) -> Result:
    """One run, from its first request to its reckoning."""
    rng = random.Random(seed)
    result = Result(seed=seed, kinds=planned(seed, world.kinds))
    run = f"run{seed}"
    world.begin(run)
    dsn = world.database.dsn
    senders = [
        Sender(Gateway(rng.randrange(10**9), run), access, world.targets(), LEAST_REQUESTS)
        for access in admitted(dsn, [f"{run}-{name}" for name in GATEWAYS])
    ]
    for sender in senders:
        sender.start()
    try:
        for kind in result.kinds:
            time.sleep(rng.uniform(0.02, 0.2))
            FAULTS[kind](world, rng)
    except Exception as error:
        result.problems.append(f"{kind}: {type(error).__name__}: {error}")
    world.mend()
    for sender in senders:
        sender.finish.set()
    deadline = time.monotonic() + PATIENCE_S
    for sender in senders:
        sender.join(max(0.0, deadline - time.monotonic()))
        if sender.is_alive():
            result.problems.append(f"not all was acknowledged within {PATIENCE_S:.0f} s: {dict(sender.answers)}")
            sender.give_up.set()
            sender.join(4 * CALL_S)
        result.problems += sorted(set(sender.problems))
        result.answers += sender.answers
        result.compare(dsn, sender.access.tenant, run, sender.gateway.tally)
    audited = rng.choice(senders)
    result.audit(dsn, audited.access.tenant, audited.gateway.tally)
    result.compare(dsn, DEFAULT_TENANT, run, world.imported)
    result.nothing_else(dsn, run, [DEFAULT_TENANT, *(sender.access.tenant for sender in senders)])
    result.resident = max(_resident(collector) for collector in world.collectors)
    if result.problems:
        result.logs = world.logs()
    return result


def _migrate(dsn: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "tallymark_collector", "migrate", "--database", dsn],
        stdout=subprocess.DEVNULL,
        check=True,
    )


def _resident(collector: Collector) -> int:
    assert collector.process is not None
    largest = 0
    for process in (psutil.Process(collector.process.pid), *collector.workers()):
        with suppress(psutil.NoSuchProcess):
            largest = max(largest, int(process.memory_info().rss))
    return largest
