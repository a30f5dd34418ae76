"""Plays runs against two collectors on one database, and reckons what became of them.

What gateways had acknowledged must be stored, to the unit, for each account and meter: once. Nothing may be set aside,
and no client may be told anything that would make it give up.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Final

import psutil
import psycopg

from tests.delivery.contract.database import DATABASE, BreakableServer
from tests.delivery.contract.faults import FAULTS
from tests.delivery.contract.link import Link
from tests.delivery.contract.load import Gateway
from tests.delivery.contract.sending import Sender
from tests.delivery.contract.targets import CALL_S, Grpc, Http, Target
from tests.delivery.faults.wire import Wire
from tests.support.collector import Collector

KINDS: Final = tuple(FAULTS)
GATEWAYS: Final = 2
COLLECTORS: Final = 2
LEAST_REQUESTS: Final = 8
PATIENCE_S: Final = 120.0
DATABASE_TIMEOUT_S: Final = 2.0
"""Longer than any write takes here, shorter than what `disk slow` lasts at times."""


@dataclass
class Result:
    """What became of a run. `lost` and `doubled` count accounts' meters whose total is too small or too large."""

    seed: int
    kinds: tuple[str, ...]
    lost: int = 0
    doubled: int = 0
    points: int = 0
    problems: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    resident: int = 0
    """Bytes of the larger collector's memory at the end."""

    def __str__(self) -> str:
        return f"seed {self.seed} ({', '.join(self.kinds)}): {self.problems}"


class World:
    """One database and the collectors on it, used by one run after another."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.database = BreakableServer(folder / "database")
        stack.callback(self.database.close)
        self.links: list[Link] = []
        self.collectors: list[Collector] = []
        self.wires: list[Wire] = []
        for number in range(COLLECTORS):
            link = Link(folder / f"link{number}", self.database.socket)
            stack.callback(link.close)
            collector = Collector(
                f"host={link.folder} user=postgres dbname={DATABASE}", "--database-timeout", str(DATABASE_TIMEOUT_S)
            )
            collector.start()
            stack.callback(collector.kill)
            wire = Wire(collector.port, number, slow_s=CALL_S + 0.5)
            stack.callback(wire.close)
            self.links.append(link)
            self.collectors.append(collector)
            self.wires.append(wire)
        self.kinds = [kind for kind in KINDS if kind != "disk full" or self.database.can_be_full]
        """What can be done here: to fill a disk, one has to be mounted first."""

    def targets(self) -> list[Target]:
        """Every way in: over gRPC through the wires, and over HTTP."""
        found: list[Target] = [Grpc(wire.port) for wire in self.wires for _ in range(2)]
        for collector in self.collectors:
            found += [Http(collector.http_port, as_json=as_json) for as_json in (False, True)]
        return found

    def mend(self) -> None:
        """Nothing is broken any more."""
        for wire in self.wires:
            wire.chances = {}
            wire.go_away(False)
        self.database.repair()


@contextmanager
def worlds(folder: Path) -> Iterator[World]:
    """A world in a folder that is there."""
    with ExitStack() as stack:
        yield World(folder, stack)


def planned(seed: int, possible: list[str]) -> tuple[str, ...]:
    """What happens in the run of this seed, in order."""
    rng = random.Random(seed)
    others = [kind for kind in possible if rng.random() < 0.12]
    kinds = [possible[seed % len(possible)], *others]
    rng.shuffle(kinds)
    return tuple(kinds)


def play(world: World, seed: int) -> Result:
    """One run, from its first request to its reckoning."""
    rng = random.Random(seed)
    result = Result(seed, planned(seed, world.kinds))
    senders = [
        Sender(Gateway(rng.randrange(10**9), f"run{seed}-{i}"), world.targets(), LEAST_REQUESTS)
        for i in range(GATEWAYS)
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
        _reckon(world.database.dsn, sender.gateway, result)
    result.resident = max(_resident(collector) for collector in world.collectors)
    return result


def _reckon(dsn: str, gateway: Gateway, result: Result) -> None:
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        ours = (f"{gateway.name}-%",)
        views = {
            name: {
                (account, meter): quantity
                for account, meter, quantity in connection.execute(
                    f"SELECT account, meter, sum(quantity) FROM {source} WHERE account LIKE %s GROUP BY account, meter",
                    ours,
                )
            }
            for name, source in (
                ("points", "usage_point JOIN usage_series USING (account, series)"),
                ("hours", "usage_hourly"),
            )
        }
        [points] = connection.execute("SELECT count(*) FROM usage_point WHERE account LIKE %s", ours).fetchone() or [0]
        calls = dict(
            connection.execute("SELECT account, count(*) FROM usage_calls WHERE account LIKE %s GROUP BY 1", ours)
        )
        aside = connection.execute(
            "SELECT reason, detail FROM usage_quarantine WHERE account LIKE %s OR account = '' LIMIT 3", ours
        ).fetchall()
    result.points += points
    recorded = gateway.recorded()
    for name, stored in views.items():
        for key in sorted({*recorded, *stored}):
            right, got = recorded.get(key, Decimal(0)), stored.get(key, Decimal(0))
            if right != got:
                result.problems.append(f"{name} of {key}: {got} stored, {right} sent")
                result.lost += got < right
                result.doubled += got > right
    if calls != dict(gateway.spans):
        result.problems.append(f"calls: {calls} stored, {dict(gateway.spans)} sent")
        result.lost += sum(calls.values()) < gateway.calls
        result.doubled += sum(calls.values()) > gateway.calls
    result.problems += [f"set aside: {reason}, {detail}" for reason, detail in aside]


def _resident(collector: Collector) -> int:
    assert collector.process is not None
    return int(psutil.Process(collector.process.pid).memory_info().rss)
