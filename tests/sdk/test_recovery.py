"""The heirs of a process that died: whose usage it is, when it was, who gets it, each step of a recovery."""

from __future__ import annotations

import fcntl
import os
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tallymark import parcels, segment
from tallymark.folder import LOCK, Folder, folders_in
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tests.sdk.dying_process import NOW, SECOND, Killed, Process, Stored, at_step, heir


@pytest.fixture
def collector() -> Stored:
    return Stored()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "service"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Folder, "tidy"),
        (segment, "read"),
        (segment, "seal"),
        (parcels, "write"),
        (os, "fsync"),
        (Path, "rename"),
        (Path, "unlink"),
        (Packer, "load"),
        (Outbox, "put"),
        (Outbox, "acknowledge"),
        (Folder, "remove"),
    ],
)
def test_killed_at_each_step_of_a_recovery(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool
) -> None:
    process = Process(place)
    process.add(0.1)
    process.cut()
    process.add(0.2)
    process.die()
    first = Process(place, "first", NOW + 30 * SECOND)
    at_step(monkeypatch, owner, name, after=after)

    def live() -> None:
        first.recover()
        first.deliver(collector)

    with pytest.raises(Killed):
        live()
    monkeypatch.undo()
    first.die()
    heir(place, collector)
    assert collector.totals() == {"m": Decimal("0.3")}


def test_a_killed_process_is_dated_by_its_last_sign_of_life(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(1)
    process.now += 500 * SECOND
    process.journal.beat(process.recorder)
    process.add(1)
    process.die()
    heir(place, collector, NOW + 90_000 * SECOND)
    ((_, _, _, _, start, end),) = collector.points()
    assert start == NOW
    assert NOW + 500 * SECOND < end <= NOW + 510 * SECOND


def test_an_heir_of_the_same_name_does_not_overlap(place: Path, collector: Stored) -> None:
    process = Process(place, "pod-7")
    process.add(1)
    process.now += 5 * SECOND
    process.journal.beat(process.recorder)
    process.die()
    again = Process(place, "pod-7", NOW + 7 * SECOND)
    again.add(2)
    again.recover()
    again.cut()
    again.deliver(collector)
    (_, _, _, _, _, first_end), (_, _, _, _, second_start, _) = sorted(collector.points(), key=lambda k: k[4])
    assert first_end <= second_start


def test_living_processes_are_left_alone_and_of_many_heirs_one_gets_it(place: Path, collector: Stored) -> None:
    alive, dead = Process(place, "alive"), Process(place, "dead")
    alive.add(1)
    for n in range(200):
        dead.add(1, f"account-{n}")
    dead.die()
    heirs = [Process(place, f"heir-{n}") for n in range(8)]
    barrier = threading.Barrier(8)

    def run(process: Process) -> None:
        barrier.wait()
        process.recover()

    threads = [threading.Thread(target=run, args=(process,)) for process in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(process.outbox) for process in heirs) == 1
    for process in heirs:
        process.deliver(collector)
    assert collector.totals() == {"m": 200}
    assert len(folders_in(place)) == 1
    alive.cut()
    alive.deliver(collector)
    assert collector.totals() == {"m": 201}
    assert alive.journal.note_end(alive.recorder)
    alive.deliver(collector)
    alive.journal.close(alive.recorder)
    assert folders_in(place) == []


def test_a_folder_found_stays_locked_until_it_is_delivered(place: Path, collector: Stored) -> None:
    dead = Process(place)
    dead.add(1)
    dead.die()
    first, second = Process(place, "first"), Process(place, "second")
    first.recover()
    second.recover()
    assert (len(first.outbox), len(second.outbox)) == (1, 0)
    first.die()
    second.recover()
    second.deliver(collector)
    assert collector.totals() == {"m": 1}


def test_an_unfinished_folder_is_cleared_away(place: Path) -> None:
    (place / ("." + "0" * 32)).mkdir(parents=True)
    (place / ("." + "0" * 32) / LOCK).touch()
    process = Process(place)
    process.recover()
    assert folders_in(place) == []


def test_full_outbox_stops_recovery_until_there_is_room(place: Path, collector: Stored) -> None:
    for n in range(3):
        dead = Process(place, f"dead-{n}")
        dead.add(1)
        dead.die()
    process = Process(place, "heir", max_bytes=1)
    process.recover()
    assert len(process.outbox) == 1
    for _ in range(3):
        process.deliver(collector)
        process.recover()
    process.deliver(collector)
    assert collector.totals() == {"m": 3}
    assert folders_in(place) == []


def test_who_lets_go_in_the_midst_of_a_recovery_keeps_that_folder_until_it_is_done_with(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        process = Process(place, name)
        process.add(1)
        process.die()
    leaving = Process(place, "leaving", NOW + 30 * SECOND)
    arrived, may_go_on = threading.Event(), threading.Event()
    real = segment.seal

    def slow(*args: Any) -> None:
        arrived.set()
        assert may_go_on.wait(60)
        real(*args)

    monkeypatch.setattr(segment, "seal", slow)
    thread = threading.Thread(target=leaving.recover)
    thread.start()
    assert arrived.wait(60)
    leaving.recovery.release()
    first, _ = folders_in(place)
    assert Folder.adopt(first) is None, "its end is being written: another one would write another end"
    may_go_on.set()
    thread.join()
    monkeypatch.undo()
    assert len(leaving.outbox) == 0
    assert not leaving.recovery._adopted, "the second one was not begun with"
    heir(place, collector)
    assert collector.totals() == {"m": 2}


def test_a_folder_is_made_however_many_look_for_unfinished_ones(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes a folder before its maker has locked it makes the maker try again, not go on in memory."""
    lock, taken = fcntl.flock, []

    def taken_first(file: int, how: int) -> None:
        if len(taken) < 20:
            taken.append(file)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", taken_first)
    made = Folder.create(place)
    assert len(taken) == 20
    assert folders_in(place)[-1] == made.path
    assert Folder.adopt(made.path) is None, "it is locked"
