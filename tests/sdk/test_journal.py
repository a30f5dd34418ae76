"""The journal and its heirs: each point at which a process may die, and each file that may be found."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource

from tallymark import journal as journal_module
from tallymark import packing, parcels, segment
from tallymark.batches import producer_record
from tallymark.folder import LOCK, Folder, folders_in
from tallymark.journal import Journal
from tallymark.meters import Meter
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tallymark.quantities import exact
from tallymark.recorder import Recorder
from tallymark.recovery import Recovery
from tallymark.reporting import Reporter
from tallymark.segment import Segment
from tallymark.streams import Series
from tests.sdk.fake_collector import FakeCollector

SERIES = Series(Meter("m", "1"), ())
SECOND = 10**9
NOW = 1_000_000 * SECOND


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is run."""


class Process:
    """The parts of one process on the disk; `die` lets go of the lock as the kernel does."""

    def __init__(self, place: Path, name: str = "i", now: int = NOW, max_bytes: int = 2**20) -> None:
        self.place = place
        self.now = now
        reporter = Reporter(every_s=0)
        self.outbox = Outbox(max_bytes)
        self.packer = Packer(self.outbox, reporter)
        self.journal = Journal(self.outbox, self.packer, reporter, lambda: self.now)
        self.recovery = Recovery(self.outbox, self.packer, reporter, lambda: self.now)
        self.recorder = Recorder(now, self.journal.new_segment)
        self.producer = producer_record(Resource({"service.instance.id": name}), "tallymark", "1")
        self.journal.open(place, self.producer, 10 * SECOND, self.recorder)

    def add(self, quantity: Any, account: str = "acme") -> None:
        self.recorder.add((SERIES, account, None), exact(quantity))

    def cut(self) -> None:
        self.now += SECOND
        self.journal.cut(self.recorder)

    def recover(self) -> None:
        self.recovery.run(self.place, self.journal.where())

    def deliver(self, collector: Stored) -> None:
        while (batch := self.outbox.head()) is not None:
            collector.stored.append(batch.read())
            self.outbox.acknowledge(batch)

    def die(self) -> None:
        if self.journal._folder is not None:
            self.journal._folder.release()
        self.recovery.close_inherited()


class Stored(FakeCollector):
    """The fake collector's reckoning alone, without a server."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []


@pytest.fixture
def collector() -> Stored:
    return Stored()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "service"


def heir(place: Path, collector: Stored, now: int = NOW + 60 * SECOND) -> Process:
    """A process that finds what is there and delivers it."""
    process = Process(place, "heir", now)
    process.recover()
    process.deliver(collector)
    assert folders_in(place) == [], "nothing is left where everything is delivered"
    return process


def at_step(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool) -> None:
    """Kills the process before or after it calls `owner.name`, once."""
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        if after:
            with contextlib.suppress(OSError):
                real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, name, dying)


STEPS: list[tuple[Any, str]] = [
    (Segment, "__init__"),  # the next segment is made
    (Segment, "end"),
    (Recorder, "cut"),
    (journal_module, "requests_of"),
    (Packer, "pack"),
    (os, "fsync"),
    (Path, "rename"),
    (parcels, "write"),
    (Path, "unlink"),
    (Packer, "load"),
    (Outbox, "put"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("owner", "name"), STEPS)
def test_killed_at_each_step_of_a_cut(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool
) -> None:
    process = Process(place)
    for _ in range(10):
        process.add(0.1)
    process.cut()
    process.add(2**63 - 1)
    process.add(5)
    at_step(monkeypatch, owner, name, after=after)
    with pytest.raises(Killed):
        process.cut()
    process.die()
    heir(place, collector)
    assert collector.totals() == {"m": 1 + 2**63 + 4}
    assert {key[0] for key in collector.points()} == {"i"}


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


@pytest.fixture
def orphan(place: Path) -> tuple[Process, Path]:
    process = Process(place)
    for n in range(50):
        process.add(1, f"account-{n}")
    folder = process.journal.where()
    assert folder is not None
    process.die()
    return process, folder


def damage(path: Path, change: Callable[[bytearray], None]) -> bytes:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return bytes(data)


def set_aside(place: Path) -> list[bytes]:
    return [path.read_bytes() for path in (place / "damaged").glob("*.damaged")]


def test_a_foreign_segment_is_set_aside(
    place: Path, collector: Stored, orphan: tuple[Process, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = orphan
    (folder / "00000007.segment").write_bytes(b"something else" * 100)
    (folder / "notes.txt").write_bytes(b"mine")
    with caplog.at_level(logging.ERROR):
        heir(place, collector)
    assert collector.totals() == {"m": 50}
    assert sorted(set_aside(place)) == [b"mine", b"something else" * 100]
    assert "does not begin as a segment does" in caplog.text


def test_what_stands_before_the_damage_is_billed(place: Path, collector: Stored, orphan: tuple[Process, Path]) -> None:
    _, folder = orphan

    def change(data: bytearray) -> None:
        data[data.index(b"account-25")] ^= 0xFF

    damaged = damage(folder / "00000001.segment", change)
    heir(place, collector)
    assert collector.totals() == {"m": 25}
    assert collector.control() == {}, "totals of what can be read would hide what cannot"
    assert collector.closed() == {}
    (kept,) = set_aside(place)
    assert kept[100:] == damaged[100:]


@pytest.mark.parametrize("size", [0, 10, 63, 64, 100, 1000, 60_000])
def test_a_torn_segment_loses_no_other(place: Path, collector: Stored, orphan: tuple[Process, Path], size: int) -> None:
    _, folder = orphan
    os.truncate(folder / "00000001.segment", size)
    heir(place, collector)
    assert int(collector.totals().get("m", 0)) == (50 if size == 60_000 else pytest.approx(size // 60, abs=4))


def test_a_later_versions_files_are_left_to_it(
    place: Path, collector: Stored, orphan: tuple[Process, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = orphan
    newer = damage(folder / "00000001.segment", lambda data: data.__setitem__(8, segment.VERSION + 1))
    process = Process(place, "old")
    process.recover()
    process.recover()
    assert len(process.outbox) == 0
    assert (folder / "00000001.segment").read_bytes() == newer
    assert caplog.text.count("is left alone") == 1
    assert Folder.adopt(folder) is not None, "another process can have it"


@pytest.mark.parametrize("at", [3, 20, 150])
def test_a_damaged_parcel_is_set_aside_and_what_can_be_read_is_sent(place: Path, collector: Stored, at: int) -> None:
    process = Process(place)
    process.add(1)
    process.cut()
    process.add(2)
    process.cut()
    folder = process.journal.where()
    assert folder is not None
    process.die()
    damaged = damage(folder / "00000001.otlp", lambda data: data.__setitem__(at, data[at] ^ 0xFF))
    heir(place, collector)
    assert collector.totals() == {"m": 2}
    assert set_aside(place) == [damaged]


def test_a_disk_that_takes_no_parcel_leaves_the_segment_until_it_is_acknowledged(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, requests: Any) -> None:
        raise OSError(28, "No space left on device")

    process = Process(place)
    process.add(0.5)
    monkeypatch.setattr(packing.parcels, "write", full)
    process.cut()
    assert process.packer.in_memory == 1
    assert "kept in memory" in caplog.text
    folder = process.journal.where()
    assert folder is not None
    batch = process.outbox.head()
    assert batch is not None
    collector.stored.append(batch.read())  # sent, but the acknowledgement is lost with the process
    assert (folder / "00000001.segment").exists()
    process.die()
    monkeypatch.undo()
    heir(place, collector)
    assert len(collector.stored) == 3, "the last one says that the producer has ended"
    assert len(collector.points()) == 1, "converted again, the segment gives the same point"
    assert collector.totals() == {"m": Decimal("0.5")}


def test_a_folder_that_cannot_be_written_to_means_memory_and_a_loud_error(
    tmp_path: Path, collector: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    process = Process(tmp_path / "file" / "service")
    process.add(3)
    process.cut()
    process.add(4)
    process.recover()
    process.cut()
    process.deliver(collector)
    assert collector.totals() == {"m": 7}
    assert process.packer.in_memory >= 2
    assert "kept in memory" in caplog.text


def test_another_place_takes_everything_along(place: Path, collector: Stored, tmp_path: Path) -> None:
    process = Process(place)
    process.add(1)
    process.cut()
    process.add(2)
    other = tmp_path / "state" / "other"
    process.journal.open(other, process.producer, 10 * SECOND, process.recorder)
    process.add(4)
    assert folders_in(place) == []
    process.die()
    heir(other, collector)
    assert collector.totals() == {"m": 7}


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


def test_a_folder_that_somebody_removed_is_made_again(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(1)
    first = process.journal.where()
    assert first is not None
    shutil.rmtree(first)
    process.add(2)
    process.cut()
    assert process.journal.where() not in (None, first)
    process.add(4)
    process.deliver(collector)
    process.die()
    heir(place, collector)
    assert collector.totals() == {"m": 7}


def test_nobody_else_can_read_what_is_there(place: Path) -> None:
    process = Process(place)
    process.add(1)
    process.cut()
    folder = process.journal.where()
    assert folder is not None
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}
