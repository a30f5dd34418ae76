"""What cannot be read is set aside and never deleted; what stands before the damage is billed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tallymark import segment
from tallymark.folder import Folder
from tests.sdk.dying_process import Process, Stored, heir


@pytest.fixture
def collector() -> Stored:
    return Stored()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "service"


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
