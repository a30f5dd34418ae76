"""The journal of a living process: where its files stand, what a disk without room leads to, each step of a cut."""

from __future__ import annotations

import os
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tallymark import journal as journal_module
from tallymark import packing, parcels
from tallymark.folder import folders_in
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tallymark.recorder import Recorder
from tallymark.segment import Segment
from tests.sdk.dying_process import SECOND, Killed, Process, Stored, at_step, heir


@pytest.fixture
def collector() -> Stored:
    return Stored()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "service"


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


def test_a_disk_that_takes_no_parcel_leaves_the_segment_until_it_is_acknowledged(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
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
