"""What can go wrong between a client and the disk behind a collector. Each leaves things as they were."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import psutil

from tests.delivery.contract import imports
from tests.delivery.contract.database import BreakableServer
from tests.delivery.contract.link import Link
from tests.delivery.contract.tally import Tally
from tests.delivery.faults.wire import Wire
from tests.support.collector import Collector


class World(Protocol):
    """What faults happen to."""

    database: BreakableServer
    collectors: list[Collector]
    links: list[Link]
    wires: list[Wire]
    folder: Path
    run: str
    """A name for what is of the run that is played."""
    imported: Tally
    """What was imported in it."""

    def dsn(self, number: int) -> str:
        """The database as that collector reaches it."""
        ...


def collector_killed(world: World, rng: random.Random) -> None:
    """SIGKILL of one of the collectors, at any point; it is started again. Of several processes, the first alone at
    times: the others see it go and end."""
    one = rng.choice(world.collectors)
    if rng.random() < 0.5:
        one.kill_all()
    else:
        one.kill()
    one.start()


def worker_killed(world: World, rng: random.Random) -> None:
    """SIGKILL of one of a collector's processes; the first starts another."""
    workers = [worker for collector in world.collectors for worker in collector.workers()]
    if workers:
        with suppress(psutil.NoSuchProcess):
            rng.choice(workers).kill()


def collector_lost(world: World, rng: random.Random) -> None:
    """A collector's machine loses its power: the database does not hear of it. It is started again."""
    number = rng.randrange(len(world.collectors))
    world.links[number].fall_silent()
    time.sleep(rng.uniform(0, 0.01))
    world.collectors[number].kill_all()
    world.collectors[number].start()


def import_killed(world: World, rng: random.Random) -> None:
    """SIGKILL of an import in its midst; the same command again finishes it, also where the file was changed."""
    source = f"{world.run}-{rng.randrange(10**9)}"
    file = world.folder / f"{source}.json"
    try:
        imports.write(file, world.run, world.imported, rng)
        command = imports.command(file, source, world.dsn(rng.randrange(len(world.links))))
        imports.kill(command, source, world.database.dsn, rng)
        if rng.random() < 0.5:
            imports.begin_otherwise(file, world.run, world.imported, rng)
        imports.finish(command)
    finally:
        file.unlink(missing_ok=True)


def collector_stopped(world: World, rng: random.Random) -> None:
    """SIGTERM: what was accepted is finished, and it ends with 0."""
    one = rng.choice(world.collectors)
    assert one.process is not None
    one.process.send_signal(signal.SIGTERM)
    status = one.process.wait(60)
    one.kill()
    if status:
        raise AssertionError(f"a collector that was told to stop ended with {status}")
    one.start()


def database_killed(world: World, rng: random.Random) -> None:
    world.database.kill()


def database_restarted(world: World, rng: random.Random) -> None:
    world.database.restart(rng.choice(["fast", "immediate"]))


def sessions_ended(world: World, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        world.database.end_sessions()
        time.sleep(rng.uniform(0, 0.05))


def database_read_only(world: World, rng: random.Random) -> None:
    with world.database.read_only():
        time.sleep(rng.uniform(0.05, 0.5))


def no_connections_left(world: World, rng: random.Random) -> None:
    with world.database.no_connections_left():
        time.sleep(rng.uniform(0.05, 0.5))


def disk_full(world: World, rng: random.Random) -> None:
    with world.database.full_disk():
        time.sleep(rng.uniform(0.1, 1.0))


def disk_slow(world: World, rng: random.Random) -> None:
    """Longer than a client waits, at times."""
    with world.database.stalled():
        time.sleep(rng.choice([0.1, 0.3, 1.0, 3.5]))


def connections_dropped(world: World, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        rng.choice(world.links).cut()
        time.sleep(rng.uniform(0, 0.05))


def connections_half_open(world: World, rng: random.Random) -> None:
    rng.choice(world.links).fall_silent()


def clients_cut_off(world: World, rng: random.Random) -> None:
    wire = rng.choice(world.wires)
    wire.go_away(True)
    time.sleep(rng.uniform(0.02, 0.3))
    wire.go_away(False)


def _answers(fate: str) -> Callable[[World, random.Random], None]:
    def answers(world: World, rng: random.Random) -> None:
        for wire in world.wires:
            wire.chances = {fate: rng.uniform(0.2, 0.8)}
        time.sleep(rng.uniform(0.1, 0.6))
        for wire in world.wires:
            wire.chances = {}

    return answers


FAULTS: Final[dict[str, Callable[[World, random.Random], None]]] = {
    "collector SIGKILL": collector_killed,
    "collector SIGTERM": collector_stopped,
    "collector lost": collector_lost,
    "worker SIGKILL": worker_killed,
    "import SIGKILL": import_killed,
    "database SIGKILL": database_killed,
    "database restarted": database_restarted,
    "sessions ended": sessions_ended,
    "database read-only": database_read_only,
    "no connections left": no_connections_left,
    "disk full": disk_full,
    "disk slow": disk_slow,
    "database cut off": connections_dropped,
    "database half open": connections_half_open,
    "clients cut off": clients_cut_off,
    "acknowledgement lost": _answers("lost"),
    "answers half-written": _answers("half"),
    "answers late": _answers("slow"),
}
"""Every kind, by name. A run has one of them for certain, in turn, and others by chance, one after another."""

SLOW: Final = {"import SIGKILL"}
"""Kinds that come in their turn alone: two more processes have to start."""
